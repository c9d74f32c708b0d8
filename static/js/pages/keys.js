// The table of keys, kept live. Events change their rows at once; the whole page is fetched again every two seconds while
// anything happens, because the feed doesn't report keepalives and new rows one by one.
//
// While somebody aims at the table (hold.js) or rows are selected, rows neither move nor vanish: they change in place, and a
// row whose key is gone is struck through.

import * as actions from "../actions.js";
import { call, request } from "../api.js";
import { now, setLeft } from "../clock.js";
import * as feed from "../feed.js";
import { hold } from "../hold.js";
import { leadOn } from "../lists.js";
import { actOnMatching } from "../matching.js";
import { model } from "../model.js";
import { fillKey, readKey, setState } from "../rows.js";
import { show } from "../panel.js";
import { made, number, place, setText, toast } from "../ui.js";

const EVERY = 2000;
const card = document.getElementById("keys");
const table = card.querySelector("table");
const body = table.tBodies[0];
const bulk = document.getElementById("bulk");
const all = document.getElementById("pick-all");
const found = document.getElementById("not-found");
const { after, within, nothing } = card.dataset;
const STATES = ["available", "blocked", "cooling", "quarantined"];
const chosen = new Set();
const matching = document.getElementById("matching");
const block = Number(document.body.dataset.block);
let allMatching = false; // not only the rows shown
let running = null; // {stopped} of the action on all that match
let loadedAt = performance.now();
let timer = 0;

const rowOf = (id) => body.querySelector(`[data-id="${id}"]`);
const still = hold(table, reload, () => chosen.size > 0);

function query() {
  const asked = new URLSearchParams(card.dataset.query);
  asked.set("limit", "50");
  if (after) asked.set("after", after);
  return asked;
}

/** Fetch the page again soon, at most every two seconds. */
function reload() {
  if (timer || document.hidden || nothing === "wrong") return;
  timer = setTimeout(load, Math.max(0, loadedAt + EVERY - performance.now()));
}

async function load() {
  timer = 0;
  try {
    const page = soonOnly(await call("GET", `/keys?${query()}`));
    const asOf = now();
    loadedAt = performance.now();
    if (still()) patch(page.keys, asOf);
    else replace(page, asOf);
  } catch {
    loadedAt = performance.now(); // the pill shows it already
  }
}

/** Of the keys in order of expiry, those that expire soon, if that is what the page shows. */
function soonOnly(page) {
  if (!within) return page;
  const keys = page.keys.filter((key) => key.expires_in <= within);
  return { keys, next: keys.length === page.keys.length ? page.next : null };
}

function patch(keys, asOf) {
  for (const key of keys) {
    const row = rowOf(key.id);
    if (row && !row.classList.contains("gone")) fillKey(row, key, asOf);
  }
}

function replace({ keys, next }, asOf) {
  const wanted = new Set(keys.map((key) => String(key.id)));
  for (const row of [...body.rows]) if (!wanted.has(row.dataset.id)) row.remove();
  keys.forEach((key, i) => {
    const row = rowOf(key.id) ?? made("row-template");
    fillKey(row, key, asOf);
    place(body, row, i);
  });
  leadOn(next);
  table.hidden = keys.length === 0;
  states(keys.length);
}

function states(count) {
  document.getElementById("no-rows").hidden = count > 0;
  const empty = (model.stats?.total ?? 1) === 0;
  const which = empty ? "empty" : nothing;
  for (const element of document.querySelectorAll("#no-rows [data-when]")) element.hidden = element.dataset.when !== which;
}

/** The state of a key after an event. */
const AFTER = {
  acquired: "blocked",
  unblocked: "available",
  released: "available",
  ready: "available",
  restored: "available",
  cooled: "cooling",
  quarantined: "quarantined",
};

/** Apply an event to its row, if that is shown. */
function apply(event) {
  const row = rowOf(event.id);
  if (!row || row.classList.contains("gone")) return;
  if (event.event === "deleted" || event.event === "expired") {
    row.classList.add("gone");
    setState(row, event.event, null);
    const expires = row.querySelector('[data-kind="expires"]');
    setLeft(expires, null);
    expires.nextElementSibling.hidden = true;
    choose(event.id, false);
  } else if (AFTER[event.event]) {
    const state = AFTER[event.event];
    // An event doesn't say how long a cooldown lasts: the countdown comes with the page's next fetch.
    setState(row, state, state === "blocked" ? Math.max(0, block - (now() - Date.parse(event.at)) / 1000) : null);
    row.dataset.lease = event.lease ?? "";
    setText(row.querySelector('[data-f="owner"]'), (state === "blocked" && event.owner) || "");
    setText(row.querySelector('[data-f="lease"]'), String(event.lease ?? ""));
  }
}

// -- selection

