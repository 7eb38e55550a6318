"""Pictures of teacher and both stages side by side: the same held-out prompts, the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rtdmd_cli.engine.report.grid import GridRow, picture_grid, save_png
from rtdmd_cli.shapes.prompts import benchmark
from scripts.reproduce.matrix import Cell
from scripts.reproduce.runner import Runner

ROWS = ("teacher", "stage1", "stage2")
PROMPTS = 8


def shown_prompts() -> list[str]:
    """Evenly spread over the benchmark, whose prompts stand task after task."""
    captions = benchmark()
    return [captions[(2 * i + 1) * len(captions) // (2 * PROMPTS)].text for i in range(PROMPTS)]


def shown_cells(runner: Runner, cells: Sequence[Cell], records: Mapping[str, dict[str, Any]]) -> list[Cell]:
    """Of ROWS with the preset's own seed, those that are done and whose weights are here; the teacher's always are."""
    own = [cell for cell in cells if cell.seed == 0 and cell.row.name in ROWS and cell.key in records]
    return [cell for cell in own if cell.row.kind == "teacher" or runner.has_weights(cell)]


def shows(path: Path, cells: Sequence[Cell]) -> bool:
    """Whether the file is the picture of these cells."""
    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get("cells") == _keys(cells)


def save_samples(
    runner: Runner, cells: Sequence[Cell], records: Mapping[str, dict[str, Any]], path: Path
) -> None:
    """Draw with `rtdmd sample` and write one PNG, a row for each of `cells`."""
    prompts = shown_prompts()
    rows = []
    with TemporaryDirectory() as folder:
        listed = Path(folder) / "prompts.txt"
        listed.write_text("\n".join(prompts) + "\n", encoding="utf-8")
        for cell in cells:
            out = Path(folder) / cell.name
            options = ["--prompts", str(listed), "--from", runner.reference(cell), "--out", str(out)]
            found = runner.command(["sample", *options, "--json", "--quiet"])
            evaluations = records[cell.key]["evaluation"]["evaluations"]
            images = [_read(Path(each["path"])) for each in found["pictures"]]
            rows.append(GridRow(f"{cell.row.label} ({evaluations} evaluations)", images))
    metadata = {"Software": "rtdmd", "prompts": "\n".join(prompts), "cells": _keys(cells)}
    save_png(picture_grid(rows, prompts), path, metadata)


def _keys(cells: Sequence[Cell]) -> str:
    return " ".join(cell.key for cell in cells)


def _read(path: Path) -> Tensor:
    """[3,H,W] in 0..1."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
