"""A PNG of judged pictures: a strip for each task, each picture with its prompt and a tick or a cross."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rtdmd_cli.engine.evaluation.shapes import Judged
from rtdmd_cli.engine.report.grid import INK, MARGIN, PAPER, GridRow, picture_grid, save_png, to_pil
from rtdmd_cli.shapes.grammar import TASKS

SAMPLES = "samples.png"
COLUMNS = 8
SCALE = 5
MARK = 28  # px, the strip above a picture that holds its mark
TITLE = 22  # px
GREEN, RED = (31, 138, 76), (200, 48, 44)
PREFIX = "a photo of "  # of every prompt; left out of the labels


def save_verdict_grid(
    summary: Mapping[str, Any], judged: Sequence[Judged], pictures: Tensor, path: Path
) -> None:
    """Write the grid of `verdict_grid`; the PNG's text says what was evaluated."""
    names = ("model", "model_hash", "steps", "guidance", "eta", "seed", "version")
    text = {name: str(summary[name]) for name in names}
    save_png(verdict_grid(summary, judged, pictures), path, text)


def verdict_grid(summary: Mapping[str, Any], judged: Sequence[Judged], pictures: Tensor) -> Image.Image:
    """Up to 8 pictures of each task, evenly spread over it, under the task's name and score.

    summary: as `shapes.scores`. pictures: [N,3,32,32] in 0..1, ordered as `judged`.
    """
    strips = []
    for task in TASKS:
        rows = [row for row, each in enumerate(judged) if each.caption.task == task]
        if rows:
            spread = [rows[number * len(rows) // COLUMNS] for number in range(COLUMNS)]
            shown = list(dict.fromkeys(spread))
            title = f"{task}: {summary['tasks'][task]:.2f} on {summary['prompts'][task]['evaluated']} prompts"
            strips.append(_strip(title, [judged[row] for row in shown], pictures[shown]))
    canvas = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), PAPER)
    top = 0
    for strip in strips:
        canvas.paste(strip, (0, top))
        top += strip.height
    return canvas


def _strip(title: str, judged: Sequence[Judged], images: Tensor) -> Image.Image:
    cells = [_cell(picture, each) for picture, each in zip(images, judged, strict=True)]
    prompts = [each.caption.text.removeprefix(PREFIX) for each in judged]
    pictures = picture_grid([GridRow("", cells)], prompts, scale=1)
    strip = Image.new("RGB", (pictures.width, pictures.height + TITLE), PAPER)
    strip.paste(pictures, (0, TITLE))
    ImageDraw.Draw(strip).text((MARGIN, MARGIN // 2), title, INK, ImageFont.load_default(size=17))
    return strip


def _cell(picture: Tensor, judged: Judged) -> Tensor:
    """The picture [3,32,32], magnified, under a tick or a cross: [3,H,W] in 0..1."""
    small = to_pil(picture)
    large = small.resize((small.width * SCALE, small.height * SCALE), Image.Resampling.NEAREST)
    cell = Image.new("RGB", (large.width, large.height + MARK), PAPER)
    cell.paste(large, (0, MARK))
    pen = ImageDraw.Draw(cell)
    if judged.verdict.correct:
        pen.line([(2, 13), (8, 20), (20, 5)], fill=GREEN, width=4, joint="curve")
    else:
        pen.line([(3, 5), (18, 20)], fill=RED, width=4)
        pen.line([(3, 20), (18, 5)], fill=RED, width=4)
    data = torch.frombuffer(bytearray(cell.tobytes()), dtype=torch.uint8)
    return data.view(cell.height, cell.width, 3).permute(2, 0, 1).float() / 255
