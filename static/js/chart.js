// The charts, drawn once a second and only while in sight. A point stands for five samples, aligned to the clock, so that only
// the last one moves: for a rate it is their mean, for a state the last of them, so that the states add up to the pool.
//
// The legend shows the numbers of now; pointing at a chart, or the arrow keys while it has the focus, those of a moment. Its
// entries switch their series off and on.

import { number } from "./ui.js";

const WIDTH = 300;
const HEIGHT = 100;
const GROUP = 5;
const SIZES = { seconds: 900, minutes: 1440 };
const LABELS = {
  seconds: ["15 min ago", "10", "5", "now"],
  minutes: ["24 h ago", "16", "8", "now"],
};

/** One figure of the overview. `layers` are its series in drawing order; `stack` stacks areas. */
export class Chart {
  constructor(figure, layers, stack) {
    this.figure = figure;
    this.layers = layers;
    this.stack = stack;
    this.plot = figure.querySelector(".plot");
    this.when = figure.querySelector(".when");
    this.at = null; // the place that the pointer is at, counted from the right
    this.now = null; // the numbers of now, if they are known better than by the series
    this.off = new Set();
    figure.querySelector(".legend").addEventListener("click", (event) => this.toggle(event.target.closest("[data-series]")));
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.leave());
    this.plot.addEventListener("blur", () => this.leave());
    this.plot.addEventListener("keydown", (event) => this.key(event));
  }

  /** Draw a series of the history: `span` is seconds or minutes. */
  draw(series, span) {
    this.span = span;
    this.series = series;
    this.values = Object.fromEntries(
      this.layers.map((name) => [name, grouped(series, series[name], this.stack ? last : (values) => mean(values) / series.step)]),
    );
    const count = this.values[this.layers[0]].length;
    const shown = this.layers.filter((name) => !this.off.has(name)).map((name) => this.values[name]);
    const columns = this.stack ? [shown.reduce(add, Array(count).fill(0))] : shown;
    const top = nice(Math.max(0, ...columns.flat()));
    this.figure.querySelector(".axis.top").textContent = number(top);
    this.figure.querySelector(".axis.middle").textContent = number(top / 2);
    this.plot.querySelectorAll(".times span").forEach((element, i) => {
      element.textContent = LABELS[span][i];
    });
    const places = SIZES[span] / GROUP;
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
    if (this.values) this.draw(this.series, this.span);
  }

  point(event) {
    const box = this.plot.querySelector("svg").getBoundingClientRect();
    const places = SIZES[this.span ?? "seconds"] / GROUP;
    this.at = Math.round((1 - (event.clientX - box.left) / box.width) * (places - 1));
    this.tell();
  }

  key(event) {
    const step = { ArrowLeft: 1, ArrowRight: -1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    this.at = Math.max(0, (this.at ?? 0) + step);
    this.tell();
    // A screen reader reads the new value of a slider.
    const values = [...this.figure.querySelectorAll(".legend li")].map((each) => each.textContent.trim());
    this.plot.ariaValueNow = -this.at;
    this.plot.ariaValueText = `${this.when.textContent}: ${values.join(", ")}`;
  }

  leave() {
    this.at = null;
    this.tell();
  }

  /** The numbers of the moment pointed at, or the latest. */
  tell() {
    if (!this.values) return;
    const count = this.values[this.layers[0]].length;
    const at = this.at === null ? 0 : Math.min(Math.max(0, this.at), Math.max(0, count - 1));
    for (const name of this.layers) {
      const value = (this.at === null && this.now ? this.now[name] : this.values[name][count - 1 - at]) ?? 0;
      this.figure.querySelector(`[data-value="${name}"]`).textContent = number(this.stack ? Math.round(value) : Math.round(value * 10) / 10);
    }
    const places = SIZES[this.span] / GROUP;
    const x = WIDTH - (WIDTH / (places - 1)) * at;
    this.plot.querySelector(".cross").setAttribute("d", this.at === null ? "" : `M${x} 0V${HEIGHT}`);
    const begins = count < 2 && this.span === "minutes";
    this.when.hidden = this.at === null && !begins;
    if (begins) this.when.textContent = "A point a minute, from now on";
    if (this.at !== null) {
      const moment = new Date((this.series.end - at * GROUP * this.series.step) * 1000);
      this.when.textContent = `${moment.toISOString().slice(11, this.span === "seconds" ? 19 : 16)} UTC`;
    }
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

/** One value for every five samples; the groups are aligned to the clock, so that only the last one moves. */
function grouped(series, values, value) {
  const found = [];
  const first = Math.floor(series.end / series.step) - values.length + 1;
  for (let start = 0; start < values.length; ) {
    const stop = Math.min(values.length, start + GROUP - ((first + start) % GROUP));
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
