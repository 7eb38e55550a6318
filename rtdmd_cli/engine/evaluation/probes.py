"""Drawn pictures whose order is beyond doubt: for each prompt one that fits and one that doesn't.

What a working model certainly ranks right, and why it is in here:
- captions: one large plain shape in a plain colour against another shape in another colour, or against noise. Every
  model that was trained on pictures with texts tells colours and such shapes apart.
- looks: a drawn sunset against the same buried in noise, for rewards that don't read the prompt.
- text: large plain letters against other letters, or none.
- shapes: rendered pictures of the shapes world, 32 px, against those of other captions or noise.
- objects: drawn things of COCO's classes against noise. A detector need not know every drawing for a real thing, so
  only some of them have to be found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from math import cos, pi, sin
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rtdmd_cli.shapes.grammar import Caption, Thing, parse, requirement, scene_for
from rtdmd_cli.shapes.render import COLOURS, coverage, render

EDGE = 384  # px
SHAPE = 200  # px
Pen = ImageDraw.ImageDraw


@dataclass(frozen=True)
class Pair:
    """A prompt, a picture that is worth more for it, and one that is worth less: each [3,H,W] float32 in 0..1."""

    prompt: str
    better: Tensor
    worse: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)


def pairs_for(name: str) -> list[Pair]:
    """The pairs that a reward of the table is checked with."""
    return PROBES.get(name, captions)()


@cache
def captions() -> list[Pair]:
    """Five pairs of 384 px, with the questions of GenEval2 as metadata."""
    things = [("red", "circle"), ("blue", "square"), ("yellow", "triangle"), ("green", "cross")]
    pictures = [_one_shape(colour, shape) for colour, shape in things]
    prompts = [f"a photo of a {colour} {shape}" for colour, shape in things]
    questions = [
        [[f"How many {shape}s are in the image?", "one"], [f"Is the {shape} {colour}?", "Yes"]]
        for colour, shape in things
    ]
    found = [
        Pair(prompts[i], pictures[i], pictures[i - 2], {"vqa_list": questions[i]}) for i in range(len(things))
    ]
    return [*found, Pair(prompts[0], pictures[0], _noise(EDGE, 0), {"vqa_list": questions[0]})]


@cache
def looks() -> list[Pair]:
    """Two pairs of 384 px."""
    scene, prompt = _sunset(), "a sunset over the sea"
    noise = _noise(EDGE, 1)
    return [Pair(prompt, scene, noise), Pair(prompt, scene, 0.25 * scene + 0.75 * noise)]


@cache
def texts() -> list[Pair]:
    """Three pairs of 384 px."""
    prompts = [f'a sign that says "{text}"' for text in ("OPEN", "Hello")]
    opened, hello, blank = _sign("OPEN"), _sign("Hello"), _sign("")
    return [
        Pair(prompts[0], opened, hello),
        Pair(prompts[1], hello, opened),
        Pair(prompts[0], opened, blank),
    ]


@cache
def shapes() -> list[Pair]:
    """Seven pairs of 32 px, one for each task and one with noise. What is compared differs in colours and shapes."""
    wanted = [
        parse("a photo of a ring"),
        parse("a photo of a red circle and a blue square"),
        parse("a photo of a yellow triangle"),
        parse("a photo of a cross left of a diamond"),
        parse("a photo of two green squares"),
        parse("a photo of a circle and a triangle"),
    ]
    other = [wanted[i - 3] for i in range(len(wanted))]
    found = [
        Pair(a.text, _rendered(a, 2 * row), _rendered(b, 2 * row + 1), requirement(a))
        for row, (a, b) in enumerate(zip(wanted, other, strict=True))
    ]
    red = Caption("colors", (Thing("circle", "red"),))
    return [*found, Pair(red.text, _rendered(red, 99), _noise(32, 2), requirement(red))]


@cache
def objects() -> list[Pair]:
    """Four pairs of 384 px, with GenEval's requirement as metadata: one thing each, the stop sign red."""
    drawings: dict[str, Callable[[Pen], None]] = {
        "stop sign": _stop_sign, "clock": _clock, "traffic light": _traffic_light, "orange": _orange,
    }  # fmt: skip
    found = []
    for row, (label, draw) in enumerate(drawings.items()):
        clause: dict[str, Any] = {"class": label, "count": 1}
        if label == "stop sign":
            clause["color"] = "red"
        prompt = f"a photo of {'an' if label[0] == 'o' else 'a'} {label}"
        known = {"tag": "single_object", "include": [clause], "prompt": prompt}
        found.append(Pair(prompt, _outdoors(draw), _noise(EDGE, 3 + row), known))
    return found


PROBES: dict[str, Callable[[], list[Pair]]] = {
    "aesthetic": looks,
    "ocr": texts,
    "geneval": objects,
    "geneval-soft": objects,
    "shapes-geneval": shapes,
    "shapes-geneval-soft": shapes,
    "shapes-clip": shapes,
    "shapes-clip-heldout": shapes,
}
"""Reward -> its pairs; `captions` for all others."""


def _one_shape(colour: str, shape: str) -> Tensor:
    """A large shape in the middle of a light ground."""
    picture = np.full((3, EDGE, EDGE), 0.9, dtype=np.float32)
    start = (EDGE - SHAPE) // 2
    part = picture[:, start : start + SHAPE, start : start + SHAPE]
    ink = np.array(COLOURS[colour], dtype=np.float32)[:, None, None]
    part += coverage(shape, SHAPE, SHAPE) * (ink - part)
    return torch.from_numpy(picture)


def _rendered(caption: Caption, seed: int) -> Tensor:
    return torch.from_numpy(render(scene_for(caption, np.random.default_rng(seed)))).clamp(0, 1)


