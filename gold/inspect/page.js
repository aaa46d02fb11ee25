"use strict";
const found = JSON.parse(document.getElementById("data").textContent);
const bytes = Uint8Array.from(atob(found.bytes), c => c.charCodeAt(0));
const chunks = Array.from(document.querySelectorAll("#chunks button"));
const place = new Map(chunks.map((chunk, c) => [chunk, c]));
const details = document.getElementById("details");
const hint = details.firstChild;
let current = null;
let stop = chunks[0];

function make(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function hex(first, last) {
  return Array.from(bytes.subarray(first, last), b => b.toString(16).padStart(2, "0")).join(" ");
}

function count(number, unit) {
  return `${number} ${unit}${number === 1 ? "" : "s"}`;
}

function logp(value) {
  return value === null ? "\u2013" : value.toFixed(3).replace("-", "\u2212");
}

function sum(side, first, last) {
  let total = 0;
  for (let k = first; k < last; k++) {
    if (side.logp[k] === null) return null;
    total += side.logp[k];
  }
  return first === last ? null : total;
}

function fill(body, side, shown, name, letter, first, last) {
  const title = make("th", name, letter);
  title.colSpan = 4;
  title.scope = "rowgroup";
  const head = body.insertRow();
  head.append(title);
  if (side.logp) head.append(make("td", logp(sum(side, first, last)), "number"));
  if (side.entropy) head.append(make("td"));
  for (let k = first; k < last; k++) {
    const row = body.insertRow();
    const from = k ? side.ends[k - 1] : 0;
    row.insertCell().append(shown.children[k - first].cloneNode(true));
    row.append(make("td", side.ids[k], "number"));
    const cell = make("td", hex(from, side.ends[k]), "bytes");
    if (k in side.own) cell.append(make("em", " its own: " + (side.own[k] || "none")));
    row.append(cell, make("td", from + "\u2013" + side.ends[k], "number"));
    if (side.logp) row.append(make("td", logp(side.logp[k]), "number"));
    if (side.entropy) row.append(make("td", logp(side.entropy[k]), "number"));
  }
}

function show(chunk) {
  if (chunk === current) return;
  const c = place.get(chunk);
  if (current) current.classList.remove("on");
  else hint.remove();
  current = chunk;
  chunk.classList.add("on");
  const [s0, s1, t0, t1] = found.chunks[c];
  const [student, teacher] = found.sides;
  const from = c ? found.ends[c - 1] : 0;
  const size = found.ends[c] - from;
  const table = make("table");
  const head = table.createTHead().insertRow();
  const titles = [["token"], ["id", "number"], ["bytes"], ["at", "number"]];
  if (student.logp) titles.push(["log p", "number"]);
  if (student.entropy) titles.push(["entropy", "number"]);
  for (const [title, kind] of titles) {
    head.append(make("th", title, kind));
    head.lastChild.scope = "col";
  }
  fill(table.createTBody(), student, chunk.children[0], "student", "s", s0, s1);
  fill(table.createTBody(), teacher, chunk.children[1], "teacher", "t", t0, t1);
  const parts = [
    make("h2", `Chunk ${c + 1} of ${found.count}`),
    make("p", `${count(size, "byte")}, ${from}\u2013${found.ends[c]}: ` +
      `${count(s1 - s0, "student token")}, ${count(t1 - t0, "teacher token")}`),
    table,
  ];
  if (student.logp) {
    const [a, b] = [sum(student, s0, s1), sum(teacher, t0, t1)];
    if (a !== null && b !== null)
      parts.push(make("p", `log p: student ${logp(a)}, teacher ${logp(b)}, difference ${logp(a - b)} nats`));
  }
  details.replaceChildren(...parts);
  details.scrollTop = 0;
}

// One chunk at a time is a stop of the tab key.
function walk(chunk) {
  stop.tabIndex = -1;
  chunk.tabIndex = 0;
  stop = chunk;
  chunk.focus();
}

function beside(chunk, down) {
  const here = chunk.getBoundingClientRect();
  const middle = here.left + here.width / 2;
  const step = down ? 1 : -1;
  let best = null;
  for (let n = place.get(chunk) + step; n >= 0 && n < chunks.length; n += step) {
    const there = chunks[n].getBoundingClientRect();
    if (Math.abs(there.top - here.top) < 2) continue;
    const away = Math.abs(there.left + there.width / 2 - middle);
    if (best && Math.abs(there.top - best.top) > 2) break;
    if (!best || away < best.away) best = { chunk: chunks[n], top: there.top, away };
  }
  return best && best.chunk;
}

const region = document.getElementById("chunks");
// Not "pointerover": a mouse that rests while the page scrolls under it points at nothing.
region.addEventListener("pointermove", e => {
  const chunk = e.target.closest("button");
  if (chunk && e.pointerType === "mouse") show(chunk);
});
for (const event of ["focusin", "click"])
  region.addEventListener(event, e => {
    const chunk = e.target.closest("button");
    if (!chunk) return;
    if (event === "click") walk(chunk);
    show(chunk);
  });
region.addEventListener("keydown", e => {
  const chunk = e.target.closest("button");
  if (!chunk || e.ctrlKey || e.metaKey || e.altKey) return;
  const at = place.get(chunk);
  const next = {
    ArrowRight: () => chunks[at + 1], ArrowLeft: () => chunks[at - 1],
    ArrowDown: () => beside(chunk, true), ArrowUp: () => beside(chunk, false),
    Home: () => chunks[0], End: () => chunks[chunks.length - 1],
  }[e.key];
  if (!next) return;
  e.preventDefault();
  const other = next();
  if (other) walk(other);
});
