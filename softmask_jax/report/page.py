"""One self-contained HTML document: its style, its script, and escaped text. Nothing is loaded from anywhere."""
import base64
import datetime
import hashlib
import html
import importlib.metadata
import re
from collections.abc import Sequence

# Okabe and Ito's palette, which colour-blind readers can tell apart; lighter on dark ground.
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --raised: #f5f6f8; --text: #1c1f24; --pale: #5c6370; --line: #d9dce2;
  --c0: #0072b2; --c1: #d55e00; --c2: #00805a; --c3: #b0568a; --c4: #a87000; --c5: #3a86b8; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181d; --raised: #1e2229; --text: #e6e8ec; --pale: #a0a7b4;
  --line: #363c47; --c0: #56b4e9; --c1: #ff8a3d; --c2: #2cc79a; --c3: #e08fc0; --c4: #e6b422; --c5: #9ad0f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem 1rem 3rem; max-width: 80rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
p { margin: .4rem 0; max-width: 60rem; } .pale, .note, footer { color: var(--pale); } footer { margin-top: 2rem; }
.warnings { border-left: 4px solid var(--c1); background: var(--raised); padding: .5rem .5rem .5rem 1.6rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 13.5rem), 1fr)); gap: .75rem;
  margin: 1rem 0; padding: 0; list-style: none; }
