"""The page that plays a denoising, in a real browser: what it shows is the trace, by mouse, touch, keys and slider."""
import re

import numpy as np
import pytest

from softmask_jax.report import viewer
from tests.helpers import browsing
from tests.helpers.browsing import browser, changed, dumped  # noqa: F401 (browser is a fixture)
from tests.helpers.crafted_trace import K, LENGTH, MASK, STEPS, WORDS, WordTokenizer, generated

pytestmark = pytest.mark.full
WIDTHS = (375, 1280)
GIVEN = 4
PANEL_HINT = "Point at a position, tap it, or reach it with Tab: here is what its mask carries."

# Helpers of every probe, and what it ends with.
BEFORE = """
(async () => {
const seen = {}, find = id => document.getElementById(id), text = document.querySelector(".text"), panel = find("panel"), slider = find("slider");
const wait = time => new Promise(done => setTimeout(done, time)), cell = place => text.children[place];
const key = (name, target = document.body) => target.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
const point = (name, node, type) => node.dispatchEvent(new PointerEvent(name, { bubbles: true, pointerType: type }));
const slide = value => { slider.value = value; slider.dispatchEvent(new Event("input")); };
const cells = () => [...text.children].map(one => [one.className, one.textContent, Number(one.style.getPropertyValue("--w"))]);
const table = () => [...panel.querySelectorAll("tr")].map(line => [...line.children].map(one => one.textContent));
const fits = () => document.documentElement.scrollWidth <= innerWidth && [...document.querySelectorAll(
  "h1, button, select, input, #status, .text .p, #panel, .legend li, figure text, figcaption, dd")].every(
  one => one.getBoundingClientRect().right <= innerWidth + 0.5);
"""
AFTER = """
seen.error = document.documentElement.dataset.error ?? "";
parent.postMessage(JSON.stringify([seen]), "*");
})();
"""


@pytest.fixture(scope="module")
def made():
    return generated(given=GIVEN)


