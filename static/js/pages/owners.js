// Who holds keys, kept live; and for an admin, the end of all leases of an owner.

import { done } from "../actions.js";
import { base, call } from "../api.js";
import * as feed from "../feed.js";
import { hold } from "../hold.js";
import { follow, leadOn, renew, setSince } from "../lists.js";
import { model } from "../model.js";
import { confirm, number, setText } from "../ui.js";

const table = document.getElementById("owners");
const body = table.tBodies[0];
const asked = new URLSearchParams(location.search);
const after = asked.get("after") ? `?after=${encodeURIComponent(asked.get("after"))}` : "";
const nameOf = ({ owner, client }) => JSON.stringify([owner || "", client || ""]);

function fill(row, holder) {
  const field = (name) => row.querySelector(`[data-f="${name}"]`);
  const { owner, client } = holder;
  Object.assign(row.dataset, { owner: owner ?? "", client: client ?? "" });
  setText(field("owner"), owner ?? "");
  field("owner").hidden = !owner;
  field("owner").href = `${base}/keys?owner=${encodeURIComponent(owner ?? "")}`;
  field("nobody").hidden = Boolean(owner);
  setText(field("client"), client ?? "");
  setText(field("held"), number(holder.held));
  setText(field("released"), number(holder.released));
  setSince(row.querySelector(".elapsed"), holder.acquired_at);
  const button = row.querySelector("[data-release]");
  if (!button) return;
  button.hidden = !owner;
  button.ariaLabel = `Release all keys of ${owner}…`;
}

async function load(holding = still()) {
  const { owners, next } = await call("GET", `/owners${after}`);
  renew(body, "owner-template", owners, nameOf, fill, holding);
  leadOn(next);
}

async function release(row) {
  const { owner, client } = row.dataset;
  const count = row.querySelector('[data-f="held"]').textContent;
  const at = row.sectionRowIndex;
  const sure = await confirm({
    title: `Release all keys of ${owner}?`,
    text: `${owner} holds ${count === "1" ? "one key" : `${count} keys`}${client ? ` with the token ${client}` : ""} and is not notified. They are available at once, and may be leased to someone else while ${owner} still uses them.`,
    go: "Release all",
    danger: true,
  });
  if (!sure) return;
  await done(
    () => call("POST", "/owners/release", client ? { owner, client } : { owner }),
    (answer) => (answer.released === 1 ? `One key of ${owner} was released.` : `${number(answer.released)} keys of ${owner} were released.`),
  );
  try {
    await load(false);
  } catch {
    return; // the pill shows it already
  }
  if (document.activeElement === document.body) (body.rows[at] ?? body.rows[at - 1])?.querySelector("a").focus();
}

function counts() {
  for (const element of document.querySelectorAll(".lead [data-count]")) setText(element, number(model.stats[element.dataset.count]));
}

body.addEventListener("click", (event) => {
  const row = event.target.closest("[data-release]")?.closest("tr");
  if (row) release(row);
});
feed.on("hello", counts);
feed.on("delta", counts);
const reload = follow(() => load());
const still = hold(table, reload);
