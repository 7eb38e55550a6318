"""Pictures side by side on a page, each with a caption: small copies as data URIs, a tick or a cross where judged."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from rtdmd_cli.engine.report.grid import as_rgb

SIDE = 256  # px of a copy; smaller pictures are embedded as they are and magnified by the browser
QUALITY = 85  # of JPEG

GALLERY_CSS = """
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: 1rem .75rem;
  margin: .75rem 0 1.5rem; padding: 0; list-style: none; }
.gallery li { min-width: 0; }
.gallery img { width: 100%; aspect-ratio: 1; object-fit: contain; }
.gallery img.sharp { image-rendering: pixelated; }
.gallery p { margin: .35rem 0 0; font-size: .8125rem; line-height: 1.35; overflow-wrap: anywhere; }
.gallery.pairs { grid-template-columns: repeat(auto-fill, minmax(15.75rem, 1fr)); gap: 1rem 1.5rem; }
.pairs ul { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; padding: 0; list-style: none; }
.gallery .why { color: var(--muted); font-size: .75rem; }
"""


@dataclass(frozen=True)
class Exhibit:
    """A picture of the gallery. mark: right, wrong or not judged so; caption and why are plain text."""

    path: Path
    caption: str
    mark: bool | None = None
    why: str = ""


def gallery_html(exhibits: Sequence[Exhibit]) -> str:
    """A list of pictures that fills the width of any screen; nothing for none."""
    return f'<ul class="gallery">{"".join(map(_item, exhibits))}</ul>' if exhibits else ""


def pair_gallery_html(pairs: Sequence[tuple[Exhibit, Exhibit]]) -> str:
    """A list of pairs of pictures, the two side by side; nothing for none."""
    items = "".join(f"<li><ul>{_item(left)}{_item(right)}</ul></li>" for left, right in pairs)
    return f'<ul class="gallery pairs">{items}</ul>' if pairs else ""


def _item(exhibit: Exhibit) -> str:
    sign = {True: "✓ ", False: "✗ ", None: ""}[exhibit.mark]
    why = f'<p class="why">{escape(exhibit.why)}</p>' if exhibit.why else ""
    return f"<li>{_image(exhibit)}<p>{sign}{escape(exhibit.caption)}</p>{why}</li>"


def _image(exhibit: Exhibit) -> str:
    found = _copy(exhibit.path)
    if found is None:
        return f"<p>{escape(exhibit.path.name)} could not be read.</p>"
    uri, (width, height) = found
    sharp = ' class="sharp"' if max(width, height) < SIDE // 2 else ""
    alt = escape(exhibit.caption)
    return f'<img{sharp} loading="lazy" src="{uri}" width="{width}" height="{height}" alt="{alt}">'


def _copy(path: Path) -> tuple[str, tuple[int, int]] | None:
    """The picture as a data URI, reduced where it is large, and its size; None where it can't be read."""
    try:
        with Image.open(path, formats=["PNG"]) as source:
            image = as_rgb(source)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    large, buffer = max(image.size) > SIDE, io.BytesIO()
    if large:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, format="JPEG", quality=QUALITY)
    else:
        image.save(buffer, format="PNG")
    kind = "jpeg" if large else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}", image.size
