// Server time in the browser, and every countdown on the page.
//
// The browser's own clock may be wrong or be changed, so it isn't used: times are the server's, advanced by the monotonic
// clock. Each frame has the server's time; the frame with the shortest delay is the most exact, so the largest difference of
// the last minute is used.
//
// A countdown at zero stays there until the server reports the key's new state.

const samples = [];
let offset = Date.parse(document.body.dataset.now || "") - monotonic() || 0;

function monotonic() {
  return performance.now();
}

/** The server's time, in milliseconds since the epoch. */
export function now() {
  return monotonic() + offset;
}

/** Record the server's time from a frame that has just come. */
export function hear(moment) {
  const at = monotonic();
  samples.push({ at, difference: Date.parse(moment) - at });
  while (samples.length > 240 || samples[0].at < at - 60_000) samples.shift();
  offset = Math.max(...samples.map((sample) => sample.difference));
}

/** A length of time as a countdown shows it: 4:07, or 6 d 23 h. The same as length() in keypool/web/dashboard.py. */
export function spell(seconds) {
  const whole = Math.max(0, Math.ceil(seconds));
  const two = (part) => String(part).padStart(2, "0");
  if (whole >= 86_400) return `${Math.floor(whole / 86_400)} d ${Math.floor((whole % 86_400) / 3600)} h`;
  if (whole >= 3600) return `${Math.floor(whole / 3600)}:${two(Math.floor((whole % 3600) / 60))}:${two(whole % 60)}`;
  return `${Math.floor(whole / 60)}:${two(whole % 60)}`;
}

/** A short length of time with its unit. The same as duration() in keypool/web/dashboard.py. */
export function duration(seconds) {
  if (seconds === null) return "none";
  return seconds < 1 ? `${(seconds * 1000).toFixed(seconds >= 0.1 ? 0 : 1)} ms` : `${seconds.toFixed(1)} s`;
}

/**
 * Give a countdown its deadline: seconds left as of now, or null for none. `kind` and `whole`, the seconds of a full gauge,
 * change with the state of the key.
 */
export function setLeft(element, left, asOf = now(), { kind, whole } = element.dataset) {
  if (element.dataset.kind !== kind || element.dataset.whole !== whole) {
    Object.assign(element.dataset, { kind, whole });
    element.shown = null;
  }
  element.deadline = left === null ? null : asOf + left * 1000;
  element.toggleAttribute("data-blank", left === null);
  if (left === null) element.dataset.left = "";
  else if (element.dataset.left === "") element.dataset.left = "set";
  draw(element);
}

/** Continue the countdowns in the server's markup, which were right at the time `asOf`. */
export function adopt(root, asOf) {
  for (const element of root.querySelectorAll(".countdown")) {
    const left = element.dataset.left;
    setLeft(element, left === "" ? null : Number(left), asOf);
  }
}

function draw(element) {
  if (element.deadline === null || element.deadline === undefined) return;
  const left = Math.max(0, (element.deadline - now()) / 1000);
  const text = spell(left);
  if (element.shown === text) return; // nothing to see: most of the time
  element.shown = text;
  element.querySelector(".time").textContent = text;
  element.querySelector(".gauge-left").setAttribute("width", Math.min(100, (100 * left) / element.dataset.whole).toFixed(1));
  element.classList.toggle("soon", left < Math.min(60, element.dataset.whole / 4));
}

function tick() {
  if (document.hidden) return;
  for (const element of document.querySelectorAll(".countdown")) draw(element);
}

adopt(document, Date.parse(document.body.dataset.now || ""));
setInterval(tick, 500);
document.addEventListener("visibilitychange", tick);
