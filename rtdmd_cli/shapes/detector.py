"""The analytic detector of the shapes world: colour segmentation, connected components, template match.

It stands where GenEval has its object detector and colour classifier, and feeds the same judge.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from rtdmd_cli.engine.judges.geneval import Detection
from rtdmd_cli.shapes.render import COLOURS, PICTURE, SHAPES, coverage

THRESHOLD = 0.3
"""Confidence under which a detection is dropped, GenEval's value."""
COUNTING_THRESHOLD = 0.9
"""The same for the counting task."""
MOST_PER_CLASS = 16
"""Detections of one class that are kept, the most confident first."""

_MIN_AREA, _MIN_EDGE, _MAX_EDGE = 12, 6, 16
_GREYS = np.linspace(0.42, 0.74, 5)
_IOU_ZERO, _IOU_FULL = 0.50, 0.80
_MARGIN = 2
Bools = NDArray[np.bool_]


@cache
def _palette() -> NDArray[np.float64]:
    """Reference colours [K,3]: the world's colours first, then greys of the background."""
    return np.concatenate([np.array(list(COLOURS.values())), np.repeat(_GREYS[:, None], 3, axis=1)])


def segment(images: NDArray[np.floating]) -> NDArray[np.int64]:
    """Nearest reference colour of every pixel: [B,3,H,W] in 0..1 to [B,H,W], index into COLOURS, -1 for background."""
    pixels = np.asarray(images, dtype=np.float64)[..., None]
    red, green, blue = (np.square(pixels[:, i] - _palette()[:, i]) for i in range(3))
    nearest = (red + green + blue).argmin(axis=-1)
    return np.where(nearest < len(COLOURS), nearest, -1)


