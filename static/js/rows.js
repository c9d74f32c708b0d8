// Rows of keys and events: templates of the page, filled. Used for rows that arrive live; the server draws the first ones with
// the same markup (templates/parts.html).

import { setLeft } from "./clock.js";
import { made, setText } from "./ui.js";

/** Fill a row of the table of keys, or of the list of the next releases. `asOf` is the server's time of the answer. */
export function fillKey(element, key, asOf) {
  for (const name of ["id", "hint", "owner", "lease"]) {
    for (const field of element.querySelectorAll(`[data-f="${name}"]`)) setText(field, String(key[name] ?? ""));
  }
  const link = element.querySelector(".key-link");
  if (element.dataset.id !== String(key.id)) {
    element.dataset.id = key.id;
    link.href = `/keys/${key.id}`;
  }
  if (element.dataset.state !== key.state) {
    element.dataset.state = key.state;
    const state = element.querySelector(".state");
    if (state) {
      state.dataset.state = key.state;
      setText(state, key.state);
    }
  }
  element.dataset.lease = key.lease ?? "";
  setLeft(element.querySelector('[data-kind="release"]'), key.release_in, asOf);
  setLeft(element.querySelector('[data-kind="expires"]'), key.expires_in, asOf);
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
  };
}

/** A new row for an event. */
export function eventRow(event) {
  const element = made("event-template");
  element.dataset.id = event.id;
  element.dataset.kind = event.event;
  const shown = { ...event, at: event.at.slice(11, 19), lease: event.lease ? `lease ${event.lease}` : "" };
  for (const field of element.querySelectorAll("[data-f]")) field.textContent = shown[field.dataset.f] ?? "";
  element.querySelector("time").dateTime = event.at;
  element.querySelector(".key-link").href = `/keys/${event.id}`;
  return element;
}

/** Put new events on top of a list, the newest first, and remove the oldest. */
export function addEvents(list, events, limit) {
  const rows = events.slice(0, limit).map(eventRow);
  if (rows.length <= 3) for (const row of rows) row.classList.add("fresh"); // many at once don't flash
  list.prepend(...rows);
  while (list.children.length > limit) list.lastElementChild.remove();
}
