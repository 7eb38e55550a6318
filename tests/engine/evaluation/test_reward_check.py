"""The check of rewards: what is right passes, and each way to be wrong fails with its reason."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd_cli.engine.evaluation import probes
from rtdmd_cli.engine.evaluation.probes import Pair
from rtdmd_cli.engine.evaluation.reward_check import CheckResult, check_reward
from rtdmd_cli.engine.judges.features import ClipScorer
from rtdmd_cli.engine.rewards.base import Need, RewardEntry
from rtdmd_cli.engine.rewards.registry import REWARDS
from rtdmd_cli.errors import DataError, EnvironmentFailure, UsageError

CPU = torch.device("cpu")
CHROMA = torch.tensor([1.0, -0.5, -0.5])[:, None, None]
RED, BLUE = torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.2)
RED[0], BLUE[2] = 0.9, 0.9


class Redness:
    """Redness of the picture where the prompt says red, else blueness: right for `two_colours`."""

    def __init__(self, scale: float = 1.0, differentiable: bool = True) -> None:
        self.scale, self.differentiable = scale, differentiable

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        signs = torch.tensor([1.0 if "red" in prompt else -1.0 for prompt in prompts])
        reds = images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
        return self.scale * signs * reds


class Scores(Redness):
    """Whatever a function makes of the right scores."""

    def __init__(self, change: Callable[[Tensor], Any], differentiable: bool = False) -> None:
        super().__init__(differentiable=differentiable)
        self.change = change

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Any:
        return self.change(super().score(images, prompts, metadata))


@pytest.fixture(autouse=True)
def two_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [Pair("red", RED, BLUE), Pair("blue", BLUE, RED), Pair("red", RED, 0 * RED + 0.5)]
    monkeypatch.setitem(probes.PROBES, "redness", lambda: pairs)
    monkeypatch.setitem(probes.PROBES, "my:Redness", lambda: pairs)


def entry(reward: Any, **changes: Any) -> RewardEntry:
    row = RewardEntry(
        "redness", "Redness.", -1.0, 1.0, reward.differentiable, (), lambda device, path: reward
    )
    return replace(row, **changes)


def run(reward: Any, **changes: Any) -> CheckResult:
    return check_reward(entry(reward, **changes), CPU)


def test_a_right_reward_passes() -> None:
    found = run(Redness())
    assert (found.name, found.status, found.reason, found.hint) == ("redness", "passed", "", "")
    assert (found.pairs, found.ordered) == (3, 3)
    assert found.low == pytest.approx(-0.7) and found.high == pytest.approx(0.7)
    assert found.gradient == pytest.approx(1 / 64)
    assert found.seconds >= 0
    assert run(Redness(differentiable=False)).gradient is None


def zeros(scores: Tensor) -> Tensor:
    return torch.zeros_like(scores)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (zeros, "every picture scores 0"),
        (lambda s: zeros(s) + 0.3, "every picture scores 0.3"),
        (lambda s: -s, "'red' scores -0.7 for a picture of it and 0.7 for one that is worse"),
        (lambda s: s * torch.tensor([1.0, -1.0, 1.0]), "'blue' scores -0.7 for a picture of it and 0.7"),
        (lambda s: 4.4 * s, "scores from -3.08 to 3.08 are far from the usual -1 to 1"),
        (lambda s: s + 2.6, "far from the usual"),
        (lambda s: s.double(), r"torch.float64 \[3\], not torch.float32 \[3\]"),
        (lambda s: s[:, None], r"torch.float32 \[3, 1\], not torch.float32 \[3\]"),
        (lambda s: s.mean(), r"torch.float32 \[\], not"),
        (lambda s: s.tolist(), "are list, not"),
        (lambda s: s.to("meta"), "scores are on meta, the pictures on cpu"),
        (lambda s: s.log(), "a score is not finite: .*nan"),
        (lambda s: s / 0, "a score is not finite: inf, inf"),
        (lambda s: s.no_such_method(), r"AttributeError: .*no_such_method.* \(test_reward_check.py, line \d+\)"),
        (lambda s: exec("raise SystemExit(0)"), "it raised SystemExit: 0"),
        (lambda s: exec("raise GeneratorExit"), "it raised GeneratorExit"),
        (lambda s: exec("raise DataError('The prompt is bad.')"), "The prompt is bad."),
    ],
)  # fmt: skip
def test_wrong_scores_fail(change: Callable[[Tensor], Any], reason: str) -> None:
    found = run(Scores(change))
    assert found.status == "failed" and re.search(reason, found.reason)


def test_not_every_better_picture_needs_a_higher_score() -> None:
    """As with a detector that finds some things; but at least one, and none in the wrong order."""
    found = run(Scores(lambda s: (s > 0.65).float() * torch.tensor([0.0, 1.0, 0.0])))
    assert (found.status, found.ordered, found.pairs) == ("passed", 1, 3)
    same = run(Scores(lambda s: torch.tensor([0.1, 0.2, 0.3])))
    assert (same.status, same.ordered) == ("failed", 0)
    assert same.reason == "no picture scores more than its worse counterpart"


def test_the_range_has_slack_of_its_width() -> None:
    assert run(Redness(scale=4.2)).status == "passed"  # 2.94, and up to 3 is let through
    assert run(Redness(scale=4.4)).status == "failed"
    assert run(Redness(scale=4.4), low=-1.2, high=1.2).status == "passed"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.detach(), "it has no gradient to the pictures, though it says"),
        (
            lambda s: s.detach() + torch.ones(len(s), requires_grad=True) * 1e-3,
            "it has no gradient to the pictures, though it says",
        ),
        (lambda s: s.detach() + 0 * s, "the gradient to the pixels is zero"),
        (lambda s: s + 0 * (s - s.detach()).sqrt(), "it has a gradient to the pictures that is not finite"),
    ],
)
def test_wrong_gradients_fail(change: Callable[[Tensor], Tensor], reason: str) -> None:
    found = run(Scores(change, differentiable=True))
    assert found.status == "failed" and reason in found.reason
    assert (found.ordered, found.gradient) == (3, None)


@pytest.mark.parametrize(("claims", "row"), [(True, False), (False, True)])
def test_row_and_reward_have_to_agree(claims: bool, row: bool) -> None:
    found = run(Redness(differentiable=claims), differentiable=row)
    words = {True: "differentiable", False: "not differentiable"}
    assert found.reason == f"it says it is {words[claims]}, its row {words[row]}"


def test_a_reward_of_the_users_own_has_no_known_order() -> None:
    found = run(Scores(lambda s: -s), name="my:Redness", low=-float("inf"), high=float("inf"))
    assert (found.status, found.ordered, found.pairs) == ("passed", None, 3)
    found = run(Scores(zeros), name="my:Redness", low=-float("inf"), high=float("inf"))
    assert found.reason == "every picture scores 0"


def raising(error: BaseException) -> Callable[[torch.device, str | None], Any]:
    def load(device: torch.device, path: str | None) -> Any:
        raise error

    return load


def test_what_cannot_be_loaded() -> None:
    absent = EnvironmentFailure("someone/model can't be loaded: no network.", "Check the network.")
    found = run(Redness(), load=raising(absent))
    assert found == CheckResult(
        "redness", "not available", "someone/model can't be loaded: no network", "Check the network."
    )
    found = run(Redness(), load=raising(DataError("The weights are damaged.")))
    assert (found.status, found.reason) == ("failed", "The weights are damaged.")
    for error in (UsageError("wrong"), MemoryError(), torch.OutOfMemoryError()):
        with pytest.raises(type(error)):
            run(Redness(), load=raising(error))


def test_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that aren't cached: the loader is not called, unless a path says where they are."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    row = entry(Redness(), needs=(Need("someone/model", ("model.safetensors",), 2_000_000, "MIT"),))
    found = check_reward(replace(row, load=raising(AssertionError("loaded"))), CPU)
    assert (found.status, found.reason) == (
        "not available",
        "someone/model (2.0 MB) is not in the local cache",
    )
    assert found.hint == "hf download someone/model --include model.safetensors"
    assert check_reward(row, CPU, "a folder").status == "passed"


@pytest.mark.parametrize("name", ["shapes-geneval", "shapes-geneval-soft", "ocr"])
def test_the_rewards_that_are_here_pass(name: str) -> None:
    found = check_reward(REWARDS[name], CPU)
    assert (found.status, found.reason) == ("passed", "")
    assert found.ordered == found.pairs >= 3 and (found.low, found.high) == (0.0, 1.0)


class ShapesClip:
    """The cosine of the world's own CLIP."""

    differentiable = True

    def __init__(self) -> None:
        self.clip = ClipScorer.load(Path(str(files("rtdmd_cli"))) / "shapes/weights/clip", "cpu")

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        return self.clip.score(images, prompts)


