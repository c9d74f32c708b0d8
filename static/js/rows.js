// Rows of keys and events: templates of the page, filled. Used for rows that arrive live; the server draws the first ones with
// the same markup (templates/parts.html).

import { base } from "./api.js";
import { setLeft } from "./clock.js";
import { utc } from "./lists.js";
import { made, setText } from "./ui.js";

const { block, cooldown } = document.body.dataset;
const DUE = { cooling: { kind: "ready", whole: cooldown } };
const BLOCK = { kind: "release", whole: block };

/** The latest report on a key in words. The same as report() in keypool/web/dashboard.py. */
function report(key) {
  const failures = key.failures ? `${key.failures} failure${key.failures > 1 ? "s" : ""}` : "";
  return [key.outcome?.replace("_", " "), failures].filter(Boolean).join(", ");
}

/** Who or what brought an event about, in words. The same as origin() in keypool/web/dashboard.py. */
function origin(event) {
  if (event.by === "holder") return `by ${event.owner || "holder"}`;
  const by = event.actor ? `by ${event.by} ${event.actor}` : `by ${event.by}`;
  return event.owner ? `${by}, held by ${event.owner}` : by;
}

/** The same without whose lease it was. The same as whom() in keypool/web/dashboard.py. */
export const whom = (event) => (event.actor ? `${event.by} ${event.actor}` : event.by);

/** How many events a row stands for, if it is a crowd. */
export const crowd = (event) => (event.count > 1 ? `×${event.count}` : "");

/** Fill a row of the table of keys, or of a list of the overview. `asOf` is the server's time of the answer. */
export function fillKey(element, key, asOf) {
  const said = report(key);
  const place = key.seats > 1 ? `seat ${key.seat} of ${key.seats}` : "";
  const shown = { ...key, report: said, about: key.owner ?? said, place };
  for (const field of element.querySelectorAll("[data-f]")) setText(field, String(shown[field.dataset.f] ?? ""));
  const link = element.querySelector(".key-link");
  if (element.dataset.id !== String(key.id)) {
    element.dataset.id = key.id;
    link.href = `${base}/keys/${key.id}`;
  }
  setState(element, key.state, key.release_in ?? key.available_in, asOf);
  element.dataset.lease = key.lease ?? "";
  element.dataset.seats = key.seats;
  const expires = element.querySelector('[data-kind="expires"]');
  if (expires) {
    setLeft(expires, key.expires_in, asOf);
    expires.nextElementSibling.hidden = key.expires_in !== null;
  }
}

/** Show the state of a row's key, and the seconds until the state ends by itself, null if it doesn't. */
export function setState(element, state, left, asOf) {
  const label = element.querySelector(".state");
  element.dataset.state = state;
  if (label) {
    label.dataset.state = state;
    setText(label, state);
  }
  setLeft(element.querySelector('.countdown:not([data-kind="expires"])'), left, asOf, DUE[state] ?? BLOCK);
}

/** A key as the table shows it. */
export function readKey(element) {
  const text = (name) => element.querySelector(`[data-f="${name}"]`).textContent;
  return {
    id: Number(element.dataset.id),
    hint: text("hint"),
    owner: text("owner"),
    state: element.dataset.state,
    lease: Number(element.dataset.lease) || null,
    report: text("report"),
    reason: text("reason"),
    seats: Number(element.dataset.seats),
  };
}

/** A new row for an event. */
export function eventRow(event) {
  const element = made("event-template");
  element.dataset.id = event.id;
  element.dataset.kind = event.event;
  const shown = {
    ...event,
    day: event.at.slice(0, 10),
    at: event.at.slice(11, 19),
    lease: event.lease ? (element.cells ? event.lease : `lease ${event.lease}`) : "",
    origin: origin(event),
    whom: whom(event),
    crowd: crowd(event),
  };
  for (const field of element.querySelectorAll("[data-f]")) field.textContent = shown[field.dataset.f] ?? "";
  const time = element.querySelector("time");
  time.dateTime = event.at;
  time.title = utc(event.at);
  const owner = element.querySelector(".owner-link");
  if (owner) {
    owner.hidden = !event.owner;
    owner.href = `${base}/keys?owner=${encodeURIComponent(event.owner ?? "")}`;
  }
  if (element.cells) element.cells[1].dataset.kind = event.event;
  element.querySelector(".key-link").href = `${base}/keys/${event.id}`;
  return element;
}

/** Put new events on top of a list, the newest first, and remove the oldest. */
export function addEvents(list, events, limit) {
  const rows = events.slice(0, limit).map(eventRow);
  if (rows.length <= 3) for (const row of rows) row.classList.add("fresh"); // many at once don't flash
  list.prepend(...rows);
  while (list.children.length > limit) list.lastElementChild.remove();
}
