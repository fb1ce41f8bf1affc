"use strict";
addEventListener("error", event => { document.documentElement.dataset.error = event.message; });
const formatted = value => value === null ? "not finite" :
  Math.abs(value) >= 1e9 || (value && Math.abs(value) < 1e-4) ? value.toExponential(3) :
  value.toLocaleString("en", { maximumSignificantDigits: Math.abs(value) < 1000 ? 4 : 12, maximumFractionDigits: 4 });
for (const figure of document.querySelectorAll("figure[data-series]")) {
  const series = JSON.parse(figure.dataset.series), out = document.createElement("output");
  out.setAttribute("aria-live", "polite");
  figure.append(out);
  const all = [...new Set(series.flatMap(one => one.x).filter(value => value !== null))].sort((a, b) => a - b);
  let chosen = null;
  // The values at the point nearest to x, and a rule through it.
  const show = (svg, x) => {
    const nearest = series.map(one => one.x.reduce((best, value, i) =>
      value !== null && Math.abs(value - x) < Math.abs((one.x[best] ?? Infinity) - x) ? i : best, 0));
    const points = series.map((one, i) => one.x[nearest[i]]).filter(value => value !== null);
    chosen = points.reduce((best, value) => Math.abs(value - x) < Math.abs(best - x) ? value : best, points[0]);
    out.textContent = figure.dataset.xName + " " + formatted(chosen) + ": " + series.map((one, i) =>
      (series.length > 1 ? one.name + " " : "") + formatted(one.y[nearest[i]])).join(", ");
    const [left, right, low, high] = svg.dataset.x.split(" ").map(Number);
    for (const rule of figure.querySelectorAll(".rule")) {
      const pixel = left + (chosen - low) / (high - low) * (right - left);
      rule.setAttribute("x1", pixel);
      rule.setAttribute("x2", pixel);
      rule.style.visibility = "visible";
    }
  };
  const point = event => {
    const svg = event.target.closest("svg[data-x]");
    if (!svg) return;
    const [left, right, low, high] = svg.dataset.x.split(" ").map(Number), box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width - left) / (right - left);
    show(svg, low + Math.min(1, Math.max(0, at)) * (high - low));
  };
  const clear = () => {
    chosen = null;
    out.textContent = "";
    for (const rule of figure.querySelectorAll(".rule")) rule.style.visibility = "hidden";
  };
  figure.addEventListener("pointermove", point);
  figure.addEventListener("pointerdown", point);
  figure.addEventListener("pointerleave", clear);
  for (const svg of figure.querySelectorAll("svg[data-x]")) {
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("blur", clear);
    svg.addEventListener("keydown", event => {
      const at = all.indexOf(chosen);
      const to = { ArrowLeft: at < 0 ? all.length - 1 : at - 1, ArrowRight: at + 1, Home: 0, End: all.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      event.stopPropagation();
      show(svg, all[Math.min(all.length - 1, Math.max(0, to))]);
    });
  }
}
