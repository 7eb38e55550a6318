"""The renderer: areas against geometry, colours where they belong, shapes inside their cells."""

import math

import numpy as np
import pytest

from rtdmd_cli.shapes.render import (
    CELL,
    CELLS,
    COLOURS,
    PICTURE,
    SHAPES,
    SIZES,
    Item,
    Scene,
    coverage,
    object_mask,
    place,
    random_scene,
    render,
)

GREY = (0.6, 0.6, 0.6)
AREAS = {
    "circle": math.pi / 4,
    "square": 1.0,
    "triangle": 1 / 2,
    "ring": math.pi / 4 * (1 - 1 / 4),
    "cross": 2 * 0.3 - 0.3**2,  # two bars of 0.3 of the edge, less their overlap
    "diamond": 1 / 2,
}
"""Share of the box."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_shape_covers_the_area_that_geometry_gives(shape: str, size: int) -> None:
    share = coverage(shape, size, size)
    assert share.shape == (size, size) and share.dtype == np.float32
    assert share.min() >= 0 and share.max() <= 1
    assert share.mean() == pytest.approx(AREAS[shape], abs=0.02)


def test_the_triangle_points_up() -> None:
    rows = coverage("triangle", 12, 12).sum(axis=1)
    assert (np.diff(rows) > 0).all()


def test_a_ring_has_a_hole_and_a_cross_has_empty_corners() -> None:
    assert coverage("ring", 12, 12)[6, 6] == 0
    assert coverage("cross", 12, 12)[0, 0] == 0 and coverage("cross", 12, 12)[6, 6] == 1


def test_an_unknown_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="star"):
        coverage("star", 10, 10)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_picture_is_the_background_with_the_colour_in_the_square(colour: str) -> None:
    picture = render(Scene((Item("square", colour, 3, 18, 10),), GREY, (0.0, 0.0)))
    expected = np.full((3, PICTURE, PICTURE), 0.6, dtype=np.float32)
    expected[:, 18:28, 3:13] = np.array(COLOURS[colour])[:, None, None]
    np.testing.assert_allclose(picture, expected, atol=1e-6)


def test_the_gradient_brightens_to_the_right_and_downwards() -> None:
    picture = render(Scene((), GREY, (0.1, 0.04)))
    assert picture[0, 0, -1] - picture[0, 0, 0] == pytest.approx(0.1, abs=1e-6)
    assert picture[0, -1, 0] - picture[0, 0, 0] == pytest.approx(0.04, abs=1e-6)
    assert picture.mean() == pytest.approx(0.6, abs=1e-6)


def test_the_mask_is_the_shapes_coverage_and_nothing_else() -> None:
    mask = object_mask(Scene((Item("ring", "red", 17, 2, 12),), GREY, (0.0, 0.0)))
    np.testing.assert_array_equal(mask[2:14, 17:29], coverage("ring", 12, 12))
    assert mask.sum() == coverage("ring", 12, 12).sum()


@pytest.mark.parametrize("cell", CELLS)
def test_shapes_stay_a_pixel_inside_their_cell_and_use_all_of_it(cell: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    items = [place("circle", "red", cell, rng) for _ in range(400)]
    for edges in ([i.x - cell[1] * CELL for i in items], [i.y - cell[0] * CELL for i in items]):
        assert min(edges) == 1
        assert max(edge + item.size for edge, item in zip(edges, items, strict=True)) == CELL - 1
    assert {item.size for item in items} == set(SIZES)


def test_the_same_seed_gives_the_same_picture_and_another_seed_another() -> None:
    def picture(seed: int) -> bytes:
        return render(random_scene([("circle", "red", (0, 1))], np.random.default_rng(seed))).tobytes()

    assert picture(5) == picture(5)
    assert picture(5) != picture(6)


def test_random_pictures_stay_in_range() -> None:
    rng = np.random.default_rng(1)
    pictures = [render(random_scene([("diamond", "white", (1, 0))], rng)) for _ in range(200)]
    assert all(p.shape == (3, PICTURE, PICTURE) and p.dtype == np.float32 for p in pictures)
    assert min(p.min() for p in pictures) >= 0 and max(p.max() for p in pictures) <= 1
