// The system page, kept live: the figures every five seconds, the uptime every second.

import { duration, now, spell } from "../clock.js";
import * as feed from "../feed.js";
import { model } from "../model.js";
import { number, setText } from "../ui.js";

const uptime = document.getElementById("uptime");
let started = Date.parse(document.body.dataset.now) - Number(uptime.dataset.uptime) * 1000;

function shown(name, value) {
  return name.endsWith("_seconds") ? `${(value * 1000).toFixed(1)} ms` : number(value);
}

feed.on("hello", () => {
  started = now() - model.stats.uptime * 1000;
});
feed.on("figures", (figures) => {
  setText(document.getElementById("stall"), (figures.loop_stall_seconds * 1000).toFixed(1));
  setText(document.getElementById("viewers"), number(figures.viewers));
  setText(document.getElementById("ready"), figures.ready ? figures.ready.title : "yes");
  for (const row of document.querySelectorAll("[data-latency]")) {
    for (const [i, value] of figures.latency[row.dataset.latency].entries()) setText(row.cells[i + 1], duration(value));
  }
  for (const [name, value] of Object.entries(figures.engine)) {
    setText(document.querySelector(`[data-figure="${name}"]`), shown(name, value));
  }
});
setInterval(() => {
  if (feed.state === "live") setText(uptime, spell((now() - started) / 1000));
}, 1000);
