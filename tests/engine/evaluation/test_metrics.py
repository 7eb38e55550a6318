"""A reward as a judge: what its code does wrong is an error with its name, not an end of the program."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd_cli.engine.evaluation.metrics import RewardJudge, find_judge
from rtdmd_cli.errors import DataError

OWN = """
import sys
class Builds:
    differentiable = False
    def score(self, images, prompts, metadata):
        return images.mean((1, 2, 3))
class Breaks(Builds):
    def __init__(self):
        sys.exit(0)
"""


class Mine:
    differentiable = False

    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        self.give = give

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Any:
        return self.give(images.mean((1, 2, 3)))


def judged(give: Callable[[Tensor], Any], seconds: float | None = None) -> list[dict[str, Any]]:
    images = torch.tensor([0.25, 0.5])[:, None, None, None].expand(2, 3, 4, 4).clone()
    return RewardJudge("my:Own", Mine(give), seconds).judge(images, ["a ring", "a star"], [{}, {}])


def test_scores() -> None:
    assert judged(lambda values: values.double()) == [{"score": 0.25}, {"score": 0.5}]


@pytest.mark.parametrize(
    ("give", "reason"),
    [
        (lambda values: sys.exit(0), "raised SystemExit: 0 "),
        (lambda values: exec("raise GeneratorExit"), "raised GeneratorExit "),
        (lambda values: 1 / 0, "raised ZeroDivisionError"),
        (lambda values: None, "answered NoneType, no tensor"),
        (lambda values: values[:1], r"answered torch.float32 \[1\] instead of \[2\]"),
        (lambda values: time.sleep(30), "took more than 0.1 s"),
    ],
)
def test_what_goes_wrong_is_named(give: Callable[[Tensor], Any], reason: str) -> None:
    with pytest.raises(
        DataError, match=rf"The reward my:Own {reason}.* 2 pictures from 'a ring' on"
    ) as caught:
        judged(give, 0.05)
    assert caught.value.exit_code == 4 and "rtdmd rewards check my:Own" in caught.value.hint


def test_how_long_it_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judges_of_mine.py").write_text(OWN)
    cpu, found = torch.device("cpu"), []
    for seconds in (None, 3.0, 0.0):
        judge = find_judge("judges_of_mine:Builds", seconds).open(cpu, None)
        assert isinstance(judge, RewardJudge)
        found.append(judge.seconds)
    assert found == [60.0, 3.0, None]
    with pytest.raises(DataError, match="judges_of_mine:Breaks can't be built: it raised SystemExit: 0"):
        find_judge("judges_of_mine:Breaks").open(cpu, None)