def test_a_real_clip_passes_with_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probes.PROBES, "redness", probes.shapes)
    found = run(ShapesClip(), low=0.1, high=0.85)
    assert (found.status, found.reason, found.ordered) == ("passed", "", 7)
    assert found.gradient is not None and found.gradient > 0
    wrong = run(ShapesClip(), low=16.0, high=24.0)
    assert "far from the usual 16 to 24" in wrong.reason


def test_every_row_of_the_table_has_a_check_that_can_fail() -> None:
    """A reward that answers zeros fails, under whatever name."""
    for row in REWARDS.values():
        reward = Scores(zeros, differentiable=row.differentiable)
        found = check_reward(replace(row, needs=(), extra="", load=lambda device, path, r=reward: r), CPU)
        assert found.status == "failed" and found.reason == "every picture scores 0"


def test_one_that_hangs_fails_in_its_time() -> None:
    found = check_reward(entry(Scores(lambda s: time.sleep(30))), CPU, seconds=0.05)
    assert (found.status, found.reason) == ("failed", "it took more than 0.15 s")
    assert found.seconds < 10


def test_a_constructor_that_fails_is_a_result() -> None:
    for error in (ZeroDivisionError("mine"), SystemExit(0), GeneratorExit()):
        found = run(Redness(), name="my:Redness", load=raising(error))
        assert found.status == "failed" and found.reason.startswith(f"it raised {type(error).__name__}")


def test_the_pictures_and_metadata_of_the_pairs_stay_as_they_are() -> None:
    class Greedy(Redness):
        def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
            scores = super().score(images, prompts, metadata)
            images.data.zero_()
            for known in metadata:
                known["eaten"] = True
            return scores

    assert run(Greedy()).status == run(Redness()).status == "passed"
    assert all("eaten" not in pair.metadata for pair in probes.pairs_for("redness"))
