"""Every kind of page in a real browser: text is legible in both schemes, controls and figures have names, nothing
overflows."""
import shutil
from pathlib import Path

import numpy as np
import pytest

from softmask_jax.evaluate import results_page
from softmask_jax.generate.notebook import SideBySide
from softmask_jax.io import run_log
from softmask_jax.report import compare_page, run_page, viewer
from tests.helpers import browsing, crafted_run
from tests.helpers.browsing import browser, changed  # noqa: F401 (browser is a fixture)
from tests.helpers.crafted_trace import MASK, WordTokenizer, generated

pytestmark = pytest.mark.full
DARK = "--blink-settings=preferredColorScheme=0"
REPRODUCTION = Path(__file__).parent.parent.parent / "configs" / "reproduction" / "index.html"

# Contrasts as WCAG 2 defines them: 4.5 for text, 3 for large text and the lines of charts.
PROBE = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgba = colour => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
  return [red, green, blue, alpha / 255];
};
const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
const ground = node => node ? over(rgba(getComputedStyle(node).backgroundColor), ground(node.parentElement)) : [255, 255, 255, 1];
const luminance = colour => [.2126, .7152, .0722].reduce((sum, weight, i) => {
  const part = colour[i] / 255;
  return sum + weight * (part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4);
}, 0);
const contrast = (one, other) => {
  const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (light + .05) / (dark + .05);
};
const seen = { texts: 0, illegible: [], unnamed: [] };
const judge = (colour, under, least, what) => {
  const ratio = contrast(over(rgba(colour), under), under);
  if (ratio < least) seen.illegible.push(ratio.toFixed(2) + " " + what);
};
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const node = texts.currentNode.parentElement, style = getComputedStyle(node), size = parseFloat(style.fontSize);
  if (!texts.currentNode.textContent.trim() || node.closest("script, style, noscript")) continue;
  if (!node.checkVisibility({ visibilityProperty: true }) || !node.getClientRects().length) continue;
  const large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
  seen.texts++;
  judge(node.closest("svg") ? style.fill : style.color, ground(node), large ? 3 : 4.5, texts.currentNode.textContent.slice(0, 30));
}
for (const line of document.querySelectorAll("path.line:not(.faint), .whisker"))
  if (line.checkVisibility()) judge(getComputedStyle(line).stroke, ground(line.closest("figure")), 3, line.outerHTML.slice(0, 60));
for (const node of document.querySelectorAll("svg, input, select, button, iframe, img, [role=listbox]")) {
  const name = node.ariaLabel || node.title || node.alt || node.labels?.[0]?.textContent || node.textContent;
  if (node.checkVisibility() && !node.closest("[aria-hidden=true]") && !name.trim()) seen.unnamed.push(node.outerHTML.slice(0, 90));
}
const levels = [...document.querySelectorAll("h1, h2, h3")].map(one => Number(one.tagName[1]));
seen.skipped = levels.filter((level, i) => level > (levels[i - 1] ?? 0) + 1).length;
seen.language = document.documentElement.lang;
seen.fits = document.documentElement.scrollWidth <= innerWidth;
seen.error = document.documentElement.dataset.error ?? "";
parent.postMessage(JSON.stringify([seen]), "*");
"""


def evaluation() -> dict:
    """The content of a crafted results.json: two models, three budgets, a paired difference."""
    def estimate(value: float) -> dict:
        return {"value": value, "low": value - 3, "high": value + 3, "unit": "%", "better": "higher"}

    results = [
        {"task": "humaneval", "model": model, "budget": budget, "notes": ["164 problems"],
         "estimates": {"pass@1": estimate(value / (5 - calls / 64))}, "cost": {"calls": calls, "seconds": calls / 9}}
        for model, value in (("binary", 40.0), ("soft", 50.0)) for budget, calls in (("1/4", 64), ("1/2", 128), ("1", 256))
    ]  # fmt: skip
    difference = {"task": "humaneval", "budget": "1", "model": "soft", "baseline": "binary", "name": "pass@1", **estimate(10)}
    models = {name: {"path": f"runs/{name}" * 9, "step": 33_500, "soft_masking": "top 3"} for name in ("binary", "soft")}
    return {"results": results, "differences": [difference], "models": models, "versions": {"jax": "0.10.2"}}


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("pages")
    run, binary = crafted_run.write(at / "soft", steps=300), crafted_run.write(at / "binary", soft=False)
    crafted_run.write_account(run, steps=4e6)
    made = {"plain masks": generated(soft=False), "soft masks": generated()}
    tinted = generated(steps=2, length=250)  # opens at step 1, with masks of every tint
    tinted.trace.weight[1] = np.linspace(0, 0.3, 250)
    compared = {one.name: run_log.read(one) for one in (binary, run)}
    answer = {"text": "def main():", "empty": 0, "ended": 1, "new_tokens": 9, "calls": 8.0, "filled": 9, "seconds": 1.0}
    written = {
        "trajectory": viewer.trajectory_page(made, WordTokenizer(), mask_token_id=MASK),
        "tints": viewer.trajectory_page(tinted, WordTokenizer(), mask_token_id=MASK),
        "compare": compare_page.build(compared, ["A line.", (("run", "nats"), [("soft", "+0.1 [+0.0, +0.2]")])]),
        "evaluation": results_page.build(evaluation()),
        "answers": SideBySide(("def main(",), {"plain masks": [answer], "soft masks": [answer]}).page.source,
    }
    for name, source in written.items():
        (at / f"{name}.html").write_text(source, encoding="utf-8")
    shutil.copy(at / "trajectory.html", run / "trajectory.html")
    shutil.copy(REPRODUCTION, at / "reproduction.html")
    return {name: at / f"{name}.html" for name in (*written, "reproduction")} | {"report": run_page.write(run)}


def audited(browser: str, path: Path, width: int, *flags: str) -> dict:  # noqa: F811
    (seen,), console = browsing.probed(browser, path, width, PROBE, *flags)
    assert not console and not seen.pop("error"), console
    return seen


@pytest.mark.parametrize("width, flags", [(375, ()), (375, (DARK,)), (1024, ()), (1920, (DARK,))])
@pytest.mark.parametrize("name", ["report", "compare", "trajectory", "tints", "evaluation", "answers", "reproduction"])
def test_a_page_is_legible_named_and_as_wide_as_its_window(browser, pages, name, width, flags):  # noqa: F811
    seen = audited(browser, pages[name], width, *flags)
    assert seen.pop("texts") > 5
    assert seen == {"illegible": [], "unnamed": [], "skipped": 0, "language": "en", "fits": True}


def test_what_is_not_legible_has_no_name_or_does_not_fit_is_noticed(browser, pages):  # noqa: F811
    worse = changed(pages["compare"], "worse.html", "<h1>", '<p style="color: #999">Pale</p><button></button><h1>')
    worse = changed(worse, "worse.html", "<h2>", '<p style="width: 2000px; height: 1px"></p><h2>')
    seen = audited(browser, worse, 1024)
    assert seen["illegible"] == ["2.85 Pale"] and seen["unnamed"] == ["<button></button>"] and not seen["fits"]
