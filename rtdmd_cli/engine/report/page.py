"""The parts of a self-contained HTML page: frame and style, tables, pictures. No script, nothing loaded from
anywhere.

Every function here escapes the text it is given, except `page`, whose `body` is HTML made by the others.
"""

import base64
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rtdmd_cli.engine.report.charts import CHART_CSS
from rtdmd_cli.engine.storage.scrubbing import scrub_page

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
PAGE_WIDTH = 960  # CSS pixels of the column; a wider picture is reduced by the browser

Cell = str | int | float | None


@dataclass(frozen=True)
class Picture:
    """A PNG file, what it shows, and a caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Table:
    """Results: headings, then rows whose first cell names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


def page(title: str, body: str, css: str = "", script: str = "") -> str:
    """A complete HTML document around `body`, which must be escaped already; `title` is escaped here. No home path, no token.

    css: what the body's own parts need beside the page's style. script: the one script that the page's policy lets run,
    by its hash; only the page of a run that goes on has one.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"{POLICY}; script-src 'sha256-{digest}'" if script else POLICY
    own = f"<script>{script}</script>\n" if script else ""
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)}</title>\n<style>{PAGE_CSS}{CHART_CSS}{css}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )
    # A file name that is not UTF-8 reaches Python as lone surrogates, which no file can hold.
    whole = scrub_page(text.encode("utf-8", "replace").decode("utf-8"))
    return f"{own}</body>".join(whole.rsplit("</body>", 1))  # as its hash has it


def table_html(table: Table) -> str:
    """A table that scrolls inside itself, columns of numbers set to the right. Raises ValueError for a row
    that is longer or shorter than the headings."""
    count = len(table.columns)
    for row in table.rows:
        if len(row) != count:
            raise ValueError(f"table {table.title!r}: a row of {len(row)} cells under {count} headings")
    columns = [_column([row[index] for row in table.rows]) for index in range(count)]
    sides = [' class="number"' if numeric else "" for numeric, _ in columns]
    heads = "".join(
        f'<th scope="col"{side}>{escape(n)}</th>' for n, side in zip(table.columns, sides, strict=True)
    )
    rows = ""
    for index in range(len(table.rows)):
        first, *rest = [texts[index] for _, texts in columns]
        cells = "".join(f"<td{side}>{text}</td>" for text, side in zip(rest, sides[1:], strict=True))
        rows += f'<tr><th scope="row">{first}</th>{cells}</tr>'
    title, note = escape(table.title), f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<h3>{title}</h3><div class="scroll" role="region" tabindex="0" aria-label="{title}"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


def _column(cells: Sequence[Cell]) -> tuple[bool, list[str]]:
    """(whether all are numbers, their texts): floats of one column get the same number of decimals."""
    size = max((abs(cell) for cell in cells if isinstance(cell, float)), default=0.0)
    decimals = 3 if size < 10 else 2 if size < 100 else 1
    texts = []
    for cell in cells:
        if isinstance(cell, float):
            texts.append(f"{cell:,.{decimals}f}".replace("-", "−"))
        else:
            texts.append("–" if cell is None else escape(cell) if isinstance(cell, str) else f"{cell:,}")
    return all(not isinstance(cell, str) for cell in cells), texts


def pairs_html(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values, one pair in a row."""
    rows = "".join(f'<tr><th scope="row">{escape(n)}</th><td>{escape(v)}</td></tr>' for n, v in pairs)
    return f'<div class="scroll"><table class="pairs">{rows}</table></div>'


