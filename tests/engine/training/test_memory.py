"""A memory that is full at any moment of an iteration: the iteration is undone and made again with half the micro-batch."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd_cli.config.schema import DistillConfig, HardwareConfig, Preset
from rtdmd_cli.config.section import LoraConfig
from rtdmd_cli.engine.compute import optim
from rtdmd_cli.engine.distill import run as distill
from rtdmd_cli.engine.distill.recipe import iterate
from rtdmd_cli.engine.planning.fitting import SAVINGS, savings_of
from rtdmd_cli.engine.training import memory
from rtdmd_cli.engine.training.memory import MemoryFull, Sizes, advance_within_memory, keep_size, less_memory
from rtdmd_cli.engine.training.trainer import ROLES, Trainer, optimizer_of
from rtdmd_cli.engine.tune_reward import stage as tuning
from rtdmd_cli.engine.tune_reward.recipe import tune
from tests.tiny_models import PROMPTS, load_sd3, sd3_config
from tests.tiny_tuning import make_tuner, tune_preset

BATCH = 4
Stage = tuple[Trainer, Sizes, Callable[[int], None], Any]
"""Trainer, micro-batch, one iteration, and the rewards of stage 2."""


def stage_1(**values: Any) -> Stage:
    config = {"batch": BATCH, "fake_per_generator": 1, "fake_lr": 0.01, "generator_lr": 0.01, "seed": 3}
    made = DistillConfig(**(config | {"lora": LoraConfig(rank=2, alpha=4)} | values))
    preset, backbone = Preset(name="tiny", model=sd3_config(), distill=made), load_sd3()
    cond, empty = backbone.encode(PROMPTS), backbone.encode([""])
    trainer = distill.build_trainer(backbone, preset, len(PROMPTS), cond.select, empty)
    return trainer, distill.sizes(trainer), lambda i: iterate(trainer, i), None


def stage_2(**values: Any) -> Stage:
    tuner = make_tuner(**values)
    return tuner.core, tuning.sizes(tuner), lambda i: tune(tuner, i), tuner.rewards


STAGES = {"distill": stage_1, "tune-reward": stage_2}
PRESETS = {"distill": Preset(name="tiny", model=sd3_config()), "tune-reward": tune_preset()}


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All that an iteration changes."""
    found = {f"ema/{name}": tensor for name, tensor in trainer.ema.items()}
    for role in ROLES:
        optimizer = optimizer_of(trainer, role)
        for name, parameter in trainer.roles.named_parameters(role):
            found[f"{role}/{name}"] = parameter
            found |= {f"{role}/{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()} | {
        "updates": torch.tensor(trainer.generator_updates)
    }


def full_at(function: Callable[..., Any], number: int, done: bool = False) -> Callable[..., Any]:
    """`function`, but the memory is full at its call `number` (from 0); done: after it has done its work."""
    calls = iter(range(10**6))

    def call(*args: Any, **named: Any) -> Any:
        at = next(calls)
        if at == number and not done:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        result = function(*args, **named)
        if at == number:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return result

    return call


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
        "GET was unable to find an engine to execute this computation",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
    ],
)
def test_full_memory_that_is_told_by_other_parts_of_torch(words: str) -> None:
    trainer, sizes, advance, _ = stage_1(micro_batch=2)
    calls = iter(range(2))

    def full() -> None:
        if next(calls) == 0:
            raise RuntimeError(words)
        advance(0)

    said: list[str] = []
    assert advance_within_memory(trainer, sizes, full, PRESETS["distill"], said.append)
    assert sizes.micro_batch() == 1 and len(said) == 1

    def wrong() -> None:
        raise RuntimeError("shapes don't fit")

    with pytest.raises(RuntimeError, match="shapes"):
        advance_within_memory(trainer, sizes, wrong, PRESETS["distill"], said.append)


def place(name: str, stage: Stage) -> tuple[Any, str, int, bool]:
    """Where the memory is to be full: an object, its function, the call, and whether it has done its work by then."""
    trainer, _, _, rewards = stage
    backbone: Any = trainer.backbone
    return {
        "first evaluation": (backbone, "velocity", 0, False),
        "an evaluation of the fake's turn": (backbone, "velocity", 5, False),
        "a later evaluation": (backbone, "velocity", 9, False),
        "fake's backward pass": (Tensor, "backward", 0, False),
        "a later backward pass": (Tensor, "backward", 1, True),
        "fake's optimiser": (trainer.fake_optimizer, "step", 0, True),
        "generator's optimiser": (trainer.generator_optimizer, "step", 0, True),
        "average": (optim, "ema_update", 0, True),
        "decoding": (backbone, "decode", 0, False),
        "rewards": (rewards, "score", 0, True),
        "the gradient of decoding": (backbone, "decode", 1, False),
        "the reward's gradient": (rewards, "pull", 0, True),
    }[name]


BOTH = (
    "first evaluation",
    "an evaluation of the fake's turn",
    "a later evaluation",
    "fake's backward pass",
    "a later backward pass",
    "fake's optimiser",
    "generator's optimiser",
    "average",
)
REWARDED = ("decoding", "rewards", "the reward's gradient", "the gradient of decoding")
CASES = [("distill", name) for name in BOTH]
CASES += [("tune-reward", name) for name in (*BOTH, *REWARDED)]


