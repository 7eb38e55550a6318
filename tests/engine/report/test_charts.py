"""Line charts: where points land, ticks, what is left out, and that the text is safe and accessible."""

import math
import random
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtdmd_cli.engine.report import charts
from rtdmd_cli.engine.report.charts import Series, format_number, line_chart


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def lines(svg: str, style: str) -> list[list[tuple[float, float]]]:
    found = [item for item in parsed(svg).iter("polyline") if item.get("class") == style]
    return [
        [(float(x), float(y)) for x, y in (p.split(",") for p in item.get("points", "").split())]
        for item in found
    ]


def texts(svg: str) -> list[str]:
    return ["".join(item.itertext()) for item in parsed(svg).iter("text")]


def test_points_land_where_the_ticks_say() -> None:
    svg = line_chart("Loss", [Series("loss", [0, 50, 100], [0.0, 1.0, 0.5])])
    (line,) = lines(svg, "s0")
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.11)
    assert y1 < y0
    assert x2 == charts.WIDTH - charts.RIGHT
    assert len(list(parsed(svg).iter("circle"))) == 3
    assert {"0", "0.2", "0.8", "1", "100"} <= set(texts(svg))


def test_a_logarithmic_axis_spaces_decades_evenly_and_leaves_out_what_it_cannot_show() -> None:
    svg = line_chart("Norm", [Series("norm", [0, 1, 2, 3, 4], [0.001, 0.1, 0.0, 10.0, -3.0])], log=True)
    (line,) = lines(svg, "s0")
    (_, low), (_, middle), (_, high) = line
    assert low - middle == pytest.approx(middle - high, abs=0.11)
    assert {"0.01", "0.1", "1", "10"} <= set(texts(svg))


def test_a_noisy_line_is_smoothed_over_its_raw_values_and_a_calm_one_is_not() -> None:
    random.seed(0)
    x = [float(i) for i in range(2000)]
    noisy = line_chart("n", [Series("n", x, [1.0 + random.gauss(0, 0.2) for _ in x])])
    (raw,), (smooth,) = lines(noisy, "s0 raw"), lines(noisy, "s0")
    assert len(raw) <= charts.MAX_POINTS and len(smooth) <= charts.MAX_POINTS

    def spread(line: list[tuple[float, float]]) -> float:
        return max(y for _, y in line) - min(y for _, y in line)

    assert spread(smooth) < 0.25 * spread(raw)
    ramp = [min(1.0, value / 500) for value in x]
    (corner,) = lines(line_chart("r", [Series("r", x, ramp)]), "s0")
    top = min(y for _, y in corner)
    reached = next(px for px, y in corner if y < top + 0.3)
    assert reached == pytest.approx(corner[0][0] + 0.25 * (corner[-1][0] - corner[0][0]), abs=3)


def test_one_spike_neither_flattens_the_chart_nor_bends_the_line() -> None:
    random.seed(1)
    x = [float(i) for i in range(400)]
    y = [1.0 + random.gauss(0, 0.05) for _ in x]
    calm = line_chart("t", [Series("t", x, y)])
    spiked = line_chart("t", [Series("t", x, [*y[:200], 500.0, *y[201:]])])
    assert texts(spiked) == texts(calm)
    (bent,), (straight,) = lines(spiked, "s0"), lines(calm, "s0")
    assert bent[200] == pytest.approx(straight[200], abs=12)
    # The spike is drawn to the upper edge: the highest tick.
    edge = min(float(rule.get("y1", "")) for rule in parsed(spiked).iter("line"))
    assert min(height for _, height in lines(spiked, "s0 raw")[0]) == edge


