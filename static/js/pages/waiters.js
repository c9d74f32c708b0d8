// Who waits for a key, kept live.

import { call } from "../api.js";
import * as feed from "../feed.js";
import { hold } from "../hold.js";
import { follow, leadOn, renew, setSince } from "../lists.js";
import { model } from "../model.js";
import { number, setText } from "../ui.js";

const table = document.getElementById("waiters");
const asked = new URLSearchParams(location.search);
const after = asked.get("after") ? `?after=${encodeURIComponent(asked.get("after"))}` : "";

// Waiters have no name of their own, but keep their order: an item is known by what stands in its row.
const nameOf = (item) => JSON.stringify([item.owner ?? "", item.client ?? "", item.waiting_since]);

function fill(row, waiter) {
  const field = (name) => row.querySelector(`[data-f="${name}"]`);
  setText(field("owner"), waiter.owner ?? "");
  field("nobody").hidden = Boolean(waiter.owner);
  setText(field("client"), waiter.client ?? "");
  setText(field("since"), waiter.waiting_since.slice(11, 19));
  setSince(row.querySelector(".elapsed"), waiter.waiting_since);
}

async function load() {
  const { waiters, next } = await call("GET", `/waiters${after}`);
  renew(table.tBodies[0], "waiter-template", waiters, nameOf, fill, still());
  leadOn(next);
}

function counts() {
  setText(document.querySelector("[data-count=waiting]"), number(model.stats.waiting));
  document.getElementById("waiting").hidden = model.stats.waiting === 0;
}

feed.on("hello", counts);
feed.on("delta", counts);
const still = hold(table, follow(load));