@pytest.fixture(scope="module")
def undisturbed() -> dict[tuple[str, int], dict[str, Tensor]]:
    """What two iterations come to whose micro-batch falls to 2 in iteration 0 or in iteration 1, without an error."""
    found = {}
    for name, make in STAGES.items():
        for number in (0, 1):
            trainer, sizes, advance, _ = make()
            for iteration in (0, 1):
                if iteration == number:
                    sizes.resize(2)
                advance(iteration)
            found[name, number] = everything(trainer)
    return found


@pytest.mark.parametrize(("name", "where"), CASES)
def test_the_iteration_is_as_if_it_had_begun_with_less(
    name: str,
    where: str,
    undisturbed: dict[tuple[str, int], dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Byte for byte: weights, optimiser states, average; told once, and all later iterations are made with it."""
    number = 1 if "optimiser" in where or where == "average" else 0  # with states that are there already
    stage = STAGES[name]()
    trainer, sizes, advance, _ = stage
    told: list[str] = []
    for iteration in (0, 1):
        with monkeypatch.context() as patch:
            if iteration == number:
                holder, function, call, done = place(where, stage)
                own = operator.attrgetter(function)(holder)
                patch.setattr(holder, function, full_at(own, call, done))
            smaller = advance_within_memory(
                trainer, sizes, lambda i=iteration: advance(i), PRESETS[name], told.append
            )
        assert smaller is (iteration == number)
    assert sizes.micro_batch() == trainer.config.micro_batch == 2
    assert len(told) == 1 and f"{sizes.section}.micro_batch=4" in told[0] and "again with 2" in told[0]
    expected, found = undisturbed[name, number], everything(trainer)
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("name", STAGES)
def test_nothing_moves_where_it_stays_full(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to 1, and then an error with the settings that need less: exit code 3."""
    trainer, sizes, advance, _ = STAGES[name]()
    advance(0)
    before, told = everything(trainer), list[str]()

    def full(*args: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(optim, "ema_update", full)  # both roles have moved by then
    with pytest.raises(MemoryFull, match="full at a micro-batch of 1: CUDA out of memory") as caught:
        advance_within_memory(trainer, sizes, lambda: advance(1), PRESETS[name], told.append)
    assert caught.value.exit_code == 3 and "--set hardware.gradient_checkpointing=true" in caught.value.hint
    assert [line.rpartition("again with ")[2][0] for line in told] == ["2", "1"]
    after = everything(trainer)
    assert all(torch.equal(after[key], before[key]) for key in before) and after.keys() == before.keys()
    assert all(p.grad is None for role in ROLES for _, p in trainer.roles.named_parameters(role))


def test_halves_divide_the_batch() -> None:
    def halved(batch: int, size: int) -> int:
        return Sizes("distill", batch, lambda: size, lambda new: None).halved()

    assert [halved(72, size) for size in (72, 9, 4, 3, 1)] == [36, 4, 2, 1, 0] and halved(6, 5) == 2


def test_a_run_goes_on_with_what_it_came_down_to() -> None:
    trainer, sizes, _, _ = stage_1(micro_batch=2)
    keep_size(sizes, {})
    assert trainer.config.micro_batch == 2
    keep_size(sizes, {memory.RECORD: 1})
    assert trainer.config.micro_batch == 1
    trainer, sizes, _, _ = stage_1(micro_batch=1)
    keep_size(sizes, {memory.RECORD: 2})
    assert trainer.config.micro_batch == 1


def test_settings_that_need_less_are_those_of_the_plan_in_its_order() -> None:
    every = DistillConfig(boundaries="every", boundaries_batched=True)
    preset = tune_preset().model_copy(update={"distill": every})
    expected = [f"{saving.key}={str(saving.value).lower()}" for saving in savings_of(preset)]
    assert less_memory(preset, "tune_reward") == expected and len(expected) == len(SAVINGS)
    assert less_memory(preset, "distill") == expected[1:]  # no rewards there
    taken = HardwareConfig(gradient_checkpointing=True, base="nf4", optimizer="adamw8bit", vae_tiling=True)
    least = tune_preset(hardware=taken.model_dump(), rewards_in_memory="one")
    assert less_memory(least, "tune_reward") == []
    assert "model.resolution" in memory.hint(least, "tune_reward")


def test_where_little_memory_can_stay_in_place_an_iteration_is_remembered_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A container or WSL gives a queued copy none; that is no full card, and nothing is made smaller."""
    trainer, sizes, advance, _ = stage_1(micro_batch=2)
    real, refused = Tensor.to, [0]

    def to(self: Tensor, *given: Any, **named: Any) -> Tensor:
        if named.get("non_blocking") and named.get("copy"):
            refused[0] += 1
            raise torch.AcceleratorError("CUDA error: out of memory")
        return real(self, *given, **named)

    monkeypatch.setattr(Tensor, "to", to)
    said: list[str] = []
    assert not advance_within_memory(trainer, sizes, lambda: advance(0), PRESETS["distill"], said.append)
    assert refused[0] > 0 and not said and sizes.micro_batch() == 2
