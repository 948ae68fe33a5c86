"use strict";
// Draws the charts of a run from the JSON in the page. Texts of the run are only ever set as text, never as markup.
const run = JSON.parse(document.getElementById("run").textContent);
const SVG = "http://www.w3.org/2000/svg";
const axis = { kind: "step", log: false };
const plots = [];

function make(parent, name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function count(value) {
  for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= size) return `${+(value / size).toPrecision(4)}${letter}`;
  return `${+value.toPrecision(6)}`;
}

function figure(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(3);
  return size >= 1000 ? value.toLocaleString("en", { maximumFractionDigits: 1 }) : `${+value.toPrecision(5)}`;
}

// Index of the element of an ascending array that is nearest to x.
function nearest(values, x) {
  let low = 0, high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] <= x) low = middle; else high = middle;
  }
  return Math.abs(values[high] - x) < Math.abs(values[low] - x) ? high : low;
}

function interpolate(from, to, x) {
  if (!from.length) return x;
  if (x <= from[0]) return from[0] > 0 ? (to[0] * x) / from[0] : to[0];
  const last = from.length - 1;
  if (x >= from[last]) return to[last];
  let i = nearest(from, x);
  if (from[i] > x) i -= 1;
  return to[i] + ((to[i + 1] - to[i]) * (x - from[i])) / (from[i + 1] - from[i]);
}

// Steps to the chosen horizontal axis and back.
const toAxis = (step) => (axis.kind === "step" ? step : interpolate(run.x.step, run.x[axis.kind], step));
const toStep = (x) => (axis.kind === "step" ? x : interpolate(run.x[axis.kind], run.x.step, x));

// Round numbers from low to high, about `wanted` of them.
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].find((each) => each * power >= rough) * power;
  const found = [];
  for (let i = Math.ceil(low / size); i * size <= high + size * 1e-9; i++) found.push(+(i * size).toPrecision(12));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const each of [1, 2, 5]) found.push(+(each * 10 ** power).toPrecision(1));
  const inside = found.filter((each) => each >= low && each <= high);
  return inside.length > 12 ? inside.filter((each) => `${each.toExponential()}`.startsWith("1")) : inside;
}

