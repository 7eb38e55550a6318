"""report.html and report.md of an evaluation: self-contained, everything escaped, nothing loaded from anywhere."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rtdmd_cli.engine.evaluation.folder import REPORT, REPORT_TEXT, read_about
from rtdmd_cli.engine.evaluation.picture_store import FolderPictures, FoundPictures, picture_path
from rtdmd_cli.engine.evaluation.run import Evaluation
from rtdmd_cli.engine.evaluation.score_phase import Line
from rtdmd_cli.engine.evaluation.summary import records
from rtdmd_cli.engine.evaluation.tables import Shown, Summary, best_and_worst, facts, groups, lead, tables
from rtdmd_cli.engine.report.gallery import GALLERY_CSS, Exhibit, gallery_html, pair_gallery_html
from rtdmd_cli.engine.report.page import Table, facts_html, page, pairs_html, table_html
from rtdmd_cli.engine.storage.files import write_text
from rtdmd_cli.engine.storage.run_folder import describe_environment
from rtdmd_cli.engine.storage.scrubbing import scrub_page

BESIDE = 12
"""Pictures, each beside the other model's, of the greatest gains, and as many of the greatest losses."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|<>~])")


def write_reports(
    evaluation: Evaluation,
    summary: Summary,
    folder: Path,
    device: Any,
    beside: Sequence[tuple[Shown, Shown]] = (),
) -> None:
    """Write both reports. summary: of `eval_summary` with times, and `compare` where there is one.

    beside: pictures of this model, each with the other model's, of `side_by_side`.
    """
    about = read_about(folder)
    command = " ".join(about["about"].get("command", ())) if about else ""
    environment = describe_environment([], device)
    packages = environment.pop("packages")
    environment.pop("command")
    versions = [
        (name, str(value)) for name, value in {**environment, **packages}.items() if value is not None
    ]
    shown = shown_pictures(evaluation)
    write_text(folder / REPORT, report_page(summary, shown, command, versions, beside))
    write_text(folder / REPORT_TEXT, scrub_page(report_text(summary, shown, command, folder)))


def shown_pictures(evaluation: Evaluation) -> list[Shown]:
    """All pictures of an evaluation that lies in a folder, with their records."""
    pictures = evaluation.pictures
    paths: Mapping[Any, Path]
    if isinstance(pictures, FolderPictures):
        paths = {key: pictures.path(key) for key in evaluation.ask.keys}
    else:
        assert isinstance(pictures, FoundPictures), "pictures in memory have no files"
        paths = pictures.paths
    return [
        Shown(paths[(record["prompt_index"], record["image_index"])], record)
        for record in records(evaluation)
    ]


def side_by_side(
    evaluation: Evaluation, other: Mapping[str, Sequence[Line]], folder: Path
) -> list[tuple[Shown, Shown]]:
    """The pictures on which two evaluations differ most by the first judge, greatest gain first, greatest loss last.

    other: the other's lines by judge, as `comparison.other_from_folder` gives them, and its folder. Each with the
    other model's picture of the same prompt and noise; those that are equally good are left out.
    """
    judge = evaluation.ask.judges[0].name
    theirs = {(line["prompt"], line["image"]): float(line["score"]) for line in other[judge]}
    pairs = []
    for mine in shown_pictures(evaluation):
        key = (mine.record["prompt_index"], mine.record["image_index"])
        own = float(mine.record["scores"][judge])
        if key in theirs and own != theirs[key]:
            record = {"prompt": mine.record["prompt"], "scores": {judge: theirs[key]}}
            pairs.append((own - theirs[key], mine, Shown(picture_path(folder, key), record)))
    pairs.sort(key=lambda pair: -pair[0])
    gains, losses = [p for p in pairs if p[0] > 0][:BESIDE], [p for p in pairs if p[0] < 0][-BESIDE:]
    return [(mine, its) for _, mine, its in (*gains, *losses)]


