"""What the documents say is there: command lines parse, links lead somewhere, preset keys and functions are real.

The documents are README.md, those of the folders, and the first lines of the preset files, which give commands as well.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel
from typer import Exit
from typer._click.core import Context
from typer.core import TyperGroup

from rtdmd_cli.cli.app import app
from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.config.schema import Preset
from rtdmd_cli.config.tune_reward import split_weights
from rtdmd_cli.engine.evaluation.benchmarks import PUBLISHED, find_benchmark
from rtdmd_cli.engine.prompts.public_sets import find_data
from rtdmd_cli.engine.rewards.registry import find_reward

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
REPRODUCE = ROOT / "scripts/reproduce/README.md"
DOCUMENTS = (README, REPRODUCE, ROOT / "rtdmd_cli/engine/backbones/README.md")
LOG = ROOT / "scripts/EXPERIMENTS.md"
LINKED = (*DOCUMENTS, LOG, ROOT / "CHANGELOG.md")
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
LONGEST = 200
"""Lines of README.md."""
SECTIONS = tuple(name for name, field in Preset.model_fields.items() if field.annotation is not str)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fences(text: str) -> list[str]:
    """The bodies of the ```bash blocks."""
    return re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """What stands in single backticks, outside code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def commands(path: Path) -> Iterator[list[str]]:
    """Arguments of every `rtdmd` command line of a document, or of a preset file's first lines."""
    text = path.read_text("utf-8")
    if path.suffix == ".yaml":
        lines = re.findall(r"^#   (rtdmd .*?)(?:  .*)?$", text, re.MULTILINE)
    else:
        lines = [line for body in fences(text) for line in body.replace("\\\n", " ").splitlines()]
        lines += [span for span in spans(text) if span.startswith("rtdmd ")]
    for line in lines:
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in ("&&", "|", ">"):
                if words[:1] == ["rtdmd"]:
                    yield words[1:]
                words = []
            else:
                words.append(word)


def parsed(arguments: list[str]) -> Context | None:
    """The context of the command that these arguments call, which is not run; None where they ask for help alone.

    Raises typer's UsageError as the program does.
    """
    command: Any = typer.main.get_command(app)
    context, rest = None, list(arguments)
    try:
        context = command.make_context("rtdmd", rest)
        while isinstance(command, TyperGroup):
            name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            context = command.make_context(name, rest, parent=context)
    except Exit:
        return None
    return context


def values_of(arguments: list[str], option: str) -> list[str]:
    """What follows each use of an option."""
    return [arguments[place + 1] for place, word in enumerate(arguments) if word == option]


def check_names(arguments: list[str]) -> None:
    """UsageError for a preset, a preset key, a reward, a benchmark or a public set that there is not.

    Names in capitals and files stand for the reader's own.
    """
    presets = [name for name in values_of(arguments, "--preset") if not name.isupper()] or ["shapes-4step"]
    overrides = values_of(arguments, "--set")
    for preset in presets:
        load_preset(preset, [text for text in overrides if not text.partition("=")[2].isupper()], {})
    for reward in split_weights(values_of(arguments, "--reward")):
        find_reward(reward) if ":" not in reward else None
    for text in overrides:
        assert real_key(text.partition("=")[0]), text
    match arguments:
        case ["eval", name, *_] if name != "list":
            find_benchmark(name)
        case ["data", "fetch", name, *_] if not name.isupper():
            find_data(name)
        case ["presets", "show" | "copy", name, *_] if not name.isupper():
            load_preset(name, (), {})


def real_key(key: str) -> bool:
    """Whether a preset has a value, or a section, at this dotted key."""
    model: Any = Preset
    for part in key.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or part not in model.model_fields:
            return False
        model = model.model_fields[part].annotation
    return True


def preset_keys(text: str) -> list[str]:
    """Dotted preset keys in backticks, also before a value, as in `distill.train: full`."""
    found = (re.match(rf"((?:{'|'.join(SECTIONS)})\.[a-z_.]+)(?![\w/])", span) for span in spans(text))
    return [match[1] for match in found if match and not match[1].endswith(".py")]


LINES = [(path, words) for path in (*DOCUMENTS, *PRESETS) for words in commands(path)]


@pytest.mark.parametrize(("path", "words"), LINES, ids=[f"{path.name}: {' '.join(w)}" for path, w in LINES])
def test_a_command_line_parses(path: Path, words: list[str]) -> None:
    parsed(words)
    check_names(words)


@pytest.mark.parametrize(
    "line",
    [
        "distill --presett x",
        "distil",
        "sample -n none",
        "data fetch",
        "distill --set distill.itterations=3",
        "distill --preset shapes-5step",
        "tune-reward --reward pickscor",
        "eval gen-eval",
        "presets shew x",
    ],
)
def test_a_wrong_command_line_is_found(line: str) -> None:
    with pytest.raises(
        Exception, match=r"(?i)no such|not a valid|missing|valid integer|unknown|is no|there is no"
    ):
        parsed(line.split())
        check_names(line.split())


def test_commands_are_found_in_fences_spans_and_presets(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("`rtdmd a b`\n\n```bash\nrtdmd c  # d\nx && rtdmd e 'f g' | less\n```\n\n`rtdmd`\n")
    assert list(commands(document)) == [["c"], ["e", "f g"], ["a", "b"]]
    preset = tmp_path / "a.yaml"
    preset.write_text("#   rtdmd a    what it is\n# rtdmd b\n")
    assert list(commands(preset)) == [["a"]]


@pytest.mark.parametrize("path", LINKED, ids=name_of)
def test_relative_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8"))
    for link in (link for link in links if "://" not in link):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text("utf-8")), link


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_paths_in_backticks_are_there(path: Path) -> None:
    """Those that begin at a folder of the checkout; a file that the reader is to make is called mymodel."""
    text = path.read_text("utf-8")
    named = re.findall(r"`(?:\./)?((?:rtdmd_cli|scripts|tests|presets)/[\w./-]+)[` ]", text)
    assert [name for name in named if "mymodel" not in name and not (ROOT / name).exists()] == []


def test_preset_keys_in_backticks_are_real() -> None:
    for path in DOCUMENTS:
        keys = preset_keys(path.read_text("utf-8"))
        assert [key for key in keys if not real_key(key)] == [], name_of(path)
    assert preset_keys("`distill.train: full`, `tune_reward.tillt=1`, `distill/run.py`") == [
        "distill.train",
        "tune_reward.tillt",
    ]
    assert real_key("tune_reward.watch.features") and not real_key("tune_reward.tillt")


def test_functions_of_the_map_are_real() -> None:
    """Written as `folder/file.py:name`, below rtdmd_cli/engine."""
    found = re.findall(r"`([\w/]+)\.py:(\w+)`", REPRODUCE.read_text("utf-8"))
    assert len(found) > 20
    for file, name in found:
        tree = ast.parse((ROOT / f"rtdmd_cli/engine/{file}.py").read_text("utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert name in defined, f"{file}.py:{name}"


def test_the_published_figures_are_those_of_the_reports() -> None:
    """Every figure of `evaluation/benchmarks.py` stands in the document for researchers, in a row of its model."""
    rows = [line for line in REPRODUCE.read_text("utf-8").splitlines() if line.startswith("|")]
    for published in PUBLISHED:
        model, _, role = published.model.partition(", ")
        (row,) = [line for line in rows if line.startswith(f"| {model} | {role.split()[0]}")]
        cells = [cell.strip() for cell in row.split("|")]
        assert {float(cell) for cell in cells if re.fullmatch(r"\d+\.\d+", cell)} == set(
            published.figures.values()
        )


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= LONGEST
