// The charts, drawn once a second and only while in sight. A point stands for five samples, aligned to the clock, so that only
// the last one moves: for a rate it is their mean, for a state the last of them, so that the states add up to the pool.
//
// The legend shows the numbers of now; pointing at a chart, or the arrow keys while it has the focus, those of a moment. Its
// entries switch their series off and on.
//
// Dragging over a chart, or + and -, asks for a range {from, to} in seconds, which the page then draws on all charts. It holds
// still, and a few samples have a point each.

import { number } from "./ui.js";

const WIDTH = 300;
const HEIGHT = 100;
const GROUP = 5;
const SIZES = { seconds: 900, minutes: 1440 };
const FINE = 180; // samples, up to which each has its own point
const FEWEST = 10; // samples in a range
const DRAGGED = 8; // pixels: less is a click
const ZOOMS = { "+": 0.5, "=": 0.5, "-": 2 };
const LABELS = {
  seconds: ["15 min ago", "10", "5", "now"],
  minutes: ["24 h ago", "16", "8", "now"],
};

/** One figure of the overview. `layers` are its series in drawing order; `stack` stacks areas; `zoom` is given ranges, null for all. */
export class Chart {
  constructor(figure, layers, stack, zoom) {
    this.figure = figure;
    this.layers = layers;
    this.stack = stack;
    this.zoom = zoom;
    this.plot = figure.querySelector(".plot");
    this.when = figure.querySelector(".when");
    this.at = null; // the place that the pointer is at, counted from the right
    this.drag = null; // where a drag began
    this.now = null; // the numbers of now, if they are known better than by the series
    this.off = new Set();
    figure.querySelector(".legend").addEventListener("click", (event) => this.toggle(event.target.closest("[data-series]")));
    for (const type of ["pointerdown", "pointermove", "pointerup", "pointercancel"]) {
      this.plot.addEventListener(type, (event) => this.point(event));
    }
    this.plot.addEventListener("dblclick", () => zoom(null));
    this.plot.addEventListener("pointerleave", () => this.leave());
    this.plot.addEventListener("blur", () => this.leave());
    this.plot.addEventListener("keydown", (event) => this.key(event));
  }

  /** Draw the history by `span`, seconds or minutes; with a `range`, that part of it. */
  draw(history, span, range) {
    const { seconds } = history;
    const all = range?.from >= seconds.end - seconds.available.length ? seconds : history[span];
    const { step } = all;
    const size = range ? (range.to - range.from) / step : SIZES[span];
    const after = range ? (all.end - range.to) / step : 0;
    const series = { step, end: all.end - after * step };
    const group = size > FINE ? GROUP : 1;
    const places = Math.ceil(size / group);
    Object.assign(this, { history, span, range, series, places, spacing: group * step });
    this.values = Object.fromEntries(
      this.layers.map((name) => {
        const until = Math.max(0, all[name].length - after);
        const values = all[name].slice(Math.max(0, until - size), until);
        return [name, grouped(series, values, group, this.stack ? last : (some) => mean(some) / step)];
      }),
    );
    const count = this.values[this.layers[0]].length;
    const shown = this.layers.filter((name) => !this.off.has(name)).map((name) => this.values[name]);
    const columns = this.stack ? [shown.reduce(add, Array(count).fill(0))] : shown;
    const top = nice(Math.max(0, ...columns.flat()));
    this.figure.querySelector(".axis.top").textContent = number(top);
    this.figure.querySelector(".axis.middle").textContent = number(top / 2);
    this.plot.querySelectorAll(".times span").forEach((element, i) => {
      element.textContent = range ? this.clock((1 - i / 3) * (places - 1)) : LABELS[span][i];
    });
    this.plot.ariaValueMin = 1 - places;
    let below = Array(count).fill(0);
    for (const name of this.stack ? this.layers.slice().reverse() : this.layers) {
      const values = this.values[name];
      const path = this.plot.querySelector(`[data-tone="${name}"]`);
      const zero = values.every((value) => value === 0);
      this.figure.querySelector(`.legend [data-tone="${name}"]`).classList.toggle("zero", zero);
      if (zero || this.off.has(name)) {
        path.setAttribute("d", "");
        continue;
      }
      const above = this.stack ? add(below, values) : values;
      const line = points(above, top, places);
      const d = count < 2 ? "" : this.stack ? `M${line.concat(points(below, top, places).reverse()).join("L")}Z` : `M${line.join("L")}`;
      path.setAttribute("d", d);
      if (this.stack) below = above;
    }
    this.tell();
  }

  /** The numbers of now, which a frame has just brought. */
  latest(values) {
    this.now = values;
    if (this.at === null) this.tell();
  }

  toggle(button) {
    if (!button) return;
    const on = this.off.delete(button.dataset.series);
    if (!on) this.off.add(button.dataset.series);
    button.setAttribute("aria-pressed", String(on));
    if (this.values) this.draw(this.history, this.span, this.range);
  }

