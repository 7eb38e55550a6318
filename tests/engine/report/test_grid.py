"""Picture grids: pixels, layout, labels that stay inside, deterministic PNG files with text chunks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from rtdmd_cli.engine.report import grid
from rtdmd_cli.engine.report.grid import GridRow, picture_grid, save_png, to_pil

LONG = "a photo of " + "a blue ring left of a white cross and " * 20


def picture(seed: int, side: int = 32) -> torch.Tensor:
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed))


def ink_box(image: Image.Image) -> tuple[int, int, int, int]:
    """The box around everything that is not paper."""
    drawn = np.argwhere((np.asarray(image) != grid.PAPER).any(axis=2))
    (top, left), (bottom, right) = drawn.min(axis=0), drawn.max(axis=0)
    return int(left), int(top), int(right), int(bottom)


def test_to_pil_keeps_channels_rows_and_columns_and_clamps() -> None:
    image = torch.zeros(3, 2, 4)
    image[0, 0, 3] = 1.0
    image[1, 1, 0] = 0.5
    image[2, 1, 1] = 7.0
    image[2, 0, 0] = -7.0
    pixels = to_pil(image)
    assert pixels.size == (4, 2)
    assert pixels.getpixel((3, 0)) == (255, 0, 0)
    assert pixels.getpixel((0, 1)) == (0, 128, 0)
    assert pixels.getpixel((1, 1)) == (0, 0, 255)
    assert pixels.getpixel((0, 0)) == (0, 0, 0)


def test_to_pil_takes_bfloat16_with_a_graph() -> None:
    image = torch.full((3, 4, 4), 0.25, dtype=torch.bfloat16, requires_grad=True)
    assert to_pil(image).getpixel((0, 0)) == (64, 64, 64)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(1, 4, 4),
        torch.zeros(2, 3, 4, 4),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
        torch.full((3, 4, 4), float("nan")),
    ],
)
def test_to_pil_refuses_what_is_no_picture(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="picture"):
        to_pil(image)


def test_small_pictures_are_magnified_without_blur_and_in_their_places() -> None:
    rows = [GridRow("first", [picture(0), picture(1)]), GridRow("second", [picture(2), picture(3)])]
    canvas = np.asarray(picture_grid(rows, ["left", "right"]))
    corners = []
    for seed in range(4):
        expected = np.asarray(to_pil(picture(seed)).resize((128, 128), Image.Resampling.NEAREST))
        heights = range(canvas.shape[0] - 127)
        lefts = (grid.MARGIN, grid.MARGIN + 128 + grid.GAP)
        corners += [
            (x, y) for y in heights for x in lefts if (canvas[y : y + 128, x : x + 128] == expected).all()
        ]
    assert len(corners) == 4
    assert corners[0][1] == corners[1][1] < corners[2][1] - 128
    assert corners[0][0] == corners[2][0] < corners[1][0] == corners[3][0]


@pytest.mark.parametrize(
    ("side", "scale", "shown"), [(32, None, 128), (48, None, 144), (32, 5, 160), (768, None, 384)]
)
def test_cell_sizes(side: int, scale: int | None, shown: int) -> None:
    image = picture_grid([GridRow("", [torch.zeros(3, side, side)] * 4)], scale=scale)
    assert image.size == (2 * grid.MARGIN + 4 * shown + 3 * grid.GAP, 2 * grid.MARGIN + shown)


def test_a_batch_is_a_row_and_rows_may_be_short_and_of_different_sizes() -> None:
    batch = torch.zeros(3, 3, 16, 24)
    image = picture_grid(
        [GridRow("batch", batch), GridRow("one", [picture(0)]), GridRow("none", [])], ["a", "b", "c"]
    )
    assert image.width == 2 * grid.MARGIN + 3 * 144 + 2 * grid.GAP


@pytest.mark.parametrize(
    ("rows", "columns", "scale", "message"),
    [
        ([], [], None, "at least one"),
        ([GridRow("x", [])], ["a"], None, "at least one"),
        ([GridRow("x", [picture(0)] * 2)], ["a"], None, "2 pictures in a row"),
        ([GridRow("x", [picture(0)])], ["a"], 0, "scale"),
    ],
)
def test_grids_that_make_no_sense(
    rows: list[GridRow], columns: list[str], scale: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        picture_grid(rows, columns, scale)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300), st.integers(90, 500))
def test_no_line_is_wider_than_its_room(text: str, width: int) -> None:
    font = ImageFont.load_default(size=15)
    lines = grid._wrap(text, font, width)
    assert len(lines) <= grid.MAX_LINES
    assert all(font.getlength(line) <= width for line in lines)
    whole = grid._drawable(text)
    if lines and not lines[-1].endswith("…"):
        assert "".join(lines).replace(" ", "") == whole.replace(" ", "")


def test_wrapping_breaks_between_words_and_ends_in_an_ellipsis() -> None:
    font = ImageFont.load_default(size=15)
    for width in range(280, 321, 5):
        lines = grid._wrap(LONG, font, width)
        assert len(lines) == 2
        assert LONG.startswith(lines[0] + " ")
        assert lines[1].endswith("…")
        assert font.getlength(lines[1]) > 200
    assert grid._wrap("a  short\nprompt", font, 300) == ["a short prompt"]
    assert grid._wrap(" \n", font, 300) == []
    assert grid._wrap("naïve café × 2", font, 300) == ["naive cafe x 2"]


@pytest.mark.parametrize("title", [LONG, "W" * 400, "q" * 47])
def test_labels_stay_inside_the_margins(title: str) -> None:
    row = GridRow(title, [torch.zeros(3, 32, 32)])
    image = picture_grid([row, row], [title])
    left, top, right, bottom = ink_box(image)
    assert left >= grid.MARGIN - 1
    assert right <= image.width - grid.MARGIN
    assert top >= grid.MARGIN
    assert bottom == image.height - grid.MARGIN - 1


def test_titles_do_not_cover_pictures() -> None:
    white = GridRow(LONG, [torch.zeros(3, 32, 32)])
    canvas = np.asarray(picture_grid([white, white], [LONG]))
    black = (canvas[:, grid.MARGIN : grid.MARGIN + 128] == 0).all(axis=(1, 2)).sum()
    assert black == 2 * 128


def test_png_bytes_are_deterministic_and_hold_the_text(tmp_path: Path) -> None:
    image = picture_grid([GridRow("a photo of a red circle", [picture(0)])], ["generator"])
    save_png(image, tmp_path / "a.png", {"prompt": "café 中文 <b>", "seed": "42"})
    save_png(image.copy(), tmp_path / "b.png", {"seed": "42", "prompt": "café 中文 <b>"})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as read:
        assert read.info == {"prompt": "café 中文 <b>", "seed": "42"}
        assert read.tobytes() == image.tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("key", ["", "k" * 80, "schlüssel", "a\nb"])
def test_png_keys_are_checked_before_anything_is_written(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="PNG text key"):
        save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", {key: "x"})
    assert not list(tmp_path.iterdir())
