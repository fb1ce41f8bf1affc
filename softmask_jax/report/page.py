"""Self-contained HTML document with its style, its script and escaped text; loads nothing."""
import base64
import datetime
import hashlib
import html
import importlib.metadata
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path


def asset(name: str, **fields) -> str:
    """Text of a file in this folder, with `$name` fields filled in."""
    content = Path(__file__).with_name(name).read_text("utf-8")
    return string.Template(content).substitute(fields) if fields else content


# Okabe and Ito's palette, safe for colour-blind readers.
STYLE = "\n" + asset("page.css")
# Hover read-out; the page is complete without it.
SCRIPT = "\n" + asset("page.js")

# Characters that HTML forbids, and surrogates, which UTF-8 cannot encode.
UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def text(value) -> str:
    """Any value as inert HTML text, safe inside quoted attributes."""
    return html.escape(UNWRITABLE.sub("\ufffd", str(value)))


def document(title: str, *body: str, style: str = "", script: str = "", framed: str = "") -> str:
    """A whole page, whose content security policy forbids loading anything and running other scripts.
    title: plain text; body: HTML; style, script: added after those of this module; framed: the page of a `frame`, whose
    scripts are allowed, too."""
    scripts = [source for source in (SCRIPT, script) if source]
    allowed = [*scripts, *re.findall("<script>(.*?)</script>", framed, re.DOTALL)]
    hashes = (base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in allowed)
    try:
        version = importlib.metadata.version("softmask_jax")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    return asset(
        "page.html", title=text(title), body="".join(body), style=STYLE + style, version=text(version),
        allowed=" ".join(f"'sha256-{one}'" for one in hashes),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        scripts="".join(f"<script>{one}</script>\n" for one in scripts),
    )  # fmt: skip


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table that scrolls if wider than the page; cells are escaped."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    lines = ("".join(f'<td{" class=long" * (len(str(cell)) > 40)}>{text(cell)}</td>' for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def block(content: str, most: int) -> str:
    """Text as it is, cut to `most` characters."""
    return f"<pre>\n{text(content[:most])}{' ... (cut)' if len(content) > most else ''}</pre>\n"


def cards(entries: Sequence[tuple[str, str, str]]) -> str:
    """Headline numbers: (title, value, explanation) each."""
    item = '<li><span>{}</span><span class="value">{}</span><span class="pale">{}</span></li>'
    items = "".join(item.format(*map(text, entry)) for entry in entries)
    return f'<ul class="cards{_columns(len(entries))}">{items}</ul>\n'


def section(title: str, *content: str) -> str:
    """A heading and its content; "" without content."""
    inner = "".join(content)
    return f"<section>\n<h2>{text(title)}</h2>\n{inner}</section>\n" if inner else ""


def frame(title: str, source: str, height: int) -> str:
    """Another page inside a page, which must allow its script; height: pixels."""
    attributes = f'sandbox="allow-scripts" width="100%" height="{height}" style="border: 0" title="{text(title)}"'
    return f'<iframe {attributes} srcdoc="{html.escape(source)}"></iframe>\n'


def figures(*charts: str) -> str:
    """Charts in as many columns as fit and leave no gap in the last row."""
    charts = [chart for chart in charts if chart]
    return f'<div class="charts{_columns(len(charts))}">\n{"".join(charts)}</div>\n' if charts else ""


def _columns(count: int) -> str:
    """CSS class for so many equals."""
    return next((f" by{n}" for n in (3, 4, 5, 2) if count % n == 0), "" if count > 1 else " by1")


def choice(title: str, options: Mapping[str, str]) -> str:
    """One of several contents, picked by radio buttons that need no script. options: content by label."""
    slug = re.sub(r"\W+", "-", title.lower()).strip("-")
    buttons = "".join(
        f'<input type="radio" name="{slug}" id="{slug}-{i}"{" checked" * (i == 0)}>'
        f'<label for="{slug}-{i}">{text(label)}</label>'
        for i, label in enumerate(options)
    )  # fmt: skip
    contents = "".join(f"<div>\n{content}</div>\n" for content in options.values())
    return f'<fieldset class="choice"><legend>{text(title)}</legend>{buttons}\n{contents}</fieldset>\n'


def verdict(sentences: Sequence[str], small: str = "") -> str:
    """The first thing that a page says, and what it rests on; "" without a sentence."""
    large = "".join(f'<p class="verdict">{text(sentence)}</p>\n' for sentence in sentences if sentence)
    return large + (f'<p class="pale">{text(small)}</p>\n' if large and small else "")


def warnings(lines: Sequence[str]) -> str:
    """Highlighted list."""
    return f'<ul class="warnings">{"".join(f"<li>{text(line)}</li>" for line in lines)}</ul>\n' if lines else ""