  /** The moment of a place, in seconds. */
  moment(at) {
    return this.series.end - at * this.spacing;
  }

  clock(at) {
    return new Date(this.moment(at) * 1000).toISOString().slice(11, this.series.step === 1 ? 19 : 16);
  }

  point({ type, clientX, pointerId, isPrimary, button }) {
    if (!this.series) return;
    const box = this.plot.querySelector("svg").getBoundingClientRect();
    const { drag } = this;
    this.at = Math.round(Math.min(1, Math.max(0, (box.right - clientX) / box.width)) * (this.places - 1));
    const moment = this.moment(this.at);
    if (type !== "pointermove") this.drag = null;
    if (type === "pointerdown" && isPrimary && button === 0) {
      this.drag = { at: this.at, moment, clientX };
      this.plot.setPointerCapture(pointerId);
    } else if (type === "pointerup" && drag && Math.abs(clientX - drag.clientX) > DRAGGED) {
      this.at = null;
      this.ask(Math.abs(moment - drag.moment), (moment + drag.moment) / 2);
    }
    this.tell();
  }

  /** Ask for a range of about this many seconds around a moment. */
  ask(seconds, middle) {
    const { step, end } = this.history[this.span];
    const all = SIZES[this.span] * step;
    const long = Math.max(FEWEST, Math.round(seconds / step)) * step;
    const to = Math.min(end, Math.max(end - all + long, Math.round((middle + long / 2) / step) * step));
    this.zoom(long < all ? { from: to - long, to } : null);
  }

  key(event) {
    const step = { ArrowLeft: 1, ArrowRight: -1 }[event.key] ?? 0;
    const zoom = ZOOMS[event.key];
    if (!this.series || !(step || zoom) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    let said = "";
    if (zoom) {
      const moment = this.moment(this.at ?? 0);
      this.ask(this.places * this.spacing * zoom, moment);
      this.at = Math.round((this.series.end - moment) / this.spacing);
      said = `${[...this.plot.querySelectorAll(".times span")].map((each) => each.textContent).join(", ")}. `;
    }
    this.at = Math.min(this.places - 1, Math.max(0, (this.at ?? 0) + step));
    this.tell();
    // A screen reader reads the new value of a slider.
    const values = [...this.figure.querySelectorAll(".legend li")].map((each) => each.textContent.trim());
    this.plot.ariaValueNow = -this.at;
    this.plot.ariaValueText = `${said}${this.when.textContent}: ${values.join(", ")}`;
  }

  leave() {
    this.at = null;
    this.tell();
  }

  /** The numbers of the moment pointed at, or the latest: those of now, unless a range is shown. */
  tell() {
    if (!this.values) return;
    const count = this.values[this.layers[0]].length;
    const now = this.at === null && !this.range;
    const at = Math.min(Math.max(0, this.at ?? 0), Math.max(0, count - 1));
    for (const name of this.layers) {
      const value = (now && this.now ? this.now[name] : this.values[name][count - 1 - at]) ?? 0;
      this.figure.querySelector(`[data-value="${name}"]`).textContent = number(this.stack ? Math.round(value) : Math.round(value * 10) / 10);
    }
    const x = (at) => WIDTH - (WIDTH / (this.places - 1)) * at;
    const dragged = this.drag ? `H${x(this.drag.at)}V0Z` : "";
    this.plot.querySelector(".cross").setAttribute("d", this.at === null ? "" : `M${x(at)} 0V${HEIGHT}${dragged}`);
    const begins = count < 2 && this.span === "minutes";
    this.when.hidden = now && !begins;
    if (begins) this.when.textContent = "A point a minute, from now on";
    if (!now) this.when.textContent = `${this.clock(at)} UTC`;
  }
}

function add(a, b) {
  return a.map((value, i) => value + b[i]);
}

function mean(values) {
  return values.reduce((a, b) => a + b, 0) / values.length;
}

function last(values) {
  return values.at(-1);
}

/** One value for every `group` samples; the groups are aligned to the clock, so that only the last one moves. */
function grouped(series, values, group, value) {
  const found = [];
  const first = Math.floor(series.end / series.step) - values.length + 1;
  for (let start = 0; start < values.length; ) {
    const stop = Math.min(values.length, start + group - ((first + start) % group));
    found.push(value(values.slice(start, stop)));
    start = stop;
  }
  return found;
}

function nice(largest) {
  if (largest <= 4) return 4;
  const power = 10 ** (String(Math.floor(largest)).length - 1);
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= largest);
}

function points(values, top, places) {
  const step = WIDTH / (places - 1);
  const shown = values.slice(-places - 1);
  const start = WIDTH - step * (shown.length - 1);
  return shown.map((value, i) => `${(start + step * i).toFixed(1)} ${(HEIGHT - (HEIGHT * value) / top).toFixed(1)}`);
}
