// What an admin can do to keys: each asks first what is worth asking, and then makes the API's own call.
//
// An action names its keys by id, explicitly, and an unblock goes with the lease that was on the screen: if the key
// was served to somebody else meanwhile, the server refuses instead of taking it from them. What this module does
// not do: draw keys; whoever calls gets true if something was done.

import { call } from "./api.js";
import { ask, confirm, number, toast } from "./ui.js";

const holder = (key) => key.owner || "Somebody who gave no name";
const named = (key) => `${key.id} ${key.hint}`;
const whose = (key) => (key.state === "blocked" ? `held by ${key.owner || "no name"}` : "available");

async function done(work, said) {
  try {
    toast(said(await work()));
    return true;
  } catch (problem) {
    toast(`${problem.title}. ${problem.message}`, "danger");
    return false;
  }
}

/** Make keys: asks how many. */
export async function generate() {
  const dialog = document.getElementById("generate");
  if (!(await ask(dialog))) return false;
  const count = Number(dialog.querySelector("[name=count]").value);
  return done(
    () => call("POST", "/batch", { op: "generate", count }),
    (answer) => (answer.keys.length === 1 ? "One key generated." : `${number(answer.keys.length)} keys generated.`),
  );
}

/** Put off a key's expiry. Nothing to ask. */
export function keepalive(key) {
  return done(
    () => call("POST", `/keys/id:${key.id}/keepalive`),
    (answer) => `Key ${key.id} lives another ${Math.round(answer.expires_in)} s.`,
  );
}

/** Take a key from whoever holds it. */
export async function unblock(key) {
  const sure = await confirm({
    title: `Unblock key ${named(key)}?`,
    text: `${holder(key)} holds it under lease ${key.lease} and is not told. The key is available at once and may be served to somebody else while ${key.owner || "they"} still use it.`,
    go: "Unblock",
  });
  if (!sure) return false;
  return done(
    () => call("POST", `/keys/id:${key.id}/unblock`, { lease: key.lease }),
    (answer) => (answer.changed ? `Key ${key.id} is available.` : `Key ${key.id} was available already.`),
  );
}

/** Purge a key. */
export async function remove(key) {
  const held = key.state === "blocked" ? `${holder(key)} holds it and is not told: their next call with it is answered 404. ` : "";
  const sure = await confirm({
    title: `Delete key ${named(key)}?`,
    text: `${held}The key is purged for ever. This can't be undone.`,
    go: "Delete",
    danger: true,
  });
  if (!sure) return false;
  return done(
    () => call("DELETE", `/keys/id:${key.id}`),
    () => `Key ${key.id} is deleted.`,
  );
}

const counted = (answer) => {
  const missed = (answer.unknown?.length ?? 0) + (answer.stale?.length ?? 0);
  const stale = answer.stale?.length ? `, ${answer.stale.length} served again meanwhile and left alone` : "";
  return missed ? ` ${number(answer.unknown.length)} gone already${stale}.` : "";
};

/** Put off the expiry of several keys. */
export function keepaliveMany(keys) {
  return done(
    () => call("POST", "/batch", { op: "keepalive", keys: keys.map((key) => `id:${key.id}`) }),
    (answer) => `${number(answer.done)} kept alive.${counted(answer)}`,
  );
}

/** Take several keys from whoever holds them. */
export async function unblockMany(keys) {
  const held = keys.filter((key) => key.state === "blocked");
  if (held.length === 0) {
    toast("None of the selected keys is blocked.");
    return false;
  }
  const sure = await confirm({
    title: `Unblock ${held.length === 1 ? "one key" : `${held.length} keys`}?`,
    text: "Who holds them is not told, and may still use them while they are served to somebody else.",
    list: held.map((key) => [named(key), whose(key)]),
    go: "Unblock",
  });
  if (!sure) return false;
  return done(
    () => call("POST", "/batch", { op: "unblock", keys: held.map((key) => ({ key: `id:${key.id}`, lease: key.lease })) }),
    (answer) => `${number(answer.done)} unblocked.${counted(answer)}`,
  );
}

/** Purge several keys: their number has to be typed. */
export async function removeMany(keys) {
  if (keys.length === 1) return remove(keys[0]);
  const held = keys.filter((key) => key.state === "blocked").length;
  const sure = await confirm({
    title: `Delete ${keys.length} keys?`,
    text: `${held ? `${held} of them are held, and their holders are not told: their next call is answered 404. ` : ""}The keys are purged for ever. This can't be undone.`,
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
