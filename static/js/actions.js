// An admin's actions on keys: each asks for confirmation where that is needed, and then makes a call of the API.
//
// An action names its keys by id, and an unblock sends the lease that was on the screen: if the key was leased to
// another holder meanwhile, the server refuses. This module doesn't draw keys; functions return true if something
// was done.

import { call } from "./api.js";
import { ask, confirm, number, toast } from "./ui.js";

const holder = (key) => key.owner || "A holder without a name";
const named = (key) => `${key.id} ${key.hint}`;
const whose = (key) => (key.state === "blocked" ? `held by ${key.owner || "a holder without a name"}` : "available");

async function done(work, said) {
  try {
    toast(said(await work()));
    return true;
  } catch (problem) {
    toast(`${problem.title}. ${problem.message}`, "danger");
    return false;
  }
}

/** Generate keys; asks how many. */
export async function generate() {
  const dialog = document.getElementById("generate");
  if (!(await ask(dialog))) return false;
  const count = Number(dialog.querySelector("[name=count]").value);
  return done(
    () => call("POST", "/batch", { op: "generate", count }),
    (answer) => (answer.keys.length === 1 ? "One key generated." : `${number(answer.keys.length)} keys generated.`),
  );
}

/** Put off a key's expiry, without confirmation. */
export function keepalive(key) {
  return done(
    () => call("POST", `/keys/id:${key.id}/keepalive`),
    (answer) => `Key ${key.id} now expires in ${Math.round(answer.expires_in)} s.`,
  );
}

/** End a key's lease. */
export async function unblock(key) {
  const sure = await confirm({
    title: `Unblock key ${named(key)}?`,
    text: `${holder(key)} has lease ${key.lease} and is not notified. The key is available at once, and may be leased to someone else while ${key.owner || "the holder"} still uses it.`,
    go: "Unblock",
  });
  if (!sure) return false;
  return done(
    () => call("POST", `/keys/id:${key.id}/unblock`, { lease: key.lease }),
    (answer) => (answer.changed ? `Key ${key.id} is available.` : `Key ${key.id} was already available.`),
  );
}

/** Purge a key. */
export async function remove(key) {
  const held = key.state === "blocked" ? `${holder(key)} has it and is not notified; the next call with it gets 404. ` : "";
  const sure = await confirm({
    title: `Delete key ${named(key)}?`,
    text: `${held}The key is permanently deleted. This can't be undone.`,
    go: "Delete",
    danger: true,
  });
  if (!sure) return false;
  return done(
    () => call("DELETE", `/keys/id:${key.id}`),
    () => `Key ${key.id} was deleted.`,
  );
}

const counted = (answer) => {
  const missed = (answer.unknown?.length ?? 0) + (answer.stale?.length ?? 0);
  const stale = answer.stale?.length ? `, ${answer.stale.length} leased again in the meantime and left alone` : "";
  return missed ? ` ${number(answer.unknown.length)} already gone${stale}.` : "";
};

/** Put off the expiry of several keys. */
export function keepaliveMany(keys) {
  return done(
    () => call("POST", "/batch", { op: "keepalive", keys: keys.map((key) => `id:${key.id}`) }),
    (answer) => `${number(answer.done)} kept alive.${counted(answer)}`,
  );
}

/** End the leases of several keys. */
export async function unblockMany(keys) {
  const held = keys.filter((key) => key.state === "blocked");
  if (held.length === 0) {
    toast("None of the selected keys is blocked.");
    return false;
  }
  const sure = await confirm({
    title: `Unblock ${held.length === 1 ? "one key" : `${held.length} keys`}?`,
    text: "Their holders are not notified, and may still use the keys while they are leased to someone else.",
    list: held.map((key) => [named(key), whose(key)]),
    go: "Unblock",
  });
  if (!sure) return false;
  return done(
    () => call("POST", "/batch", { op: "unblock", keys: held.map((key) => ({ key: `id:${key.id}`, lease: key.lease })) }),
    (answer) => `${number(answer.done)} unblocked.${counted(answer)}`,
  );
}

/** Purge several keys; their number has to be typed. */
export async function removeMany(keys) {
  if (keys.length === 1) return remove(keys[0]);
  const held = keys.filter((key) => key.state === "blocked").length;
  const sure = await confirm({
    title: `Delete ${keys.length} keys?`,
    text: `${held ? `${held} of them are held; their holders are not notified, and their next call gets 404. ` : ""}The keys are permanently deleted. This can't be undone.`,
    list: keys.map((key) => [named(key), whose(key)]),
    word: `delete ${keys.length}`,
    go: `Delete ${keys.length} keys`,
    danger: true,
  });
  if (!sure) return false;
  return done(
    () => call("POST", "/batch", { op: "delete", keys: keys.map((key) => `id:${key.id}`) }),
    (answer) => `${number(answer.done)} deleted.${counted(answer)}`,
  );
}

document.addEventListener("click", (event) => {
  if (event.target.closest("[data-generate]")) generate();
});
