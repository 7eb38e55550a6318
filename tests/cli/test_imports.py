"""Which heavy modules a command imports: a list that is kept, since each costs the user time at every call."""

import os
import subprocess
import sys

import pytest

HEAVY = {
    "PIL",
    "accelerate",
    "asyncio",
    "bitsandbytes",
    "diffusers",
    "httpx2",
    "numpy",
    "onnxruntime",
    "peft",
    "requests",
    "rich",
    "sympy",
    "torch",
    "torch._dynamo",
    "torch._inductor.lowering",
    "transformers",
    "yaml",
}
"""Modules that take 20 ms or more to import; those of torch are named where torch itself may be imported."""
ALLOWED = {
    "--help": set(),
    "data list": {"rich"},
    "distill --dry-run": {"numpy", "yaml"},  # numpy draws the built-in prompts
    "eval list": {"numpy", "rich"},
    "presets list": {"yaml"},
    "presets show shapes-4step --resolved": {"yaml"},
    "rewards list": {"rich"},
    "runs list": {"yaml"},
}
"""Command -> the heavy modules it may import."""
SAMPLE = """
from rtdmd_cli.engine.compute.importing import quick_imports
with quick_imports():
    from rtdmd_cli.engine.sampling import pictures
from rtdmd_cli.engine.backbones.families import FAMILIES
FAMILIES["sd3"].module()
"""


def imported(code: str, *arguments: str, **environ: str) -> set[str]:
    """The names of HEAVY that a fresh process imports while it runs `code`."""
    report = "\nimport sys\nprint('modules:', *sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code + report, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environ, timeout=120)
    assert done.returncode == 0, done.stderr
    return HEAVY & set(done.stderr.rpartition("modules:")[2].split())


@pytest.mark.parametrize("command", ALLOWED)
def test_a_command_imports_what_it_may(command: str) -> None:
    code = "import sys\nfrom rtdmd_cli.cli.app import main\nassert main(sys.argv[1:]) == 0"
    code += "\nfrom pydantic.plugin import _loader\nassert _loader._plugins is None"  # it looked for none
    assert imported(code, *command.split()) == ALLOWED[command]


def test_sampling_imports_no_compiler() -> None:
    """diffusers itself imports peft, peft imports bitsandbytes, and that would import inductor."""
    assert "torch._inductor.lowering" not in imported(SAMPLE)
