"""What the table holds: its rows, and the cells (a row with one seed) with the settings that make them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from rtdmd_cli.config.loader import Resolved, load_preset, preset_values
from rtdmd_cli.config.schema import Preset
from rtdmd_cli.errors import UsageError

Kind = Literal["teacher", "distill", "tune-reward"]

SEED_KEYS = ("distill.seed", "tune_reward.seed")
PUBLISHED_CONSISTENCY = 0.01
DIVERSITY_IMAGES, DIVERSITY_PROMPTS = 4, 120
_UNUSED = ("name", "description", "hardware.tracker", "hardware.threads", "hardware.gradient_checkpointing")
_BEFORE = (
    ("hardware.mixed_precision", "none"),
    ("distill.lora.dtype", "float32"),
    ("tune_reward.lora.dtype", "float32"),
)
"""What every cell was made with before there was a choice: not part of a key, so that those cells are still known."""
STAGE_1_OWN = ("hardware.mixed_precision=none",)
"""Stage 1's cells (and the teacher's, which train nothing) are in float32, which came out alike on all processors that
were tried, unless --set says otherwise. Stage 2's, which take longest, are as the preset says: on processors that
multiply bf16, in two thirds of the time."""
_SCHEDULE = ("save_every", "save_minutes", "keep", "log_every", "sample_every")
_SECTIONS: dict[Kind, tuple[str, ...]] = {
    "teacher": ("model.", "hardware."),
    "distill": ("model.", "sampler.", "hardware.", "distill."),
    "tune-reward": ("model.", "sampler.", "hardware.", "distill.", "tune_reward."),
}
"""What of a preset decides a cell of that kind; what decides the evaluation comes on top."""


@dataclass(frozen=True)
class Sampling:
    """How a teacher is sampled: steps, and guidance (1 is none, and half the evaluations)."""

    steps: int
    guidance: float


@dataclass(frozen=True)
class Row:
    """A row of the table. overrides: `--set` texts on top of the preset. samplings: of a teacher; the best counts."""

    name: str
    label: str
    kind: Kind
    overrides: tuple[str, ...] = ()
    samplings: tuple[Sampling, ...] = ()
    ablation: bool = False


@dataclass(frozen=True)
class Request:
    """The options that change what is computed. limit: benchmark prompts, None for all."""

    preset: str
    overrides: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True)
class Cell:
    """One row with one seed. seed: 0 for the preset's own seeds, 1 for those plus one, and so on."""

    row: Row
    seed: int
    resolved: Resolved
    settings: dict[str, Any]
    stage_1: Cell | None = None

    @cached_property
    def key(self) -> str:
        """Of the settings that make the figures. The package's version is not one."""
        return _digest(self.settings)

    @property
    def name(self) -> str:
        """The name of the cell's file."""
        return f"{self.row.kind}-{self.key}"

    @cached_property
    def run_name(self) -> str:
        """The name of its training: of the settings that make the weights. Cells that differ in the rest share it."""
        return f"{self.row.kind}-{_digest(self.settings['training'])}"

    @property
    def label(self) -> str:
        return f"{self.row.name}, seed {self.seed}"


