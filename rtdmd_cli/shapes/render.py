"""The renderer of the shapes world: plain shapes in plain colours on a mild grey, 32 x 32 pixels, numpy only.

A picture is a loose grid of 2 x 2 cells of 16 px. A cell holds at most one shape of 10 or 12 px, anywhere inside the cell
with at least one pixel to its border, so that two shapes are always at least two pixels apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

PICTURE = 32
"""Edge of a picture, px."""
CELL = 16
"""Edge of a cell of the loose grid, px."""
CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))
"""(row, column) of the four cells."""
SIZES = (10, 12)
"""Edge of a shape's bounding box, px."""
SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.92, 0.15),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.10, 0.25, 0.90),
    "purple": (0.55, 0.12, 0.72),
    "white": (0.99, 0.99, 0.99),
    "black": (0.04, 0.04, 0.05),
}
"""RGB in 0..1."""
BACKGROUND = (0.50, 0.68)
"""Range of the background's grey level, before tint and gradient."""

_SUPERSAMPLING = 8
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Item:
    """One shape in a picture: x, y are the left and upper edge of its bounding box in px, size its edge in px."""

    shape: str
    colour: str
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class Scene:
    """A picture as data. `background` is RGB in 0..1, `gradient` the change of brightness across the picture (x, y)."""

    items: tuple[Item, ...]
    background: tuple[float, float, float]
    gradient: tuple[float, float]


def _inside(shape: str, x: Array, y: Array) -> NDArray[np.bool_]:
    """Whether points (x to the right, y down, both in -1..1) lie inside the unit version of a shape."""
    match shape:
        case "circle":
            return x**2 + y**2 <= 1
        case "square":
            return np.maximum(abs(x), abs(y)) <= 1
        case "triangle":
            return abs(x) <= (y + 1) / 2
        case "ring":
            radius = x**2 + y**2
            return (radius <= 1) & (radius >= 0.5**2)
        case "cross":
            return np.minimum(abs(x), abs(y)) <= 0.3
        case "diamond":
            return abs(x) + abs(y) <= 1
    raise ValueError(f"unknown shape {shape!r}")


@cache
def coverage(shape: str, width: int, height: int) -> Array:
    """Share of every pixel that the shape covers when it fills a box: [height, width] in 0..1."""
    fine = _SUPERSAMPLING
    xs, ys = (_pixel_centres(edge * fine) for edge in (width, height))
    inside = _inside(shape, xs[None, :], ys[:, None])
    share: Array = inside.reshape(height, fine, width, fine).mean(axis=(1, 3), dtype=np.float32)
    return share


def _pixel_centres(count: int) -> Array:
    """Centres of `count` equal parts of -1..1."""
    centres: Array = ((np.arange(count) + 0.5) / count * 2 - 1).astype(np.float32)
    return centres


def render(scene: Scene) -> Array:
    """Draw a scene: [3, 32, 32] float32 in 0..1, edges anti-aliased."""
    ramp = np.linspace(-0.5, 0.5, PICTURE, dtype=np.float32)
    shade = scene.gradient[0] * ramp[None, :] + scene.gradient[1] * ramp[:, None]
    picture: Array = np.asarray(scene.background, dtype=np.float32)[:, None, None] + shade[None]
    for item in scene.items:
        mask = coverage(item.shape, item.size, item.size)
        colour = np.asarray(COLOURS[item.colour], dtype=np.float32)[:, None, None]
        part = picture[:, item.y : item.y + item.size, item.x : item.x + item.size]
        part += mask * (colour - part)
    return picture


def object_mask(scene: Scene) -> Array:
    """Where shapes are: [32, 32] in 0..1, the share of each pixel that a shape covers."""
    mask = np.zeros((PICTURE, PICTURE), dtype=np.float32)
    for item in scene.items:
        mask[item.y : item.y + item.size, item.x : item.x + item.size] = coverage(
            item.shape, item.size, item.size
        )
    return mask


def random_background(rng: np.random.Generator) -> tuple[tuple[float, float, float], tuple[float, float]]:
    """A mild grey with a slight tint, and a slight gradient."""
    red, green, blue = (rng.uniform(*BACKGROUND) + rng.uniform(-0.03, 0.03, 3)).tolist()
    across, down = rng.uniform(-0.05, 0.05, 2).tolist()
    return (red, green, blue), (across, down)


def place(shape: str, colour: str, cell: tuple[int, int], rng: np.random.Generator) -> Item:
    """Put a shape of random size at a random place inside a cell (row, column)."""
    size = int(rng.choice(SIZES))
    dx, dy = rng.integers(1, CELL - size, size=2, endpoint=False).tolist()
    return Item(shape, colour, cell[1] * CELL + dx, cell[0] * CELL + dy, size)


def random_scene(items: Sequence[tuple[str, str, tuple[int, int]]], rng: np.random.Generator) -> Scene:
    """A scene of (shape, colour, cell) entries with random sizes, offsets and background."""
    background, gradient = random_background(rng)
    return Scene(tuple(place(*item, rng) for item in items), background, gradient)
