"""Makes pictures of prompts and writes them: PNGs that say how they were made, and an index of them.

    <folder>/0000-0001-seed42.png    prompt 0, picture 1, seed 42; the record as text chunks
             index.jsonl             one record a picture
             grid.png                on request

Nothing is overwritten. A folder that holds other pictures of the same names, or an index that is somebody else's, is left
alone, as is one that another process writes to, and the next free one is taken: samples, samples-2, samples-3 ...
Pictures of the very same record are kept, not made again, so that an interrupted job continues.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rtdmd_cli import __version__
from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning
from rtdmd_cli.engine.compute.signals import StopRequest
from rtdmd_cli.engine.prompts.embeddings import EmbeddingCache, open_cache
from rtdmd_cli.engine.report.grid import GridRow, as_rgb, picture_grid, save_png, to_pil
from rtdmd_cli.engine.sampling.model import Model
from rtdmd_cli.engine.sampling.sample import SamplingPlan, decode_all, generate
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.engine.storage.files import append_line, locked, make_folder
from rtdmd_cli.engine.storage.locks import is_held
from rtdmd_cli.errors import EnvironmentFailure, UsageError

T = TypeVar("T")

INDEX = "index.jsonl"
GRID = "grid.png"
GRID_COLUMNS = 8
GRID_PICTURES = 128  # in a grid; the first ones
BATCH_PIXELS = 4 * 1024**2  # of a batch, where none is asked for
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

Record = dict[str, Any]
_LINE_START = b'{"dtype": '
"""How a line of the index begins: its keys are sorted."""


@dataclass(frozen=True)
class Job:
    """Pictures to make: `images` of each prompt, width x height px, in batches of `batch`."""

    model: Model
    plan: SamplingPlan
    prompts: Sequence[str]
    images: int
    seed: int
    width: int
    height: int
    batch: int


@dataclass(frozen=True)
class Written:
    """What `write_pictures` left: (file, record) in order; how many of them were there already."""

    pictures: list[tuple[Path, Record]]
    kept: int
    seconds: float


def default_batch(preset: Preset, width: int, height: int) -> int:
    """The preset's batch of evaluation, less for large pictures: 4 of 1024 x 1024 px. At least 1."""
    return max(1, min(preset.evaluate.batch, BATCH_PIXELS // (width * height)))


def records(job: Job) -> dict[str, Record]:
    """How each picture is made, by file name, in the order of prompt and image index."""
    count, model = len(job.prompts), job.model
    wide, deep = (max(4, len(str(number - 1))) for number in (count, job.images))
    common = {
        "negative": None,
        "seed": job.seed,
        "steps": job.plan.steps,
        "guidance": job.plan.guidance,
        "eta": job.plan.eta,
        "width": job.width,
        "height": job.height,
        "dtype": DTYPE_NAMES[model.backbone.dtype],
        "model": model.label,
        "model_hash": model.model_hash,
        "version": __version__,
    }
    return {
        f"{p:0{wide}d}-{i:0{deep}d}-seed{job.seed}.png": {
            "prompt": job.prompts[p],
            "prompt_index": p,
            "image_index": i,
            **common,
        }
        for p in range(count)
        for i in range(job.images)
    }


def text_chunks(record: Mapping[str, Any]) -> dict[str, str]:
    """A record as a PNG's text; nothing is "none"."""
    return {
        key: "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        for key, value in record.items()
    }


def free_folder(out: Path, fits: Callable[[Path], bool]) -> Path:
    """`out`, or the first of `out`-2, `out`-3 ... that doesn't exist or `fits`.

    UsageError if `out` is a file, or doesn't fit and has no name to number (`.`, `..`, `/`).
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, not a folder.", "Choose a folder with --out.")
    number, folder = 1, out
    while folder.exists() and not (folder.is_dir() and fits(folder)):
        if out.name in ("", ".."):
            raise UsageError(f"{out} holds other files of these names.", "Choose another folder with --out.")
        number += 1
        folder = out.with_name(f"{out.name}-{number}")
    return folder


def choose_folder(out: Path, job: Job, grid: bool) -> Path:
    """The folder to write to: `out` or a free one beside it, as the module describes."""
    planned = records(job)
    chunks = {name: text_chunks(record) for name, record in planned.items()}
    if grid:
        chunks[GRID] = _grid_chunks(planned)

    def fits(folder: Path) -> bool:
        there = {path.name for path in folder.iterdir()}
        if is_held(folder) or not _may_be_ours(folder / INDEX):
            return False
        return all(read_chunks(folder / name) == text for name, text in chunks.items() if name in there)

    with os_errors(out, "read"):
        return free_folder(out, fits)


def read_chunks(path: Path) -> dict[str, str] | None:
    """The text of a PNG; None for a file that isn't one."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def write_pictures(
    folder: Path, job: Job, on_pictures: Callable[[int], None], stop: StopRequest | None = None
) -> Written:
    """Make what `folder` lacks of the job, each picture written as soon as its batch is done.

    on_pictures: told the number of pictures after each batch. stop: looked at before each batch; raises Stopped.
    Errors as `paint`; EnvironmentFailure from the disk; BusyError where another process writes to the folder.
    """
    stop = StopRequest() if stop is None else stop
    make_folder(folder)
    kept = f"the pictures in {folder} are kept, and the same command makes the rest"
    with (
        locked(folder, "Wait for it, or choose another --out."),
        stop.during("finishing these pictures", kept),
    ):
        return _write_missing(folder, job, on_pictures, stop)


def _write_missing(folder: Path, job: Job, on_pictures: Callable[[int], None], stop: StopRequest) -> Written:
    began = time.monotonic()
    planned = records(job)
    there = {name for name in planned if (folder / name).exists()}
    indexed = _indexed(folder / INDEX)
    for name in sorted(there - indexed):  # written, but the process ended before its line
        append_line(folder / INDEX, _index_line(name, planned[name]))
    on_pictures(len(there))
    todo = [name for name in planned if name not in there]
    if todo:
        cond, uncond = encode(job.model, job.prompts, job.plan)
        shape = job.model.backbone.latent_shape(job.height, job.width)
        for part in batched(todo, job.batch):
            stop.check()
            keys = [(planned[name]["prompt_index"], planned[name]["image_index"]) for name in part]
            images = paint(job.model, job.plan, cond, uncond, keys, shape=shape, seed=job.seed)
            for name, image in zip(part, images, strict=True):
                _write_picture(folder, name, image, planned[name])
            on_pictures(len(part))
    pictures = [(folder / name, record) for name, record in planned.items()]
    return Written(pictures, len(there), time.monotonic() - began)


def _write_picture(folder: Path, name: str, image: Tensor, record: Record) -> None:
    path = folder / name
    if path.exists():
        raise EnvironmentFailure(f"{path} was written by another program meanwhile.", "Choose another --out.")
    save_png(to_pil(image), path, text_chunks(record))
    append_line(folder / INDEX, _index_line(name, record))


def encode(
    model: Model, prompts: Sequence[str], plan: SamplingPlan
) -> tuple[Conditioning, Conditioning | None]:
    """The prompts' conditioning on the CPU, one row a prompt, and the empty prompt's where guidance needs it.

    Read from and written to the cache on disk; the text encoders are then freed. In bf16 a prompt takes 2 MB for Stable
    Diffusion 3, 4 MB for FLUX.1 and 8 MB for FLUX.2-klein-4B, at the published text lengths.
    """
    cache, uncond = encode_to_cache(model, prompts, plan)
    return cache.fetch(prompts), uncond


def encoding_ahead(
    prompts: Sequence[str], max_gb: float | None, size: tuple[int, int] | None = None
) -> Callable[[Backbone], None]:
    """For `open_model`: encodes the prompts into the cache, and frees the text encoders before the transformer is loaded.

    max_gb: as of `open_cache`, by the model's preset: below it, the prompts of its training would leave the cache.
    size: (height, width) of the pictures, px; UsageError, before anything is encoded, where the model can't do it.
    """

    def prepare(backbone: Backbone) -> None:
        if size is not None:
            backbone.latent_shape(*size)
        open_cache(backbone, max_gb).ensure(prompts, backbone.encode)
        backbone.drop_text_encoders()

    return prepare


def encode_to_cache(
    model: Model, prompts: Sequence[str], plan: SamplingPlan
) -> tuple[EmbeddingCache, Conditioning | None]:
    """As `encode`, with the prompts left on disk: the cache that has them all, to be fetched in parts."""
    empty = [""] if plan.needs_empty_prompt else []
    backbone = model.backbone
    cache = open_cache(backbone, model.source.preset.hardware.cache_gb)
    cache.ensure([*prompts, *empty], backbone.encode)
    backbone.drop_text_encoders()
    return cache, cache.fetch(empty) if empty else None


def paint(
    model: Model,
    plan: SamplingPlan,
    cond: Conditioning,
    uncond: Conditioning | None,
    keys: Sequence[tuple[int, int]],
    *,
    shape: tuple[int, int, int],
    seed: int,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """One batch of pictures [len(keys), 3, height, width], float32 in 0..1 on the CPU.

    Arguments as `generate`. PictureFailure for pictures that are not finite.
    """
    size = len(keys)
    latents = generate(
        model.backbone, model.roles, plan, cond, uncond, keys, shape=shape, seed=seed, batch=size, rows=rows
    )
    return decode_all(model.backbone, latents, size, f"The model {model.label}")


def write_grid(folder: Path, job: Job) -> Path:
    """Write grid.png of the job's first 128 pictures, a row of up to 8 for each prompt; one there is kept."""
    path, planned = folder / GRID, records(job)
    if path.exists():
        return path
    rows: list[GridRow] = []
    shown = islice(planned.items(), GRID_PICTURES)
    by_prompt: dict[int, list[str]] = {}
    for name, record in shown:
        by_prompt.setdefault(record["prompt_index"], []).append(name)
    for prompt, names in by_prompt.items():
        for number, part in enumerate(batched(names, GRID_COLUMNS)):
            title = job.prompts[prompt] if number == 0 else ""
            rows.append(GridRow(title, [read_picture(folder / name) for name in part]))
    save_png(picture_grid(rows), path, _grid_chunks(planned))
    return path


def read_picture(path: Path) -> Tensor:
    """A picture [3, H, W], float32 in 0..1, of an 8-bit PNG."""
    with os_errors(path, "read"), Image.open(path, formats=["PNG"]) as image:
        pixels = torch.from_numpy(np.array(as_rgb(image)))
    return pixels.permute(2, 0, 1).float() / 255


def _grid_chunks(planned: Mapping[str, Record]) -> dict[str, str]:
    request = json.dumps(planned, sort_keys=True)
    return {"pictures": str(len(planned)), "request": hashlib.sha256(request.encode()).hexdigest()}


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items in parts of `size`, the last one shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _index_line(name: str, record: Record) -> str:
    return json.dumps({"file": name, **record}, ensure_ascii=False, sort_keys=True)


def _may_be_ours(path: Path) -> bool:
    """Whether there is no index, or one that `write_pictures` wrote: its lines are records, the last one perhaps half."""
    if not os.path.lexists(path):
        return True
    if path.is_symlink() or not path.is_file():
        return False
    lines = strict_json.read_lines(path)
    half = lines.pop()[0] if lines and not lines[-1][0].endswith(b"\n") else b""
    whole = all(entry is not None and {"file", "prompt", "model_hash"} <= entry.keys() for _, entry in lines)
    return whole and half.startswith(_LINE_START[: len(half)])


def _indexed(path: Path) -> set[str]:
    """The files that an index names; lines that are no JSON objects are passed over."""
    return {str(entry.get("file")) for _, entry in strict_json.read_lines(path) if entry is not None}
