// The overview, kept live: tiles from each frame, charts once a second, what ends next every two seconds.

import { call } from "../api.js";
import { Chart } from "../chart.js";
import { now, spell } from "../clock.js";
import * as feed from "../feed.js";
import { hold } from "../hold.js";
import { countSecond, model } from "../model.js";
import { addEvents, eventRow, fillKey } from "../rows.js";
import { made, number, setText } from "../ui.js";

const REFUSED_FOR = 300;
const SOONEST_EVERY = 2000;
const SHOWN = 10;
const SHOWN_DUE = 5;
const STATES = ["available", "blocked", "cooling", "quarantined"];
const NOTES = { cooling: "until cooled down", quarantined: "until restored" };
const charts = [
  new Chart(document.getElementById("chart-composition"), STATES, true),
  new Chart(document.getElementById("chart-rates"), ["kept_alive", "unblocked", "acquired", "refused"], false),
];
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
let soonestAt = 0;
let nextDue = null;

function tile(name, value, note) {
  const element = document.getElementById(`tile-${name}`);
  setText(element.querySelector(".figure"), number(value));
  if (note) setText(element.querySelector(".note"), note);
  return element;
}

function tiles() {
  const { stats } = model;
  tile("available", stats.available, `of ${number(stats.total)} keys`);
  tile("blocked", stats.blocked);
  const mostlyOut = (stats.cooling + stats.quarantined) * 2 > stats.total;
  for (const [name, note] of Object.entries(NOTES)) {
    tile(name, stats[name], mostlyOut ? "over half of the pool is out" : note).classList.toggle("warn", mostlyOut);
  }
  tile("waiting", stats.waiting);
  for (const element of document.querySelectorAll("#exhausted [data-count]")) setText(element, number(stats[element.dataset.count]));
  document.getElementById("empty").hidden = stats.total > 0;
  document.getElementById("exhausted").hidden = stats.available > 0 || stats.total === 0;
}

function drawCharts() {
  if (!model.history || document.hidden) return;
  for (const chart of charts) chart.draw(model.history[span], span);
}

function second() {
  if (feed.state !== "live" && feed.state !== "polling") return;
  countSecond();
  drawCharts();
  if (model.history) {
    const refused = model.history.seconds.refused.slice(-REFUSED_FOR).reduce((a, b) => a + b, 0);
    tile("refused", refused).classList.toggle("warn", refused > 0);
  }
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
  soonestAt = 0;
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
  tile("expiring", figures.expiring);
  if (!model.history) tile("refused", figures.refused);
});
document.getElementById("span").addEventListener("change", (event) => {
  span = event.target.value;
  drawCharts();
});
setInterval(() => {
  second();
  drawDue();
  if (feed.state === "live" && performance.now() - soonestAt > 5000) loadSoonest();
}, 1000);
