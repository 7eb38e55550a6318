"""The quickest settings of a preset that fit a card, found in a fixed order, and written as a preset of their own.

It begins with everything that is quick and takes memory. While the plan does not fit, it gives
up what costs the least time: it takes the first of `SAVINGS` that makes the peak smaller, then looks through the list from
the top again, since another phase may be the largest by then. At the end the micro-batch grows while it fits.
The images of an update stay, so that the step is the same up to rounding; a base in 8 or 4 bits changes it, and comes late.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rtdmd_cli.config import strict_yaml
from rtdmd_cli.config.loader import load_preset, preset_values
from rtdmd_cli.config.planned import SPARE
from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.planning.plan import GIB, WORKSPACE, StageName, StagePlan, gib, plan_stage
from rtdmd_cli.engine.storage.files import write_text
from rtdmd_cli.errors import EnvironmentFailure

SIZES = (1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 36, 48, 64)
"""Micro-batches that are tried, where they divide the images of an update."""


@dataclass(frozen=True)
class Saving:
    """A setting that saves memory. why: what it costs, for people."""

    key: str
    value: Any
    why: str


QUICK: dict[str, Any] = {
    "hardware.gradient_checkpointing": False,
    "hardware.base": "plain",
    "hardware.optimizer": "adamw",
    "hardware.vae_tiling": False,
    "hardware.text_encoder": "auto",
    "tune_reward.rewards_in_memory": "all",
    "distill.micro_batch": 1,
    "tune_reward.micro_batch": 1,
}
"""Where the search begins; `distill.boundaries_batched` too, where every boundary is used."""
SAVINGS = (
    Saving(
        "tune_reward.rewards_in_memory",
        "one",
        "reward models are loaded anew each epoch, which takes seconds",
    ),
    Saving("hardware.optimizer", "adamw8bit", "optimiser states in 8 bits, at no cost of time"),
    Saving("hardware.vae_tiling", True, "pictures are decoded one at a time"),
    Saving("hardware.gradient_checkpointing", True, "activations are computed twice: a third more time"),
    Saving("distill.boundaries_batched", False, "fake score and teacher see one boundary at a time"),
    Saving("hardware.base", "int8", "the base in 8 bits: its products differ a little"),
    Saving("hardware.base", "nf4", "the base in 4 bits: its products differ more, and unpacking takes time"),
)


@dataclass(frozen=True)
class Fitted:
    """A preset that fits; reasons: a line for each choice."""

    preset: Preset
    reasons: Sequence[str]


def changed(preset: Preset, values: Mapping[str, Any]) -> Preset:
    """The preset with other values, by dotted key, validated."""
    data = preset.model_dump()
    for key, value in values.items():
        section, name = key.split(".")
        data[section][name] = value
    return Preset.model_validate(data)


def peak_of(plans: Sequence[StagePlan]) -> StagePlan:
    """The stage that decides."""
    return max(plans, key=lambda plan: plan.card)


Planner: TypeAlias = Callable[[Preset, StageName], StagePlan]
"""`plan.plan_stage`, or what stands for it."""


def silent(line: str) -> None:
    """Tells nobody."""


def fit(
    preset: Preset,
    stages: Sequence[StageName],
    memory: float,
    plan: Planner = plan_stage,
    tell: Callable[[str], None] = silent,
) -> Fitted:
    """The quickest settings whose plan leaves SPARE of `memory` GB free. tell: gets a line for what is tried and chosen.

    EnvironmentFailure, saying by how much, where none fits.
    """
    limit = memory * GIB * (1 - SPARE)
    current, reasons = changed(preset, start_of(preset)), list[str]()

    def planned(candidate: Preset, what: str) -> StagePlan:
        tell(f"counting with {what}")
        return peak_of([plan(candidate, stage) for stage in stages])

    worst = planned(current, "everything that is quick")
    left = savings_of(current)
    while worst.card > limit:
        for saving in left:
            candidate = changed(current, {saving.key: saving.value})
            found = planned(candidate, f"{saving.key}: {saving.value}")
            if found.card < worst.card:
                break
        else:
            break
        lines = f"{gib(worst.card)} to {gib(found.card)} GiB"
        reasons.append(f"{saving.key}: {saving.value}, {lines}; {saving.why}")
        tell(reasons[-1])
        current, worst = candidate, found
        left = [each for each in left if each.key != saving.key or stronger(each, saving)]
    if worst.card > limit:
        raise EnvironmentFailure(
            f"{preset.name} does not fit {memory:g} GB: with every saving {worst.stage} takes {gib(worst.card)} GiB in its "
            f"{worst.deciding.name}, {gib(worst.card - limit)} GiB too much ({SPARE:.0%} are kept free).",
            "Lower model.resolution, train with smaller adapters (distill.lora.rank), or use a larger card.",
        )
    tell("counting with other micro-batches")
    current, more = grown(current, stages, limit, plan)
    reasons += more
    worst = planned(current, "the largest of them") if more else worst
    reasons.append(f"{gib(worst.card)} GiB of {memory:g}, in the {worst.deciding.name} of {worst.stage}")
    return Fitted(current, reasons)


def stronger(one: Saving, other: Saving) -> bool:
    """Whether it saves more by the same setting: it stands further down."""
    return SAVINGS.index(one) > SAVINGS.index(other)


def start_of(preset: Preset) -> dict[str, Any]:
    """QUICK, as far as the preset allows it."""
    found = dict(QUICK)
    if preset.distill.boundaries == "every":
        found["distill.boundaries_batched"] = True
    return found


def savings_of(preset: Preset) -> list[Saving]:
    """SAVINGS that the preset allows: full weights need a plain base, joined steps one evaluation of all boundaries."""
    steps = preset.distill.backprop_steps, preset.tune_reward.matching_backprop_steps or 1
    never = {"hardware.base"} if preset.distill.train == "full" else set[str]()
    if max(steps) > 1 or preset.distill.boundaries != "every":
        never.add("distill.boundaries_batched")
    return [saving for saving in SAVINGS if saving.key not in never]


def grown(
    preset: Preset, stages: Sequence[StageName], limit: float, plan: Planner
) -> tuple[Preset, list[str]]:
    """The largest micro-batch of each stage that fits: activations grow with it in a straight line."""
    reasons = []
    for stage in stages:
        key, images = (
            ("distill.micro_batch", preset.distill.batch)
            if stage == "distill"
            else ("tune_reward.micro_batch", preset.tune_reward.images_per_epoch)
        )
        if images % 2:
            continue
        one, two = (plan(changed(preset, {key: size}), stage) for size in (1, 2))
        step = [b.peak - a.peak for a, b in zip(one.phases, two.phases, strict=True)]
        fits = [
            size
            for size in SIZES
            if images % size == 0
            and all(
                phase.peak + WORKSPACE + (size - 1) * more <= limit
                for phase, more in zip(one.phases, step, strict=True)
            )
        ]
        if fits and fits[-1] > 1:
            preset = changed(preset, {key: fits[-1]})
            reasons.append(f"{key}: {fits[-1]}, the most pictures at a time that fit")
    return preset, reasons


def write(fitted: Fitted, base: str, path: Path) -> None:
    """Write a preset that extends `base` (a name, or a file) and holds what differs."""
    before, now = (preset_values(each) for each in (load_preset(base, [], {}).preset, fitted.preset))
    data: dict[str, Any] = {"extends": base if not Path(base).is_file() else str(Path(base).resolve())}
    for key, value in now.items():
        if value != before[key] and key not in ("name", "description"):
            section, _, name = key.partition(".")
            data.setdefault(section, {})[name] = value
    comments = [f"# {line}" for line in (f"{base}, fitted by rtdmd plan --fit:", *fitted.reasons)]
    write_text(path, "\n".join([*comments, "", strict_yaml.dump(data)]))
