"use strict";
{
const find = id => document.getElementById(id), data = JSON.parse(find("trace").textContent);
const { pieces, unit, parts } = data, MASK = -1, GLYPH = "\u2581", KINDS = ["", "special", "bytes"];
const texts = [...document.querySelectorAll(".text")], together = texts.length > 1, panel = find("panel"), slider = find("slider"), hint = panel.firstChild;
const steps = Number(slider.max), digits = unit ? Math.max(3, 2 - Math.floor(Math.log10(unit * parts))) : 3;
const spaces = string => string.replace(/ {7,}/g, run => "\u2423\u00d7" + run.length).replaceAll(" ", "\u2423");
const named = id => id === MASK ? GLYPH : spaces(pieces[id][1].replaceAll("\n", ""));
const inside = pieces.map(piece => { const line = piece[1].replaceAll("\n", ""); return line.trim() || spaces(line); });
const made = (tag, content = "", look = "") => {
  const node = document.createElement(tag);
  node.append(...[content].flat());
  if (look) node.className = look;
  return node;
};
// A pane is a text on the page with the row that it shows; chosen and hovered are {pane, position}.
let panes = [], frame = 0, chosen = null, hovered = null, timer = 0;

// All frames of a row are unpacked once; per frame only the cells that look different are touched.
const opened = (number, text) => {
  const { start, changes, masks, called, k } = data.rows[number], frames = [Int32Array.from(start)];
  for (const change of changes) {
    const next = frames.at(-1).slice();
    for (let i = 0; i < change.length; i += 2) next[change[i]] = change[i + 1];
    frames.push(next);
  }
  const cells = start.map((_, position) => {
    const node = made("span");
    node.setAttribute("role", "option");
    node.tabIndex = position ? -1 : 0;
    node.dataset.position = position;
    return { node, look: null, word: null, tint: null };
  });
  text.replaceChildren(...cells.map(cell => cell.node));
  // stride: numbers of a mask, see `encoded` in viewer.py.
  const name = data.names[number] ?? "", count = text.parentNode.querySelector(".count"), stride = 2 + 2 * k;
  return { text, cells, frames, masks, called, stride, name, count };
};
const open = number => {
  panes = together ? texts.map((text, i) => opened(i, text)) : [opened(number, texts[0])];
  chosen = hovered = null;
  if (!together) for (const curves of document.querySelectorAll(".curves")) curves.hidden = curves.dataset.row !== String(number);
};
// A row that needs fewer steps than its neighbour stays at its end.
const at = pane => Math.min(frame, pane.frames.length - 1);

// What a mask carries in a frame; null where it is plain because nothing was predicted yet, or there is no step after.
const carried = (pane, at, position) => {
  const masks = pane.masks[at] ?? [], now = pane.frames[at];
  if (now[position] !== MASK || !masks.length) return null;
  let from = 0;
  for (let other = 0; other < position; other++) if (now[other] === MASK) from += pane.stride;
  const candidates = [];
  for (let i = from + 2; i < from + pane.stride; i += 2) candidates.push({ id: masks[i], pi: masks[i + 1] / 1000 });
  return { weight: masks[from] * unit, entropy: masks[from + 1] < 0 ? null : masks[from + 1] / 1000, candidates };
};

const paint = pane => {
  const { frames, cells } = pane, now = frames[at(pane)], initial = frames[0];
  const before = frames[at(pane) < frame ? at(pane) : Math.max(frame - 1, 0)], masks = pane.masks[frame] ?? [];
  const filled = find("inside").checked && masks.length;
  const count = { masks: 0, committed: 0, masked: 0, changed: 0 };
  let from = 0;
  for (let position = 0; position < now.length; position++) {
    const id = now[position], cell = cells[position];
    let look, word, tint = 0;
    if (id === MASK) {
      count.masks++;
      if (masks.length) tint = Math.round(masks[from] / parts * 100);
      word = filled && masks[from + 2] !== MASK ? inside[masks[from + 2]] : GLYPH;
      look = "p m" + (tint > 93 ? " strongest" : tint > 61 ? " strong" : "") + (before[position] === MASK ? "" : " back");
      count.masked += before[position] !== MASK;
      from += pane.stride;
    } else {
      const fresh = before[position] === MASK, other = !fresh && before[position] !== id;
      word = pieces[id][1];
      look = ("p " + KINDS[pieces[id][2]] + (initial[position] === id ? " given" : "") + (fresh ? " new" : other ? " changed" : ""));
      count.committed += fresh;
      count.changed += other;
    }
    if (cell.look !== look) cell.node.className = cell.look = look;
    if (cell.word !== word) cell.node.textContent = cell.word = word;
    if (cell.tint !== tint) cell.node.style.setProperty("--w", cell.tint = tint);
  }
  return count;
};

const since = ({ frames }, at, position) => {
  let first = at;
  while (first && frames[first - 1][position] === frames[at][position]) first--;
  return first;
};

const state = ({ pane, position }) => {
  const { frames } = pane, id = frames[at(pane)][position], step = since(pane, at(pane), position);
  if (frames[0][position] === id && id !== MASK) return "given";
  if (!step) return "mask";
  const before = frames[step - 1][position], verb = id === MASK ? "re-masked" : before === MASK ? "committed" : "changed";
  return (id === MASK ? "mask, " : "") + verb + (step === frame ? " in this step" : " in step " + step);
};

const shares = ({ weight, entropy, candidates }) => {
  const whole = made("div", "", "whole"), rows = [];
  const part = (value, look) => { const one = made("span", "", look); one.style.flexGrow = value; whole.append(one); };
  const line = (name, pi, value, look) => {
    const first = made("td", name), bar = made("span", "", "bar " + look);
    bar.style.width = pi * 100 + "%";
    if (look) first.append(bar);
    rows.push(made("tr", [first, made("td", look ? pi.toFixed(3) : ""), made("td", value.toFixed(digits))]));
  };
  part(1 - weight, "mask");
  for (const [i, { id, pi }] of candidates.entries()) {
    if (weight) part(weight * pi, "c" + i % 6);
    line(named(id), pi, weight * pi, "c" + i % 6);
  }
  line(GLYPH + " mask, 1 \u2212 \u03bb", 0, 1 - weight, "");
  const head = made("tr", ["candidate", "\u03c0", "\u03bb\u03c0"].map(name => made("th", name)));
  const amount = "\u03bb = " + (weight ? weight.toFixed(digits) : "0: a plain mask; the prediction is not fed back");
  const content = [made("p", amount), whole, made("table", [made("thead", head), made("tbody", rows)])];
  if (entropy !== null) content.push(made("p", "Entropy of this prediction: " + entropy.toFixed(3) + " nats", "pale"));
  else content.push(made("p", "A token stood here before: its mask remembers it.", "pale"));
  return content;
};

const inform = () => {
  const looked = hovered ?? chosen;
  if (!looked) return panel.replaceChildren(hint);
  const { pane, position } = looked, id = pane.frames[at(pane)][position], now = carried(pane, at(pane), position);
  const title = made("h2", (pane.name ? pane.name + ", position " : "Position ") + position);
  const content = [title, made("p", id === MASK ? state(looked) : [made("b", named(id)), ", " + state(looked)])];
  if (id !== MASK) content[1].append(made("span", " (id " + pieces[id][0] + ")", "pale"));
  if (now) content.push(...shares(now));
  else if (id === MASK) content.push(made("p", frame ? "Still a mask at the end." : "A plain mask: nothing has been predicted yet.", "pale"));
  const step = since(pane, at(pane), position) - 1, then = id !== MASK && step >= 0 && carried(pane, step, position);
  if (then) content.push(made("p", "What the mask carried into step " + (step + 1) + ":", "pale"), ...shares(then));
  if (chosen) {
    const close = made("button", "\u00d7");
    close.setAttribute("aria-label", "Close");
    close.addEventListener("click", () => choose(null));
    content.unshift(close);
    const { node, word } = chosen.pane.cells[chosen.position];
    const label = "position " + chosen.position + ", " + state(chosen) + ", " + (id === MASK ? word : named(id));
    if (node.ariaLabel !== label) node.ariaLabel = label;
  }
  panel.replaceChildren(...content);
};

// What the last step did to a text, in words.
const summary = (pane, { masks, committed, masked, changed }) => {
  const reused = frame && pane.called[frame - 1] === 0 ? "; no network call: the last prediction was used again" : "";
  return masks + (masks === 1 ? " mask" : " masks") + " left" + (frame ? ", " + committed + " committed" : "") +
    (masked ? ", " + masked + " re-masked" : "") + (changed ? ", " + changed + " changed" : "") + reused;
};

const seek = to => {
  frame = Math.min(steps, Math.max(0, to));
  const words = panes.map(pane => summary(pane, paint(pane)));
  for (const [i, { count }] of panes.entries()) if (count) count.textContent = words[i];
  const where = frame ? "After step " + frame + " of " + steps : "At the start, " + steps + " steps ahead";
  find("status").textContent = where + (together ? "" : ": " + words[0]);
  slider.value = frame;
  slider.setAttribute("aria-valuetext", "after step " + frame + " of " + steps);
  for (const svg of document.querySelectorAll(".curves:not([hidden]) svg[data-x]")) {
    const [left, right, low, high] = svg.dataset.x.split(" ").map(Number);
    const line = svg.querySelector(".now") ?? svg.querySelector(".rule").cloneNode();
    if (line.getAttribute("class") === "rule") {
      line.setAttribute("class", "now");
      svg.append(line);
    }
    const at = left + (frame - low) / (high - low) * (right - left);
    line.setAttribute("x1", at);
    line.setAttribute("x2", at);
    line.style.visibility = frame < low || frame > high ? "hidden" : "visible";
  }
  inform();
};

// Announced where the reader stops, not at every step that is played.
const play = on => {
  clearTimeout(timer);
  timer = 0;
  find("play").textContent = on ? "Pause" : "Play";
  find("status").setAttribute("aria-live", on ? "off" : "polite");
  if (!on) return;
  if (frame === steps) seek(0);
  const next = () => {
    seek(frame + 1);
    if (frame === steps) play(false);
    else timer = setTimeout(next, 1000 / Number(find("speed").value));
  };
  timer = setTimeout(next, 1000 / Number(find("speed").value));
};
const jump = to => { play(false); seek(to); };

const choose = (place, focus) => {
  for (const { cells } of panes) for (const [position, { node }] of cells.entries()) node.tabIndex = position ? -1 : 0;
  if (chosen) {
    const left = chosen.pane.cells[chosen.position].node;
    left.removeAttribute("aria-selected");
    left.removeAttribute("aria-label");
  }
  chosen = place;
  if (place) {
    const { cells } = place.pane, { node } = cells[place.position];
    cells[0].node.tabIndex = -1;
    node.tabIndex = 0;
    node.setAttribute("aria-selected", "true");
    if (focus) node.focus();
  }
  inform();
};
const placeOf = event => {
  const node = event.target.closest?.("[data-position]"), pane = panes.find(({ text }) => text.contains(node));
  return node && pane ? { pane, position: Number(node.dataset.position) } : null;
};
const same = (one, other) => one?.pane === other?.pane && one?.position === other?.position;
for (const text of texts) {
  text.addEventListener("pointerover", event => { if (event.pointerType !== "touch") { hovered = placeOf(event); inform(); } });
  text.addEventListener("pointerleave", () => { hovered = null; inform(); });
  text.addEventListener("focusin", event => { if (!same(placeOf(event), chosen)) choose(placeOf(event)); });
  text.addEventListener("click", event => { if (placeOf(event)) choose(placeOf(event), true); });
}

find("play").addEventListener("click", () => play(!timer));
find("back").addEventListener("click", () => jump(frame - 1));
find("forward").addEventListener("click", () => jump(frame + 1));
slider.addEventListener("input", () => jump(Number(slider.value)));
find("inside").addEventListener("change", () => seek(frame));
find("grid").addEventListener("change", event => {
  for (const text of texts) text.classList.toggle("grid", event.target.checked);
});
find("row")?.addEventListener("change", event => { open(Number(event.target.value)); seek(frame); });
for (const svg of document.querySelectorAll(".curves svg[data-x]")) svg.addEventListener("click", event => {
  const [left, right, low, high] = svg.dataset.x.split(" ").map(Number), box = svg.getBoundingClientRect();
  const at = ((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width - left) / (right - left);
  jump(Math.round(low + at * (high - low)));
});
const within = (pane, position) => ({ pane, position: Math.min(pane.cells.length - 1, Math.max(0, position)) });
document.addEventListener("keydown", event => {
  const { target, key } = event, on = selector => target.matches?.(selector);
  if (event.ctrlKey || event.altKey || event.metaKey || on("select") || (on("#slider") && key !== " ")) return;
  if (key === " " && on("button, summary, [type=checkbox]")) return;
  const moves = { " ": () => play(!timer), ArrowLeft: () => jump(frame - 1), ArrowRight: () => jump(frame + 1),
    Home: () => jump(0), End: () => jump(steps), Escape: () => choose(null) };
  const walk = { ArrowUp: -1, ArrowDown: 1 }[key], place = placeOf(event);
  if (walk && place) choose(within(place.pane, place.position + walk), true);
  else if (moves[key]) moves[key]();
  else return;
  event.preventDefault();
});

// The mask that carries most in a frame of a pane; null without one that carries a prediction.
const fullest = pane => {
  const masks = pane.masks[frame] ?? [], ids = pane.frames[at(pane)];
  let best = null, from = 0, most = -1;
  for (let position = 0; position < ids.length && masks.length; position++) {
    if (ids[position] !== MASK) continue;
    if (masks[from] > most) [best, most] = [{ pane, position }, masks[from]];
    from += pane.stride;
  }
  return best;
};

// page.html#step=12&position=40&row=1 opens there; without a step or a position half-way, at the fullest mask.
const arrive = () => {
  const asked = new URLSearchParams(location.hash.slice(1)), number = name => Math.trunc(Number(asked.get(name))) || 0;
  const chooser = find("row"), wanted = Math.min(data.rows.length - 1, Math.max(0, number("row")));
  if (chooser) chooser.value = wanted;
  open(wanted);
  const anywhere = !asked.has("step") && !asked.has("position");
  jump(anywhere ? Math.floor(steps / 2) : number("step"));
  if (asked.has("position")) choose(within(panes[together ? wanted : 0], number("position")));
  else if (anywhere) choose(fullest(panes.at(-1)));
  if (!chosen) return;
  const { text, cells } = chosen.pane, top = cells[chosen.position].node.offsetTop - text.offsetTop - text.clientHeight / 2;
  for (const pane of panes) pane.text.scrollTop = top;
};
if (matchMedia("(prefers-reduced-motion: reduce)").matches) find("speed").value = Math.min(2, find("speed").value);
addEventListener("hashchange", arrive);
arrive();
}
