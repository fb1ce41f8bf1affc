"""Report and compare pages in a real browser: charts are drawn, nothing overflows, hostile text stays text."""
import re
from pathlib import Path

import pytest

from softmask_jax.io import run_log
from softmask_jax.report import compare_page, page, run_page, viewer
from tests.helpers import browsing, crafted_run
from tests.helpers.browsing import browser, changed, dumped, script_hash  # noqa: F401 (browser is a fixture)
from tests.helpers.crafted_trace import MASK, WordTokenizer, generated

pytestmark = pytest.mark.full
WIDTHS = (375, 1024, 1920)

# What only a browser knows becomes attributes of <html>.
PROBE = """
const root = document.documentElement;
root.dataset.inner = innerWidth;
root.dataset.scroll = root.scrollWidth;
root.dataset.drawn = [...document.querySelectorAll("figure > svg")].filter(svg =>
  svg.getBoundingClientRect().width > 250 && svg.getBoundingClientRect().height > 100).length;
root.dataset.out = [...document.querySelectorAll("figure text, figure path.line, h1, .cards li, figcaption")].filter(
  one => one.getBoundingClientRect().right > innerWidth + 0.5 || one.matches(".tick") &&
    one.getBoundingClientRect().left < one.ownerSVGElement.getBoundingClientRect().left - 0.5).length;
const svg = document.querySelector("figure[data-series] > svg"), box = svg.getBoundingClientRect();
const at = { clientX: box.left + box.width * 0.6, clientY: box.top + 50 };
svg.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, ...at }));
root.dataset.read = document.querySelector("figure[data-series] output").textContent;
const key = name => svg.dispatchEvent(new KeyboardEvent("keydown", { bubbles: true, key: name }));
svg.dispatchEvent(new FocusEvent("blur"));
key("End");
key("ArrowLeft");
root.dataset.keyed = document.querySelector("figure[data-series] output").textContent;
root.dataset.reached = svg.tabIndex;
root.dataset.small = [...document.querySelectorAll("figure text")].filter(one => one.getBoundingClientRect().width).map(
  one => parseFloat(getComputedStyle(one).fontSize) * one.ownerSVGElement.getBoundingClientRect().width /
    one.ownerSVGElement.viewBox.baseVal.width).reduce((a, b) => Math.min(a, b), 99);
const drawn = () => [...document.querySelectorAll("figure")].filter(one => one.offsetWidth).map(
  one => one.querySelector("figcaption").textContent);
root.dataset.axes = "";
for (const radio of document.querySelectorAll("input[type=radio]")) {
  radio.click();
  root.dataset.axes += drawn().slice(0, 2).join(", ") + "; ";
}
const toggle = document.querySelector("figure > input:not(:checked)");
const shown = () => ["linear", "log"].map(kind =>
  getComputedStyle(toggle.parentNode.querySelector("svg." + kind)).display).join(" ");
if (toggle) {
  root.dataset.before = shown();
  toggle.click();
  root.dataset.after = shown();
}
root.dataset.colour = getComputedStyle(document.body).backgroundColor;
parent.postMessage(JSON.stringify([{ ...root.dataset }, root.outerHTML]), "*");
"""


