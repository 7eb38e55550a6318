"""Where the pictures of an evaluation lie: in GenEval's folder layout, or in memory.

    <folder>/pictures.jsonl              the sum of every picture (`sums`)
             00000/metadata.jsonl        prompt 0, one JSON object
             00000/samples/0000.png      its picture 0, how it was made as text chunks
             00000/exact/0000.safetensors    the same in float32, where a benchmark is judged before rounding

Prompt folders are named by the prompt's index in the benchmark. Everything is written atomically; the PNG and then its sum
come last, so that a picture whose sum is known is whole. The original GenEval scripts read such a folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rtdmd_cli.engine.evaluation.prompts import EvalPrompts, Key, spread
from rtdmd_cli.engine.evaluation.sums import PictureSums, contents_sum
from rtdmd_cli.engine.prompts.reading import PromptSet, known_by
from rtdmd_cli.engine.report.grid import as_rgb, save_png, to_pil
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.engine.storage.files import write_bytes, write_text
from rtdmd_cli.errors import DataError

METADATA, SAMPLES, EXACT = "metadata.jsonl", "samples", "exact"
MAX_SIDE = 4096  # px: a judge holds several pictures at once, 200 MB each
_PNG = re.compile(r"\d+\.png")
_LAYOUT = "GenEval's layout is 00000/metadata.jsonl and 00000/samples/0000.png."


class Pictures(Protocol):
    """Pictures [3,H,W], float32 in 0..1, by key."""

    def has(self, key: Key) -> bool: ...

    def read(self, key: Key) -> Tensor:
        """DataError, naming the file, for a picture that is missing or damaged."""
        ...


@dataclass(frozen=True)
class MemoryPictures:
    """Pictures that are gone with the process."""

    held: dict[Key, Tensor] = field(default_factory=dict)

    def has(self, key: Key) -> bool:
        return key in self.held

    def read(self, key: Key) -> Tensor:
        return self.held[key]

    def write(self, key: Key, image: Tensor, chunks: Mapping[str, str]) -> None:
        """Keep a picture. chunks: of a file's text, not needed here."""
        self.held[key] = image


def picture_path(root: Path, key: Key) -> Path:
    """Where the picture (prompt, image) of an evaluation's folder lies."""
    return root / f"{key[0]:05d}" / SAMPLES / f"{key[1]:04d}.png"


@dataclass(frozen=True)
class FolderPictures:
    """An evaluation's own pictures. exact: keep and read them unrounded."""

    root: Path
    prompts: EvalPrompts
    exact: bool
    sums: PictureSums

    def path(self, key: Key) -> Path:
        """The picture's PNG."""
        return picture_path(self.root, key)

    def has(self, key: Key) -> bool:
        """Whether it is there and was written to its end; one whose sum is not known is made again."""
        return key in self.sums.known and all(path.is_file() for path in self.files(key).values())

    def files(self, key: Key) -> dict[str, Path]:
        """Its files by their kind; the last one is judged."""
        return _files(self.path(key), self.exact)

    def read(self, key: Key) -> Tensor:
        path = self.path(key)
        return _read_exact(exact_path(path)) if self.exact else read_png(path)

    def write(self, key: Key, image: Tensor, chunks: Mapping[str, str]) -> None:
        """Write a picture with its text, and the prompt's metadata where it isn't there yet."""
        path = self.path(key)
        metadata = path.parent.parent / METADATA
        if not metadata.exists():
            write_text(metadata, json.dumps(self.prompts.line(key[0]), ensure_ascii=False) + "\n")
        if self.exact:
            write_bytes(exact_path(path), save({"image": image.contiguous()}))
        save_png(to_pil(image), path, chunks)
        self.sums.add(key, {kind: contents_sum(each) for kind, each in self.files(key).items()})


@dataclass(frozen=True)
class FoundPictures:
    """Pictures of a folder that may be anyone's; nothing is written there. exact: all have their unrounded values."""

    paths: Mapping[Key, Path]
    exact: bool
    sums: PictureSums

    def has(self, key: Key) -> bool:
        return key in self.paths

    def files(self, key: Key) -> dict[str, Path]:
        """Its files by their kind; the last one is judged."""
        return _files(self.paths[key], self.exact)

    def read(self, key: Key) -> Tensor:
        path = self.paths[key]
        return _read_exact(exact_path(path)) if self.exact else read_png(path)


def _files(png: Path, exact: bool) -> dict[str, Path]:
    return {"png": png, "exact": exact_path(png)} if exact else {"png": png}


def exact_path(png: Path) -> Path:
    """Where a PNG's unrounded values lie."""
    return png.parent.parent / EXACT / f"{png.stem}.safetensors"


def read_png(path: Path) -> Tensor:
    """A picture [3,H,W], float32 in 0..1, of a PNG. DataError where it is missing or damaged."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = torch.from_numpy(np.array(as_rgb(image)))
    except FileNotFoundError as error:
        raise DataError(f"The picture {path} is missing.", "Make it again with --resume.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise damaged(path) from error
    return pixels.permute(2, 0, 1).float() / 255


def damaged(path: Path) -> DataError:
    """For a picture that can't be read."""
    return DataError(
        f"The picture {path} is damaged or no PNG.",
        "Remove it and go on with --resume; nothing else is lost.",
    )


