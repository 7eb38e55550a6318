"""Imports point downwards only, nothing is pickled, and what is imported is declared."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rtdmd_cli"
RULES = {
    "rtdmd_cli.__main__": {"rtdmd_cli.cli"},
    "rtdmd_cli.cli": {"rtdmd_cli"},
    "rtdmd_cli.engine.algo": {"rtdmd_cli.engine.algo"},
    "rtdmd_cli.engine": {"rtdmd_cli.engine", "rtdmd_cli.config", "rtdmd_cli.shapes", "rtdmd_cli.errors"},
    "rtdmd_cli.config": {"rtdmd_cli.config", "rtdmd_cli.errors"},
    "rtdmd_cli.shapes": {"rtdmd_cli.shapes", "rtdmd_cli.engine.judges.geneval", "rtdmd_cli.errors"},
    "rtdmd_cli.errors": set(),
    "rtdmd_cli": set(),
}
"""Layer -> what of the package it may import; the first layer that a module belongs to counts."""
VERSION_READERS = ("rtdmd_cli.cli", "rtdmd_cli.engine")  # of `from rtdmd_cli import __version__`
PICKLES = {"_pickle", "cloudpickle", "cPickle", "dill", "joblib", "marshal", "pickle", "shelve"}
CONVERTER = "rtdmd_cli.engine.rewards.convert"  # of weights that are published as pickles only
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}  # import name -> name on the index, where they differ
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def inside(module: str, layer: str) -> bool:
    return module == layer or module.startswith(f"{layer}.")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Every imported module, also those inside functions; `from package import module` gives the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES or full == "rtdmd_cli.__version__" else node.module


def wrong_imports(module: str, source: str) -> list[str]:
    layer = next(layer for layer in RULES if inside(module, layer))
    found = []
    for target in imports(ast.parse(source)):
        own = inside(target, PACKAGE)
        if target == "rtdmd_cli.__version__":
            allowed = layer in VERSION_READERS
        elif own:
            allowed = any(inside(target, other) for other in RULES[layer])
        else:
            name = target.partition(".")[0]
            allowed = layer != "rtdmd_cli.engine.algo" or name == "torch" or name in sys.stdlib_module_names
        if not allowed:
            found.append(target)
    return found


def pickling(source: str) -> list[str]:
    """Pickle modules, torch.load and torch.save, and the switches of other loaders that allow pickles."""
    tree = ast.parse(source)
    found = [name for name in imports(tree) if name.partition(".")[0] in PICKLES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization"):
            found += [alias.name for alias in node.names if alias.name in ("load", "save", "serialization")]
        elif isinstance(node, ast.keyword) and node.arg in (
            "allow_pickle",
            "weights_only",
            "use_safetensors",
        ):
            safe = ast.Constant(node.arg != "allow_pickle")
            found += [ast.unparse(node)] if ast.unparse(node.value) != ast.unparse(safe) else []
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_downwards(path: Path) -> None:
    assert wrong_imports(module_name(path), path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_is_pickled(path: Path) -> None:
    """But for one call that reads published weights with the restricted loader."""
    allowed = ["torch.load"] if module_name(path) == CONVERTER else []
    assert pickling(path.read_text("utf-8")) == allowed


def test_the_converter_names_the_restricted_loader() -> None:
    source = (ROOT / f"{CONVERTER.replace('.', '/')}.py").read_text("utf-8")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    loads = [node for node in calls if ast.unparse(node.func) == "torch.load"]
    assert [{word.arg: ast.unparse(word.value) for word in node.keywords} for node in loads] == [
        {"map_location": "'cpu'", "weights_only": "True"}
    ]


def test_third_party_imports_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    entries = project["dependencies"] + project["optional-dependencies"]["ocr"]
    declared = {re.split(r"[^\w-]", entry)[0].replace("-", "_") for entry in entries}
    imported = {
        name.partition(".")[0] for path in FILES for name in imports(ast.parse(path.read_text("utf-8")))
    }
    third_party = imported - sys.stdlib_module_names - {PACKAGE}
    assert {DISTRIBUTIONS.get(name, name) for name in third_party} - declared == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rtdmd_cli.engine.sampling.sample", "from rtdmd_cli.cli import console"),
        ("rtdmd_cli.engine.algo.flow", "from rtdmd_cli import errors"),
        ("rtdmd_cli.engine.algo.flow", "def f():\n    import numpy as np"),
        ("rtdmd_cli.engine.algo.flow", "from rtdmd_cli import __version__"),
        ("rtdmd_cli.config.schema", "import rtdmd_cli.engine.roles.adapters"),
        ("rtdmd_cli.shapes.render", "from rtdmd_cli.engine.evaluation import features"),
        ("rtdmd_cli.shapes.render", "from rtdmd_cli.config.schema import Preset"),
        ("rtdmd_cli.errors", "from rtdmd_cli.config import schema"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert len(wrong_imports(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rtdmd_cli.cli.app", "from rtdmd_cli.engine.sampling.sample import euler"),
        ("rtdmd_cli.engine.storage.files", "from rtdmd_cli import __version__"),
        ("rtdmd_cli.engine.algo.losses", "import math\nfrom torch import Tensor"),
        ("rtdmd_cli.shapes.detector", "from rtdmd_cli.engine.evaluation import geneval"),
    ],
)
def test_a_right_import_is_let_through(module: str, source: str) -> None:
    assert wrong_imports(module, source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from shelve import open",
        "import torch\ntorch.load('x', weights_only=True)",
        "import torch\nf = torch.save",
        "from torch import load",
        "np.load('x', allow_pickle=True)",
        "read('x', weights_only=False)",
        "M.from_pretrained('x', use_safetensors=None)",
    ],
)
def test_pickling_is_found(source: str) -> None:
    assert len(pickling(source)) == 1
