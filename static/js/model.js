// The page's model of the pool: the latest numbers, the series behind the charts, the latest events.
//
// It begins with a hello and goes on with deltas. Rates are counted here, second by second, from the counters that
// each frame brings, in the shape that the server keeps them (keypool/web/history.py). feed.js connects, the
// pages draw.

import { now } from "./clock.js";

const GAUGES = ["available", "blocked", "cooling", "quarantined", "waiting"];
const SIZES = { seconds: 900, minutes: 1440 };

export const model = {
  stats: null,
  history: null,
  /** Newest first. */
  events: [],
};

/** The counters, by name, at the latest second of the series. */
let counted = {};
/** The names of the counters. */
let counts = [];

/** A complete state, which replaces the model. */
export function begin(hello) {
  model.stats = hello.stats;
  model.history = hello.history;
  model.events = hello.events.slice().reverse();
  if (!model.history) return; // this page draws no charts
  for (const series of Object.values(model.history)) series.end = Math.floor(Date.parse(series.end) / 1000);
  counted = hello.history.seconds.counted;
  counts = Object.keys(counted);
}

/** What has changed since the last one. A `whole` delta, from polling, brings the latest events again. */
export function go(delta) {
  model.stats = delta.stats;
  const fresh = delta.events.slice().reverse();
  model.events = delta.whole ? fresh : fresh.concat(model.events).slice(0, 200);
}

/** Add the second that has passed to the series; called once a second. */
export function countSecond() {
  const { history, stats } = model;
  if (!history || !stats) return;
  const second = Math.floor(now() / 1000);
  const passed = Math.min(second - history.seconds.end, SIZES.seconds);
  if (passed <= 0) return;
  for (const name of GAUGES) extend(history.seconds[name], Array(passed).fill(stats[name]), SIZES.seconds);
  for (const name of counts) {
    const happened = Math.max(0, stats[name] - counted[name]);
    const share = Math.floor(happened / passed);
    const part = Array(passed).fill(share);
    part[passed - 1] += happened - share * passed;
    extend(history.seconds[name], part, SIZES.seconds);
  }
  history.seconds.end = second;
  if (second - history.minutes.end >= 60 && history.seconds.available.length >= 60) countMinute(second);
  counted = { ...stats };
}

function countMinute(second) {
  const { seconds, minutes } = model.history;
  const late = second % 60;
  if (minutes.end === second - late) return;
  const until = seconds.available.length - late;
  for (const name of GAUGES) extend(minutes[name], [seconds[name][until - 1]], SIZES.minutes);
  for (const name of counts) {
    extend(minutes[name], [seconds[name].slice(Math.max(0, until - 60), until).reduce((a, b) => a + b, 0)], SIZES.minutes);
  }
  minutes.end = second - late;
}

function extend(list, values, size) {
  list.push(...values);
  if (list.length > size) list.splice(0, list.length - size);
}