function draw(plot) {
  const { chart, box } = plot;
  const width = Math.max(260, box.clientWidth), large = chart.large;
  const height = large ? Math.max(260, Math.min(430, width * 0.45)) : 190;
  const wide = large && width > 640; // names of lines and last values stand beside the plot
  const longest = Math.max(0, ...chart.lines.map((line) => line.name.length)); // of 34 letters where all lines coincide
  const left = 46, right = wide ? Math.min(width / 2, Math.max(168, 8 + 6.5 * (longest + 7))) : 8, top = 12, bottom = 24;
  box.querySelector("svg")?.remove();
  const svg = make(box, "svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  const first = axis.log ? Math.max(toAxis(run.first), 1e-9) : 0, last = Math.max(toAxis(run.last), first + 1e-9);
  const scaled = (x) => (axis.log ? Math.log(Math.max(x, first) / first) / Math.log(last / first) : (x - first) / (last - first));
  const x = (step) => left + scaled(toAxis(step)) * (width - left - right);
  const y = (value) => top + ((chart.high - value) / (chart.high - chart.low)) * (height - top - bottom);
  const unscaled = (pixel) => {
    const part = Math.min(1, Math.max(0, (pixel - left) / (width - left - right)));
    return toStep(axis.log ? first * (last / first) ** part : first + part * (last - first));
  };
  Object.assign(plot, { svg, x, y, unscaled, width, height, top, bottom, left, right });
  for (const value of ticks(chart.low, chart.high, large ? 6 : 4)) {
    make(svg, "line", { x1: left, x2: width - right, y1: y(value), y2: y(value), stroke: "var(--grid)" });
    make(svg, "text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, count(value));
  }
  const wanted = Math.max(2, Math.floor(width / 110));
  let before = -Infinity;
  for (const value of axis.log ? logTicks(first, last) : ticks(first, last, wanted)) {
    const place = left + scaled(value) * (width - left - right);
    if (place - before < 38) continue;
    before = place;
    const anchor = place > width - 30 ? "end" : "middle";
    make(svg, "text", { x: place, y: height - 6, "text-anchor": anchor }, count(value));
  }
  const clip = make(make(svg, "defs", {}), "clipPath", { id: `clip${plot.number}` });
  make(clip, "rect", { x: left - 5, y: top - 5, width: width - left - right + 10, height: height - top - bottom + 10 });
  for (const mark of run.marks) {
    if (!mark.line) continue;
    const place = x(mark.step);
    const line = make(svg, "line", { x1: place, x2: place, y1: top, y2: height - bottom, stroke: "var(--mark)", "stroke-dasharray": mark.line });
    make(line, "title", {}, mark.text);
  }
  for (const line of chart.lines) {
    make(svg, "line", { x1: left, x2: width - right, y1: y(line.value), y2: y(line.value), stroke: "var(--mark)", "stroke-dasharray": "6 4" });
  }
  const inside = make(svg, "g", { "clip-path": `url(#clip${plot.number})` });
  if (chart.band) drawBand(inside, chart.band, x, y);
  for (const series of chart.series) drawSeries(inside, series, x, y);
  if (large) placeLabels(svg, chart, y, wide ? width - right + 8 : width - 12, wide, height - bottom);
  if (chart.large)
    for (const mark of run.marks) {
      if (!mark.alarm) continue;
      const place = x(mark.step);
      const sign = make(svg, "path", { class: "spike", d: `M${place - 5} ${top - 8}h10l-5 9z`, fill: "var(--alarm)" });
      make(sign, "title", {}, mark.text);
    }
  plot.cursor = make(svg, "line", { y1: top, y2: height - bottom, stroke: "var(--ink)", "stroke-opacity": 0.45, visibility: "hidden" });
  plot.dots = chart.series.map((each) =>
    make(svg, "circle", { r: 4, fill: `var(--c${each.color})`, stroke: "var(--paper)", "stroke-width": 1.5, visibility: "hidden" }));
}

function drawSeries(parent, series, x, y) {
  const color = `var(--c${series.color})`;
  if (series.dots || series.step.length < 3) {
    for (let i = 0; i < series.step.length; i++)
      make(parent, "circle", { cx: x(series.step[i]), cy: y(series.value[i]), r: series.step.length > 150 ? 2 : 3.5, fill: color, stroke: "var(--paper)" });
    return;
  }
  const bold = series.bold || series.mean;
  if (bold) {
    path(parent, series.step, series.value, x, y, { stroke: color, "stroke-opacity": 0.3, "stroke-width": 1, class: "raw" });
    path(parent, bold.step, bold.value, x, y, { stroke: color, "stroke-width": 1.9, class: "bold" });
  } else {
    path(parent, series.step, series.value, x, y, { stroke: color, "stroke-width": 1.6, class: "raw" });
  }
}

// The area between the lowest and the highest expected values, and a line through the expected ones.
function drawBand(parent, band, x, y) {
  const along = (values) => band.step.map((step, i) => `${x(step).toFixed(1)} ${y(values[i]).toFixed(1)}`);
  const around = [...along(band.low), ...along(band.high).reverse()];
  make(parent, "path", { class: "band", d: `M${around.join("L")}Z`, fill: "var(--c1)", "fill-opacity": 0.14, stroke: "var(--c1)", "stroke-opacity": 0.3 });
  make(parent, "path", { d: `M${along(band.value).join("L")}`, fill: "none", stroke: "var(--c1)", "stroke-opacity": 0.6, "stroke-dasharray": "3 3" });
}

// A line through the points, broken where a figure was not logged for a while.
function path(parent, steps, values, x, y, attributes) {
  const gaps = steps.slice(1).map((each, i) => each - steps[i]).sort((a, b) => a - b);
  const usual = gaps.length ? gaps[gaps.length >> 1] : 0, longest = Math.max(6 * usual, (run.last - run.first) / 20);
  let d = "";
  for (let i = 0; i < steps.length; i++) {
    const joined = i && steps[i] - steps[i - 1] <= longest;
    d += `${joined ? "L" : "M"}${x(steps[i]).toFixed(1)} ${y(values[i]).toFixed(1)}${joined ? "" : "h0"}`; // a lone point is a dot
  }
  make(parent, "path", { d, fill: "none", "stroke-linejoin": "round", "stroke-linecap": "round", ...attributes });
}

// Names of reference lines at the right, and beside the plot also the last values, moved apart where they would overlap.
function placeLabels(svg, chart, y, x, beside, floor) {
  const labels = chart.lines.map((line) => ({ value: line.value, text: `${line.name} ${line.value.toFixed(3)}`, fill: "var(--soft)" }));
  if (beside)
    for (const series of chart.series) {
      const of = series.bold || series, last = of.value[of.value.length - 1];
      if (last !== undefined) labels.push({ value: last, text: `${series.name} ${last.toFixed(3)}`, fill: `var(--c${series.color})` });
    }
  let below = beside ? floor + 17 : Infinity;
  for (const label of labels.sort((a, b) => a.value - b.value)) {
    const place = Math.min(y(label.value) + (beside ? 4 : -4), below - 14);
    below = place;
    const anchor = beside ? "start" : "end";
    make(svg, "text", { x, y: place, "text-anchor": anchor, class: "label", style: `fill:${label.fill}` }, label.text);
  }
}

// What the series of a chart say about a step: [series, step, value, text].
function readings(chart, step) {
  return chart.series.filter((each) => each.step.length).map((series) => {
    const of = series.mean || series, i = nearest(of.step, step);
    const half = (a, b) => (a === undefined || b === undefined ? undefined : (a + b) / 2);
    let text = figure(of.value[i]);
    if (series.mean) {
      const from = half(of.step[i - 1], of.step[i]) ?? -Infinity, to = half(of.step[i], of.step[i + 1]) ?? Infinity;
      const near = series.value.filter((_, k) => series.step[k] >= from && series.step[k] <= to);
      if (near.length) text += ` (${figure(Math.min(...near))} to ${figure(Math.max(...near))})`;
    }
    return [series, of.step[i], of.value[i], text];
  });
}

function point(step) {
  for (const plot of plots) {
    const place = plot.x(step);
    plot.cursor.setAttribute("x1", place);
    plot.cursor.setAttribute("x2", place);
    plot.cursor.setAttribute("visibility", "visible");
    plot.dots.forEach((dot) => dot.setAttribute("visibility", "hidden"));
    for (const [series, at, value] of readings(plot.chart, step)) {
      const dot = plot.dots[plot.chart.series.indexOf(series)], height = plot.y(value);
      if (height < plot.top - 5 || height > plot.height - plot.bottom + 5) continue;
      dot.setAttribute("cx", plot.x(at));
      dot.setAttribute("cy", height);
      dot.setAttribute("visibility", "visible");
    }
  }
}

function leave() {
  for (const plot of plots) {
    plot.cursor.setAttribute("visibility", "hidden");
    plot.dots.forEach((dot) => dot.setAttribute("visibility", "hidden"));
    plot.tip.hidden = true;
  }
}

// Moves the cursors of all charts to the logging step nearest to `step`, and shows what this chart says there.
function show(plot, step) {
  const found = readings(plot.chart, step);
  if (!found.length) return;
  const of = plot.chart.series.find((each) => each.step.length), main = of.mean || of;
  plot.index = nearest(main.step, step);
  const at = main.step[plot.index];
  point(at);
  plot.tip.replaceChildren();
  const title = document.createElement("div");
  title.className = "soft";
  title.textContent = `step ${Math.round(at).toLocaleString("en")}` + (run.x.tokens.length ? `, ${count(interpolate(run.x.step, run.x.tokens, at))} tokens` : "");
  plot.tip.append(title);
  for (const [series, own, , text] of readings(plot.chart, at)) {
    const line = document.createElement("div"), dot = document.createElement("i"), value = document.createElement("b");
    dot.style.background = `var(--c${series.color})`;
    value.textContent = text;
    const late = Math.abs(own - at) > 0.5 ? ` at step ${Math.round(own).toLocaleString("en")}` : "";
    line.append(dot, `${series.name} `, value, late);
    plot.tip.append(line);
  }
  if (plot.chart.band) {
    const { step: steps, low, high } = plot.chart.band, i = nearest(steps, at), line = document.createElement("div");
    line.textContent = `expected ${figure(low[i])} to ${figure(high[i])} at step ${Math.round(steps[i]).toLocaleString("en")}`;
    plot.tip.append(line);
  }
  plot.tip.hidden = false;
  const place = (plot.x(at) / plot.width) * plot.box.clientWidth;
  const left = place > plot.box.clientWidth / 2 ? place - plot.tip.offsetWidth - 12 : place + 12;
  plot.tip.style.left = `${Math.max(0, Math.min(left, plot.box.clientWidth - plot.tip.offsetWidth))}px`;
}

function setUp(box, number) {
  const chart = run.charts[number], tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "status");
  box.append(tip);
  const plot = { chart, box, tip, number, index: 0 };
  plots.push(plot);
  draw(plot);
  box.addEventListener("pointermove", (event) => {
    const scale = plot.width / box.clientWidth;
    show(plot, plot.unscaled((event.clientX - box.getBoundingClientRect().left) * scale));
  });
  box.addEventListener("pointerleave", leave);
  box.addEventListener("blur", leave);
  box.addEventListener("keydown", (event) => {
    const of = chart.series.find((each) => each.step.length), main = of && (of.mean || of);
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") return leave();
    if (!main || !(event.key in moves)) return;
    event.preventDefault();
    show(plot, main.step[Math.max(0, Math.min(main.step.length - 1, plot.index + moves[event.key]))]);
  });
  let before = box.clientWidth;
  new ResizeObserver(() => {
    if (box.clientWidth !== before && box.clientWidth) {
      before = box.clientWidth;
      draw(plot);
    }
  }).observe(box);
}

document.querySelectorAll(".plot").forEach(setUp);
document.querySelectorAll(".axes input").forEach((input) =>
  input.addEventListener("change", () => {
    if (input.type === "checkbox") axis.log = input.checked; else axis.kind = input.value;
    plots.forEach(draw);
  }));