def check_pictures(
    pictures: FolderPictures | FoundPictures, keys: Sequence[Key]
) -> tuple[int, int, dict[Key, str]]:
    """Width and height of all pictures, from their headers, and the sum of what is judged of each.

    DataError names one that is missing, damaged, not the one that was made, too large, or of another size than the first.
    """
    size, sums = None, {}
    for key in keys:
        path, known = pictures.files(key)["png"], pictures.sums.known.get(key, {})
        try:
            with Image.open(path, formats=["PNG"]) as image:
                found = image.size
        except FileNotFoundError as error:
            raise DataError(f"The picture {path} is missing.", "Make it again with --resume.") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise damaged(path) from error
        if max(found) > MAX_SIDE:
            raise DataError(
                f"The picture {path} has {found[0]} x {found[1]} px, more than {MAX_SIDE} a side.",
                "Reduce the pictures first.",
            )
        if size is not None and found != size:
            raise DataError(
                f"The picture {path} has {found[0]} x {found[1]} px, the ones before it {size[0]} x {size[1]}.",
                "Score pictures of one size.",
            )
        size = found
        for kind, file in pictures.files(key).items():
            sums[key] = contents_sum(file)
            if known.get(kind, sums[key]) != sums[key]:
                raise DataError(
                    f"The picture {file} is not the one that was made: its sha256 has changed.",
                    "Remove it and go on with --resume: it is made again.",
                )
    assert size is not None, "an evaluation has pictures"
    return *size, sums


def scan_folder(root: Path, images: int | None, limit: int | None) -> tuple[EvalPrompts, FoundPictures, int]:
    """The prompts and pictures of a folder in GenEval's layout, and how many pictures of each prompt are taken.

    images: of each prompt; None for as many as every prompt has. limit: of prompts, evenly spread. DataError for a folder
    without prompt folders, metadata that is missing, damaged or has no prompt, and a prompt with too few pictures.
    """
    with os_errors(root, "read"):
        folders = sorted(
            (each for each in (root.iterdir() if root.is_dir() else []) if each.name.isdecimal()),
            key=lambda each: int(each.name),
        )
    if not folders:
        raise DataError(f"{root} holds no pictures in GenEval's layout.", _LAYOUT)
    for one, other in pairwise(folders):
        if int(one.name) == int(other.name):
            raise DataError(f"{one} and {other.name} have the same number.", f"Rename one of them. {_LAYOUT}")
    lines = {int(each.name): _metadata(each) for each in folders}
    whole = PromptSet([line.pop("prompt") for line in lines.values()], list(lines.values()))
    number = {row: position for position, row in enumerate(lines)}
    chosen = [folders[row] for row in spread(len(folders), limit)]
    places = {int(each.name): each / SAMPLES for each in chosen}
    samples = {row: _samples(place) for row, place in places.items()}
    least = min(len(paths) for paths in samples.values())
    taken = least if images is None else images
    short = next((row for row, paths in samples.items() if len(paths) < max(taken, 1)), None)
    if short is not None:
        raise DataError(
            f"{places[short]} holds {len(samples[short])} pictures, not {max(taken, 1)}.",
            f"Ask for fewer with --images-per-prompt, or add what is missing. {_LAYOUT}",
        )
    paths = {(row, rank): path for row, found in samples.items() for rank, path in enumerate(found[:taken])}
    fewest = next(row for row, found in samples.items() if len(found) == least)
    most = max(map(len, samples.values()))
    left_out = (f"{taken} of up to {most} pictures a prompt, as {places[fewest].parent.name} holds {least}",)
    prompts = EvalPrompts(
        {row: whole.texts[number[row]] for row in samples},
        {row: whole.metadata[number[row]] for row in samples},
        len(whole),
        known_by(whole),
        departures=left_out if images is None and least < most else (),
    )
    exact = all(exact_path(path).is_file() for path in paths.values())
    own = all(f"{key[1]:04d}.png" == path.name for key, path in paths.items())  # as an evaluation names them
    sums = PictureSums.read_only(root) if own else PictureSums(None, {})
    return prompts, FoundPictures(paths, exact, sums), taken


def _metadata(folder: Path) -> dict[str, Any]:
    path = folder / METADATA
    try:
        line = strict_json.read(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing.", _LAYOUT) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not one JSON object.", _LAYOUT) from error
    prompt = line.get("prompt") if isinstance(line, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(
            f"{path} has no text `prompt`.", 'It holds a line such as {"prompt": "a photo of a dog"}.'
        )
    found: dict[str, Any] = line
    return found


def _samples(samples: Path) -> list[Path]:
    """The pictures of a prompt, by number."""
    if not samples.is_dir():
        raise DataError(f"{samples} is missing.", _LAYOUT)
    with os_errors(samples, "read"):
        found = [path for path in samples.iterdir() if _PNG.fullmatch(path.name)]
    return sorted(found, key=lambda path: (int(path.stem), path.name))


def _read_exact(path: Path) -> Tensor:
    try:
        image = load(path.read_bytes())["image"]
    except FileNotFoundError as error:
        raise DataError(f"The picture {path} is missing.", "Make it again with --resume.") from error
    except (OSError, SafetensorError, KeyError) as error:
        raise damaged(path) from error
    return image