def _noise(edge: int, seed: int) -> Tensor:
    """Independent uniform pixels [3,edge,edge]."""
    return torch.rand(3, edge, edge, generator=torch.Generator().manual_seed(seed))


def _tensor(picture: Image.Image) -> Tensor:
    """Reduced to EDGE, which smooths what was drawn larger: [3,EDGE,EDGE]."""
    small = picture.resize((EDGE, EDGE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255


def _sign(text: str) -> Tensor:
    """Dark letters on a light board."""
    picture = Image.new("RGB", (2 * EDGE, 2 * EDGE), (120, 140, 110))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((40, 200, 2 * EDGE - 40, 560), (245, 240, 225), (60, 40, 30), 12)
    pen.text((EDGE, 380), text, (25, 25, 60), ImageFont.load_default(size=200), anchor="mm")
    return _tensor(picture)


def _sunset() -> Tensor:
    """A sky from violet to gold, the sun, its path on the water, hills."""
    down = np.linspace(0, 1, 2 * EDGE)
    stops = np.array([(45, 35, 95), (150, 60, 110), (245, 130, 70), (255, 205, 120)], dtype=np.float64)
    sky = np.stack([np.interp(down / 0.6, [0, 0.4, 0.75, 1], stops[:, c]) for c in range(3)], axis=-1)
    sea = 0.55 * sky[::-1] + np.array([5, 10, 30])
    rows = np.where(down[:, None] < 0.6, sky, sea)
    picture = Image.fromarray(np.repeat(rows[:, None], 2 * EDGE, axis=1).clip(0, 255).astype(np.uint8))
    pen, horizon = ImageDraw.Draw(picture), int(0.6 * 2 * EDGE)
    pen.pieslice((300, horizon - 85, 470, horizon + 85), 180, 360, (255, 240, 190))
    for row in range(12):
        y, half = horizon + 10 + 22 * row, 70 - 4 * row
        pen.ellipse((385 - half, y, 385 + half, y + 6), (255, 215, 140))
    hills = [(x, horizon - 60 * sin(pi * x / 300) ** 2) for x in range(0, 301, 10)]
    pen.polygon([*hills, (300, horizon), (0, horizon)], (50, 30, 60))
    pen.polygon([(768 - x, y) for x, y in hills] + [(468, horizon), (768, horizon)], (65, 35, 65))
    return _tensor(picture)


def _outdoors(draw: Callable[[Pen], None]) -> Tensor:
    """A thing drawn in 768 px before sky and grass."""
    sky, grass = np.array([(150, 195, 235), (215, 232, 245)]), np.array([(110, 150, 80), (70, 115, 50)])
    down = np.linspace(0, 1, 2 * EDGE)[:, None]
    rows = np.where(
        down < 0.75,
        sky[0] + (sky[1] - sky[0]) * down / 0.75,
        grass[0] + (grass[1] - grass[0]) * (down - 0.75) * 4,
    )
    picture = Image.fromarray(np.repeat(rows[:, None], 2 * EDGE, axis=1).astype(np.uint8))
    draw(ImageDraw.Draw(picture))
    return _tensor(picture)


def _ring(radius: float, corners: int, turn: float) -> list[tuple[float, float]]:
    """The corners of a regular polygon around (384, 300)."""
    angles = [2 * pi * (i + turn) / corners for i in range(corners)]
    return [(384 + radius * cos(angle), 300 + radius * sin(angle)) for angle in angles]


def _stop_sign(pen: Pen) -> None:
    pen.rectangle((368, 480, 400, 768), (130, 132, 135))
    for radius, colour in ((225, (150, 15, 20)), (220, (250, 250, 250)), (204, (195, 25, 30))):
        pen.polygon(_ring(radius, 8, 0.5), colour)
    pen.text(
        (384, 300), "STOP", (250, 250, 250), ImageFont.load_default(size=120), anchor="mm", stroke_width=3
    )


def _clock(pen: Pen) -> None:
    pen.ellipse((144, 60, 624, 540), (70, 45, 30))
    pen.ellipse((174, 90, 594, 510), (252, 250, 240))
    font = ImageFont.load_default(size=44)
    for hour, at in enumerate(_ring(165, 12, -2), start=1):
        pen.text(at, str(hour), (20, 20, 20), font, anchor="mm")
    pen.line((384, 300, 384 - 75, 300 - 50), (15, 15, 15), 16)
    pen.line((384, 300, 384 + 110, 300 - 65), (15, 15, 15), 10)
    pen.ellipse((370, 286, 398, 314), (15, 15, 15))


def _traffic_light(pen: Pen) -> None:
    pen.rectangle((368, 560, 400, 768), (60, 62, 65))
    pen.rounded_rectangle((274, 40, 494, 580), 30, (35, 38, 36), (15, 15, 15), 6)
    for y, colour in ((130, (235, 40, 35)), (310, (90, 75, 20)), (490, (20, 70, 35))):
        pen.ellipse((309, y - 75, 459, y + 75), colour, (10, 10, 10), 8)


def _orange(pen: Pen) -> None:
    pen.ellipse((170, 640, 600, 700), (60, 90, 45))
    for step in range(60):  # brighter towards the upper left
        shift, radius = 1.6 * step, 210 - 3.2 * step
        colour = (225 + step // 3, 110 + int(1.1 * step), 10 + step // 2)
        x, y = 384 - 0.5 * shift, 460 - 0.7 * shift
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    pen.ellipse((372, 262, 396, 282), (70, 90, 40))
    pen.polygon([(388, 265), (430, 205), (520, 200), (460, 255)], (55, 120, 50))
