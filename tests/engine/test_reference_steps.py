"""Both stages by their commands against committed figures that a refactor must not change.

    PYTHONPATH=. python -m tests.engine.test_reference_steps      writes the reference anew

`reference_steps.json` holds, for adapters and for full weights, the losses and gradient norms of 6 iterations of stage 1 and
of 2 epochs of stage 2, and a sha256 over every tensor of the last checkpoints: one thread, float32. Losses have to agree to
5e-4 anywhere; the sha256 on the processor that the file names, where rounding is the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rtdmd_cli.cli import app

REFERENCE = Path(__file__).with_name("reference_steps.json")
PLAIN = ("hardware.float32_matmul=highest", "hardware.mixed_precision=none", "hardware.threads=1")
COMMON = (
    "model.teacher_steps=2",
    "previews.baseline=false",
    "distill.iterations=6",
    "distill.log_every=1",
    "tune_reward.epochs=2",
)
SMALL = ("tune_reward.images_per_epoch=8", "tune_reward.eval_images=0", "tune_reward.watch.features=null")
STEADY = ("distill.eps=1.0e-3",)  # so large that rounding does not decide a direction
PUBLISHED = (
    "distill.boundaries=one",
    "distill.boundaries_batched=false",
    "distill.backprop_steps=1",
    "distill.normaliser=published",
    "distill.consistency_weight=0.01",
    "tune_reward.matching=last",
    "tune_reward.matching_images=null",
    "tune_reward.matching_backprop_steps=null",
    "tune_reward.tilt=0",
    "tune_reward.policy_weight=1",
    "tune_reward.kl_weight=0.1",
    "tune_reward.consistency_weight=0.01",
    "tune_reward.backprop_steps=1",
    "tune_reward.micro_batch=4",
)
VARIANTS = {
    "lora": ("shapes-4step-lora", ("distill.batch=4", "distill.micro_batch=2", *PUBLISHED)),
    "full": ("shapes-4step", ("distill.batch=4", "tune_reward.matching_images=4")),
}
BESIDE = ("iteration", "seconds", "iterations_per_second", "learning_rate/fake", "learning_rate/generator")
"""Of a metric line, what is not computed by the steps."""


def call(*arguments: str) -> dict[str, Any]:
    """The JSON that a command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert app.main([*arguments, "--json", "--quiet"]) == 0
    answer: dict[str, Any] = json.loads(out.getvalue())
    return answer


def weights_sha256(checkpoint: Path) -> str:
    """Over names, dtypes, shapes and bytes of every tensor of a checkpoint, in order."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                digest.update(f"{path.name}/{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def outcome(made: dict[str, Any]) -> dict[str, Any]:
    """Metric lines without what stands beside, and the weights."""
    lines = (Path(made["run"]) / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [{key: value for key, value in json.loads(line).items() if key not in BESIDE} for line in lines]
    return {"rows": rows, "weights_sha256": weights_sha256(Path(made["checkpoint"]))}


def run_both_stages(folder: Path, variant: str) -> dict[str, Any]:
    """Stage 1 and stage 2 in `folder`."""
    name, settings = VARIANTS[variant]
    sets = [word for pair in (*PLAIN, *COMMON, *SMALL, *STEADY, *settings) for word in ("--set", pair)]
    out = ("--out", str(folder))
    first = call("distill", "--preset", name, "--name", variant, *out, *sets)
    second = call("tune-reward", "--from", first["run"], "--name", f"{variant}-tuned", *out, *sets)
    return {"distill": outcome(first), "tune-reward": outcome(second)}


def processor() -> str:
    """The processor's name as Linux gives it, with its family and model; "" elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    known = {key.strip(): value.strip() for key, value in facts.items()}
    words = (known.get("model name", ""), known.get("cpu family", ""), known.get("model", ""))
    return " ".join(filter(None, (*words, torch.backends.cpu.get_cpu_capability(), torch.__version__)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of encoded prompts, which are the same for both variants."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_stages_do_what_they_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None, cache: Path, variant: str
) -> None:
    monkeypatch.setenv("RTDMD_CACHE", str(cache))
    known = json.loads(REFERENCE.read_text("utf-8"))
    found = run_both_stages(tmp_path / "runs", variant)
    for stage, expected in known["variants"][variant].items():
        rows = found[stage]["rows"]
        assert len(rows) == len(expected["rows"]) == (6 if stage == "distill" else 2)
        for row, wanted in zip(rows, expected["rows"], strict=True):
            assert row == pytest.approx(wanted, rel=5e-4, abs=1e-7), stage  # AVX2 against AVX-512: 1e-4
        if processor() == known["processor"]:
            assert found[stage]["weights_sha256"] == expected["weights_sha256"], stage


def write() -> None:
    """Write the reference of this machine."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RTDMD_CACHE"] = f"{folder}/cache"
        found = {variant: run_both_stages(Path(folder) / "runs", variant) for variant in VARIANTS}
    text = json.dumps({"processor": processor(), "variants": found}, indent=1)
    REFERENCE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
