"""Imports point downwards only, nothing is pickled, and what is imported is declared."""

import ast
import re
import sys
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rtdmd_cli"
LADDER = (
    "cli",
    "engine.doctor",
    "engine.export",
    "engine.evaluation",
    "engine.planning",
    "engine.tune_reward",
    "engine.distill",
    "engine.training",
    "engine.sampling",
    "engine.rewards",
    "engine.report",
    "engine.prompts",
    "shapes",
    "engine.judges",
    "engine.roles",
    "engine.backbones",
    "engine.storage",
    "engine.compute",
    "engine.algo",
    "engine.families",
    "config",
    "errors",
)
"""The rooms of the package from top to bottom: a room imports only what stands below it."""
NARROW = {"engine.algo": (), "config": ("errors",), "shapes": ("engine.judges", "errors")}
"""Rooms that import less than all that stands below them."""
BUILT_IN = ("engine.prompts.reading", "engine.rewards.shapes")
"""The files under `distill` that import the built-in world: where its prompts and its rewards are found by their names."""
VERSION_READERS = ("cli", "engine")  # of `from rtdmd_cli import __version__`
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


def short(module: str) -> str:
    """Without the name of the package."""
    return module.removeprefix(PACKAGE).removeprefix(".")


def room_of(module: str) -> str:
    """The room of a module of the package; AssertionError for one that has no place on the ladder."""
    rooms = [room for room in LADDER if inside(short(module), room)]
    assert len(rooms) == 1, f"{module} has no room"
    return rooms[0]


def allowed_rooms(room: str) -> tuple[str, ...]:
    return NARROW.get(room, LADDER[LADDER.index(room) + 1 :])


def wrong_imports(module: str, source: str) -> list[str]:
    """What a module imports that its room may not."""
    room, found = room_of(module), []
    for target in imports(ast.parse(source)):
        if target == "rtdmd_cli.__version__":
            wrong = not any(inside(room, reader) for reader in VERSION_READERS) or room == "engine.algo"
        elif inside(target, PACKAGE):
            other, low = room_of(target), LADDER.index(room) > LADDER.index("engine.distill")
            wrong = other not in (room, *allowed_rooms(room))
            wrong |= other == "shapes" != room and low and short(module) not in BUILT_IN
        else:
            name = target.partition(".")[0]
            wrong = room == "engine.algo" and name != "torch" and name not in sys.stdlib_module_names
        found += [target] if wrong else []
    return found


def circle(graph: Mapping[str, Collection[str]]) -> list[str]:
    """Modules that import each other in a ring, the first one found; empty where there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module not in done:
            for target in graph[module]:
                if found := visit(target, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in graph if (found := visit(module, []))), [])


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


PLACED = [path for path in FILES if short(module_name(path)) not in ("", "__main__", "engine")]


@pytest.mark.parametrize("path", PLACED, ids=module_name)
def test_imports_point_downwards(path: Path) -> None:
    assert wrong_imports(module_name(path), path.read_text("utf-8")) == []


def test_every_room_is_on_the_ladder_and_no_other() -> None:
    assert {room_of(module_name(path)) for path in PLACED} == set(LADDER)
    outside = [path for path in FILES if path not in PLACED]
    targets = {name for path in outside for name in imports(ast.parse(path.read_text("utf-8")))}
    assert {name for name in targets if inside(name, PACKAGE)} == {"rtdmd_cli.cli.app"}  # by __main__


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Imports inside functions and under TYPE_CHECKING count."""
    graph = {
        module_name(path): [name for name in imports(ast.parse(path.read_text("utf-8"))) if name in MODULES]
        for path in FILES
    }
    assert circle(graph) == []


def test_a_circle_is_found() -> None:
    graph = {"a": ["b"], "b": ["c", "d"], "c": [], "d": ["b"]}
    assert sorted(circle(graph)) == ["b", "d"] and circle(graph | {"d": ["c"]}) == []


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
    extras = project["optional-dependencies"]
    entries = [*project["dependencies"], *extras["ocr"], *extras["trackio"], *extras["wandb"]]
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
        ("rtdmd_cli.config.schema", "import rtdmd_cli.engine.roles.base"),
        ("rtdmd_cli.config.schema", "from rtdmd_cli.engine.algo import flow"),
        ("rtdmd_cli.shapes.render", "from rtdmd_cli.engine.storage import files"),
        ("rtdmd_cli.shapes.render", "from rtdmd_cli.config.schema import Preset"),
        ("rtdmd_cli.errors", "from rtdmd_cli.config import schema"),
        ("rtdmd_cli.engine.distill.run", "from rtdmd_cli.engine.tune_reward.recipe import tune"),
        ("rtdmd_cli.engine.storage.files", "if TYPE_CHECKING:\n    from rtdmd_cli.engine.roles import base"),
        ("rtdmd_cli.engine.sampling.sample", "from rtdmd_cli.shapes.render import render"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert len(wrong_imports(module, source)) == 1


def test_a_module_without_a_room_is_found() -> None:
    with pytest.raises(AssertionError, match="has no room"):
        wrong_imports("rtdmd_cli.engine.hallway", "import math")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rtdmd_cli.cli.app", "from rtdmd_cli.engine.sampling.sample import euler"),
        ("rtdmd_cli.engine.storage.files", "from rtdmd_cli import __version__"),
        ("rtdmd_cli.engine.algo.losses", "import math\nfrom torch import Tensor"),
        ("rtdmd_cli.shapes.detector", "from rtdmd_cli.engine.judges import geneval"),
        ("rtdmd_cli.engine.evaluation.shapes", "from rtdmd_cli.shapes.render import render"),
        ("rtdmd_cli.engine.rewards.shapes", "from rtdmd_cli.shapes.detector import detect"),
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
