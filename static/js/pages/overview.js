// The overview, kept live: tiles from each frame, charts once a second, what ends next every two seconds.

import { call } from "../api.js";
import { Chart } from "../chart.js";
import { duration, now, spell } from "../clock.js";
import * as feed from "../feed.js";
import { hold } from "../hold.js";
import { countSecond, model } from "../model.js";
import { addEvents, eventRow, fillKey } from "../rows.js";
import { made, number, setText } from "../ui.js";

const LATELY = 300; // seconds, as in keypool/web/latency.py
const RECENT = ["refused", "released", "expired"];
const SOONEST_EVERY = 2000;
const SHOWN = 10;
const SHOWN_DUE = 5;
const STATES = ["available", "blocked", "cooling", "quarantined"];
const NOTES = { cooling: "until cooled down", quarantined: "until restored" };
const MEDIANS = { waits: "median of waits", calls: "median" };
const charts = [
  new Chart(document.getElementById("chart-composition"), STATES, true, zoom),
  new Chart(document.getElementById("chart-rates"), ["kept_alive", "unblocked", "acquired", "released", "expired", "refused"], false, zoom),
];
const showAll = document.getElementById("show-all");
const latest = document.getElementById("latest");
const soonest = [...document.querySelectorAll(".soonest")].map((list) => ({
  list,
  still: hold(list, () => {
    soonestAt = -Infinity;
    loadSoonest();
  }),
}));
const still = hold(latest, showLatest);
let span = "seconds";
let range = null; // that the charts are zoomed into
let soonestAt = -Infinity;
let figuresAt = -Infinity;
let nextDue = null;
let verdicts = null;

function tile(name, value, note) {
  const element = document.getElementById(`tile-${name}`);
  setText(element.querySelector(".figure"), typeof value === "number" ? number(value) : value);
  if (note) setText(element.querySelector(".note"), note);
}

function tiles() {
  const { stats } = model;
  tile("available", stats.available, `of ${number(stats.total)} keys`);
  tile("blocked", stats.blocked);
  for (const name of Object.keys(NOTES)) tile(name, stats[name]);
  tile("waiting", stats.waiting);
  for (const element of document.querySelectorAll("#exhausted [data-count]")) setText(element, number(stats[element.dataset.count]));
  document.getElementById("empty").hidden = stats.total > 0;
  const before = document.getElementById("expired-before");
  before.hidden = stats.expired === 0;
  setText(before.querySelector("strong"), number(stats.expired));
  document.getElementById("exhausted").hidden = !exhausted();
  charts[0].latest(stats);
  headline();
  hurry();
}

function exhausted() {
  return model.stats.available === 0 && model.stats.total > 0;
}

/** Verdicts are found by the server. They come with the figures, sooner if a number that they depend on has come or gone. */
function hurry() {
  const { stats } = model;
  const signs = [stats.available, stats.waiting, stats.cooling + stats.quarantined, stats.total].map(Boolean).join();
  if (signs === hurry.signs || performance.now() - figuresAt < SOONEST_EVERY) return;
  hurry.signs = signs;
  feed.refresh();
}

/** The headline of the verdicts. The same as attention() in keypool/web/dashboard.py. */
function headline() {
  if (!verdicts) return;
  const count = verdicts.length + exhausted();
  const title = document.getElementById("health-title");
  title.dataset.tone = count ? "warn" : "good";
  setText(title, count ? `${count === 1 ? "One thing needs" : `${count} things need`} attention` : "All is well");
}

/** Show verdicts. Rows that stay are changed in place, so that a link keeps the focus. */
function health(found) {
  verdicts = found.filter(({ code }) => code !== "exhausted"); // which has a card of its own
  const list = document.getElementById("verdicts");
  for (const row of [...list.children]) if (!verdicts.some(({ code }) => code === row.dataset.code)) row.remove();
  verdicts.forEach((verdict, i) => {
    let row = list.querySelector(`[data-code="${verdict.code}"]`);
    if (!row) {
      row = made("verdict-template");
      row.dataset.code = verdict.code;
      list.insertBefore(row, list.children[i] ?? null);
    }
    for (const field of row.querySelectorAll("[data-f]")) setText(field, verdict[field.dataset.f]);
    row.querySelector("a").href = verdict.href;
  });
  if (model.stats) headline();
}

