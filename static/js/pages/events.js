// The stream of events: filtered by kind and by text; it can be paused.
//
// The server sends at most 50 a frame; those left out are counted. The last 200 are kept.

import * as feed from "../feed.js";
import { addEvents, eventRow } from "../rows.js";
import { number, setText } from "../ui.js";

const LIMIT = 200;
const FEW = 10;
const stream = document.getElementById("stream");
const pause = document.getElementById("pause");
const missed = document.getElementById("missed");
const field = document.getElementById("search");
const { kind } = stream.dataset;
let waiting = [];
let paused = false;
let left = 0;
let drawnAt = 0;

const newestAt = () => stream.querySelector("time")?.dateTime ?? "";

function fits(event) {
  const text = field.value.trim().toLowerCase();
  if (kind && event.event !== kind) return false;
  return !text || `${event.id} ${event.hint} ${event.origin}`.toLowerCase().includes(text);
}

/** A few events are drawn as they come, a flood once a second. */
function take(events) {
  const fresh = events.filter((event) => !kind || event.event === kind).reverse();
  waiting = fresh.concat(waiting).slice(0, LIMIT);
  if (paused || waiting.length <= FEW || performance.now() - drawnAt > 1000) draw();
}

function draw() {
  if (!paused) {
    if (waiting.length > FEW) drawnAt = performance.now();
    addEvents(stream, waiting, LIMIT);
    waiting = [];
  }
  if (paused || field.value) sift();
  else say(stream.children.length);
}

function sift() {
  let shown = 0;
  for (const row of stream.children) {
    const text = (name) => row.querySelector(`[data-f="${name}"]`).textContent;
    const hidden = !fits({ event: row.dataset.kind, id: row.dataset.id, hint: text("hint"), origin: text("origin") });
    if (row.hidden !== hidden) row.hidden = hidden;
    if (!hidden) shown += 1;
  }
  say(shown);
}

function say(shown) {
  document.getElementById("no-events").hidden = shown > 0;
  missed.hidden = !left && !(paused && waiting.length);
  const said = [];
  if (paused && waiting.length) said.push(`${number(waiting.length)}${waiting.length === LIMIT ? " or more" : ""} arrived since you paused.`);
  if (left) said.push(`${number(left)} more came too fast to be listed.`);
  setText(missed, said.join(" "));
}

pause.addEventListener("click", () => {
  paused = !paused;
  pause.setAttribute("aria-pressed", String(paused));
  setText(pause.querySelector("span"), paused ? "Resume" : "Pause");
  if (!paused) {
    addEvents(stream, waiting, LIMIT);
    waiting = [];
    left = 0;
  }
  sift();
});
setInterval(() => {
  if (waiting.length && !paused && !document.hidden && performance.now() - drawnAt > 1000) draw();
}, 500);
field.addEventListener("input", sift);

feed.on("hello", (hello) => {
  // Events missed while the page was disconnected: all that are newer than the newest known.
  const since = waiting[0]?.at ?? newestAt();
  take(hello.events.filter((event) => event.at > since));
});
feed.on("delta", (delta) => {
  if (delta.whole) {
    const since = waiting[0]?.at ?? newestAt();
    take(delta.events.filter((event) => event.at > since));
    return;
  }
  left += delta.dropped;
  take(delta.events);
});