def table_rows(preset: Preset) -> list[Row]:
    """Every row for this preset. An ablation that the preset has built in is turned round where it can be."""
    model, steps = preset.model, len(preset.sampler.raw_steps)
    free, guided = Sampling(steps, 1.0), Sampling(max(1, steps // 2), model.guidance)
    full = Sampling(model.teacher_steps, model.guidance)
    equal = (
        f"teacher at equal cost, the better of {free.steps} steps without guidance and {guided.steps} with"
    )
    main = [
        Row(
            "teacher", f"teacher, {full.steps} steps with guidance {full.guidance:g}", "teacher", (), (full,)
        ),
        Row("teacher-equal-cost", equal, "teacher", (), (free, guided)),
        Row("stage1", "stage 1", "distill"),
        Row("stage2", "stage 2", "tune-reward"),
    ]
    return main + _stage_1_ablations(preset) + _stage_2_ablations(preset)


_Change = tuple[str, dict[str, str]]
_Values = dict[str, float | str | None]


def _stage_1_ablations(preset: Preset) -> list[Row]:
    return [
        Row(
            f"stage1-{name}",
            f"stage 1, {label}",
            "distill",
            tuple(f"distill.{key}={value}" for key, value in values.items()),
            ablation=True,
        )
        for name, label, values in _stage_1_changes(preset)
    ]


def _stage_1_changes(preset: Preset) -> list[tuple[str, str, dict[str, str]]]:
    """(name, label, values of `distill`) of each ablation: what the preset has built in is left out, and the reverse."""
    own, steps = preset.distill, str(len(preset.sampler.raw_steps))
    alone = {"backprop_steps": "1"}
    table: list[tuple[str, bool, _Change, _Change]] = [
        (
            "consistency",
            own.consistency_weight > 0,
            ("without the consistency term", {"consistency_weight": "0"}),
            ("with the consistency term", {"consistency_weight": str(PUBLISHED_CONSISTENCY)}),
        ),
        (
            "interval",
            own.interval == "full",
            ("noised inside the sub-interval", {"interval": "sub"}),
            ("full interval", {"interval": "full"}),
        ),
        (
            "boundaries",
            own.boundaries == "every",
            ("one boundary of a rollout, drawn", {"boundaries": "one"}),
            ("every boundary of a rollout", {"boundaries": "every"}),
        ),
        (
            "normaliser",
            own.normaliser == "noise-free",
            ("normaliser as published", {"normaliser": "published"}),
            ("normaliser without the noise", {"normaliser": "noise-free"}),
        ),
        (
            "backprop",
            own.backprop_steps > 1,
            ("no gradient through earlier steps", alone),
            ("gradient through all steps", {"backprop_steps": steps, "boundaries_batched": "true"}),
        ),
        (
            "batched",
            own.boundaries_batched,
            (
                "no gradient through earlier steps, boundaries one after another",
                alone | {"boundaries_batched": "false"},
            ),
            ("boundaries in one batch", {"boundaries_batched": "true"}),
        ),
    ]
    return [(name, *(without if built_in else added)) for name, built_in, without, added in table]


def _stage_2_ablations(preset: Preset) -> list[Row]:
    own, found = preset.tune_reward.model_dump(), list[Row]()
    for name, label, values in _stage_2_changes(preset):
        same = all(own[key] == value for key, value in values.items())
        overrides = tuple(
            f"tune_reward.{key}={'null' if value is None else value}" for key, value in values.items()
        )
        note = " (as the preset)" if same else ""
        found.append(
            Row(f"stage2-{name}", f"stage 2, {label}{note}", "tune-reward", overrides, ablation=True)
        )
    return found


def _stage_2_changes(preset: Preset) -> list[tuple[str, str, _Values]]:
    """(name, label, values of `tune_reward`) of each ablation."""
    every, own = len(preset.sampler.raw_steps) - 1, preset.tune_reward.model_dump()
    policy: _Values = {"policy_weight": own["policy_weight"] or 1.0}
    off: _Values = {"policy_weight": 0.0, "backprop_weight": 0.0, "tilt": 0.0}
    matched = own["dmd_weight"] > 0
    grpo, propagated = off | policy, off | {"backprop_weight": own["backprop_weight"] or 1.0}
    all_steps: _Values = {"subset_steps": every}
    subject = "policy gradient"
    if not own["policy_weight"]:  # then the row to compare with is the one of GRPO only
        all_steps, subject = grpo | all_steps, "GRPO only,"
    table: list[tuple[str, str, _Values]] = [
        ("grpo-only", "the reward by policy gradient (GRPO) only", grpo),
        ("all-steps", f"{subject} on all {every} stochastic steps, not a subset", all_steps),
        ("backprop-only", "the reward by back-propagation only", propagated),
    ]
    if matched:
        tilt: _Values = {"tilt": own["tilt"] or 1.0}
        if preset.distill.interval == "sub" or own["matching"] == "last":
            table.append(("tilt-only", "the reward by the tilt of matching only", off | tilt))
        table.append(("matching", "no distribution matching, and so no tilt", {"dmd_weight": 0.0}))
        table.append(("no-reward", "no reward, distribution matching alone", off))
    else:
        table.append(("matching", "with distribution matching", {"dmd_weight": 1.0}))
    if matched and own["matching"] == "distill":
        label = "distribution matching through the last step, as published, no tilt"
        last: _Values = {"matching": "last", "matching_images": None, "matching_backprop_steps": None}
        table.append(("matching-last", label, last | {"tilt": 0.0}))
        joined = preset.distill.backprop_steps
        if own["matching_backprop_steps"] not in (None, joined):
            label = f"matching's gradient through {joined} steps, as stage 1's"
            table.append(("matching-steps", label, {"matching_backprop_steps": None}))
    return table


def chosen_rows(rows: Sequence[Row], names: Sequence[str]) -> set[str]:
    """The names of the rows asked for; all for none. UsageError for a name that is no row's."""
    known = [row.name for row in rows]
    for name in names:
        if name not in known:
            raise UsageError(f"There is no row {name!r}.", f"Choose from {', '.join(known)}.")
    return set(names or known)


def make_cell(request: Request, row: Row, seed: int, rows: Sequence[Row]) -> Cell:
    """The cell of a row and a seed; a stage-2 cell holds the stage-1 cell that it starts from."""
    given = request.overrides if row.kind == "tune-reward" else (*STAGE_1_OWN, *request.overrides)
    base = load_preset(request.preset, given).preset
    own = dict(zip(SEED_KEYS, (base.distill.seed, base.tune_reward.seed), strict=True))
    seeds = tuple(f"{key}={value + seed}" for key, value in own.items())
    resolved = load_preset(request.preset, (*given, *row.overrides, *seeds))
    stage_1 = None
    if row.kind == "tune-reward":
        stage_1 = make_cell(request, next(each for each in rows if each.name == "stage1"), seed, rows)
    return Cell(row, seed, resolved, _settings(request, row, seed, resolved, stage_1), stage_1)


def _settings(
    request: Request, row: Row, seed: int, resolved: Resolved, stage_1: Cell | None
) -> dict[str, Any]:
    from rtdmd_cli.engine.backbones.families import FAMILIES, locate_model
    from rtdmd_cli.engine.backbones.layout import folder_hash  # imports diffusers

    preset = resolved.preset
    schedule = {f"{section}.{key}" for section in ("distill", "tune_reward") for key in _SCHEDULE}
    values = {
        key: value
        for key, value in preset_values(preset).items()
        if key.startswith(_SECTIONS[row.kind])
        and key not in schedule
        and key not in _UNUSED
        and (key, value) not in _BEFORE
    }
    limit, images = request.limit, preset.evaluate.images_per_prompt
    return {
        "training": {
            "kind": row.kind,
            "values": values,
            "weights": folder_hash(
                FAMILIES[preset.model.family].module().LAYOUT, locate_model(preset.model).folder
            ),
            "stage_1": stage_1.run_name if stage_1 else None,
        },
        "samplings": [[each.steps, each.guidance] for each in row.samplings],
        "evaluation": {
            "seed": preset.evaluate.seed + seed,
            "images_per_prompt": images,
            "limit": limit,
        },
        "diversity": _diversity(limit) if images == 1 else None,
    }


def _digest(settings: dict[str, Any]) -> str:
    """Twelve hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _diversity(limit: int | None) -> dict[str, int]:
    """The evaluation from which the diversity comes, where the main one has no two pictures of a prompt."""
    prompts = DIVERSITY_PROMPTS if limit is None else min(limit, DIVERSITY_PROMPTS)
    return {"images_per_prompt": DIVERSITY_IMAGES, "limit": prompts}


def table_cells(request: Request, rows: Sequence[Row], main: int, ablations: int) -> list[Cell]:
    """All cells of the table in the order in which they are made: every row of a seed before the next seed."""
    return [
        make_cell(request, row, seed, rows)
        for seed in range(max(main, ablations))
        for row in rows
        if seed < (ablations if row.ablation else main)
    ]
