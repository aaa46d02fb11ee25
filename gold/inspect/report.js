"use strict";
const found = JSON.parse(document.getElementById("data").textContent);

function make(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

// Charts: the values at the step that is pointed at, or reached with the arrow keys.
for (const figure of document.querySelectorAll(".chart")) {
  const chart = found.charts[figure.dataset.chart];
  const svg = figure.querySelector("svg");
  const cross = svg.querySelector(".cross");
  const told = figure.querySelector("output");
  const rest = told.textContent;
  const steps = [...new Set(chart.lines.flatMap(line => line.steps))].sort((a, b) => a - b);
  let at = steps.length - 1;

  function value(line, step) {
    const n = line.steps.indexOf(step);
    if (n < 0) return null;
    return line.values[n] + (line.low ? ` (${line.low[n]} \u2013 ${line.high[n]})` : "");
  }
  function show(n) {
    at = Math.max(0, Math.min(steps.length - 1, n));
    const step = steps[at];
    const x = found.plot.left + step / Math.max(chart.last, 1) * (found.plot.right - found.plot.left);
    cross.setAttribute("x1", x);
    cross.setAttribute("x2", x);
    const parts = [];
    for (const line of chart.lines) {
      const said = value(line, step);
      if (said !== null) parts.push(line.label ? `${line.label} ${said}` : said);
    }
    told.textContent = `step ${step.toLocaleString("en")}: ${parts.join(", ")}`;
  }
  function leave() {
    cross.setAttribute("x1", -9);
    cross.setAttribute("x2", -9);
    told.textContent = rest;
  }
  function pointed(event) {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * found.plot.width;
    const step = (x - found.plot.left) / (found.plot.right - found.plot.left) * Math.max(chart.last, 1);
    let best = 0;
    steps.forEach((each, n) => { if (Math.abs(each - step) < Math.abs(steps[best] - step)) best = n; });
    show(best);
  }
  svg.addEventListener("pointermove", pointed);
  svg.addEventListener("pointerdown", pointed);
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", event => {
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: steps.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    show(next);
  });
}

// Samples: what each side gives the chunk that is pointed at.
const details = document.getElementById("details");
let current = null;

function shown(text) {
  return make("span", text.replaceAll(" ", "\u00b7").replaceAll("\n", "\u23ce"), "k");
}
function chance(logp) {
  const p = Math.exp(logp);
  return p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : p >= 0.0001 ? `${(100 * p).toPrecision(2)} %` : "< 0.01 %";
}
function nats(logp) {
  return logp.toFixed(2).replace("-", "\u2212");
}
function side(name, kind, logp, tokens) {
  const row = make("p");
  row.append(make("b", name, kind), ` ${chance(logp)}, log p ${nats(logp)}`);
  if (tokens && tokens.length > 1) {
    row.append(": ");
    for (const [text, own] of tokens) row.append(shown(text), ` ${chance(own)} `);
  }
  return row;
}
function open(button) {
  if (button === current) return;
  if (current) current.classList.remove("on");
  current = button;
  button.classList.add("on");
  const chunk = found.samples[button.dataset.chunk];
  const parts = [];
  if (chunk.student !== undefined) parts.push(side("student", "s", chunk.student, chunk.student_tokens));
  if (chunk.teacher !== undefined) parts.push(side("teacher", "t", chunk.teacher, chunk.teacher_tokens));
  if (chunk.alternatives && chunk.alternatives.length) {
    const row = make("p");
    row.append(make("b", "teacher's likeliest here", "t"), ": ");
    for (const [text, logp] of chunk.alternatives) row.append(shown(text), ` ${chance(logp)} `);
    parts.push(row);
  }
  details.replaceChildren(...parts);
  details.hidden = false;
}
function close() {
  if (current) current.classList.remove("on");
  current = null;
  details.hidden = true;
}
function walk(from, to) {
  from.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}
for (const tokens of document.querySelectorAll(".tokens")) {
  tokens.addEventListener("pointermove", event => {
    const button = event.target.closest("button");
    if (button && event.pointerType === "mouse") open(button);
  });
  for (const kind of ["click", "focusin"])
    tokens.addEventListener(kind, event => {
      const button = event.target.closest("button");
      if (button) open(button);
    });
  tokens.addEventListener("keydown", event => {
    const button = event.target.closest("button");
    if (!button || event.ctrlKey || event.metaKey || event.altKey) return;
    const all = Array.from(tokens.querySelectorAll("button"));
    const at = all.indexOf(button);
    const next = { ArrowRight: all[at + 1], ArrowLeft: all[at - 1], Home: all[0], End: all[all.length - 1] }[event.key];
    if (!next) return;
    event.preventDefault();
    walk(button, next);
  });
}
document.addEventListener("keydown", event => { if (event.key === "Escape") close(); });
document.addEventListener("click", event => {
  if (!event.target.closest(".tokens, #details")) close();
});

// A page of a run that goes on reads itself again; the box says whether.
if (found.running) {
  const label = document.getElementById("follow");
  const box = label.querySelector("input");
  label.hidden = false;
  try {
    box.checked = sessionStorage.getItem("follow") !== "no";
    box.addEventListener("change", () => sessionStorage.setItem("follow", box.checked ? "yes" : "no"));
  } catch { /* no storage for files: the box starts checked */ }
  setInterval(() => { if (box.checked && !document.hidden && details.hidden) location.reload(); }, 20000);
}
