"""Charts as SVG: well-formed, scaled to their values, thinned without losing extremes, and readable to machines."""
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from softmask_jax.report.chart_axes import Axis, log_ticks, number, tick_name, ticks
from softmask_jax.report.charts import MOST_POINTS, Series, bar_chart, line_chart, smoothed


def parsed(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(figure.replace(" checked>", ' checked="">').replace('"><label', '"/><label'))


def points(path: str) -> np.ndarray:
    return np.array([[float(v) for v in pair.split()] for pair in re.findall(r"[-\d.]+ [-\d.]+", path)])


def paths(figure: str, kind: str, svg: str = "linear") -> list[str]:
    found = parsed(figure).findall(f"./svg[@class='{svg}']/path")
    return [one.get("d") for one in found if one.get("class").split()[0] == kind]


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0, 300), (2.1, 8.3), (-2.51, -2.34), (0, 1e-5), (1e12, 2.4e13), (5, 5.001)]
)
def test_ticks_are_round_inside_and_neither_few_nor_many(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 7 and low - 1e-9 * abs(low) <= found[0] and found[-1] <= high * (1 + 1e-9) + 1e-12
    step = found[1] - found[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-6), 3) in (1, 2, 5)
    names = [tick_name(value, step) for value in found]
    assert len(set(names)) == len(names) and max(map(len, names)) <= 9


@pytest.mark.parametrize("low, high", [(1, 1e6), (10, 22), (0.3, 60), (1e-9, 1e9), (2.0, 4.5)])
def test_log_ticks_are_inside_and_neither_few_nor_many(low, high):
    found = log_ticks(low, high)
    assert 3 <= len(found) <= 8 and low <= found[0] and found[-1] <= high and found == sorted(found)


@pytest.mark.parametrize(
    "value, said",
    [(0, "0"), (12345.6, "12,346"), (999.94, "999.9"), (13.444, "13.44"), (0.01234, "0.01234"), (2.5e13, "2.500e+13"),
     (3e-6, "3.000e-06"), (-1.5, "-1.500"), (float("inf"), "inf"), (float("nan"), "nan")],
)  # fmt: skip
def test_numbers_have_four_digits(value, said):
    assert number(value) == said


def test_ticks_are_named_shortly():
    pairs = (20_000, 5000), (1.5e6, 5e5), (2e13, 1e13), (0.05, 0.05), (300, 100), (-2.4, 0.1)
    assert [tick_name(*pair) for pair in pairs] == ["20k", "1.5M", "2e13", "0.05", "300", "-2.4"]
    assert [tick_name(value, 5000, 10_000) for value in (0, 5000, 10_000)] == ["0", "5k", "10k"]
    assert [tick_name(value, 2e-9, 2.1e-7) for value in (2.04e-7, 2.06e-7)] == ["2.04e-7", "2.06e-7"]
    assert [tick_name(value, 5e-4, 2e-3) for value in (5e-4, 1e-3, 1.5e-3)] == ["5e-4", "1e-3", "1.5e-3"]


def test_an_axis_maps_its_ends_to_its_pixels():
    assert Axis(2, 4, 0, 100)([2, 3, 4]).tolist() == [0, 50, 100]
    assert Axis(1, 100, 200, 0, log=True)([1, 10, 100]).tolist() == [200, 100, 0]


def test_a_curve_goes_through_its_points_and_hands_them_to_the_read_out():
    figure = line_chart("Loss", [Series("loss", [0, 50, 100], [1.0, 3.0, 2.0])], y_label="nats")
    (line,) = paths(figure, "line")
    (x0, y0), (x1, y1), (x2, y2) = points(line)
    assert x0 < x1 < x2 and x1 - x0 == pytest.approx(x2 - x1) and y1 < y2 < y0  # pixels count downward
    assert (y0 - y2) == pytest.approx((y0 - y1) / 2, abs=0.2)
    data = json.loads(parsed(figure).get("data-series"))
    assert data == [{"name": "loss", "x": [0, 50, 100], "y": [1, 3, 2]}]
    left, right, low, high = map(float, parsed(figure).find("svg").get("data-x").split())
    assert (left, right, low, high) == pytest.approx((x0, x2, 0, 100))


