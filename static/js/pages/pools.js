// The list of pools, fetched again every few seconds; and for an admin, a new pool and the end of one.

import { done } from "../actions.js";
import { callPools } from "../api.js";
import { spell } from "../clock.js";
import { hold } from "../hold.js";
import { ask, confirm, made, number, place, setText } from "../ui.js";

const EVERY = 5000;
const STATES = ["available", "blocked", "cooling", "quarantined"];
const body = document.querySelector("#pools tbody");
const still = hold(body, load);

function fill(row, pool) {
  row.dataset.pool = pool.name;
  const { block_seconds: block, keepalive_seconds: keepalive } = pool.settings;
  const shown = { ...pool, block: spell(block), keepalive: keepalive === null ? "never expire" : spell(keepalive) };
  for (const field of row.querySelectorAll("[data-f]")) {
    const value = shown[field.dataset.f];
    if (field.dataset.f === "draining") field.hidden = !value;
    else setText(field, typeof value === "number" ? number(value) : String(value));
  }
  row.querySelector('[data-f="name"]').href = pool.name === "default" ? "/" : `/pools/${pool.name}`;
  let at = 0;
  for (const state of STATES) {
    const part = row.querySelector(`.bar [data-tone="${state}"]`);
    const width = pool.total ? (100 * pool[state]) / pool.total : 0;
    part.setAttribute("x", at.toFixed(2));
    part.setAttribute("width", width.toFixed(2));
    at += width;
  }
  const button = row.querySelector("[data-delete-pool]");
  if (button) button.hidden = pool.name === "default" || pool.draining;
}

async function load() {
  if (document.hidden) return;
  try {
    const { pools } = await callPools("GET", "");
    const there = new Map([...body.rows].map((row) => [row.dataset.pool, row]));
    if (still()) {
      for (const pool of pools) if (there.has(pool.name)) fill(there.get(pool.name), pool);
      return;
    }
    pools.forEach((pool, i) => {
      const row = there.get(pool.name) ?? made("pool-template");
      there.delete(pool.name);
      fill(row, pool);
      place(body, row, i);
    });
    for (const row of there.values()) row.remove();
  } catch {
    // The pill shows it already.
  }
}

async function make() {
  const dialog = document.getElementById("new-pool");
  const form = dialog.querySelector("form");
  form.reset();
  if (!(await ask(dialog))) return;
  const settings = { block_seconds: Number(form.block_seconds.value) };
  if (form.forever.checked) settings.keepalive_seconds = null;
  const name = form.elements.name.value;
  await done(
    () => callPools("PUT", `/${encodeURIComponent(name)}`, settings),
    () => `Pool ${name} is there.`,
  );
  load();
}

async function remove(row) {
  const name = row.dataset.pool;
  const total = row.querySelector('[data-f="total"]').textContent;
  const empty = total === "0";
  const sure = await confirm({
    title: `Delete the pool ${name}?`,
    text: empty
      ? "It has no keys. Calls that name it get 404 from then on."
      : `Its ${total} keys are permanently deleted: at once, or when their leases end. It serves no key from now on. This can't be undone.`,
    word: empty ? "" : name,
    go: "Delete the pool",
    danger: true,
  });
  if (!sure) return;
  await done(
    () => callPools("DELETE", `/${name}${empty ? "" : "?drain=true"}`),
    (draining) => (draining === null ? `Pool ${name} was deleted.` : `Pool ${name} is being deleted.`),
  );
  load();
}

document.getElementById("make-pool")?.addEventListener("click", make);
body.addEventListener("click", (event) => {
  if (event.target.closest("[data-delete-pool]")) remove(event.target.closest("tr"));
});
document.addEventListener("visibilitychange", load);
setInterval(load, EVERY);
