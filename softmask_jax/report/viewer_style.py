"""How the page that plays a denoising (viewer.py) looks, beside the style of page.py, and how it explains itself."""

PANEL_HINT = "Point at a position, tap it, or reach it with Tab: here is what its mask carries."

GUIDE = """<details class="player"><summary>How to read it, and the keys</summary>
<p>After step s, a mask shows what step s + 1 gets in its place: (1 \u2212 \u03bb) e_mask + \u03bb \u03a3 \u03c0_i e_i, where
\u03c0 is step s's prediction over its likeliest tokens. \u03bb is its tint, the likeliest token stands in it. A token that
was committed keeps, in the panel, what its mask had carried. Entropy and \u03bb are averages over the masks that a step
was given; a click on a curve goes to that step.</p>
<p><kbd>space</kbd> plays and pauses, <kbd>\u2190</kbd> <kbd>\u2192</kbd> go a step, <kbd>Home</kbd> <kbd>End</kbd> to the start
and the end; in the text <kbd>\u2191</kbd> <kbd>\u2193</kbd> walk from position to position, <kbd>Esc</kbd> leaves it. The address
may end in #step=12&amp;position=40&amp;row=1.</p></details>
"""

# The tint of a mask is one hue from the ground's lightness to the full colour, so it reads without colour vision too;
# letters on it turn light or dark where they would no longer stand out.
STYLE = """
.facts { display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; margin: .4rem 0 0; font-size: .9rem; }
.facts div { display: flex; gap: .4rem; } .facts dt { color: var(--pale); } .facts dd { margin: 0; }
.controls { position: sticky; top: 0; z-index: 2; background: var(--ground); padding: .7rem 0 .3rem; margin-top: .5rem; }
.transport { display: flex; align-items: center; gap: .5rem; }
.options { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin-top: .3rem; font-size: .9rem; }
.options label { display: flex; align-items: center; gap: .35rem; }
.options input { accent-color: var(--c0); width: 1.1rem; height: 1.1rem; margin: 0; }
.controls button, .options select, #panel button { font: inherit; color: inherit; background: var(--raised);
  border: 1px solid var(--line); border-radius: .4rem; }
.controls button { min-width: 2.6rem; height: 2.6rem; cursor: pointer; } .options select { height: 2.1rem; }
.controls button:hover { border-color: var(--pale); }
#play { min-width: 5rem; background: var(--c0); border-color: var(--c0); color: var(--ground); font-weight: 600; }
#slider { flex: 1; min-width: 4rem; height: 2.6rem; margin: 0; accent-color: var(--c0); }
#status { margin: .3rem 0 0; max-width: none; min-height: 1.5em; font-variant-numeric: tabular-nums; }
.scene { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem; }
.player .legend { align-items: center; gap: .1rem 1.1rem; margin: .6rem 0 .5rem; color: var(--pale); }
.legend .p { color: var(--text); } .scale { display: inline-block; width: 6rem; height: .8rem; margin: 0 .4rem;
  border-radius: .2rem; vertical-align: -.05rem;
  background: linear-gradient(to right, var(--empty), var(--c0));
  background: linear-gradient(in oklab to right, var(--empty), var(--c0)); }
:root { --empty: #eceef2; } @media (prefers-color-scheme: dark) { :root { --empty: #262b34; } }
#text { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .8rem; line-height: 1.75; tab-size: 4;
  white-space: pre-wrap; min-height: 8rem; }
#text, .legend .p { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .86rem; }
.p { border-radius: .2rem; cursor: default; unicode-bidi: isolate; scroll-margin: 7rem 0; }
#text .p:hover { outline: 1px solid var(--pale); outline-offset: 1px; }
#text .p:focus { outline: none; } #text .p[aria-selected="true"] { outline: 2px solid var(--text); outline-offset: 2px; }
.given { color: var(--pale); font-style: italic; background: var(--raised); }
.special, .bytes { border: 1px solid var(--line); color: var(--pale); font-size: .8em; padding: 0 .2em; }
.new { box-shadow: 0 2px var(--c2); background: color-mix(in oklab, var(--c2) 18%, transparent); }
.changed { text-decoration: underline wavy var(--c3) 1.5px; text-underline-offset: 3px;
  background: color-mix(in oklab, var(--c3) 18%, transparent); }
.m { display: inline-block; width: 4.4ch; height: 1.45em; margin: 0 1px; padding: 0 .2ch; line-height: 1.45em;
  vertical-align: middle; overflow: hidden; white-space: pre; text-align: center; font-size: .9em;
  background: color-mix(in oklab, var(--c0) calc(var(--w, 0) * 1%), var(--empty)); }
.m.strongest { color: #fff; } .legend .m { width: auto; padding: 0 .5ch; }
@media (prefers-color-scheme: dark) { .m.strong, .m.strongest { color: #15181d; } }
.back { border: 2px dashed var(--c1); line-height: calc(1.45em - 4px); } .back::before { content: "\\21ba"; }
#text.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(3.2rem, 1fr)); gap: 3px; }
.grid .p { width: auto; height: 1.75em; line-height: 1.75em; margin: 0; padding: 0 .3ch; overflow: hidden;
  white-space: pre; text-align: center; font-size: .86rem; }
.grid .p:not(.m) { border: 1px solid var(--line); line-height: calc(1.75em - 2px); }
#panel { background: var(--raised); border-radius: .5rem; padding: .7rem .9rem; font-size: .9rem; min-width: 0; }
#panel h2 { font-size: 1rem; margin: 0; } #panel p { margin: .25rem 0; } #panel button { float: right; width: 2rem; }
#panel table { width: 100%; margin: .3rem 0; table-layout: fixed; } #panel td, #panel th { padding: .15rem 0 .15rem .5rem; }
#panel :is(td, th):not(:first-child) { text-align: right; width: 4.1rem; }
#panel :is(td, th):first-child { padding-left: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#panel td:first-child, #panel b { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
.bar { display: block; height: 4px; border-radius: 2px; background: var(--c); } .whole { display: flex; gap: 1px; }
.whole span { height: .7rem; background: var(--c); min-width: 1px; } .whole .mask { --c: var(--line); }
.curves { margin-top: 1.2rem; }
.charts:not(:has(> :nth-child(5))) { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17.5rem), 1fr)); }
.curves figcaption { font-size: .92rem; padding: 0; } .curves figure text { font-size: 13px; } .curves svg { cursor: pointer; }
.curves figure > input, .curves figure > label { display: none; }
.now { stroke: var(--text); stroke-width: 1.6; }
@media (min-width: 56rem) { .scene { grid-template-columns: minmax(0, 1fr) 21rem; }
  #panel { position: sticky; top: 7rem; align-self: start; min-height: 16rem; } #text { max-height: 62vh; overflow-y: auto; } }
@media (max-width: 30rem) { #status { min-height: 3em; } }
@media (max-width: 55.99rem) { #panel { position: sticky; bottom: 0; max-height: 45vh; overflow-y: auto;
  border: 1px solid var(--line); box-shadow: 0 -4px 16px #0003; } }
kbd { font: inherit; font-size: .85em; border: 1px solid var(--line); border-radius: .25rem; padding: 0 .35em; }
@media print { .controls, #panel { display: none; } }
"""
