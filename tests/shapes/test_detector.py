"""The detector: ground truth, pictures that show something else, and pictures that show nothing."""

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from rtdmd_cli.engine.judges.geneval import judge, task_scores
from rtdmd_cli.shapes.detector import COUNTING_THRESHOLD, THRESHOLD, components, detect, match, segment
from rtdmd_cli.shapes.grammar import Caption, Thing, parse, requirement, scene_for
from rtdmd_cli.shapes.prompts import benchmark
from rtdmd_cli.shapes.render import COLOURS, SHAPES, SIZES, Item, Scene, coverage, render

Array = NDArray[np.float32]


def threshold_of(caption: Caption) -> float:
    return COUNTING_THRESHOLD if caption.task == "counting" else THRESHOLD


def verdicts(pictures: Array, captions: list[Caption]) -> list[bool]:
    found = {limit: detect(pictures, limit) for limit in {threshold_of(caption) for caption in captions}}
    return [judge(found[threshold_of(c)][row], requirement(c)).correct for row, c in enumerate(captions)]


@cache
def rendered() -> tuple[list[Caption], Array]:
    """The benchmark's captions and a picture of each."""
    rng = np.random.default_rng(0)
    captions = list(benchmark())
    return captions, np.stack([render(scene_for(caption, rng)) for caption in captions])


def test_ground_truth_is_read_rightly() -> None:
    captions, pictures = rendered()
    marks = verdicts(pictures, captions)
    scores = task_scores({"tag": c.task, "correct": mark} for c, mark in zip(captions, marks, strict=True))
    assert scores.overall >= 0.99
    assert min(score for score in scores.tasks.values() if score is not None) >= 0.99


@pytest.mark.parametrize("task", ["position", "color_attr"])
def test_swapped_colours_or_relations_change_the_verdict(task: str) -> None:
    captions, pictures = rendered()
    rows = [row for row, caption in enumerate(captions) if caption.task == task][::3]
    swapped = [_swap(captions[row]) for row in rows]
    assert not any(verdicts(pictures[rows], swapped))


def _swap(caption: Caption) -> Caption:
    """The first thing in the second's place: shapes of a relation, or colours."""
    first, second = caption.things
    if caption.relation:
        return Caption(caption.task, (second, first), caption.relation)
    return Caption(caption.task, (Thing(first.shape, second.colour), Thing(second.shape, first.colour)))


def test_another_number_changes_the_verdict() -> None:
    captions, pictures = rendered()
    rows = [row for row, caption in enumerate(captions) if caption.task == "counting"][::3]
    for change in (1, 2):
        things = [captions[row].things[0] for row in rows]
        others = [Thing(t.shape, t.colour, (t.count - 2 + change) % 3 + 2) for t in things]
        assert not any(verdicts(pictures[rows], [Caption("counting", (thing,)) for thing in others]))


def test_blank_and_noise_pictures_hold_nothing() -> None:
    rng = np.random.default_rng(1)
    blank = np.stack(
        [render(Scene((), (grey, grey, grey), (0.05, -0.05))) for grey in np.linspace(0.47, 0.71, 16)]
    )
    noise = rng.random((16, 3, 32, 32), dtype=np.float32)
    faint = (blank + 0.05 * rng.standard_normal(blank.shape)).astype(np.float32)
    assert [detections for detections in detect(np.concatenate([blank, noise, faint])) if detections] == []


def test_blurred_pictures_fail() -> None:
    captions, pictures = rendered()
    blurred = pictures[::5]
    for _ in range(12):  # a binomial blur of 5 px standard deviation, about half a shape
        blurred = _blur(blurred)
    marks = verdicts(blurred, captions[::5])
    assert sum(marks) / len(marks) < 0.05


def _blur(x: Array) -> Array:
    """A box of 5 x 5 px, edges repeated."""
    padded = np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(2, 3))
    return windows.mean(axis=(4, 5), dtype=np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_template_of_a_shape_is_its_own(shape: str, size: int) -> None:
    share = np.pad(coverage(shape, size, size), 2)
    assert match(share, size) == (shape, pytest.approx(1.0))


@pytest.mark.parametrize("colour", COLOURS)
def test_a_detection_tells_shape_colour_and_place(colour: str) -> None:
    picture = render(Scene((Item("square", colour, 18, 3, 10),), (0.6, 0.6, 0.6), (0.0, 0.0)))
    ((detection,),) = detect(picture[None])
    assert (detection.label, detection.color, detection.box) == ("square", colour, (18, 3, 28, 13))
    assert detection.score == 1.0


def test_a_half_drawn_shape_is_no_confident_detection() -> None:
    picture = render(scene_for(parse("a photo of a red circle"), np.random.default_rng(3)))[None]
    whole = detect(picture)[0][0]
    x0, y0, x1, y1 = (int(edge) for edge in whole.box)
    half = picture.copy()
    half[:, :, y0:y1, (x0 + x1) // 2 : x1] = 0.6
    assert whole.score == 1.0
    assert not [d for d in detect(half, COUNTING_THRESHOLD)[0] if d.label == "circle"]


def test_colours_are_told_apart_and_greys_are_background() -> None:
    swatches = [*COLOURS.values(), (0.5, 0.5, 0.5), (0.7, 0.68, 0.72)]
    labels = segment(np.array(swatches).T[None, :, None, :])
    assert labels.tolist() == [[[*range(len(COLOURS)), -1, -1]]]


def test_components_against_a_flood_fill() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(-1, 3, size=(6, 9, 11))
    expected = np.full(labels.shape, -1)
    for image, out in zip(labels, expected, strict=True):
        for root in range(image.size):
            if image.flat[root] >= 0 and out.flat[root] < 0:
                _flood(image, out, root)
    np.testing.assert_array_equal(components(labels), expected)


def _flood(image: NDArray[np.int64], out: NDArray[np.int64], root: int) -> None:
    height, width = image.shape
    stack = [divmod(root, width)]
    while stack:
        y, x = stack.pop()
        if 0 <= y < height and 0 <= x < width and out[y, x] < 0 and image[y, x] == image.flat[root]:
            out[y, x] = root
            stack += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


def test_a_picture_is_read_the_same_alone_and_in_a_batch() -> None:
    _, pictures = rendered()
    few = pictures[::60]
    assert detect(few) == detect(few) == [detect(picture[None])[0] for picture in few]


@pytest.mark.parametrize("size", [(3, 32, 32), (2, 3, 64, 64), (2, 1, 32, 32)])
def test_other_sizes_are_refused(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="32"):
        detect(np.zeros(size))
