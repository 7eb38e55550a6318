"""Labelled grids of pictures as PNG: samples beside the teacher's, and the health panel of the fake score.

Labels use the one scalable font that Pillow carries, so that a grid looks the same on every machine. That
font knows ASCII and a few signs: accents are dropped from labels, other scripts appear as boxes; the PNG's
text chunks and the report hold the full text.
"""

import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from rtdmd_cli.engine.storage.files import write_bytes

# All lengths in pixels.
SMALL_SIDE = 128  # smaller pictures are magnified to at least this
LARGE_SIDE = 384  # larger pictures are reduced to this
MIN_WIDTH = 320  # of the area for pictures and labels, so that a label always has room for a few words
MARGIN = 20
GAP = 8
ROW_GAP = 22
LABEL_GAP = 7
MAX_LINES = 2
LOSSLESS_SIDE = 256  # single pictures up to this are PNG
JPEG_QUALITY = 92

PAPER = (240, 240, 237)
INK = (34, 36, 40)
MUTED = (98, 102, 110)

ELLIPSIS = "…"
PLAIN_SIGNS = str.maketrans({"–": "-", "—": "-", "−": "-", "×": "x", "→": "->", "•": "·", "\u00a0": " "})


@dataclass(frozen=True)
class GridRow:
    """One row: a title above its pictures; each picture is [3,H,W] with values 0..1."""

    title: str
    images: Sequence[Tensor] | Tensor


def to_pil(image: Tensor) -> Image.Image:
    """[3,H,W], 0..1 (clamped), any float type and device, as an 8-bit RGB picture of W x H.

    Raises ValueError for another shape, an integer type or a value that is not finite.
    """
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise ValueError(f"a picture is a float tensor [3,H,W], not {image.dtype} {list(image.shape)}")
    values = image.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("a picture holds values that are not finite")
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def as_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB: 16-bit grey is scaled, not cut off; what is transparent lies on white."""
    if image.mode.startswith("I"):  # grey of 16 bits, as Pillow opens it
        grey = np.asarray(image, dtype=np.float64) / 65535
        image = Image.fromarray((grey.clip(0, 1) * 255).round().astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return image.convert("RGB")


def picture_grid(
    rows: Sequence[GridRow], columns: Sequence[str] = (), scale: int | None = None
) -> Image.Image:
    """Rows of pictures, each under its own title, with a heading over each column.

    columns: headings, one for each picture of a row, or none at all. A row may hold fewer pictures than
    headings.
    scale: whole magnification with nearest neighbour, 1 or more. None: pictures under 128 px are magnified to
    128 px or a little more, pictures over 384 px reduced to that.
    Labels wrap to two lines at most; what does not fit ends in an ellipsis. Raises ValueError for an empty
    grid, a row with more pictures than headings, or a scale under 1.
    """
    count = max((len(row.images) for row in rows), default=0)
    if count == 0:
        raise ValueError("a grid needs at least one picture")
    if columns and count > len(columns):
        raise ValueError(f"{count} pictures in a row, but only {len(columns)} column headings")
    if scale is not None and scale < 1:
        raise ValueError(f"scale must be 1 or more, not {scale}")
    cells = [[_sized(to_pil(image), scale) for image in row.images] for row in rows]
    width = max(cell.width for row in cells for cell in row)
    titles = [row.title for row in rows]
    return _draw(titles, cells, list(columns) or [""] * count, width)


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the picture with `metadata` as text chunks (any Unicode value), atomically and with the same
    bytes for the same input. Raises ValueError for a key that PNG does not allow, EnvironmentFailure when the
    disk refuses."""
    info = PngInfo()
    for key, text in sorted(metadata.items()):
        if not 1 <= len(key) <= 79 or not key.isascii() or not key.isprintable():
            raise ValueError(f"a PNG text key has 1 to 79 printable ASCII characters, not {key!r}")
        info.add_text(key, text)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info, compress_level=6)
    write_bytes(path, buffer.getvalue())


def save_picture(image: Tensor, path: Path) -> Path:
    """Write one picture [3,H,W], 0..1, atomically: as PNG up to 256 px, else as JPEG. `path` has no suffix.

    Returns the path with its suffix. Errors as `to_pil` and `save_png`.
    """
    picture, buffer = to_pil(image), io.BytesIO()
    small = max(picture.size) <= LOSSLESS_SIDE
    if small:
        picture.save(buffer, format="PNG", compress_level=6)
    else:
        picture.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    target = path.with_name(f"{path.name}.{'png' if small else 'jpg'}")
    write_bytes(target, buffer.getvalue())
    return target