@pytest.fixture(scope="module")
def path(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("viewer") / "page.html"
    facts = {"model": "a-model-with-quite-a-long-name" * 4, "steps": STEPS}
    page = viewer.trajectory_page(made, WordTokenizer(), mask_token_id=MASK, rows=(0, 1), title="t" * 90, facts=facts)
    path.write_text(page, encoding="utf-8")
    return path


@pytest.fixture
def look(browser, path):  # noqa: F811
    def look(width: int, script: str, *flags: str, fragment: str = "", at=path) -> dict:
        (seen,), console = browsing.probed(browser, at, width, BEFORE + script + AFTER, *flags, fragment=fragment)
        assert not seen["error"] and not console, (seen["error"], console)
        return seen

    return look


@pytest.mark.parametrize("width", WIDTHS)
def test_every_frame_shows_the_traces_tokens_and_tints_its_masks_by_lambda(look, made, width):
    seen = look(width, "seen.frames = []; for (let step = 0; step <= 6; step++) { slide(step); seen.frames.push(cells()); }")
    tokens = np.concatenate([made.trace.tokens[:STEPS, 0], made.tokens[None, 0]])
    weight, largest = made.trace.weight[:, 0], made.trace.weight.max()
    for step, cells in enumerate(seen["frames"]):
        for place, (look_, word, tint) in enumerate(cells):
            id_, marks = tokens[step, place], set(look_.split())
            before = tokens[max(step - 1, 0), place]
            assert ("m" in marks) == (id_ == MASK) and ("given" in marks) == (place < GIVEN)
            assert ("new" in marks) == (before == MASK != id_) and ("back" in marks) == (id_ == MASK != before)
            assert ("changed" in marks) == (before != id_ and MASK not in (before, id_))
            if id_ == MASK and 0 < step < STEPS:
                assert abs(tint - 100 * weight[step, place] / largest) < 0.52
                candidate = WORDS[made.trace.token_ids[step, 0, place, 0]]
                assert word == "\u2581" or not candidate.isprintable() or word.strip("\u25cc") == candidate.strip() or "\u2423" in word
            elif id_ != MASK and WORDS[id_].isprintable() and WORDS[id_] != "\u0301":
                assert word == WORDS[id_] and tint == 0
            else:
                assert id_ != MASK or (word, tint) == ("\u2581", 0)


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_with_the_panel_open_in_both_layouts(look, width):
    seen = look(width, """
        slide(3); cell(10).click(); seen.text = fits(); seen.inner = innerWidth;
        find("grid").click(); seen.grid = fits(); seen.columns = getComputedStyle(text).gridTemplateColumns.split(" ").length;
        seen.drawn = [...document.querySelectorAll(".curves:not([hidden]) figure > svg.linear")].filter(svg =>
          svg.getBoundingClientRect().width > 200).length;""")  # fmt: skip
    assert seen["inner"] == width and seen["text"] and seen["grid"] and seen["drawn"] == 5
    assert seen["columns"] > (3 if width == 375 else 10)


def test_the_page_opens_half_way_at_the_mask_that_carries_most(look, made):
    seen = look(1280, """seen.at = [slider.value, panel.querySelector("h2").textContent, document.activeElement.tagName];
        seen.selected = [...text.children].filter(one => one.ariaSelected).map(one => Number(one.dataset.position));""")
    half, weights = STEPS // 2, made.trace.weight
    position = int(np.where(made.trace.tokens[half, 0] == MASK, weights[half, 0], -1).argmax())
    assert seen == {"at": [str(half), f"Position {position}", "BODY"], "selected": [position], "error": ""}


def test_on_a_phone_nothing_covers_the_text(look, tmp_path):
    long = tmp_path / "long.html"
    page = viewer.trajectory_page(generated(steps=24, length=400), WordTokenizer(), mask_token_id=MASK)
    long.write_text(page, encoding="utf-8")
    seen = look(375, """
        const covered = () => [...text.children].filter(one => {
          const box = one.getBoundingClientRect(), around = text.getBoundingClientRect(), y = box.top + box.height / 2;
          const inside = y > around.top + 2 && y < around.bottom - 2 && y > 0 && y < innerHeight && box.width && box.height < 40;
          return inside && !one.contains(document.elementFromPoint(box.left + 2, y));
        }).length;
        const shown = () => { const one = text.querySelector("[aria-selected]").getBoundingClientRect(), all = text.getBoundingClientRect();
          return one.top >= all.top && one.bottom <= all.bottom; };
        seen.covered = [covered()]; seen.shown = shown(); seen.top = scrollY; scrollTo(0, 300); seen.covered.push(covered());
        seen.below = panel.getBoundingClientRect().top >= text.getBoundingClientRect().bottom;""", at=long)  # fmt: skip
    assert seen["covered"] == [0, 0] and seen["shown"] and seen["below"] and seen["top"] == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_pointing_at_a_mask_tells_the_traces_numbers_and_a_tap_keeps_them(look, made, width):
    step, trace = 3, made.trace
    place = int(np.flatnonzero((trace.tokens[step, 0] == MASK) & (trace.tokens[step - 1, 0] == MASK))[2])
    seen = look(width, f"""
        key("Escape"); slide({step}); point("pointerover", cell({place}), "mouse"); seen.hover = table(); seen.said = panel.textContent;
        point("pointerleave", text, "mouse"); seen.left = panel.textContent;
        point("pointerover", cell({place}), "touch"); seen.touched = panel.textContent;
        cell({place}).click(); seen.tap = table(); seen.selected = cell({place}).ariaSelected; seen.named = cell({place}).ariaLabel;
        slide(0); seen.start = panel.textContent; slide({step}); seen.back = table();
        panel.querySelector("button").click(); seen.closed = panel.textContent;""")  # fmt: skip
    weight, shares = trace.weight[step, 0, place], trace.shares[step, 0, place]
    assert seen["hover"][0] == ["candidate", "\u03c0", "\u03bb\u03c0"] and len(seen["hover"]) == K + 2
    for (name, share, product), id_, exact in zip(seen["hover"][1:], trace.token_ids[step, 0, place], shares):
        assert name == viewer.Pieces(WordTokenizer())(int(id_))[0].replace("\n", "").replace(" " * 8, "\u2423\u00d78").replace(" ", "\u2423")
        assert float(share) == pytest.approx(exact, abs=6e-4) and float(product) == pytest.approx(weight * exact, abs=7e-4)
    assert float(seen["hover"][-1][2]) == pytest.approx(1 - weight, abs=6e-4)
    said = re.search(r"Position (\d+)mask\u03bb = ([\d.]+).*Entropy of this prediction: ([\d.]+) nats", seen["said"])
    assert int(said[1]) == place and float(said[2]) == pytest.approx(weight, abs=6e-4)
    assert float(said[3]) == pytest.approx(-trace.neg_entropy[step - 1, 0, place], abs=6e-4)
    assert seen["left"] == seen["touched"] == seen["closed"] == PANEL_HINT
    assert seen["tap"] == seen["hover"] == seen["back"] and seen["selected"] == "true" and f"position {place}" in seen["named"]
    assert "nothing has been predicted yet" in seen["start"]


def test_the_panel_of_a_token_tells_where_it_came_from(look, made):
    trace = made.trace
    committed = int(np.flatnonzero((trace.tokens[3, 0] == MASK) & (trace.tokens[4, 0] != MASK))[-1])
    seen = look(1280, f"""
        const at = (step, place) => {{ slide(step); cell(place).click(); return panel.textContent; }};
        seen.given = at(5, 0); seen.later = at(6, {committed}); seen.table = table(); seen.now = at(4, {committed});
        seen.masked = at(3, {GIVEN}); seen.again = at(6, {GIVEN}); seen.other = at(4, {GIVEN + 1}); seen.first = at(1, {GIVEN});""")  # fmt: skip
    assert ", given (id" in seen["given"]
    assert "committed in step 4 (id" in seen["later"] and "carried into step 4:" in seen["later"] and "committed in this step" in seen["now"]
    assert [float(line[1]) for line in seen["table"][1:-1]] == pytest.approx(trace.shares[3, 0, committed].tolist(), abs=6e-4)
    assert "mask, re-masked in this step" in seen["masked"] and "remembers it" in seen["masked"]
    assert "committed in step 4" in seen["again"] and "changed in this step" in seen["other"] and "carried" not in seen["first"]


@pytest.mark.parametrize("width", WIDTHS)
def test_play_slider_buttons_and_keys_move_through_the_steps(look, made, width):
    seen = look(width, """
        const said = () => find("status").textContent, at = () => Number(slider.value), live = () => find("status").ariaLive;
        seen.start = [at(), said(), find("play").textContent, live()];
        key("Home"); find("speed").value = 32; find("play").click(); seen.playing = [find("play").textContent, live()];
        await wait(80); key(" "); seen.paused = [at(), find("play").textContent, live()]; const stopped = at();
        await wait(200); seen.still = at() === stopped; key(" "); await wait(600); seen.ended = [at(), said(), find("play").textContent];
        find("play").click(); seen.again = at(); key("End"); seen.end = at(); key("ArrowLeft"); seen.left = at();
        key("Home"); seen.home = [at(), said()]; key("ArrowLeft"); seen.first = at(); key("ArrowRight"); key("ArrowRight"); seen.right = [at(), said()];
        find("forward").click(); seen.forward = [at(), said()]; find("back").click(); seen.back = at();
        slide(4); seen.slid = [at(), said()]; key("End"); seen.left_alone = key("ArrowRight", find("speed")) && key(" ", find("play"));
        document.querySelector(".curves svg").dispatchEvent(new MouseEvent("click", { bubbles: true,
          clientX: document.querySelector(".curves svg").getBoundingClientRect().left })); seen.clicked = at();
        slide(3); seen.marks = [...document.querySelectorAll(".curves:not([hidden]) svg.linear .now")].map(line => Number(line.getAttribute("x1")));
        """)  # fmt: skip
    tokens = np.concatenate([made.trace.tokens[:STEPS, 0], made.tokens[None, 0]])
    left = (tokens == MASK).sum(1)
    assert seen["start"][0] == STEPS // 2 and seen["start"][2:] == ["Play", "polite"]
    assert seen["home"] == [0, f"At the start, 6 steps ahead: {left[0]} masks left"]
    assert seen["playing"] == ["Pause", "off"] and 0 < seen["paused"][0] < STEPS and seen["paused"][1:] == ["Play", "polite"]
    assert seen["still"] and seen["ended"][0] == STEPS and seen["ended"][2] == "Play" and "0 masks left" in seen["ended"][1]
    assert (seen["again"], seen["end"], seen["left"], seen["first"]) == (0, 6, 5, 0)
    committed = ((tokens[:-1] == MASK) & (tokens[1:] != MASK)).sum(1)
    reused = "; no network call: the last prediction was used again"
    assert seen["right"] == [2, f"After step 2 of 6: {left[2]} masks left, {committed[1]} committed{reused}"]
    assert seen["forward"] == [3, f"After step 3 of 6: {left[3]} masks left, {committed[2]} committed, 1 re-masked"]
    assert seen["back"] == 2 and seen["slid"] == [4, f"After step 4 of 6: {left[4]} masks left, {committed[3]} committed, 1 changed"]
    assert seen["left_alone"] and seen["clicked"] <= 1
    assert len(seen["marks"]) == 5 and all(200 < x < 240 for x in seen["marks"])


def test_keys_walk_through_the_text_and_escape_leaves_it(look):
    seen = look(1280, """
        slide(3); cell(0).focus(); seen.first = panel.querySelector("h2").textContent;
        key("ArrowDown", document.activeElement); key("ArrowDown", document.activeElement); key("ArrowUp", document.activeElement);
        key("ArrowDown", document.activeElement);
        seen.walked = [panel.querySelector("h2").textContent, document.activeElement.dataset.position];
        seen.tabs = [...text.children].filter(one => one.tabIndex === 0).length;
        key("ArrowRight", document.activeElement); seen.step = slider.value;
        key("Escape"); seen.left = panel.textContent;""")  # fmt: skip
    assert seen["first"] == "Position 0" and seen["walked"] == ["Position 2", "2"] and seen["tabs"] == 1
    assert seen["step"] == "4" and seen["left"] == PANEL_HINT


def test_the_chooser_and_the_address_open_another_row(look, made):
    seen = look(1280, """
        seen.at = [slider.value, find("row").value, panel.querySelector("h2").textContent]; seen.cells = cells();
        seen.titles = [...document.querySelectorAll(".curves:not([hidden]) figcaption")].map(one => one.textContent);
        find("row").value = 0; find("row").dispatchEvent(new Event("change")); seen.other = cells(); seen.closed = panel.textContent;
        """, fragment="#step=6&position=9&row=1")  # fmt: skip
    assert seen["at"] == ["6", "1", "Position 9"] and seen["closed"] == PANEL_HINT
    assert len(seen["titles"]) == 5 and all(title.endswith("sample 2") for title in seen["titles"])
    for row, cells in ((1, seen["cells"]), (0, seen["other"])):
        plain = [place for place in range(LENGTH) if WORDS[made.tokens[row, place]].startswith(" word")]
        assert plain and [cells[place][1] for place in plain] == [WORDS[made.tokens[row, place]] for place in plain]


def test_a_step_touches_only_the_cells_that_change(look, made):
    seen = look(1280, """
        slide(3); const touched = new Set();
        const watch = new MutationObserver(found => found.forEach(one => {
          const node = one.target.closest?.("[data-position]"); if (node) touched.add(Number(node.dataset.position)); }));
        watch.observe(text, { subtree: true, childList: true, attributes: true });
        key("ArrowRight"); await wait(50); seen.touched = [...touched]; touched.clear(); slide(4); await wait(50); seen.same = touched.size;
        """)  # fmt: skip
    tokens = made.trace.tokens[:, 0]
    moved = (tokens[3] == MASK) | (tokens[4] == MASK) | (tokens[2] != tokens[3]) | (tokens[3] != tokens[4])
    assert seen["same"] == 0 and 0 < len(seen["touched"]) <= moved.sum() < LENGTH and moved[seen["touched"]].all()


def test_candidates_in_masks_can_be_hidden(look):
    seen = look(1280, 'slide(3); find("inside").click(); seen.words = cells().filter(one => one[0].includes(" m")).map(one => one[1]);')
    assert set(seen["words"]) == {"\u2581"}


def test_the_page_follows_the_readers_dark_or_light_scheme(look):
    script = 'seen.colours = [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector(".m")).backgroundColor];'
    light, dark = look(1280, script), look(1280, script, "--blink-settings=preferredColorScheme=0")
    assert light["colours"][0] == "rgb(255, 255, 255)" and dark["colours"][0] == "rgb(21, 24, 29)"
    assert light["colours"][1] != dark["colours"][1]


def test_readers_who_want_less_motion_start_at_a_slower_speed(look, path, tmp_path):
    long = tmp_path / "long.html"
    long.write_text(viewer.trajectory_page(generated(steps=120), WordTokenizer(), mask_token_id=MASK), encoding="utf-8")
    script = 'seen.speed = find("speed").value;'
    assert look(1280, script, at=long)["speed"] == "8"
    assert look(1280, script, "--force-prefers-reduced-motion", at=long)["speed"] == "2"


def test_hostile_text_is_inert_even_if_scripts_were_allowed(browser, path):  # noqa: F811
    lax = changed(path, "lax.html", '<meta http-equiv="Content-Security-Policy"[^>]*>', "")
    for page in (path, lax):
        dom, console = dumped(browser, page)
        assert "owned" not in re.search("<title>(.*?)</title>", dom)[1] and "<img" not in dom and not console
        assert dom.count('role="option"') == LENGTH


def test_without_scripts_the_curves_and_the_text_at_the_end_are_there(browser, path):  # noqa: F811
    silent = changed(path, "silent.html", "script-src '[^;]*'", "script-src 'none'")
    dom, _ = dumped(browser, silent)
    assert dom.count('<svg class="linear"') == 10 and "The text at the end, sample 2" in dom
    assert 'role="option"' not in dom and "<noscript>" in dom


@pytest.mark.parametrize("width", WIDTHS)
def test_results_by_name_play_side_by_side(look, made, tmp_path, width):
    both = tmp_path / "both.html"
    results = {"plain masks": generated(soft=False, steps=4), "soft masks": made}
    both.write_text(viewer.trajectory_page(results, WordTokenizer(), mask_token_id=MASK), encoding="utf-8")
    seen = look(width, """
        const texts = [...document.querySelectorAll(".text")], counts = () => [...document.querySelectorAll(".count")].map(one => one.textContent);
        seen.opened = panel.querySelector("h2").textContent.replace(/\\d+/, "");
        slide(3); seen.masks = texts.map(one => one.querySelectorAll(".m").length); seen.counts = counts();
        texts[0].children[5].click(); seen.first = panel.textContent; texts[1].children[5].click(); seen.second = panel.textContent;
        seen.selected = texts.map(one => one.querySelectorAll("[aria-selected]").length);
        slide(6); seen.end = counts(); seen.status = find("status").textContent; seen.fits = fits();
        seen.titles = [...document.querySelectorAll("section h2")].map(one => one.textContent);
        seen.figures = document.querySelectorAll(".curves figure").length;""", at=both)  # fmt: skip
    left = [int((one.trace.tokens[3, 0] == MASK).sum()) for one in results.values()]
    assert seen["masks"] == left and [int(count.split()[0]) for count in seen["counts"]] == left
    assert seen["opened"] == "soft masks, position " and seen["titles"] == list(results) and seen["fits"]
    assert seen["first"].startswith("\u00d7plain masks, position 5") and seen["second"].startswith("\u00d7soft masks, position 5")
    assert seen["selected"] == [0, 1] and seen["status"] == "After step 6 of 6"
    assert all(count.startswith("0 masks left") for count in seen["end"]) and seen["figures"] == 5
