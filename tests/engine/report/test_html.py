"""report.html: self-contained, safe, complete, and truthful about missing pictures."""

import base64
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from rtdmd_cli.engine.report.grid import GridRow, picture_grid, save_png
from rtdmd_cli.engine.report.html import MAX_GRIDS, RunReport, metrics_series, render_report, write_report
from rtdmd_cli.engine.report.page import POLICY, Picture, Table, format_duration

EVIL = "<script>alert(1)</script> & \"quoted\" 'http://evil.example/x.png'"
VOID = {"meta", "img", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Tags with their attributes, the text outside of <style>, and whether tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def report(tmp_path: Path) -> RunReport:
    rows = [GridRow("a photo of two red circles", torch.rand(4, 3, 32, 32))]
    pictures = []
    for step in (0, 100, 200):
        path = tmp_path / f"step-{step}.png"
        save_png(picture_grid(rows), path, {"step": str(step)})
        pictures.append(Picture(path, f"Iteration {step}: {EVIL}"))
    metrics: list[dict[str, object]] = []
    for i in range(1, 201):
        row: dict[str, object] = {
            "iteration": i,
            "fake_loss": 1 / i,
            "fake_grad_norm": 1 + 1 / i,
            "seconds": 0.5 * i,
        }
        metrics.append(row | ({"dmd_loss": 2.0, "generator_grad_norm": 0.3} if i % 2 == 0 else {}))
    return RunReport(
        title=f"shapes {EVIL}",
        status="finished",
        iterations=200,
        target_iterations=200,
        seconds=252,
        verdict=EVIL,
        facts=[("Preset", EVIL)],
        tables=[
            Table(EVIL, ["model", "score", "note"], [["teacher", 0.87, EVIL], ["stage 1", 0.825, None]], EVIL)
        ],
        metrics=metrics,
        grids=pictures,
        health=pictures[0],
        lag={
            EVIL: ([0, 100, 200], [0.75, 0.75, 0.75]),
            "lag": ([0, 100, 200], [0.5, 0.25, 0.125]),
            "lag_teacher": ([0, 100, 200], [4.0, 4.0, 4.0]),
        },
        preset_yaml=f"name: '{EVIL}'\n",
        environment=[("torch", EVIL)],
        command=f"rtdmd distill --name '{EVIL}'",
    )


def test_nothing_is_loaded_and_nothing_is_run(report: RunReport) -> None:
    text = render_report(report)
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "audio",
        "video",
        "use",
        "image",
    }
    policies = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [POLICY]
    assert {"default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"} <= set(POLICY.split("; "))
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "src", "srcset", "action", "xmlns", "xlink:href", "style", "background"):
            value = attributes.get(name, "#")
            assert value.startswith("#") or (tag == "img" and value.startswith("data:image/png;base64,"))
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in style


def test_every_given_text_is_escaped_and_shown(report: RunReport) -> None:
    text = render_report(report)
    assert "<script" not in text
    # Title twice, verdict, fact, table title, cell and note, three captions and the health panel's, preset,
    # environment, command; the lag's name stands in its chart.
    assert Page(text).text.count("<script>alert(1)</script>") >= 14


def test_the_answer_comes_first_with_the_key_figures(report: RunReport) -> None:
    report = replace(report, verdict="The generator scores 0.83.")
    text = Page(render_report(report)).text
    answer = text[text.index("The generator scores") : text.index("Preset")]
    assert "The run finished: 200 iterations in 4 min 12 s (0.794 a second)." in answer
    assert "The DMD loss stayed at 2." in answer
    assert "The fake-score loss went from 0.18 to 0.00525." in answer
    assert "lag went from 0.5 to 0.125." in answer


def test_an_unfinished_run_says_how_far_it_came() -> None:
    report = RunReport("run", "interrupted", iterations=1200, target_iterations=15000, seconds=3600)
    page = Page(render_report(report))
    assert "The run was interrupted: 1,200 of 15,000 iterations in 1 h 00 min (0.333 a second)." in page.text
    assert not page.all("section") and not page.all("img")


