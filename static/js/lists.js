// What lists share that are fetched again while their page is open: when, how their rows are changed, and the link to the
// next page.
//
// While somebody aims at a list (hold.js), its rows change in place, and neither move nor vanish.

import { now, spell } from "./clock.js";
import * as feed from "./feed.js";
import { made, place } from "./ui.js";

const EVERY = 2000;
const MOST_BACK = 20; // keypool/web/paging.py has the same

/** Call `load` when the pool has changed, at most every two seconds. The result asks for it, too. */
export function follow(load) {
  let timer = 0;
  let loadedAt = performance.now();
  const soon = () => {
    if (timer || document.hidden) return;
    timer = setTimeout(async () => {
      try {
        await load();
      } catch {
        // The pill shows it already.
      }
      loadedAt = performance.now();
      timer = 0;
    }, Math.max(0, loadedAt + EVERY - performance.now()));
  };
  feed.on("hello", soon);
  feed.on("delta", soon);
  return soon;
}

/**
 * Give a table's body a row for each item, by the page's template; `nameOf` tells which row is whose, of an item and of a row
 * alike; rows of the same name keep their order. With `still` no row comes, moves or goes.
 */
export function renew(body, template, items, nameOf, fill, still = false) {
  const there = Map.groupBy(body.rows, (row) => nameOf(row.item ?? row.dataset));
  let at = 0;
  for (const item of items) {
    let row = there.get(nameOf(item))?.shift();
    if (!row && still) continue;
    row ??= made(template);
    row.item = item;
    row.classList.remove("gone");
    fill(row, item);
    if (!still) place(body, row, at);
    at += 1;
  }
  for (const row of [...there.values()].flat()) {
    if (still) row.classList.add("gone");
    else row.remove();
  }
  if (still) return;
  body.closest("table").hidden = items.length === 0;
  document.getElementById("no-rows")?.toggleAttribute("hidden", items.length > 0);
}

/** Let the link to the next page lead to this cursor, null if there is none. */
export function leadOn(next) {
  const link = document.getElementById("next");
  link.hidden = !next;
  if (!next) return;
  const url = new URLSearchParams(location.search);
  const back = (url.get("back") ?? "").split(".").filter(Boolean);
  url.set("back", [...back, url.get("after") ?? "first"].slice(-MOST_BACK).join("."));
  url.set("after", next);
  link.href = `?${url}`;
}

/** A moment in full, as a title has it. The same as utc() in keypool/web/dashboard.py. */
export const utc = (at) => `${at.slice(0, 10)} ${at.slice(11, 19)} UTC`;

/** Show how long it is since a moment; it goes on by itself. */
export function setSince(element, at) {
  if (element.dateTime === at) return;
  element.dateTime = at;
  element.title = utc(at);
  element.textContent = since(at);
}

const since = (at) => spell(Math.floor(Math.max(0, now() - Date.parse(at)) / 1000));

setInterval(() => {
  if (document.hidden) return;
  for (const element of document.querySelectorAll("time.elapsed")) {
    const text = since(element.dateTime);
    if (element.textContent !== text) element.textContent = text;
  }
}, 1000);