def test_a_chart_has_a_title_a_description_and_names_of_axes():
    svg = parsed(line_chart("A <b> & c", [Series("s", [1, 2], [3, 4])], x_label="step", y_label="nats")).find("svg")
    named = svg.get("aria-labelledby").split()
    assert svg.get("role") == "img" and [svg.find("title").get("id"), svg.find("desc").get("id")] == named
    assert svg.find("title").text == "A <b> & c" and "s: 2 points, first 3.000, last 4.000" in svg.find("desc").text
    assert {"step", "nats"} <= {text.text for text in svg.findall("text")}


def test_a_log_scale_is_offered_where_values_are_positive_and_spread():
    spread = line_chart("A", [Series("s", [1, 2, 3], [1, 10, 100])], log=True)
    first, middle, last = points(paths(spread, "line", "log")[0])[:, 1]
    assert first - middle == pytest.approx(middle - last, abs=0.2) and " checked>" in spread
    for values in ([1, 1.5, 1.9], [-1, 10, 100], [0, 10, 100]):
        assert "log scale" not in line_chart("A", [Series("s", [1, 2, 3], values)])


def test_intervals_are_whiskers_of_few_estimates_and_a_band_of_many():
    few = Series("s", [1, 2], [2, 3], [1, 2], [3, 4])
    figure = line_chart("A", [few])
    assert len(paths(figure, "whisker")) == 1 and not paths(figure, "band") and "<circle" in figure
    x = np.arange(50.0)
    figure = line_chart("A", [Series("s", x, x + 3, x + 2, x + 4)])
    assert len(paths(figure, "band")) == 1 and not paths(figure, "whisker")
    assert len(points(paths(figure, "band")[0])) == 100


def test_what_is_not_finite_leaves_a_gap_and_lone_points_are_marked():
    x, y = np.arange(20.0), np.ones(20)
    y[[5, 7]], y[12] = np.nan, np.inf
    figure = line_chart("A", [Series("s", x, y)])
    assert [len(points(path)) for path in paths(figure, "line")] == [5, 1, 4, 7]
    assert len(parsed(figure).findall("./svg[@class='linear']/circle")) == 1
    assert "NaN" not in figure and json.loads(parsed(figure).get("data-series"))[0]["y"][5] is None


@pytest.mark.parametrize(
    "y", [[], [math.nan, math.inf], [7.0], [0.0, 0.0], [-3.0, -3.0], [1e150, -1e150], [1e-300, 2e-300]]
)
def test_any_values_make_a_chart(y):
    figure = line_chart("A", [Series("s", list(range(len(y))), y)])
    parsed(figure)
    assert not re.search(r'[" ](nan|inf)', re.sub("<desc.*?</desc>|data-series=.*?>", "", figure))


def test_a_long_curve_is_thinned_to_its_extremes():
    x = np.arange(200_000.0)
    y = np.sin(x / 1e4)
    y[123_456], y[77_777] = 50.0, -50.0
    thin = Series("s", x, y).thinned()
    assert len(thin.x) <= MOST_POINTS and max(thin.y) == 50 and min(thin.y) == -50 and (np.diff(thin.x) > 0).all()
    assert thin.x[list(thin.y).index(50.0)] == 123_456
    band = Series("s", x, y, y - 1, y + 1).thinned()
    np.testing.assert_allclose(np.asarray(band.high) - band.y, 1)
    y[:1000] = np.nan
    assert np.isnan(Series("s", x, y).thinned().y[0])


def test_a_running_mean_ignores_what_is_not_finite():
    np.testing.assert_allclose(smoothed([1, 2, 3, np.nan, 5], rows=1), [1.5, 2, 2.5, 4, 5])
    assert smoothed([]).shape == (0,) and np.isnan(smoothed([np.nan])).all()
    noise = np.random.default_rng(0).standard_normal(1000)
    assert smoothed(noise).std() < 0.35


def test_bars_are_as_high_as_their_values_and_say_them():
    figure = bar_chart("Bars", {"a": 1.0, "b": 2.0, "c": math.nan})
    heights = [float(bar.get("height")) for bar in parsed(figure).findall(".//rect")]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2) and len(heights) == 2
    assert parsed(figure).find(".//rect/title").text == "a: 1.000"
    assert "no finite value" in bar_chart("Bars", {"a": math.nan})


def test_more_series_than_colours_differ_by_their_dashes():
    series = [Series(str(i), [0, 1], [i, i + 1]) for i in range(14)]
    looks = [path.get("class") for path in parsed(line_chart("A", series)).findall("./svg[@class='linear']/path")]
    lines = [look for look in looks if look.startswith("line")]
    assert len(set(lines)) == 14