def test_sections_are_complete_and_grids_newest_first(report: RunReport) -> None:
    page = Page(render_report(report))
    anchors = [a["id"] for a in page.all("section")]
    assert anchors == ["results", "samples", "curves", "health", "settings"]
    assert [a["href"] for a in page.all("a")] == [f"#{anchor}" for anchor in anchors]
    captions = [a["alt"].split(":")[0] for a in page.all("img")]
    assert captions == ["Iteration 200", "Iteration 100", "Iteration 0", "Iteration 0"]
    newest = page.all("img")[0]
    assert base64.b64decode(newest["src"].split(",")[1]) == report.grids[-1].path.read_bytes()
    assert (newest["width"], newest["class"]) == ("576", "sharp")
    charts = [a["aria-label"].split(".")[0] for a in page.all("svg")]
    assert charts == ["Fake-score loss", "DMD loss", "Gradient norms, before clipping", "Lag"]
    assert len(page.all("details")) == 3
    assert "How to read it: the fake score’s picture should look like the generator’s" in page.text


def test_a_metric_without_a_curve_is_still_shown_and_lag_is_found_among_the_metrics(
    report: RunReport,
) -> None:
    rows = [{"iteration": i, "lr": 0.1 * i, "lag": 1.0 / i} for i in range(1, 5)]
    page = Page(render_report(replace(report, metrics=rows, lag={})))
    assert "Other metrics" in page.text
    assert [a["aria-label"].split(".")[0] for a in page.all("svg")] == ["lr", "Lag"]
    assert "lag went from 1 to 0.25" in page.text


def test_many_grids_are_thinned_evenly_and_the_page_says_so(report: RunReport) -> None:
    path = report.grids[0].path
    grids = [Picture(path, f"Iteration {step}") for step in range(100)]
    page = Page(render_report(replace(report, grids=grids, health=None)))
    captions = [a["alt"] for a in page.all("img")]
    assert len(captions) == MAX_GRIDS
    assert (captions[0], captions[-1]) == ("Iteration 99", "Iteration 0")
    assert f"Earlier in the run ({MAX_GRIDS - 1} of 99)" in page.text


def test_a_missing_or_foreign_picture_is_named_and_does_not_stop_the_report(
    report: RunReport, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign.png"
    foreign.write_bytes(b"<svg onload=alert(1)>" * 10)
    grids = [Picture(foreign, "foreign"), Picture(tmp_path / "gone.png", "gone")]
    page = Page(render_report(replace(report, grids=grids, health=None)))
    assert not page.all("img")
    assert "gone.png could not be read." in page.text
    assert "foreign.png is not a PNG picture." in page.text
    assert str(tmp_path) not in render_report(replace(report, grids=grids, health=None))


def test_tables_align_numbers_and_give_one_column_one_precision(report: RunReport) -> None:
    text = render_report(report)
    assert '<td class="number">0.870</td>' in text and '<td class="number">0.825</td>' in text
    assert "<td>–</td>" in text
    with pytest.raises(ValueError, match="a row of 1 cells under 2 headings"):
        render_report(replace(report, tables=[Table("t", ["a", "b"], [["x"]])]))


def test_written_file(report: RunReport, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, replace(report, command="rtdmd --out r\udcff"))
    first = path.read_bytes()
    assert len(first) < 20_000 + 60_000 + 4 * math.ceil(report.grids[0].path.stat().st_size * 4 / 3)
    assert b'<meta charset="utf-8">' in first[:200]
    write_report(path, replace(report, command="rtdmd --out r\udcff"))
    assert path.read_bytes() == first
    assert not [item for item in tmp_path.iterdir() if item.suffix not in {".png", ".html"}]


def test_metrics_series() -> None:
    rows: list[dict[str, object]] = [
        {"iteration": 1, "fake_loss": 0.5, "note": "x", "flag": True, "none": None},
        {"iteration": 2, "fake_loss": math.nan, "dmd_loss": 2},
        {"fake_loss": 9.0},
        {"iteration": 3, "fake_loss": 0.25, "dmd_loss": math.inf},
    ]
    assert metrics_series(rows) == {"fake_loss": ([1.0, 3.0], [0.5, 0.25]), "dmd_loss": ([2.0], [2.0])}
    assert metrics_series([]) == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (252, "4 min 12 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