def test_every_series_has_its_own_style_and_a_legend_with_its_last_value() -> None:
    many = [Series(f"s = {i}", [0, 1], [0.1 * i, 0.123 * (i + 1)]) for i in range(4)]
    svg = line_chart("Lag", many)
    assert [len(lines(svg, f"s{i}")) for i in range(4)] == [
        2,
        2,
        2,
        2,
    ]  # the line, and its sample in the legend
    assert "s = 3 0.492" in texts(svg)
    assert "s = 0 0.123" in texts(svg)
    assert not any(
        text.startswith("only") for text in texts(line_chart("Lag", [Series("only", [0, 1], [1, 2])]))
    )


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, -math.inf]])
def test_no_values(values: list[float]) -> None:
    assert "no values" in texts(line_chart("Loss", [Series("loss", list(range(len(values))), values)]))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(), min_size=1, max_size=60), st.booleans())
def test_everything_stays_inside_the_picture(values: list[float], log: bool) -> None:
    svg = line_chart("Loss", [Series("loss", list(range(1, len(values) + 1)), values)], log=log)
    for name, low, high in (("x", 0, charts.WIDTH), ("y", 0, charts.HEIGHT)):
        for found in re.findall(rf'\b[c]?{name}[12]?="(-?[\d.]+)"', svg):
            assert low <= float(found) <= high
    for style in ("s0", "s0 raw"):
        for line in lines(svg, style):
            assert all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in line)


def test_text_is_escaped_and_the_chart_is_named_for_screen_readers() -> None:
    svg = line_chart(
        '<script>"&', [Series("<b>", [0, 1], [1, 2]), Series("c&d", [0, 1], [2, 3])], x_label="<x>"
    )
    assert "<script" not in svg and "<b>" not in svg and "<x>" not in svg
    root = parsed(svg)
    assert root.get("role") == "img"
    assert root.findtext("title") == '<script>"&'
    assert "c&d: 2 at <x> 0, 3 at 1" in root.findtext("desc", "")
    assert "http" not in svg and "style=" not in svg


def test_series_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="3 x values, 2 y values"):
        line_chart("Loss", [Series("loss", [1, 2, 3], [1, 2])])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-0.0, "0"),
        (15000, "15,000"),
        (999.6, "1,000"),
        (2.414, "2.41"),
        (0.0999999, "0.1"),
        (0.0012, "0.0012"),
        (1.25e-5, "1.25e−5"),
        (-0.5, "−0.5"),
        (3e9, "3e9"),
        (100, "100"),
    ],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize("values", [[2.0, 2.0], [2.0, 2.0 + 4e-16], [0.0, 0.0], [0.0, 5e-324], [-3.0, -3.0]])
def test_a_level_line_lies_in_the_middle_of_its_axis(values: list[float]) -> None:
    low, high, ticks = charts._linear_scale(values, 5)
    assert low < values[0] - 0.09 * (abs(values[0]) or 1) and high > values[1] + 0.09 * (abs(values[1]) or 1)
    assert len(ticks) >= 3


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_linear_ticks_are_few_tidy_and_cover_the_values(low: float, size: float) -> None:
    start, end, ticks = charts._linear_scale([low, low + size], 5)
    assert 2 <= len(ticks) <= 12
    assert start <= low + 1e-6 * size and end >= low + size - 1e-6 * size
    assert ticks == sorted(set(ticks))


def test_no_two_ticks_have_the_same_label() -> None:
    """Three digits would write 15,000.2 and 15,000.4 alike, and 0.98765 and 0.98766."""
    for low, high in ((15_000.0, 15_001.0), (0.98765, 0.98769), (1e8, 1e8 + 5), (-2.0001, -2.0)):
        ticks = charts._linear_scale([low, high], 5)[2]
        labels = charts.tick_labels(ticks)
        assert len(set(labels)) == len(ticks) > 2
    assert charts.tick_labels([0.0, 0.25, 0.5]) == ["0", "0.25", "0.5"]
    assert charts.tick_labels([0, 5000, 15_000]) == ["0", "5,000", "15,000"]


@pytest.mark.parametrize("value", [0.21, 0.3, 0.5, 0.77, 1.0, 3.3, 940.0])
def test_a_short_logarithmic_axis_has_two_ticks_at_least(value: float) -> None:
    low, high, ticks = charts._log_scale([value, 1.2 * value])
    assert len(ticks) >= 2 and all(low <= tick <= high for tick in ticks)