function choose(id, on) {
  if (on) chosen.add(id);
  else {
    chosen.delete(id);
    allMatching = false;
  }
  const row = rowOf(id);
  row?.classList.toggle("chosen", on);
  const box = row?.querySelector(".picked");
  if (box) box.checked = on;
  count();
}

function count() {
  if (!bulk) return;
  bulk.hidden = chosen.size === 0 && !running;
  const { count: many, exact } = match();
  setText(document.getElementById("bulk-count"), allMatching ? (exact ? number(many) : "All that match") : number(chosen.size));
  const rows = body.querySelectorAll(".key-row:not(.gone)").length;
  all.checked = chosen.size > 0 && chosen.size === rows;
  all.indeterminate = chosen.size > 0 && chosen.size < rows;
  const more = after || !document.getElementById("next").hidden;
  matching.hidden = allMatching || !all.checked || !more || card.dataset.tab === "expiring" || Boolean(running);
  setText(matching, exact ? `Select all ${number(many)}` : "Select all that match");
}

/** How many keys the list has on all its pages; not `exact` of a search, which has as many as the pool at most. */
function match() {
  const asked = query();
  const exact = !["prefix", "name", "owner"].some((each) => asked.has(each));
  const stats = model.stats ?? {};
  return { count: (exact && stats[card.dataset.tab]) || (stats.total ?? 0), exact };
}

async function actOnAll(act) {
  const asked = query();
  asked.delete("after");
  const found = match();
  const bar = document.getElementById("bulk-progress");
  const mine = { stopped: false };
  const done = await actOnMatching(act, asked, found, (seen) => {
    if (!running) run(mine);
    bar.max = found.count;
    bar.value = seen;
    setText(document.getElementById("bulk-count"), number(seen));
    return mine.stopped;
  });
  if (!done) return;
  run(null);
  clear();
  load();
}

/** Show that an action on all is under way, or is over. */
function run(now) {
  running = now;
  for (const button of bulk.querySelectorAll("[data-bulk]")) button.hidden = Boolean(now);
  matching.hidden = true;
  for (const id of ["bulk-progress", "bulk-stop"]) document.getElementById(id).hidden = !now;
  setText(document.getElementById("bulk-what"), now ? "done" : "selected");
  if (now) document.getElementById("bulk-stop").focus();
}

function clear() {
  if (running) return;
  allMatching = false;
  count();
  for (const id of [...chosen]) choose(id, false);
}

body.addEventListener("change", (event) => {
  const row = event.target.closest(".key-row");
  if (row && event.target.matches(".picked")) choose(Number(row.dataset.id), event.target.checked);
});
body.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-act]");
  const row = event.target.closest(".key-row");
  if (button && (await actions.ONE[button.dataset.act](readKey(row)))) load();
  else if (!button && row && !event.target.closest("a, input, label") && !getSelection().toString()) show(Number(row.dataset.id));
});
all?.addEventListener("change", () => {
  const on = all.checked;
  for (const row of body.querySelectorAll(".key-row:not(.gone)")) choose(Number(row.dataset.id), on);
});
bulk?.addEventListener("click", async (event) => {
  const act = event.target.closest("[data-bulk]")?.dataset.bulk;
  if (!act) return;
  if (act === "clear") {
    clear();
    return;
  }
  if (allMatching) {
    actOnAll(act);
    return;
  }
  const keys = [...chosen].map(rowOf).filter(Boolean).map(readKey);
  if (await actions.MANY[act](keys)) {
    clear();
    load();
  }
});
matching?.addEventListener("click", () => {
  allMatching = true;
  count();
  bulk.querySelector("[data-bulk]").focus(); // the button that was pressed is gone
});
document.getElementById("bulk-stop")?.addEventListener("click", () => {
  if (running) running.stopped = true;
});
document.addEventListener("escape", clear);

// -- search: the server finds what the text stands for, which may be a whole key, so it isn't put into a URL

document.querySelector("form.search").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  try {
    const { url } = await request("POST", form.action, new URLSearchParams(new FormData(form)));
    if (url) {
      form.reset(); // a whole key isn't left in the page
      location.assign(url);
    } else {
      found.replaceChildren(document.getElementById("not-found-text").content.cloneNode(true));
      found.hidden = false;
    }
  } catch (problem) {
    toast(`${problem.title}. ${problem.message}`, "danger");
  }
});
document.getElementById("search").addEventListener("input", () => (found.hidden = true));

feed.on("hello", () => {
  counts();
  reload();
});
feed.on("delta", (delta) => {
  counts();
  delta.events.forEach(apply);
  reload();
});

function counts() {
  const { stats } = model;
  setText(document.querySelector('[data-count="all"]'), number(stats.total));
  for (const name of STATES) setText(document.querySelector(`[data-count="${name}"]`), number(stats[name]));
}
feed.on("figures", ({ expiring }) => {
  setText(document.querySelector('[data-count="expiring"]'), number(expiring));
  if (within) reload();
});
