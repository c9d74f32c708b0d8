// The stream of events: filtered by kind and by text; it can be paused.
//
// While it is paused, or somebody aims at it (hold.js) or has scrolled down, new events wait behind a button that says how
// many they are. The server sends at most 50 a frame; those left out are counted. Rare events aren't taken from the frames,
// where thousands of others crowd them out, but from the list that the server keeps of them. The last 200 are kept here.
//
// Rows that don't fit a text are hidden at once; then the server looks among all that it has. The text gets into the page's
// address only if some event has it, so that a key that was pasted by mistake doesn't.

import { call } from "../api.js";
import * as feed from "../feed.js";
import { hold } from "../hold.js";
import { follow } from "../lists.js";
import { addEvents, crowd, whom } from "../rows.js";
import { number, setText } from "../ui.js";

const LIMIT = 200;
const FEW = 10;
const RARE = 50; // of them, how many are fetched at a time
const stream = document.getElementById("stream");
const pause = document.getElementById("pause");
const missed = document.getElementById("missed");
const newer = document.getElementById("newer");
const field = document.getElementById("search");
const { kind, kept } = stream.dataset;
const later = new URLSearchParams(location.search).has("after"); // not the first page, where new events come
let waiting = [];
let paused = false;
let left = 0;
let drawnAt = 0;
let searching = null;

const still = hold(stream.closest(".card"), draw, () => paused || stream.getBoundingClientRect().top < 0);
const newestAt = () => stream.querySelector("time")?.dateTime ?? "";

/** A few events are drawn as they come, a flood once a second. They are given oldest first. */
function take(events) {
  const fresh = events.filter((event) => kept !== undefined || !kind || event.event === kind).reverse();
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

/** Whether an event has the text that was typed in what its row shows. The same as matching() in keypool/web/handlers.py. */
const fits = (words) => words.join(" ").toLowerCase().includes(field.value.trim().toLowerCase());

/** Say on the button how many events wait. */
function offer() {
  const count = waiting.filter((event) => fits([event.id, event.hint, whom(event), event.owner])).length;
  newer.hidden = count === 0;
  setText(newer, `${number(count)}${count === LIMIT ? " or more" : ""} new`);
}

function sift() {
  let shown = 0;
  for (const row of stream.children) {
    const hidden = !fits(["id", "hint", "whom", "owner"].map((name) => row.querySelector(`[data-f="${name}"]`).textContent));
    if (row.hidden !== hidden) row.hidden = hidden;
    if (!hidden) shown += 1;
  }
  say(shown);
}

function say(shown) {
  document.getElementById("no-events").hidden = shown > 0;
  stream.parentElement.hidden = shown === 0;
  missed.hidden = !left;
  setText(missed, left ? `${number(left)} more events${kind ? ", of all kinds," : ""} came too fast to be listed. None that is listed under Rare is lost.` : "");
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
    offer();
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

let typed = 0;
field.addEventListener("input", () => {
  sift();
  offer();
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