def components(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Connected components (8 neighbours) of equal labels: [B,H,W], each pixel the smallest flat index of its own component.

    Background pixels (label -1) get -1. Every image of the batch is labelled at once: each pixel takes the smallest
    index around it, then the one that the pixel of that index has, until nothing changes.
    """
    batch, height, width = labels.shape
    far = height * width
    shifts = [np.s_[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    around = np.pad(labels, ((0, 0), (1, 1), (1, 1)), constant_values=-1)
    barriers = [np.where(around[shift] == labels, 0, far).astype(np.int32) for shift in shifts]
    index = np.where(labels >= 0, np.arange(far).reshape(1, height, width), far).astype(np.int32)
    while True:
        padded = np.pad(index, ((0, 0), (1, 1), (1, 1)), constant_values=far)
        smallest = index
        for shift, barrier in zip(shifts, barriers, strict=True):
            smallest = np.minimum(smallest, padded[shift] + barrier)
        known = np.concatenate([smallest.reshape(batch, far), np.full((batch, 1), far, np.int32)], axis=1)
        update = np.take_along_axis(known, known, axis=1)[:, :far].reshape(labels.shape)
        if np.array_equal(update, index):
            return np.where(labels >= 0, index, -1).astype(np.int64)
        index = update


def _contrast(share: NDArray[np.floating]) -> NDArray[np.float64]:
    """Coverage with its faint and its nearly full values pushed to 0 and 1, which takes out the background's unevenness."""
    return np.clip((np.asarray(share, dtype=np.float64) - 0.15) / 0.7, 0, 1)


@cache
def _templates(edge: int) -> tuple[tuple[str, ...], NDArray[np.float64], NDArray[np.float64]]:
    """Every shape at sizes around `edge` px, at the nine places around the middle of a window of `edge` + 4 px.

    Names [N], templates [N,W*W] and their sums [N].
    """
    window = edge + 2 * _MARGIN
    names, stack = [], []
    for shape in SHAPES:
        for size in range(edge - 1, edge + 3):
            drawn = _contrast(coverage(shape, size, size))
            first = (window - size) // 2 - 1
            for y in range(first, first + 3):
                for x in range(first, first + 3):
                    canvas = np.zeros((window, window))
                    canvas[y : y + size, x : x + size] = drawn
                    names.append(shape)
                    stack.append(canvas.ravel())
    templates = np.stack(stack)
    return tuple(names), templates, templates.sum(axis=1)


def match(share: NDArray[np.floating], edge: int) -> tuple[str, float]:
    """The shape whose template fits best.

    Args:
        share: [W,W], how much of the object's colour each pixel shows, in 0..1, W = `edge` + 4.
        edge: the longer edge of the object's box, px.

    Returns:
        Name of the shape, and the intersection over union of soft masks (sum of minima over sum of maxima).
    """
    names, templates, sums = _templates(edge)
    soft = _contrast(share).ravel()
    shared = np.minimum(soft, templates).sum(axis=1)
    overlap = shared / (soft.sum() + sums - shared)  # maxima: what either has, less what both have
    best = int(overlap.argmax())
    return names[best], float(overlap[best])


def detect(images: NDArray[np.floating], threshold: float = THRESHOLD) -> list[list[Detection]]:
    """Find the shapes of each picture.

    Args:
        images: [B,3,32,32], RGB in 0..1.
        threshold: confidence in 0..1 under which a detection is dropped. Confidence is the overlap with the best
            template, 0 at an intersection over union of 0.5 and 1 from 0.8 on.

    Returns:
        For each picture its detections, most confident first, at most 16 of a class.

    Raises:
        ValueError: the pictures are not [B,3,32,32].
    """
    if images.ndim != 4 or images.shape[1:] != (3, PICTURE, PICTURE):
        raise ValueError(f"the detector reads pictures [B,3,{PICTURE},{PICTURE}], not {list(images.shape)}")
    labels = segment(images)
    parts = components(labels)
    return [_detect_one(*each, threshold) for each in zip(images, labels, parts, strict=True)]


def _detect_one(
    image: NDArray[np.floating], labels: NDArray[np.int64], parts: NDArray[np.int64], threshold: float
) -> list[Detection]:
    found: list[Detection] = []
    for root, area in zip(*np.unique(parts[parts >= 0], return_counts=True), strict=True):
        ys, xs = np.nonzero(parts == root)
        x0, x1, y0, y1 = int(xs.min()), int(xs.max()) + 1, int(ys.min()), int(ys.max()) + 1
        edges = (x1 - x0, y1 - y0)
        if area < _MIN_AREA or min(edges) < _MIN_EDGE or max(edges) > _MAX_EDGE:
            continue
        colour = int(labels.flat[int(root)])
        others = (parts >= 0) & (parts != root)
        share = _share(image, labels, others, colour, (x0, y0), max(edges))
        shape, overlap = match(share, max(edges))
        score = min(max((overlap - _IOU_ZERO) / (_IOU_FULL - _IOU_ZERO), 0.0), 1.0)
        if score >= threshold:
            box = (float(x0), float(y0), float(x1), float(y1))
            found.append(Detection(shape, box, score, tuple(COLOURS)[colour]))
    found.sort(key=lambda detection: -detection.score)
    return [d for i, d in enumerate(found) if sum(o.label == d.label for o in found[:i]) < MOST_PER_CLASS]


def _share(
    image: NDArray[np.floating],
    labels: NDArray[np.int64],
    others: Bools,
    colour: int,
    corner: tuple[int, int],
    edge: int,
) -> NDArray[np.float64]:
    """How far each pixel around an object has moved from the local background to the object's colour: [edge + 4, edge + 4]."""
    x, y = corner
    inside = np.s_[max(y - _MARGIN, 0) : y + edge + _MARGIN, max(x - _MARGIN, 0) : x + edge + _MARGIN]
    pixels = np.moveaxis(image, 0, -1)[inside].astype(np.float64)
    empty = labels[inside] < 0
    background = np.median(pixels[empty], axis=0) if empty.any() else np.full(3, _GREYS.mean())
    direction = _palette()[colour] - background
    share = (pixels - background) @ direction / (direction @ direction)
    share = np.where(others[inside], 0.0, share)
    canvas = np.zeros((edge + 2 * _MARGIN,) * 2)
    top, left = max(_MARGIN - y, 0), max(_MARGIN - x, 0)
    canvas[top : top + share.shape[0], left : left + share.shape[1]] = share
    return canvas
