"use strict";
{
const find = id => document.getElementById(id), data = JSON.parse(find("trace").textContent);
const { pieces, k, unit, parts } = data, MASK = -1, GLYPH = "\u2581", KINDS = ["", "special", "bytes"];
const text = find("text"), panel = find("panel"), slider = find("slider"), hint = panel.firstChild;
const steps = Number(slider.max), stride = 2 + 2 * k, digits = unit ? Math.max(3, 2 - Math.floor(Math.log10(unit * parts))) : 3;
const spaces = string => string.replace(/ {7,}/g, run => "\u2423\u00d7" + run.length).replaceAll(" ", "\u2423");
const named = id => id === MASK ? GLYPH : spaces(pieces[id][1].replaceAll("\n", ""));
const inside = pieces.map(piece => { const line = piece[1].replaceAll("\n", ""); return line.trim() || spaces(line); });
const made = (tag, content = "", look = "") => {
  const node = document.createElement(tag);
  node.append(...[content].flat());
  if (look) node.className = look;
  return node;
};
let row, cells = [], frame = 0, chosen = null, hovered = null, timer = 0;

// All frames of a row are unpacked once; per frame only the cells that look different are touched.
const open = number => {
  const { start, changes, masks, called } = data.rows[number], frames = [Int32Array.from(start)];
  for (const change of changes) {
    const next = frames.at(-1).slice();
    for (let i = 0; i < change.length; i += 2) next[change[i]] = change[i + 1];
    frames.push(next);
  }
  row = { frames, masks, called };
  cells = start.map((_, position) => {
    const node = made("span");
    node.setAttribute("role", "option");
    node.tabIndex = position ? -1 : 0;
    node.dataset.position = position;
    return { node, look: null, word: null, tint: null };
  });
  text.replaceChildren(...cells.map(cell => cell.node));
  chosen = hovered = null;
  for (const curves of document.querySelectorAll(".curves")) curves.hidden = curves.dataset.row !== String(number);
};

// What a mask carries in a frame; null where it is plain because nothing was predicted yet, or there is no step after.
const carried = (at, position) => {
  const masks = row.masks[at] ?? [], now = row.frames[at];
  if (now[position] !== MASK || !masks.length) return null;
  let from = 0;
  for (let other = 0; other < position; other++) if (now[other] === MASK) from += stride;
  const candidates = [];
  for (let i = from + 2; i < from + stride; i += 2) candidates.push({ id: masks[i], pi: masks[i + 1] / 1000 });
  return { weight: masks[from] * unit, entropy: masks[from + 1] < 0 ? null : masks[from + 1] / 1000, candidates };
};

const paint = () => {
  const now = row.frames[frame], before = row.frames[Math.max(frame - 1, 0)], initial = row.frames[0];
  const masks = row.masks[frame] ?? [], filled = find("inside").checked && masks.length;
  const count = { masks: 0, committed: 0, masked: 0, changed: 0 };
  let from = 0;
  for (let position = 0; position < now.length; position++) {
    const id = now[position], cell = cells[position];
    let look, word, tint = 0;
    if (id === MASK) {
      count.masks++;
      if (masks.length) tint = Math.round(masks[from] / parts * 100);
      word = filled && masks[from + 2] !== MASK ? inside[masks[from + 2]] : GLYPH;
      look = "p m" + (tint > 84 ? " strongest" : tint > 60 ? " strong" : "") + (before[position] === MASK ? "" : " back");
      count.masked += before[position] !== MASK;
      from += stride;
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

const state = position => {
  const id = row.frames[frame][position];
  if (row.frames[0][position] === id && id !== MASK) return "given";
  let since = frame;
  while (since && row.frames[since - 1][position] === id) since--;
  if (!since) return "mask";
  const before = row.frames[since - 1][position], verb = id === MASK ? "re-masked" : before === MASK ? "committed" : "changed";
  return (id === MASK ? "mask, " : "") + verb + (since === frame ? " in this step" : " in step " + since);
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
  const position = hovered ?? chosen;
  if (position === null) return panel.replaceChildren(hint);
  const id = row.frames[frame][position], now = carried(frame, position), title = made("h2", "Position " + position);
  const content = [title, made("p", id === MASK ? state(position) : [made("b", named(id)), ", " + state(position)])];
  if (id !== MASK) content[1].append(made("span", " (id " + pieces[id][0] + ")", "pale"));
  if (now) content.push(...shares(now));
  else if (id === MASK) content.push(made("p", frame ? "Still a mask at the end." : "A plain mask: nothing has been predicted yet.", "pale"));
  let since = frame;
  while (since && row.frames[since][position] === id) since--;
  const then = id !== MASK && carried(since, position);
  if (then) content.push(made("p", "What the mask carried into step " + (since + 1) + ":", "pale"), ...shares(then));
  if (chosen !== null) {
    const close = made("button", "\u00d7");
    close.setAttribute("aria-label", "Close");
    close.addEventListener("click", () => choose(null));
    content.unshift(close);
    cells[chosen].node.setAttribute("aria-label", "position " + chosen + ", " + state(chosen) + ", " + cells[chosen].word);
  }
  panel.replaceChildren(...content);
};

const seek = to => {
  frame = Math.min(steps, Math.max(0, to));
  const { masks, committed, masked, changed } = paint();
  const reused = frame && !row.called[frame - 1] ? "; no network call: the last prediction was used again" : "";
  find("status").textContent = (frame ? "After step " + frame + " of " + steps + ": " : "At the start, " + steps + " steps ahead: ") +
    masks + (masks === 1 ? " mask" : " masks") + " left" + (frame ? ", " + committed + " committed" : "") +
    (masked ? ", " + masked + " re-masked" : "") + (changed ? ", " + changed + " changed" : "") + reused;
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

const choose = (position, focus) => {
  const left = cells[chosen ?? 0].node;
  left.removeAttribute("aria-selected");
  left.removeAttribute("aria-label");
  left.tabIndex = -1;
  chosen = position;
  const { node } = cells[position ?? 0];
  node.tabIndex = 0;
  if (position !== null) node.setAttribute("aria-selected", "true");
  if (focus) node.focus();
  inform();
};
const positionOf = event => {
  const node = event.target.closest("[data-position]");
  return node ? Number(node.dataset.position) : null;
};
text.addEventListener("pointerover", event => { if (event.pointerType !== "touch") { hovered = positionOf(event); inform(); } });
text.addEventListener("pointerleave", () => { hovered = null; inform(); });
text.addEventListener("focusin", event => { if (positionOf(event) !== chosen) choose(positionOf(event)); });
text.addEventListener("click", event => { if (positionOf(event) !== null) choose(positionOf(event), true); });

find("play").addEventListener("click", () => play(!timer));
find("back").addEventListener("click", () => jump(frame - 1));
find("forward").addEventListener("click", () => jump(frame + 1));
slider.addEventListener("input", () => jump(Number(slider.value)));
find("inside").addEventListener("change", () => seek(frame));
find("grid").addEventListener("change", event => text.classList.toggle("grid", event.target.checked));
find("row")?.addEventListener("change", event => { open(Number(event.target.value)); seek(frame); });
for (const svg of document.querySelectorAll(".curves svg[data-x]")) svg.addEventListener("click", event => {
  const [left, right, low, high] = svg.dataset.x.split(" ").map(Number), box = svg.getBoundingClientRect();
  const at = ((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width - left) / (right - left);
  jump(Math.round(low + at * (high - low)));
});
document.addEventListener("keydown", event => {
  const { target, key } = event, on = selector => target.matches?.(selector);
  if (event.ctrlKey || event.altKey || event.metaKey || on("select") || (on("#slider") && key !== " ")) return;
  if (key === " " && on("button, summary, [type=checkbox]")) return;
  const moves = { " ": () => play(!timer), ArrowLeft: () => jump(frame - 1), ArrowRight: () => jump(frame + 1),
    Home: () => jump(0), End: () => jump(steps), Escape: () => choose(null) };
  const walk = { ArrowUp: -1, ArrowDown: 1 }[key], position = text.contains(target) ? positionOf(event) : null;
  if (walk && position !== null) choose(Math.min(cells.length - 1, Math.max(0, position + walk)), true);
  else if (moves[key]) moves[key]();
  else return;
  event.preventDefault();
});

// page.html#step=12&position=40&row=1 opens there.
const arrive = () => {
  const asked = new URLSearchParams(location.hash.slice(1)), number = name => Math.trunc(Number(asked.get(name))) || 0;
  const chooser = find("row"), wanted = Math.min(data.rows.length - 1, Math.max(0, number("row")));
  if (chooser) chooser.value = wanted;
  open(wanted);
  jump(number("step"));
  if (asked.has("position")) choose(Math.min(cells.length - 1, Math.max(0, number("position"))));
};
if (matchMedia("(prefers-reduced-motion: reduce)").matches) find("speed").value = Math.min(2, find("speed").value);
addEventListener("hashchange", arrive);
arrive();
}