def _sized(image: Image.Image, scale: int | None) -> Image.Image:
    """The picture as it is shown: whole magnification, or reduced when it is large and no scale is asked
    for."""
    side = max(image.size)
    if scale is None and side > LARGE_SIDE:
        size = (
            max(1, round(image.width * LARGE_SIDE / side)),
            max(1, round(image.height * LARGE_SIDE / side)),
        )
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = scale if scale is not None else -(-SMALL_SIDE // side)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _draw(titles: list[str], cells: list[list[Image.Image]], columns: list[str], width: int) -> Image.Image:
    """Lay out and draw: headings, then for each row its title and its cells; `width` is a column's width."""
    row_font, column_font = ImageFont.load_default(size=15), ImageFont.load_default(size=13)
    inner = max(len(columns) * (width + GAP) - GAP, MIN_WIDTH)
    headings = [_wrap(title, column_font, width) for title in columns]
    labels = [_wrap(title, row_font, inner) for title in titles]
    heading_height = max(_text_height(lines, column_font) for lines in headings)
    heights = [max((cell.height for cell in row), default=0) for row in cells]
    total = 2 * MARGIN + heading_height + ROW_GAP * (len(cells) - 1) + sum(heights)
    total += sum(_text_height(lines, row_font) for lines in labels)

    canvas = Image.new("RGB", (inner + 2 * MARGIN, total), PAPER)
    pen = ImageDraw.Draw(canvas)
    lefts = [MARGIN + index * (width + GAP) for index in range(len(columns))]
    for left, lines in zip(lefts, headings, strict=True):
        # All headings end on the same line, just above the first row.
        top = MARGIN + heading_height - _text_height(lines, column_font)
        _write(pen, (left, top), lines, column_font, MUTED)
    top = MARGIN + heading_height
    for lines, row, height in zip(labels, cells, heights, strict=True):
        _write(pen, (MARGIN, top), lines, row_font, INK)
        top += _text_height(lines, row_font)
        for left, cell in zip(lefts, row, strict=False):
            canvas.paste(cell, (left, top))
        top += height + ROW_GAP
    return canvas


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _line_height(font: Font) -> int:
    return int(font.getbbox("Apgy|")[3]) + 3


def _text_height(lines: list[str], font: Font) -> int:
    """Height of the lines with the gap to the pictures below, 0 for no text."""
    return len(lines) * _line_height(font) + LABEL_GAP if lines else 0


def _write(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: list[str],
    font: Font,
    fill: tuple[int, int, int],
) -> None:
    for index, line in enumerate(lines):
        pen.text((corner[0], corner[1] + index * _line_height(font)), line, font=font, fill=fill)


def _wrap(text: str, font: Font, width: int, max_lines: int = MAX_LINES) -> list[str]:
    """The text in at most `max_lines` lines, none wider than `width` px; breaks between words, or inside one
    that is wider than a line; an ellipsis ends the last line when text is left over."""
    lines: list[str] = []
    rest = _drawable(text)
    while rest:
        taken = _fitting(rest, font, width)
        if len(lines) == max_lines - 1 and taken < len(rest):
            return [*lines, _ellipsised(rest, font, width)]
        lines.append(rest[:taken].rstrip())
        rest = rest[taken:].lstrip()
    return lines


def _fitting(text: str, font: Font, width: int) -> int:
    """How many characters of `text` fill a line of `width` px: whole words where one fits, at least one
    character."""
    count = _prefix(text, font, width)
    if count == len(text) or text[count] == " ":
        return count
    space = text.rfind(" ", 0, count)
    return space if space > 0 else count


def _prefix(text: str, font: Font, width: int) -> int:
    """The largest number of leading characters, at least one, that is no wider than `width` px (binary
    search)."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def _ellipsised(text: str, font: Font, width: int) -> str:
    room = width - int(font.getlength(ELLIPSIS)) - 1
    return text[: _prefix(text, font, room)].rstrip(" ,.;:") + ELLIPSIS


def _drawable(text: str) -> str:
    """One line of text with accents dropped and blanks collapsed: what the built-in font can show of it."""
    plain = "".join(
        c for c in unicodedata.normalize("NFKD", text.translate(PLAIN_SIGNS)) if not unicodedata.combining(c)
    )
    # NFKD takes the ellipsis apart, which the font does know.
    return " ".join(plain.replace("...", ELLIPSIS).split())
