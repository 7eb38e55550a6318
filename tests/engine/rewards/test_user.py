"""Rewards of the user's own, from modules written to a temporary current directory."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rtdmd_cli.engine.rewards.registry import find_reward
from rtdmd_cli.errors import UsageError

CPU = torch.device("cpu")
GOOD = """
import torch

class Redness:
    '''How red the picture is.

    More words.
    '''
    differentiable = True

    def score(self, images, prompts, metadata):
        return images[:, 0].mean((1, 2))

class WithDevice(Redness):
    def __init__(self, device):
        self.device = device

class WithDeviceAndMore(Redness):
    def __init__(self, device=None, weight=1.0):
        self.device, self.weight = device, weight

class OneArgument(Redness):
    def __init__(self, where, *, weight=2.0):
        self.device = where

class Defaults(Redness):
    '''  '''
    def __init__(self, weight=3.0):
        self.weight = weight

class TwoArguments(Redness):
    def __init__(self, a, b): ...

class KeywordOnly(Redness):
    def __init__(self, weight=1.0, *, device):
        self.device = device

class KeywordsOnly(Redness):
    def __init__(self, *, weight): ...

class NoScore:
    differentiable = False

class ScoreIsNoMethod(NoScore):
    score = 3

class ShortScore(NoScore):
    def score(self, images): ...

class Silent:
    def score(self, images, prompts, metadata): ...

class Late(Silent):
    def __init__(self):
        self.differentiable = True

class Breaks(Redness):
    def __init__(self):
        raise ZeroDivisionError("mine")

not_a_class = 3
"""

Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module into the current directory, under a name of this test alone, which it gives."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    before = set(sys.modules)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def write(name: str, text: str) -> str:
        assert name not in before
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write


def failing(name: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        find_reward(name).load(CPU, None)
    return caught.value


def test_its_row(write: Write) -> None:
    write("mine_a", GOOD)
    entry = find_reward("mine_a:Redness")
    assert (entry.name, entry.measures) == ("mine_a:Redness", "How red the picture is.")
    assert (entry.low, entry.high, entry.divisor) == (-math.inf, math.inf, 1.0)
    assert (entry.differentiable, entry.needs, entry.metadata, entry.extra) == (True, (), "", "")
    assert find_reward("mine_a:Defaults").measures == "A reward of your own."
    reward = entry.load(CPU, None)
    image = torch.tensor([0.25, 0.5, 0.75])[:, None, None].expand(1, 3, 4, 4)
    assert reward.differentiable and reward.score(image, [""], [{}]).tolist() == [0.25]


def test_it_is_built_with_the_device_or_with_nothing(write: Write) -> None:
    write("mine_b", GOOD)
    for name in ("WithDevice", "WithDeviceAndMore", "OneArgument", "KeywordOnly"):
        assert vars(find_reward(f"mine_b:{name}").load(CPU, None))["device"] == CPU
    assert vars(find_reward("mine_b:Defaults").load(CPU, None)) == {"weight": 3.0}


def test_a_module_in_a_package(write: Write) -> None:
    write("mine_c.inner", GOOD)
    assert find_reward("mine_c.inner:Redness").differentiable


def test_a_file_does_not_hide_an_installed_module(write: Write) -> None:
    """The current directory comes last: json.py in it is not the module that others mean."""
    write("mine_d", "import wave\nclass Wave:\n    differentiable, score = True, wave.open")
    write("wave", "raise RuntimeError")
    assert find_reward("mine_d:Wave").differentiable


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("NoScore", "has no method `score`", "score(images, prompts, metadata)"),
        ("ScoreIsNoMethod", "has no method `score`", "score(images, prompts, metadata)"),
        ("ShortScore", "doesn't take three arguments", "score(images, prompts, metadata)"),
        ("Silent", "does not say whether it is differentiable", "differentiable = True"),
        ("Late", "does not say whether it is differentiable", "into the class Late"),
        (
            "TwoArguments",
            "can't be built: missing a required argument: 'a'",
            "with the device, or with nothing",
        ),
        ("KeywordsOnly", "can't be built: too many positional arguments", "with the device"),
        ("Nothing", "has no class `Nothing`", "Redness, WithDevice"),
        ("not_a_class", "has no class `not_a_class`", "Redness"),
    ],
)
def test_what_is_missing_is_named(write: Write, name: str, message: str, hint: str) -> None:
    write(f"mine_{name.lower()}", GOOD)
    error = failing(f"mine_{name.lower()}:{name}")
    assert message in error.message and hint in error.hint
    assert name in error.message or name in error.hint


def test_modules_that_cannot_be_imported(write: Write) -> None:
    error = failing("mine_absent:Redness")
    assert "No module named 'mine_absent'" in error.message and "where mine_absent.py is" in error.hint
    write("mine_e", "import mine_absent_too")
    error = failing("mine_e:Redness")
    assert "No module named 'mine_absent_too'" in error.message and "python -c 'import mine_e'" in error.hint
    write("mine_f", "1 / 0")
    assert "ZeroDivisionError: division by zero" in failing("mine_f:Redness").message
    write("mine_g", "def")
    assert "SyntaxError" in failing("mine_g:Redness").message
    write("mine_script", "import sys; print('said'); sys.exit(0)")
    assert "SystemExit: 0" in failing("mine_script:Redness").message
    write("mine_h", "x = 1")
    assert failing("mine_h:Redness").hint == "It has no class at all."


@pytest.mark.parametrize("name", [":", "a:", ":A", "a-b:C", "a.py:C", "a:C:D", "/a:C", "a..b:C"])
def test_names_that_are_none(name: str) -> None:
    error = failing(name)
    if name == "a.py:C":  # a module `py` of a package `a`
        assert "can't be imported" in error.message
    else:
        assert "module:Class" in error.message and "Redness" in error.hint


def test_a_path_and_an_error_of_its_own(write: Write) -> None:
    write("mine_i", GOOD)
    with pytest.raises(UsageError, match="takes no path"):
        find_reward("mine_i:Redness").load(CPU, "somewhere")
    with pytest.raises(ZeroDivisionError, match="mine"):
        find_reward("mine_i:Breaks").load(CPU, None)


def test_an_instance_that_says_otherwise_than_its_class(write: Write) -> None:
    changed = "    def __init__(self):\n        self.differentiable = False\n"
    write("mine_j", f"{GOOD}\nclass Changes(Redness):\n{changed}")
    assert "says otherwise" in failing("mine_j:Changes").message


def test_without_a_colon_the_nearest_name_is_given() -> None:
    assert failing("shapes-genevall").hint == "Did you mean `shapes-geneval`?"
    assert failing("zzzzzz").hint == "List them: rtdmd rewards list"
