"""Pictures of a run in progress: fixed prompts and seeds, generator beside teacher."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning
from rtdmd_cli.engine.compute.device import within_memory
from rtdmd_cli.engine.report.grid import GridRow, picture_grid, save_picture, save_png
from rtdmd_cli.engine.roles.base import RoleSet
from rtdmd_cli.engine.sampling.sample import Kind, SamplingPlan, decode_all, generate, sampling_plan
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.files import write_json
from rtdmd_cli.engine.storage.run_folder import PICTURES
from rtdmd_cli.engine.storage.runs import PICTURE_INDEX

COUNT = 8
"""Prompts of a run's grids where the preset names none, evenly spread over the prompt set; pictures drawn at once."""
TEACHER, FEW_STEPS, START = "teacher", "few-step-teacher", "start"
"""Names of the pictures to compare with, in the file names of single pictures."""


@dataclass(frozen=True)
class Shown:
    """One picture of a grid. row: of its prompt among the encoded ones, which also keys its noise beside the seed."""

    prompt: str
    seed: int
    row: int

    @property
    def key(self) -> str:
        """Names the picture in a file name: 12 hexadecimal digits of prompt and seed."""
        return hashlib.sha256(f"{self.seed}\n{self.prompt}".encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Previews:
    """What a grid shows, [n] pictures; their prompts' conditioning, the empty prompt's, and the pictures [n,3,H,W] to
    compare with, made once.

    reference: the teacher's pictures in stage 1, the starting generator's in stage 2. seed: of the health panel's noise.
    """

    backbone: Backbone
    roles: RoleSet
    preset: Preset
    plan: SamplingPlan
    shape: tuple[int, int, int]
    seed: int
    shown: list[Shown]
    cond: Conditioning
    empty: Conditioning
    reference: Tensor
    reference_kind: Kind
    reference_label: str

    @property
    def titles(self) -> list[str]:
        """Over each picture: its prompt, and its seed where there are several."""
        several = len({each.seed for each in self.shown}) > 1
        return [f"{each.prompt} (seed {each.seed})" if several else each.prompt for each in self.shown]

    @property
    def rows(self) -> Conditioning:
        """The encoded prompt of each picture, [n]."""
        return self.cond.select([each.row for each in self.shown])

    def latents(self, plan: SamplingPlan | None = None) -> Tensor:
        """Latents [n,C,H,W] of the generator's current weights (or as `plan` says), always from the same noise."""
        parts: dict[int, Tensor] = {}
        for seed in dict.fromkeys(each.seed for each in self.shown):
            places = [place for place, each in enumerate(self.shown) if each.seed == seed]
            items = [(self.shown[place].row, 0) for place in places]
            draw = partial(self._drawn, plan or self.plan, items, seed)
            drawn = within_memory(draw, COUNT, self.backbone.device)
            parts |= dict(zip(places, drawn, strict=True))
        return torch.stack([parts[place] for place in sorted(parts)])

    def _drawn(self, plan: SamplingPlan, items: Sequence[tuple[int, int]], seed: int, batch: int) -> Tensor:
        return generate(
            self.backbone,
            self.roles,
            plan,
            self.cond,
            self.empty,
            items,
            shape=self.shape,
            seed=seed,
            batch=batch,
        )

    def pictures(self, plan: SamplingPlan | None = None) -> Tensor:
        """As `latents`, decoded: [n,3,H,W] in 0..1."""
        return decode_all(self.backbone, self.latents(plan), COUNT)


def pick(count: int) -> list[int]:
    """Indices of the preview prompts among `count` prompts: at most COUNT, evenly spread."""
    return sorted({int((i + 0.5) * count / COUNT) for i in range(COUNT)})


def chosen(preset: Preset, prompts: Sequence[str], first: int) -> tuple[list[str], list[int]]:
    """The prompts of the grids, and their indices among the encoded ones.

    prompts: the training prompts, encoded first. first: index of the first of `previews.prompts`.
    """
    own = list(preset.previews.prompts)
    if own:
        return own, list(range(first, first + len(own)))
    indices = pick(len(prompts))
    return [prompts[index] for index in indices], indices


def drawing_line(preset: Preset, prompts: int) -> str:
    """That the teacher's pictures of the grids are drawn now, which may take minutes, for people."""
    count = prompts * max(len(preset.previews.seeds), 1)
    steps = preset.model.teacher_steps
    each = "1 step" if steps == 1 else f"{steps} steps"
    drawn = "1 picture of the teacher" if count == 1 else f"{count} pictures of the teacher"
    return f"drawing {drawn} for the sample grids, {each}{'' if count == 1 else ' each'}"


def make_previews(
    backbone: Backbone,
    roles: RoleSet,
    preset: Preset,
    prompts: Sequence[str],
    cond: Conditioning,
    empty: Conditioning,
    reference: Kind = "teacher",
    reference_label: str = "teacher",
) -> Previews:
    """The grids of these prompts (cond: a row for each), every one with every seed of the preset.

    Draws the reference: the teacher as `rtdmd sample --from PRESET` would, or, in stage 2, the generator that it
    started from.
    """
    seeds = preset.previews.seeds or (preset.evaluate.seed,)
    previews = Previews(
        backbone,
        roles,
        preset,
        sampling_plan("generator", backbone, preset.model, preset.sampler),
        backbone.latent_shape(preset.model.resolution, preset.model.resolution),
        preset.evaluate.seed,
        [Shown(text, seed, row) for row, text in enumerate(prompts) for seed in seeds],
        cond,
        empty,
        torch.empty(0),
        reference,
        reference_label,
    )
    plan = sampling_plan(reference, backbone, preset.model, preset.sampler)
    return replace(previews, reference=previews.pictures(plan))


def save_sample_grid(previews: Previews, ema: dict[str, Tensor], path: Path, iteration: int) -> Tensor:
    """Write the grid of generator (EMA weights) beside the reference, and the generator's pictures one by one.

    Returns the generator's pictures [n,3,H,W].
    """
    with previews.roles.swapped("generator", ema):
        images = previews.pictures()
    rows = [
        GridRow(f"generator, {previews.plan.evaluations} evaluations", images),
        GridRow(previews.reference_label, previews.reference),
    ]
    save_png(picture_grid(rows, previews.titles), path, {"iteration": str(iteration)})
    save_pictures(previews, path.parent, f"step-{iteration:06d}", images)
    return images


def save_baseline(previews: Previews, ema: dict[str, Tensor], path: Path) -> Tensor:
    """Write the grid before training: teacher in full, teacher in few steps, and the generator as it starts.

    Also their pictures one by one. Returns the generator's [n,3,H,W].
    """
    model, sampler = previews.preset.model, previews.preset.sampler
    full = sampling_plan("teacher", previews.backbone, model, sampler)
    few = sampling_plan("teacher", previews.backbone, model, sampler, steps=len(sampler.raw_steps))
    own = previews.reference_kind == "teacher"
    teacher = previews.reference if own else previews.pictures(full)
    with previews.roles.swapped("generator", ema):
        images = previews.pictures()
    few_images = previews.pictures(few)
    start = (
        "generator before training" if own else f"{previews.reference_label}: the generator before training"
    )
    rows = [
        GridRow(f"teacher, {full.evaluations} evaluations", teacher),
        GridRow(f"teacher in {few.steps} steps, {few.evaluations} evaluations", few_images),
        GridRow(f"{start}, {previews.plan.evaluations} evaluations", images),
    ]
    save_png(picture_grid(rows, previews.titles), path, {"iteration": "0"})
    for name, drawn in ((TEACHER, teacher), (FEW_STEPS, few_images), ("step-000000", images)):
        save_pictures(previews, path.parent, name, drawn)
    return images


def save_reference(previews: Previews, samples: Path) -> None:
    """Write what the pictures are of, and those to compare with, one by one. samples: the run's folder of grids."""
    index = samples / PICTURES / PICTURE_INDEX
    known = strict_json.read(index) if index.is_file() else {}
    now = {each.key: {"prompt": each.prompt, "seed": each.seed} for each in previews.shown}
    write_json(
        index,
        {"order": [*now, *(key for key in known.get("order", []) if key not in now)]}
        | {"pictures": known.get("pictures", {}) | now},
    )
    name = TEACHER if previews.reference_kind == "teacher" else START
    save_pictures(previews, samples, name, previews.reference)


def save_pictures(previews: Previews, samples: Path, name: str, images: Tensor) -> None:
    """Write each picture of `images` [n,3,H,W] as <samples>/pictures/<name>-<key>, PNG or JPEG by its size."""
    for each, image in zip(previews.shown, images, strict=True):
        save_picture(image, samples / PICTURES / f"{name}-{each.key}")