.cards li { background: var(--raised); border-radius: .5rem; padding: .6rem .9rem; } .cards span { display: block; }
.cards .value { font-size: 1.35rem; font-weight: 600; line-height: 1.3; } .cards .pale { font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { position: relative; margin: 0; padding: .6rem .6rem .4rem; border: 1px solid var(--line); border-radius: .5rem;
  min-width: 0; }
figcaption { font-weight: 600; } figcaption:has(+ input) { padding-right: 6.5rem; }
figure > svg { display: block; width: 100%; height: auto; }
figure > input { position: absolute; top: .98rem; right: 4.9rem; margin: 0; accent-color: var(--c0); }
figure > label { position: absolute; top: .72rem; right: .6rem; font-size: .8rem; color: var(--pale); }
svg.log, input:checked ~ svg.linear { display: none; } input:checked ~ svg.log { display: block; }
.legend { display: flex; flex-wrap: wrap; gap: 0 .9rem; margin: 0; padding: 0; list-style: none; font-size: .85rem; }
svg.key { width: 22px; height: 8px; margin-right: .3rem; } .note, output { font-size: .85rem; }
output { display: block; min-height: 1.5em; color: var(--pale); font-variant-numeric: tabular-nums; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .d1 { stroke-dasharray: 5 3; } .d2 { stroke-dasharray: 1.5 2.5; }
.line, .whisker { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.whisker { stroke-width: 1.2; stroke-dasharray: none; } .band { fill: var(--c); opacity: .18; }
.faint { opacity: .5; stroke-width: 1; } circle, .bar { fill: var(--c); }
.grid { stroke: var(--line); stroke-width: .6; } .frame { fill: none; stroke: var(--pale); stroke-width: 1; }
.rule { stroke: var(--pale); stroke-width: 1; visibility: hidden; }
figure text { fill: var(--pale); font: 11px system-ui, sans-serif; } .tick.x, .name { text-anchor: middle; }
.tick.y { text-anchor: end; }
pre { background: var(--raised); border-radius: .5rem; padding: .7rem .9rem; margin: .4rem 0 1rem;
  white-space: pre-wrap; font: .85rem/1.45 ui-monospace, monospace; max-height: 24rem; overflow-y: auto; }
.scroll { overflow-x: auto; margin: .5rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); }
.scroll td, .scroll th { overflow-wrap: normal; } .scroll .long { overflow-wrap: anywhere; min-width: 14rem; }
summary { cursor: pointer; margin: .6rem 0; }
@media print { figure, li, tr { break-inside: avoid; } figure > input, figure > label, output { display: none; } }
"""

# Reads the figures under the pointer out; the page is whole without it.
SCRIPT = """
"use strict";
addEventListener("error", event => { document.documentElement.dataset.error = event.message; });
const said = value => value === null ? "not finite" :
  Math.abs(value) >= 1e9 || (value && Math.abs(value) < 1e-4) ? value.toExponential(3) :
  value.toLocaleString("en", { maximumSignificantDigits: Math.abs(value) < 1000 ? 4 : 12, maximumFractionDigits: 4 });
for (const figure of document.querySelectorAll("figure[data-series]")) {
  const series = JSON.parse(figure.dataset.series), out = document.createElement("output");
  out.setAttribute("aria-live", "off");
  out.textContent = "\\u00a0";
  figure.append(out);
  const show = event => {
    const svg = event.target.closest("svg[data-x]");
    if (!svg) return;
    const [left, right, low, high] = svg.dataset.x.split(" ").map(Number), box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width - left) / (right - left);
    const x = low + Math.min(1, Math.max(0, at)) * (high - low);
    const nearest = series.map(one => one.x.reduce((best, value, i) =>
      value !== null && Math.abs(value - x) < Math.abs((one.x[best] ?? Infinity) - x) ? i : best, 0));
    const points = series.map((one, i) => one.x[nearest[i]]).filter(value => value !== null);
    const chosen = points.reduce((best, value) => Math.abs(value - x) < Math.abs(best - x) ? value : best, points[0]);
    out.textContent = figure.dataset.xName + " " + said(chosen) + ": " + series.map((one, i) =>
      (series.length > 1 ? one.name + " " : "") + said(one.y[nearest[i]])).join(", ");
    for (const rule of figure.querySelectorAll(".rule")) {
      const place = left + (chosen - low) / (high - low) * (right - left);
      rule.setAttribute("x1", place);
      rule.setAttribute("x2", place);
      rule.style.visibility = "visible";
    }
  };
  figure.addEventListener("pointermove", show);
  figure.addEventListener("pointerdown", show);
  figure.addEventListener("pointerleave", () => {
    out.textContent = "\\u00a0";
    for (const rule of figure.querySelectorAll(".rule")) rule.style.visibility = "hidden";
  });
}
"""

# What HTML cannot hold, and halves of surrogate pairs, which UTF-8 cannot.
UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def text(value) -> str:
    """Any value as inert HTML text, also inside a quoted attribute."""
    return html.escape(UNWRITABLE.sub("\ufffd", str(value)))


def document(title: str, *body: str, style: str = "", script: str = "") -> str:
    """A whole page. The browser is told to load nothing and to run no script but this module's and the one given.

    Args:
      title: plain text. body: HTML. style, script: what a page needs beside this module's, both after it.
    """
    scripts = [one for one in (SCRIPT, script) if one]
    hashes = (base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; form-action 'none'"
    )
    try:
        version = importlib.metadata.version("softmask_jax")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    written = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return "".join([
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        f"<title>{text(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n",
        *body,
        f"<footer><p>Written by softmask_jax {text(version)}, {written}.</p></footer>\n",
        *(f"<script>{one}</script>\n" for one in scripts),
        "</body>\n</html>\n",
    ])  # fmt: skip


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table that scrolls by itself where it is wider than the page; cells are escaped."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    lines = ("".join(f'<td{" class=long" * (len(str(cell)) > 40)}>{text(cell)}</td>' for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def cards(entries: Sequence[tuple[str, str, str]]) -> str:
    """Headline numbers: (what, value, what it rests on) each."""
    items = (
        f'<li><span>{text(what)}</span><span class="value">{text(value)}</span>'
        f'<span class="pale">{text(more)}</span></li>'
        for what, value, more in entries
    )
    return f'<ul class="cards">{"".join(items)}</ul>\n'


def section(title: str, *content: str) -> str:
    """A heading and what is under it; nothing where that is empty."""
    inner = "".join(content)
    return f"<section>\n<h2>{text(title)}</h2>\n{inner}</section>\n" if inner else ""


def figures(*charts: str) -> str:
    """Charts side by side as far as the width allows."""
    inner = "".join(charts)
    return f'<div class="charts">\n{inner}</div>\n' if inner else ""


def warnings(lines: Sequence[str]) -> str:
    """What a reader must know first."""
    return f'<ul class="warnings">{"".join(f"<li>{text(line)}</li>" for line in lines)}</ul>\n' if lines else ""
