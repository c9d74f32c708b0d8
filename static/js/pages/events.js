// The stream of events: filtered by kind and by text; it can be paused.
//
// The server sends at most 50 a frame; those left out are counted. Rare events aren't taken from the frames, where thousands
// of others crowd them out, but from the list that the server keeps of them. The last 200 are kept here.
//
// Rows that don't fit a text are hidden at once; then the server looks among all that it has. The text gets into the page's
// address only if some event has it, so that a key that was pasted by mistake doesn't.

import { call } from "../api.js";
import * as feed from "../feed.js";
import { follow } from "../lists.js";
import { addEvents, crowd, eventRow } from "../rows.js";
import { number, setText } from "../ui.js";

const LIMIT = 200;
const FEW = 10;
const RARE = 50; // of them, how many are fetched at a time
const stream = document.getElementById("stream");
const pause = document.getElementById("pause");
const missed = document.getElementById("missed");
const field = document.getElementById("search");
const { kind, kept } = stream.dataset;
const later = new URLSearchParams(location.search).has("after"); // not the first page, where new events come
let waiting = [];
let paused = false;
let left = 0;
let drawnAt = 0;
let searching = null;

const newestAt = () => stream.querySelector("time")?.dateTime ?? "";

/** A few events are drawn as they come, a flood once a second. They are given oldest first. */
function take(events) {
  const fresh = events.filter((event) => kept !== undefined || !kind || event.event === kind).reverse();
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

/** Whether a row has the text in what it shows. The same as matching() in keypool/web/handlers.py. */
function fits(row, text) {
  return ["id", "hint", "whom", "owner"].map((name) => row.querySelector(`[data-f="${name}"]`).textContent).join(" ").toLowerCase().includes(text);
}

function sift() {
  const text = field.value.trim().toLowerCase();
  let shown = 0;
  for (const row of stream.children) {
    const hidden = Boolean(text) && !fits(row, text);
    if (row.hidden !== hidden) row.hidden = hidden;
    if (!hidden) shown += 1;
  }
  say(shown);
}

function say(shown) {
  document.getElementById("no-events").hidden = shown > 0;
  stream.parentElement.hidden = shown === 0;
  missed.hidden = !left && !(paused && waiting.length);
  const said = [];
  if (paused && waiting.length) said.push(`${number(waiting.length)}${waiting.length === LIMIT ? " or more" : ""} arrived since you paused.`);
  if (left) said.push(`${number(left)} more events${kind ? ", of all kinds," : ""} came too fast to be listed. None that is listed under Rare is lost.`);
  setText(missed, said.join(" "));
}

/** Look among all events that the server has. */
async function search() {
  searching?.abort();
  searching = new AbortController();
  const { form } = field;
  try {
    const answer = await fetch(form.action, {
      method: "POST",
      headers: { Accept: "text/html" },
      body: new URLSearchParams(new FormData(form)),
      signal: searching.signal,
    });
    if (!answer.ok || new URL(answer.url).pathname !== new URL(form.action).pathname) return; // signed out
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    waiting = [];
    stream.replaceChildren(...page.getElementById("stream").children);
    document.querySelector(".pager").replaceWith(page.querySelector(".pager"));
    const address = new URL(answer.url);
    if (!answer.redirected && kind) address.searchParams.set("kind", kind);
    history.replaceState(null, "", address);
    sift();
  } catch {
    // The pill shows it already; or a later search has taken its place.
  }
}

/** Fetch the latest rare events, and take those that aren't here yet; a crowd may have grown. */
async function loadRare() {
  const nameOf = (at, event, id) => `${at} ${event} ${id}`;
  const { events } = await call("GET", `/events?limit=${RARE}${kind === "rare" ? "" : `&kind=${kind}`}`);
  const there = new Map([...stream.children].map((row) => [nameOf(row.querySelector("time").dateTime, row.dataset.kind, row.dataset.id), row]));
  const waits = new Set(waiting.map((event) => nameOf(event.at, event.event, event.id)));
  const fresh = events.filter((event) => {
    const name = nameOf(event.at, event.event, event.id);
    const row = there.get(name);
    if (row) setText(row.querySelector('[data-f="crowd"]'), crowd(event));
    return !row && !waits.has(name);
  });
  if (fresh.length) take(fresh.reverse());
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

let typed = 0;
field.addEventListener("input", () => {
  sift();
  clearTimeout(typed);
  typed = setTimeout(search, 400);
});
field.form.addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(typed);
  search();
});

if (later) {
  pause.hidden = true;
} else if (kept !== undefined) {
  follow(loadRare);
} else {
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
}