function drawCharts() {
  if (!model.history || document.hidden) return;
  const series = model.history[span];
  if (range?.to <= series.end - series.available.length * series.step) range = null; // it is over by now
  if (document.activeElement === showAll && !range) document.querySelector("#span :checked").focus();
  showAll.hidden = !range;
  for (const chart of charts) chart.draw(model.history, span, range);
}

function zoom(wanted) {
  for (const chart of charts) chart.drag = null;
  range = wanted;
  drawCharts();
}

function second() {
  if (feed.state !== "live" && feed.state !== "polling") return;
  countSecond();
  drawCharts();
  if (model.history) for (const name of RECENT) tile(name, sum(model.history.seconds[name].slice(-LATELY)));
}

function sum(values) {
  return values.reduce((a, b) => a + b, 0);
}

async function loadSoonest() {
  if (document.hidden || performance.now() - soonestAt < SOONEST_EVERY) return;
  soonestAt = performance.now();
  try {
    const due = await Promise.all(soonest.map(loadList));
    nextDue = Math.min(...due);
    drawDue();
  } catch {
    // The pill shows it already.
  }
}

/** Fill a list of the keys whose state ends next. Returns the moment of the first, Infinity if there is none. */
async function loadList({ list, still }) {
  const { keys } = await call("GET", `/keys?order=${list.dataset.order}&limit=${SHOWN_DUE}`);
  const asOf = now();
  if (still()) {
    for (const row of list.children) {
      const key = keys.find((each) => String(each.id) === row.dataset.id);
      row.classList.toggle("over", !key);
      if (key) fillKey(row, key, asOf);
    }
    return dueOf(keys, asOf);
  }
  while (list.children.length > keys.length) list.lastElementChild.remove();
  while (list.children.length < keys.length) list.append(made("soon-template"));
  keys.forEach((key, i) => {
    list.children[i].classList.remove("over");
    fillKey(list.children[i], key, asOf);
  });
  list.nextElementSibling.hidden = keys.length > 0;
  return dueOf(keys, asOf);
}

const dueOf = (keys, asOf) => (keys.length ? asOf + (keys[0].release_in ?? keys[0].available_in) * 1000 : Infinity);

function drawDue() {
  if (nextDue === null) return;
  const next = document.getElementById("next-due");
  next.hidden = nextDue === Infinity;
  document.getElementById("none-due").hidden = !next.hidden;
  if (!next.hidden) setText(next.querySelector("strong"), spell((nextDue - now()) / 1000));
}

function showLatest() {
  if (!model.stats) return; // nothing has come yet: the server's own markup stays
  latest.replaceChildren(...model.events.slice(0, SHOWN).map(eventRow));
  events();
}

function events() {
  document.getElementById("latest-none").hidden = latest.children.length > 0;
}

feed.on("hello", () => {
  tiles();
  if (!still()) showLatest();
  drawCharts();
  soonestAt = -Infinity;
  loadSoonest();
});
feed.on("delta", (delta) => {
  tiles();
  if (!still()) {
    if (delta.whole) showLatest();
    else addEvents(latest, delta.events.slice().reverse(), SHOWN);
    events();
  }
  loadSoonest();
});
feed.on("figures", (figures) => {
  figuresAt = performance.now();
  health(figures.health);
  tile("expiring", figures.expiring, `within ${figures.window} s`);
  if (!model.history) for (const name of RECENT) tile(name, figures[name]);
  for (const [name, [median, p99]] of Object.entries(figures.latency)) {
    const what = MEDIANS[name];
    if (what) tile(name, duration(median), `${what}; p99 ${duration(p99)}`);
  }
  for (const element of document.querySelectorAll(".tile")) {
    const name = element.id.slice("tile-".length);
    const warned = figures.warned.includes(name);
    element.classList.toggle("warn", warned);
    if (NOTES[name]) setText(element.querySelector(".note"), warned ? "over half of the pool is out" : NOTES[name]);
  }
});
document.getElementById("span").addEventListener("change", (event) => {
  span = event.target.value;
  zoom(null);
});
showAll.addEventListener("click", () => zoom(null));
document.addEventListener("escape", () => zoom(null));
setInterval(() => {
  second();
  drawDue();
  if (feed.state === "live" && performance.now() - soonestAt > 5000) loadSoonest();
}, 1000);
