// The stream of events: filtered by kind and by text; it can be paused.
//
// While it is paused, or somebody aims at it (hold.js) or has scrolled down, new events wait behind a button that says how
// many they are. The server sends at most 50 a frame; those left out are counted. The last 200 are kept.

import * as feed from "../feed.js";
import { hold } from "../hold.js";
import { addEvents, origin } from "../rows.js";
import { number, setText } from "../ui.js";

const LIMIT = 200;
const FEW = 10;
const stream = document.getElementById("stream");
const pause = document.getElementById("pause");
const missed = document.getElementById("missed");
const newer = document.getElementById("newer");
const field = document.getElementById("search");
const { kind } = stream.dataset;
let waiting = [];
let paused = false;
let left = 0;
let drawnAt = 0;

const still = hold(stream.parentElement, draw, () => paused || stream.getBoundingClientRect().top < 0);
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
  if (still()) offer();
  else if (waiting.length <= FEW || performance.now() - drawnAt > 1000) draw();
}

function draw() {
  if (waiting.length > FEW) drawnAt = performance.now();
  addEvents(stream, waiting, LIMIT);
  waiting = [];
  offer();
  if (field.value) sift();
  else say(stream.children.length);
}

/** Say on the button how many events wait. */
function offer() {
  const count = waiting.filter((event) => fits({ ...event, origin: origin(event) })).length;
  newer.hidden = count === 0;
  setText(newer, `${number(count)}${count === LIMIT ? " or more" : ""} new`);
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
  missed.hidden = !left;
  setText(missed, left ? `${number(left)} more came too fast to be listed.` : "");
}

pause.addEventListener("click", () => {
  paused = !paused;
  pause.setAttribute("aria-pressed", String(paused));
  setText(pause.querySelector("span"), paused ? "Resume" : "Pause");
  left = paused ? left : 0;
  if (!still()) draw();
});
newer.addEventListener("click", () => {
  const focused = newer.matches(":focus-visible");
  draw();
  if (focused) stream.querySelector(".key-link").focus();
  scrollTo({ top: 0 });
});
setInterval(() => {
  if (waiting.length && !document.hidden && !still() && performance.now() - drawnAt > 1000) draw();
}, 500);
field.addEventListener("input", () => {
  sift();
  offer();
});

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