def facts_html(facts: Sequence[tuple[str, str]]) -> str:
    """Names over values, side by side as many as fit; nothing for no facts."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{items}</dl>' if items else ""


def figure_html(picture: Picture) -> str:
    """The picture as a data URI, or a line that says why it is not there."""
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
    try:
        data = picture.path.read_bytes()
    except OSError:
        return f'<figure>{caption}<p class="note">{escape(picture.path.name)} could not be read.</p></figure>'
    size = _png_size(data)
    if size is None:
        return (
            f'<figure>{caption}<p class="note">{escape(picture.path.name)} is not a PNG picture.</p></figure>'
        )
    width, height = size
    sharp = ' class="sharp"' if width <= PAGE_WIDTH else ""
    uri = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    alt = escape(picture.caption)
    image = f'<img{sharp} src="{uri}" width="{width}" height="{height}" alt="{alt}">'
    return f"<figure>{caption}{image}</figure>"


def _png_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) from the header of a PNG file, None for anything else."""
    if len(data) < 33 or not data.startswith(b"\x89PNG\r\n\x1a\n") or data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def format_duration(seconds: float) -> str:
    """38 s, 4 min 12 s, 2 h 05 min."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


PAGE_CSS = """
:root { color-scheme: light dark; --paper: #fff; --panel: #f6f6f4; --ink: #222428; --muted: #62666e;
  --line: #e4e4e0; --link: #2563a8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --panel: #1e2125; --ink: #e8e8e5; --muted: #a2a7b0;
    --line: #2e3136; --link: #7db4ec; }
}
*, *::before, *::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: calc(960px + 2 * clamp(1.1rem, 5vw, 3rem)); margin: 0 auto;
  padding: clamp(1.6rem, 6vw, 4rem) clamp(1.1rem, 5vw, 3rem) 5rem; }
h1 { font-size: clamp(1.5rem, 5vw, 2rem); line-height: 1.2; letter-spacing: -.015em; margin: 0 0 1rem; }
h1, h3, th[scope="row"], .pairs td { overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 3.5rem 0 1rem; }
h3 { font-size: .9375rem; font-weight: 500; color: var(--muted); margin: 1.5rem 0 .5rem; }
p { max-width: 42rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
.lead { font-size: 1.125rem; }
.warning { border-left: 4px solid #c2410c; background: var(--panel); padding: .75rem 1rem; font-weight: 600; }
strong { font-weight: 600; font-variant-numeric: tabular-nums; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem 1.5rem;
  margin: 1.75rem 0; }
.facts dt { color: var(--muted); font-size: .8125rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: .6rem 0;
  border-block: 1px solid var(--line); }
nav a { color: var(--link); text-decoration: none; padding: .2rem 0; }
nav a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; background: linear-gradient(to right, var(--paper) 30%, transparent) 0 0,
  linear-gradient(to left, var(--paper) 30%, transparent) 100% 0,
  linear-gradient(to right, rgb(0 0 0 / 22%), transparent) 0 0, linear-gradient(to left, rgb(0 0 0 / 22%), transparent) 100% 0;
  background-repeat: no-repeat; background-size: 2.5rem 100%, 2.5rem 100%, .7rem 100%, .7rem 100%;
  background-attachment: local, local, scroll, scroll; } /* a shadow where there is more to the side */
table { border-collapse: separate; border-spacing: 0; min-width: 100%; font-size: .9375rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; font-weight: 400; padding: .5rem 1.25rem .5rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--muted); font-size: .8125rem; vertical-align: bottom; }
th[scope="row"] { font-weight: 500; min-width: 8.5rem; position: sticky; left: 0; background: var(--paper); }
.pairs th { width: 30%; }
.number { text-align: right; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
@media (max-width: 32rem) {
  table { font-size: .8125rem; }
  th, td { padding-right: .7rem; }
  th[scope="row"] { min-width: 5.5rem; max-width: 9rem; position: static; }
  thead th { hyphens: auto; }
  .number { white-space: normal; }
}
.note, .charts p, .figures p, figcaption { color: var(--muted); font-size: .875rem; }
.note { margin-top: .6rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
  gap: 2rem clamp(1.5rem, 3vw, 2.25rem); }
.charts p, .figures p { margin: .35rem 0 0; }
.figures { display: flex; flex-wrap: wrap; gap: 1.75rem clamp(1.5rem, 4vw, 2.5rem); align-items: flex-start; }
.figures > div { flex: 1 1 min(100%, 20rem); min-width: 0; max-width: 29rem; }
figure { margin: 0; max-width: 100%; }
figcaption { margin-bottom: .5rem; overflow-wrap: anywhere; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; outline: 1px solid var(--line); }
@media (min-width: 40rem) { img.sharp { image-rendering: pixelated; } }
details { margin-top: 1.25rem; }
summary { cursor: pointer; padding: .5rem 0; margin-bottom: .5rem; color: var(--link); }
pre { margin: 0; padding: .9rem 1rem; background: var(--panel); border-radius: 6px; overflow-x: auto;
  font: .8125rem/1.6 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.command { white-space: pre-wrap; overflow-wrap: anywhere; }
"""
