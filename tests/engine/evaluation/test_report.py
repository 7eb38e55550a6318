"""The report of an evaluation: what stands where, and that nothing in it can run or load anything."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rtdmd_cli.engine.evaluation.report import plain_markdown, report_page, report_text
from rtdmd_cli.engine.evaluation.tables import Shown, best_and_worst, groups, lead, result_table

NASTY = '<img src=x onerror="alert(1)"> & | `b` [a](http://c)'


def figure(key: str, value: float, **more: Any) -> dict[str, Any]:
    row = {
        "key": key,
        "label": key,
        "name": key,
        "judge": key,
        "value": value,
        "prompts": 100,
        "pictures": 100,
    }
    return row | {"interval": [value - 0.1, value + 0.1], "stamp": "", "trained_on": False} | more


def summary(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(
        ("model_hash", "eta", "width", "height", "seconds_per_picture", "device")
    )
    found |= {"benchmark": "drawbench", "model": NASTY, "images": 100, "images_per_prompt": 1, "steps": 4}
    found |= {
        "evaluations": 4,
        "guidance": 1.0,
        "seed": 0,
        "version": "0",
        "protocol": "200 prompts",
        "dtype": "fp32",
    }
    found |= {"figures": [figure("hpsv2", 0.3, stamp="100 of 200 prompts")], "breakdowns": [], "failures": []}
    found |= {"published": None, "trained_on": [], "judges": {"hpsv2": "published"}}
    return found | changes


def shown(folder: Path, count: int, side: int = 32) -> list[Shown]:
    found = []
    for index in range(count):
        path = folder / f"{index:05d}/samples/0000.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (side, side), (index, 0, 0)).save(path)
        record = {"prompt": NASTY, "prompt_index": index, "image_index": 0, "tag": None}
        found.append(Shown(path, record | {"scores": {"hpsv2": index / count}}))
    return found


class Page(HTMLParser):
    """The tags of a page, the addresses in it, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.urls: list[str] = []
        self.words = ""
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.urls += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_is_closed_and_escaped(tmp_path: Path) -> None:
    text = report_page(summary(), shown(tmp_path, 6), f"rtdmd eval {NASTY}", [("torch", NASTY)])
    page = Page(text)
    assert not {"script", "iframe", "object", "form", "link"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert all(url.startswith(("data:image/png;base64,", "#")) for url in page.urls)
    assert page.words.count(NASTY) >= 2 + 12  # title, command and every caption
    assert (
        "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "width=device-width" in text
    )
    assert "100 of 200 prompts" in page.words
    assert text == report_page(
        summary(),
        [Shown(each.path, each.record) for each in shown_again(tmp_path)],
        f"rtdmd eval {NASTY}",
        [("torch", NASTY)],
    )


def shown_again(folder: Path) -> list[Shown]:
    found = []
    for index, path in enumerate(sorted(folder.glob("*/samples/*.png"))):
        record = {"prompt": NASTY, "prompt_index": index, "image_index": 0, "tag": None}
        found.append(Shown(path, record | {"scores": {"hpsv2": index / 6}}))
    return found


def test_large_pictures_are_reduced_and_lost_ones_named(tmp_path: Path) -> None:
    pictures = shown(tmp_path, 2, side=600)
    pictures[0].path.write_bytes(b"none")
    text = report_page(summary(), pictures, "", [])
    assert "0000.png could not be read" in text
    found = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    assert found and base64.b64decode(found[0]).startswith(b"\xff\xd8")
    assert 'width="256" height="256"' in text


def test_best_and_worst(tmp_path: Path) -> None:
    pictures = shown(tmp_path, 60)
    best, worst = best_and_worst(pictures)
    assert [each.record["prompt_index"] for each in best] == list(range(59, 35, -1))
    assert [each.record["prompt_index"] for each in worst] == list(range(24))
    strict = [
        Shown(Path(name), {"scores": {"geneval": score}, "soft": soft})
        for name, score, soft in (("a", 0.0, 0.9), ("b", 1.0, 1.0), ("c", 0.0, 0.1), ("d", 1.0, 0.8))
    ]
    best, worst = best_and_worst(strict)
    assert [each.path.name for each in (*best, *worst)] == ["b", "d", "c", "a"]
    assert len(best_and_worst(strict[:1])[0]) == 1


def test_groups_by_task(tmp_path: Path) -> None:
    tags = ["colors"] * 20 + ["position"] * 3
    pictures = [Shown(Path(str(n)), {"tag": tag, "scores": {"x": 0.0}}) for n, tag in enumerate(tags)]
    found = groups(pictures)
    assert list(found) == ["colors", "position"] and len(found["position"]) == 3
    assert [each.path.name for each in found["colors"]] == ["0", "2", "5", "7", "10", "12", "15", "17"]


@pytest.mark.parametrize("width", [512, 1024, None])
def test_a_published_figure_of_another_size_is_marked(width: int | None) -> None:
    rows = [figure("pickscore", 22.9)]
    theirs = {"rows": [{"model": "X", "figures": {"pickscore": 22.3}}], "note": "", "source": "S"}
    theirs |= {"size": 1024, "other_size": width == 512}
    table = result_table(summary(figures=rows, published=theirs, width=width))
    marked = table.rows[0][-1] == "published at 1024 px, this at 512 px"
    assert marked is ("--size 1024" in table.note) is (width == 512)


def test_published_figures_stand_beside_and_trained_ones_are_marked() -> None:
    rows = [figure("hpsv2", 0.3), figure("clipscore", 0.29, trained_on=True, stamp="2 of 200 prompts")]
    published = {
        "source": "A Paper",
        "note": "Of other prompts.",
        "rows": [{"model": "Theirs", "evaluations": 4, "figures": {"hpsv2": 0.3516}}],
    }
    table = result_table(summary(figures=rows, published=published))
    assert table.columns[-2:] == ["published: Theirs", "remark"] and table.columns[1] == "this model"
    assert [row[-2:] for row in table.rows] == [["0.3516", "–"], ["–", "trained on; 2 of 200 prompts"]]
    assert "A Paper" in table.note and "Of other prompts." in table.note
    assert "The model was trained on this measure." in lead(summary(figures=rows[1:]))


@pytest.mark.parametrize("text", ["a|b", "<script>", "*x*", "[a](b)", "line\nbreak", "`x`", "# head"])
def test_markdown_shows_text_as_it_is(text: str) -> None:
    plain = plain_markdown(text)
    assert "\n" not in plain and not re.search(r"(?<!\\)[|<*\[`#]", plain)


def test_the_text_links_pictures(tmp_path: Path) -> None:
    text = report_text(summary(), shown(tmp_path / "a b", 2), "rtdmd eval x", tmp_path)
    assert "(<a%20b/00001/samples/0000.png>)" in text and "    rtdmd eval x" in text
    assert "| hpsv2 | 0.3000 | 0.2000 to 0.4000 | 100 | 100 of 200 prompts |" in text
    assert "<img" not in text.replace("\\<img", "")


def test_none_of_the_worst_has_the_best_score(tmp_path: Path) -> None:
    pictures = shown(tmp_path, 60)
    for number, each in enumerate(pictures):
        each.record["scores"]["hpsv2"] = 1.0 if number > 2 else 0.0
    best, worst = best_and_worst(pictures)
    assert len(best) == 24 and [each.path for each in worst] == [each.path for each in pictures[:3]]
    assert "The 3 worst" in Page(report_page(summary(), pictures, "", [])).words
    for each in pictures:
        each.record["scores"]["hpsv2"] = 1.0
    assert best_and_worst(pictures)[1] == []
    assert "worst" not in Page(report_page(summary(), pictures, "", [])).words


def test_the_other_models_pictures_stand_beside_this_ones(tmp_path: Path) -> None:
    mine, other = shown(tmp_path / "mine", 2), shown(tmp_path / "other", 2)
    compared = summary(compare={"other": {"model": NASTY}, "pairs": [], "stamp": ""})
    text = report_page(compared, mine, "", [], list(zip(mine, other, strict=True)))
    part = text[text.index('<section id="beside">') :].partition("</section>")[0]
    assert part.count("<img") == 4 and "Where the two differ most" in part and NASTY not in part
    assert 'id="beside"' not in report_page(summary(), mine, "", [])
