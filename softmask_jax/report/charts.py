"""Line and bar charts as inline SVG: ticks, legend, intervals, a logarithmic version, data for the hover read-out.
Styled by page.css; a chart fills its parent's width."""
import dataclasses
import html
import json
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from softmask_jax.report.chart_axes import Axis, log_ticks, number, tick_name, ticks, widened, with_margin

MOST_POINTS = 600
WIDTH, HEIGHT = 360, 226
LEFT, RIGHT, TOP, BOTTOM = 64, 347, 10, 188
# Up to this many estimates, each shows its own interval; above, intervals are a band.
MOST_WHISKERS = 12
COLOURS = 6
NOTHING = '<p class="none">no finite value</p>'


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve; non-finite values are gaps."""

    name: str
    x: Sequence[float]  # [N], ascending
    y: Sequence[float]  # [N]
    low: Sequence[float] | None = None  # [N], interval of y
    high: Sequence[float] | None = None
    faint: bool = False  # pale, behind the others
    colour: int | None = None  # palette index; None: position in the chart

    def thinned(self) -> "Series":
        """At most MOST_POINTS: minimum and maximum y of each bucket, or means if there are intervals."""
        if len(self.x) <= MOST_POINTS:
            return self
        names = ("x", "y") if self.low is None else ("x", "y", "low", "high")
        columns = {name: np.asarray(getattr(self, name), np.float64) for name in names}
        if self.low is None:
            buckets = _buckets(len(self.x), MOST_POINTS // 2)
            kept = np.unique(np.concatenate([_extremes(columns["y"], bucket) for bucket in buckets]))
            return dataclasses.replace(self, **{name: values[kept] for name, values in columns.items()})
        buckets = _buckets(len(self.x), MOST_POINTS)
        means = {name: np.array([values[bucket].mean() for bucket in buckets]) for name, values in columns.items()}
        return dataclasses.replace(self, **means)


def smoothed(y: Sequence[float], rows: int | None = None) -> np.ndarray:
    """Centred running mean of the finite values of y [N] over 2 x `rows` + 1 entries (default: N / 50)."""
    y = np.asarray(y, np.float64)
    rows = max(2, len(y) // 100) if rows is None else rows
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(y))
    first, last = np.maximum(at - rows, 0), np.minimum(at + rows + 1, len(y))
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)


def line_chart(
    title: str, series: Sequence[Series], *, x_label: str = "step", y_label: str = "", note: str = "",
    log: bool = False, named: bool = False,
) -> str:  # fmt: skip
    """A `<figure>`; titles must be unique in a page. note: what it shows, in words. log: show the logarithmic y axis
    first, if available. named: a legend for a single series, too."""
    series = [one.thinned() for one in series if len(one.x)]
    x = _finite(one.x for one in series)
    y = _finite(part for one in series for part in (one.y, one.low, one.high) if part is not None)
    if not (len(x) and len(y)):
        return _figure(title, NOTHING, note=note)
    first = 0.0 if 0 < x.min() < 0.2 * x.max() else x.min()  # runs start at 0, their rows a little later
    horizontal = Axis(*widened(first, x.max()), LEFT, RIGHT)
    verticals = {"linear": Axis(*with_margin(y.min(), y.max()), BOTTOM, TOP)}
    offers_log = y.min() > 0 and y.max() / y.min() > 2
    if offers_log:
        margin = (y.max() / y.min()) ** 0.04
        verticals["log"] = Axis(y.min() / margin, y.max() * margin, BOTTOM, TOP, log=True)
    described = _describe(series, x_label, y_label)
    svgs = [
        _svg(f"{title} ({kind})" if offers_log else title, described, kind, _curves(series, horizontal, vertical),
             (x_label, y_label), vertical, horizontal)
        for kind, vertical in verticals.items()
    ]  # fmt: skip
    data = _data(series, x_label)
    return _figure(title, *svgs, note=note, legend=_legend(series, named), toggle=offers_log, log=log, data=data)


def optional_chart(title: str, series: Sequence[Series], **options) -> str:
    """`line_chart`, or "" if no series has a point."""
    return line_chart(title, series, **options) if any(len(one.x) for one in series) else ""


def bar_chart(
    title: str, bars: Mapping[str, float], *, x_label: str = "", y_label: str = "", note: str = ""
) -> str:
    """A `<figure>` with a bar per name, such as a histogram."""
    finite = _finite([list(bars.values())])
    if not len(finite):
        return _figure(title, NOTHING, note=note)
    vertical = Axis(*with_margin(min(0.0, finite.min()), max(0.0, finite.max()) or 1.0, below=False), BOTTOM, TOP)
    step, zero, parts = (RIGHT - LEFT) / len(bars), vertical(0.0), []
    for i, (name, height) in enumerate(bars.items()):
        middle = LEFT + (i + 0.5) * step
        if np.isfinite(height):
            top = vertical(height)
            parts.append(
                f'<rect class="bar c0" x="{middle - 0.4 * step:.1f}" width="{0.8 * step:.1f}" y="{min(top, zero):.1f}" '
                f'height="{abs(zero - top):.1f}"><title>{html.escape(name)}: {number(height)}</title></rect>'
            )
        if i % -(-len(bars) // 10) == 0:
            parts.append(f'<text class="tick x" x="{middle:.1f}" y="{BOTTOM + 14}">{html.escape(name)}</text>')
    described = "; ".join(f"{name}: {number(height)}" for name, height in bars.items())
    return _figure(title, _svg(title, described, "linear", parts, (x_label, y_label), vertical), note=note)


def share_chart(title: str, shares: Mapping[str, float]) -> str:
    """A `<figure>` with a horizontal bar for each share of a whole."""
    left, right, height, parts = 150, WIDTH - 45, 22, []
    for i, (name, share) in enumerate(shares.items()):
        middle = (i + 0.5) * height
        parts.append(
            f'<text class="tick y" x="{left - 6}" y="{middle + 4:.0f}">{html.escape(name)}</text>'
            f'<rect class="bar c0" x="{left}" width="{share * (right - left):.1f}" y="{middle - 7:.0f}" height="14"/>'
            f'<text class="tick" x="{left + share * (right - left) + 5:.1f}" y="{middle + 4:.0f}">{share:.1%}</text>'
        )
    label, described = f"chart-{_slug(title)}", "; ".join(f"{name}: {share:.1%}" for name, share in shares.items())
    return _figure(title, (
        f'<svg viewBox="0 0 {WIDTH} {height * len(shares)}" role="img" aria-labelledby="{label} {label}-text">'
        f'<title id="{label}">{html.escape(title)}</title><desc id="{label}-text">{html.escape(described)}</desc>'
        f'{"".join(parts)}</svg>'
    ))  # fmt: skip


def _buckets(count: int, buckets: int) -> list[slice]:
    edges = np.linspace(0, count, buckets + 1).astype(int)
    return [slice(a, b) for a, b in zip(edges, edges[1:])]


def _extremes(y: np.ndarray, bucket: slice) -> list[int]:
    finite = bucket.start + np.flatnonzero(np.isfinite(y[bucket]))
    return [finite[y[finite].argmin()], finite[y[finite].argmax()]] if len(finite) else [bucket.start]


def _finite(parts) -> np.ndarray:
    values = np.concatenate([np.zeros(0), *(np.asarray(part, np.float64) for part in parts)])
    return values[np.isfinite(values)]


def _grid(horizontal: Axis | None, vertical: Axis) -> list[str]:
    parts, marks = [], (log_ticks if vertical.log else ticks)(vertical.low, vertical.high)
    gaps = np.diff(marks) if len(marks) > 1 else [vertical.high - vertical.low]
    for i, (value, y) in enumerate(zip(marks, vertical(marks))):
        step = gaps[max(i - 1, 0)] if vertical.log else gaps[0]
        name = tick_name(value, step, value if vertical.log else max(map(abs, marks)))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick y" x="{LEFT - 5}" y="{y + 4:.1f}">{name}</text>')
    for value in ticks(horizontal.low, horizontal.high) if horizontal else ():
        x, name = horizontal(value), tick_name(value, (horizontal.high - horizontal.low) / 5, horizontal.high)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}"/>')
        parts.append(f'<text class="tick x" x="{x:.1f}" y="{BOTTOM + 14}">{name}</text>')
    return [*parts, f'<path class="frame" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>']


def _curves(series: Sequence[Series], horizontal: Axis, vertical: Axis) -> list[str]:
    parts = []
    for i, one in sorted(enumerate(series), key=lambda pair: not pair[1].faint):
        x, y, look = horizontal(one.x), vertical(one.y), _look(one, i)
        lows, highs = (y, y) if one.low is None else (vertical(one.low), vertical(one.high))
        few = len(x) <= MOST_WHISKERS
        for part in np.ma.clump_unmasked(np.ma.masked_invalid(x + y)):
            low, high = lows[part], highs[part]
            known = one.low is not None and np.isfinite([low, high]).all()
            if known and not few:
                around = np.concatenate([x[part], x[part][::-1]]), np.concatenate([low, high[::-1]])
                parts.append(f'<path class="band {look}" d="{_path(*around)}Z"/>')
            parts.append(f'<path class="line {look}" d="{_path(x[part], y[part])}"/>')
            if few and known:
                aside = 3.0 * (i - (len(series) - 1) / 2)  # keeps whiskers of different series apart
                bars = "".join(f"M{a + aside:.1f} {b:.1f}V{c:.1f}" for a, b, c in zip(x[part], low, high))
                parts.append(f'<path class="whisker {look}" d="{bars}"/>')
            if few or part.stop - part.start == 1:
                dots = zip(x[part], y[part])
                parts += [f'<circle class="{look}" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in dots]
    return parts


def _look(one: Series, position: int) -> str:
    """CSS classes of a curve: colour, dashes, paleness."""
    colour = position if one.colour is None else one.colour
    return f"c{colour % COLOURS} d{colour // COLOURS % 3}{' faint' if one.faint else ''}"


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y))


def _svg(title: str, described: str, kind: str, parts: Sequence[str], labels: tuple[str, str], vertical: Axis,
         horizontal: Axis | None = None) -> str:  # fmt: skip
    """The drawing on its grid. labels: of the x and the y axis."""
    name, middle = f"chart-{_slug(title)}", f"{(TOP + BOTTOM) / 2:.0f}"
    x_label, y_label = map(html.escape, labels)
    domain = f' data-x="{LEFT} {RIGHT} {horizontal.low} {horizontal.high}"' if horizontal else ""
    return (
        f'<svg class="{kind}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name} {name}-text"{domain}>'
        f'<title id="{name}">{html.escape(title)}</title><desc id="{name}-text">{html.escape(described)}</desc>'
        f'{"".join([*_grid(horizontal, vertical), *parts])}'
        f'<text class="name" x="{(LEFT + RIGHT) / 2:.0f}" y="{HEIGHT - 6}">{x_label}</text>'
        f'<text class="name" x="11" y="{middle}" transform="rotate(-90 11 {middle})">{y_label}</text>'
        f'<line class="rule" y1="{TOP}" y2="{BOTTOM}"/></svg>'
    )


def _figure(title: str, *content: str, note: str = "", legend: str = "", toggle: bool = False, log: bool = False,
            data: str = "") -> str:  # fmt: skip
    name, box = f"log-{_slug(title)}", ""
    if toggle:
        box = f'<input type="checkbox" id="{name}"{" checked" * log}><label for="{name}">log scale</label>'
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    inner = "".join([f"<figcaption>{html.escape(title)}</figcaption>", box, note, legend, *content])
    return f"<figure{data}>{inner}</figure>\n"


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _legend(series: Sequence[Series], named: bool) -> str:
    if len(series) < 2 and not named:
        return ""
    sample = '<svg class="key" viewBox="0 0 22 8" aria-hidden="true"><path class="line {}" d="M0 4H22"/></svg>'
    keys = (f"<li>{sample.format(_look(one, i))}{html.escape(one.name)}</li>" for i, one in enumerate(series))
    return f'<ul class="legend">{"".join(keys)}</ul>'


def _data(series: Sequence[Series], x_label: str) -> str:
    def plain(values):
        return [float(f"{v:.6g}") if math.isfinite(v) else None for v in map(float, values)]

    points = [{"name": one.name, "x": plain(one.x), "y": plain(one.y)} for one in series]
    encoded = html.escape(json.dumps(points, separators=(",", ":")))
    return f' data-x-name="{html.escape(x_label)}" data-series="{encoded}"'


def _describe(series: Sequence[Series], x_label: str, y_label: str) -> str:
    parts = []
    for one in series:
        y = _finite([one.y])
        parts.append(
            f"{one.name}: {len(one.x)} points, first {number(y[0])}, last {number(y[-1])}, "
            f"least {number(y.min())}, greatest {number(y.max())}" if len(y) else f"{one.name}: no finite value"
        )  # fmt: skip
    return f"{y_label or 'Values'} against {x_label}. {'; '.join(parts)}."