def report_page(
    summary: Summary,
    pictures: Sequence[Shown],
    command: str,
    versions: Sequence[tuple[str, str]],
    beside: Sequence[tuple[Shown, Shown]] = (),
) -> str:
    """The whole page. The same data gives the same text."""
    best, worst = best_and_worst(pictures)
    sections = [
        ("results", "Results", "".join(table_html(each) for each in tables(summary))),
        ("best", f"The {len(best)} best", gallery_html([_exhibit(each) for each in best])),
        ("worst", f"The {len(worst)} worst", gallery_html([_exhibit(each) for each in worst])),
        ("beside", "Beside the other model's", _beside(summary, beside)),
        ("pictures", "Pictures by task", _group_galleries(pictures)),
        ("settings", "Settings", _settings(summary, command, versions)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in sections)
    body = "".join(
        f'<section id="{anchor}"><h2>{heading}</h2>{content}</section>\n'
        for anchor, heading, content in sections
    )
    protocol = f'<p class="note">Protocol: {escape(summary["protocol"])}.</p>'
    answer = f'<p class="lead">{escape(lead(summary))}</p>{protocol}{facts_html(facts(summary))}'
    return page(_title(summary), f'{answer}<nav aria-label="Sections">{links}</nav>\n{body}', GALLERY_CSS)


def report_text(summary: Summary, pictures: Sequence[Shown], command: str, folder: Path) -> str:
    """The same as Markdown, pictures as links relative to `folder`."""
    best, worst = best_and_worst(pictures)
    parts = [f"# {plain_markdown(_title(summary))}", plain_markdown(lead(summary))]
    parts.append(f"Protocol: {plain_markdown(summary['protocol'])}.")
    parts.append("\n".join(f"- {name}: {plain_markdown(value)}" for name, value in facts(summary)))
    parts += [_markdown_table(each) for each in tables(summary)]
    for heading, found in ((f"The {len(best)} best", best), (f"The {len(worst)} worst", worst)):
        if not found:
            continue
        lines = [_markdown_picture(each, folder) for each in found]
        parts.append("\n".join([f"## {heading}", "", *lines]))
    if command:
        parts.append(f"## Command\n\n    {' '.join(command.split())}")
    return "\n\n".join(parts) + "\n"


def plain_markdown(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(text).split())).replace("&", "&amp;")


def _title(summary: Summary) -> str:
    return f"{summary['benchmark']}: {summary['model']}"


def _exhibit(shown: Shown) -> Exhibit:
    caption = f"{shown.record['prompt']} ({shown.scores})"
    return Exhibit(shown.path, caption, shown.correct, shown.why)


def _beside(summary: Summary, pairs: Sequence[tuple[Shown, Shown]]) -> str:
    """Pairs of pictures, this model's on the left; nothing for none."""
    if not pairs:
        return ""
    other = escape(str(summary["compare"]["other"].get("model", "the other model")))
    text = (
        f"Where the two differ most by the first judge; left {escape(str(summary['model']))}, right {other}."
    )
    return f'<p class="note">{text}</p>' + pair_gallery_html([(_exhibit(a), _exhibit(b)) for a, b in pairs])


def _group_galleries(pictures: Sequence[Shown]) -> str:
    return "".join(
        f"<h3>{escape(tag)}</h3>{gallery_html([_exhibit(each) for each in found])}"
        for tag, found in groups(pictures).items()
    )


def _settings(summary: Summary, command: str, versions: Sequence[tuple[str, str]]) -> str:
    parts = [f'<h3>Command</h3><pre class="command">{escape(command)}</pre>'] if command else []
    judges = [(name, f"{weights} weights") for name, weights in summary["judges"].items()]
    parts.append(f"<details><summary>Judges</summary>{pairs_html(judges)}</details>")
    parts.append(f"<details><summary>Machine and versions</summary>{pairs_html(versions)}</details>")
    return "".join(parts)


def _markdown_table(table: Table) -> str:
    head = " | ".join(plain_markdown(name) for name in table.columns)
    lines = [f"## {plain_markdown(table.title)}", "", f"| {head} |", "|" + "---|" * len(table.columns)]
    lines += [f"| {' | '.join(plain_markdown(str(cell)) for cell in row)} |" for row in table.rows]
    return "\n".join([*lines, "", plain_markdown(table.note)] if table.note else lines)


def _markdown_picture(shown: Shown, folder: Path) -> str:
    sign = {True: "right: ", False: "wrong: ", None: ""}[shown.correct]
    why = f" ({plain_markdown(shown.why)})" if shown.why else ""
    target = os.path.relpath(shown.path, folder).replace(" ", "%20")
    return (
        f"- [{plain_markdown(shown.record['prompt'])}](<{target}>), {sign}{plain_markdown(shown.scores)}{why}"
    )