def probed(browser: str, path: Path, width: int, *flags: str) -> tuple[dict[str, str], str, str]:
    """(data attributes of <html>, the page's DOM, what the browser logged) of a page as wide as this."""
    sent, console = browsing.probed(browser, path, width, PROBE, *flags)
    return *sent, console


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Pages of crafted runs: whole, hardly begun, and three runs compared."""
    at = tmp_path_factory.mktemp("pages")
    whole = crafted_run.write(at / "a-run-with-quite-a-long-name-as-people-give-them-to-sweeps_lr=0.002_k=3", steps=700)
    crafted_run.write_account(whole, steps=4e6)
    begun = crafted_run.write(at / "begun", finished=False, soft=False, steps=20, train__steps=90)
    binary = crafted_run.write(at / "binary", soft=False, data__paths="/a/very/long/path/" * 12)
    compared = at / "compare.html"
    runs = {path.name: run_log.read(path) for path in (binary, whole, begun)}
    compared.write_text(compare_page.build(runs, ["A line.", (("run", "nats"), [("x" * 90, "+0.1 [+0.0, +0.2]")])]))
    return {"whole": run_page.write(whole), "begun": run_page.write(begun), "compare": compared}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name, charts", [("whole", 14), ("begun", 6), ("compare", 10)])
def test_charts_are_drawn_and_nothing_overflows(browser, pages, name, charts, width):
    data, _, console = probed(browser, pages[name], width)
    assert int(data["inner"]) == width and int(data["scroll"]) <= width and data["out"] == "0", data
    assert int(data["drawn"]) == charts
    assert "error" not in data and not console, console


def test_the_pointer_reads_values_out_and_the_box_changes_the_scale(browser, pages):
    data, _, _ = probed(browser, pages["whole"], 1280)
    step, raw, mean = re.fullmatch(r"step (\d+): each logged row ([\d.]+), running mean ([\d.]+)", data["read"]).groups()
    assert 300 < int(step) < 500 and 2 < float(raw) < 3 and 2 < float(mean) < 3
    assert float(raw) == pytest.approx(crafted_run.train_row(int(step), True)["loss"], rel=1e-3)
    assert (data["before"], data["after"]) == ("block none", "none block")


def test_the_keyboard_reads_values_out_too(browser, pages):
    data, _, _ = probed(browser, pages["whole"], 1024)
    assert data["reached"] == "0" and data["keyed"].startswith("step 690: each logged row ")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_text_of_charts_is_never_tiny(browser, pages, width):
    assert float(probed(browser, pages["whole"], width)[0]["small"]) > 10


def test_a_comparison_shows_its_curves_once_against_the_axis_that_is_chosen(browser, pages):
    data, _, _ = probed(browser, pages["compare"], 1024)
    shown = "".join(f"Training loss by {axis}, Validation perplexity by {axis}; " for axis in ("step", "tokens", "FLOPs"))
    assert data["axes"] == shown


def test_hostile_text_is_inert_even_if_scripts_were_allowed(browser, pages):
    lax = changed(pages["whole"], "lax.html", '<meta http-equiv="Content-Security-Policy"[^>]*>', "")
    for path in (pages["whole"], lax):
        dom, console = dumped(browser, path)
        assert "owned" not in re.search("<title>(.*?)</title>", dom)[1] and "<img" not in dom
        assert "&lt;img src=x onerror=" in dom and not console and "data-error" not in dom


def test_a_script_error_would_be_noticed(browser, pages):
    script = page.SCRIPT + "absent();"
    lax = changed(pages["begun"], "lax.html", "sha256-[^']*", f"sha256-{script_hash(script)}")
    dom, console = dumped(browser, changed(lax, "broken.html", re.escape(page.SCRIPT), script))
    assert "absent is not defined" in re.search("<html[^>]*>", dom)[0] and "absent is not defined" in console


def test_the_page_follows_the_readers_dark_or_light_scheme(browser, pages):
    light, _, _ = probed(browser, pages["whole"], 1280)
    dark, _, _ = probed(browser, pages["whole"], 1280, "--blink-settings=preferredColorScheme=0")
    assert light["colour"] == "rgb(255, 255, 255)" and dark["colour"] == "rgb(21, 24, 29)"


def test_the_page_is_whole_without_scripts(browser, pages):
    silent = changed(pages["whole"], "silent.html", "script-src 'sha256-[^']*'", "script-src 'none'")
    dom, console = dumped(browser, silent)
    assert "violates the following Content Security Policy" in console
    assert "<output" not in dom and dom.count('<svg class="linear"') == 13 and "Validation perplexity" in dom


def test_a_runs_trajectory_plays_inside_its_report(browser, tmp_path):  # noqa: F811
    path = crafted_run.write(tmp_path / "run")
    made = {"plain masks": generated(soft=False), "soft masks": generated()}
    played = viewer.trajectory_page(made, WordTokenizer(), mask_token_id=MASK)
    (path / "trajectory.html").write_text(played, encoding="utf-8")
    _, console = dumped(browser, run_page.write(path))
    assert not console
    # The policy allows the scripts of the page that is there, also of another version.
    assert script_hash("older()") in page.document("report", framed="<script>older()</script>")
    # A page that does not allow the script of its frame says so.
    (tmp_path / "strict.html").write_text(page.document("strict", page.frame("frame", played, 500)), encoding="utf-8")
    _, console = dumped(browser, tmp_path / "strict.html")
    assert "Content Security Policy" in console
