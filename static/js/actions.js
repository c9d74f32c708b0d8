// An admin's actions on keys: each asks for confirmation where that is needed, and then makes a call of the API.
//
// An action names its keys by id, and an unblock sends the lease that was on the screen: if the key was leased to
// another holder meanwhile, the server refuses. This module doesn't draw keys; functions return true if something
// was done.

import { call } from "./api.js";
import { ask, askQuarantine, confirm, number, toast } from "./ui.js";

const SLOW = 1000; // ms without an answer after which the page says that it waits
const holder = (key) => key.owner || "A holder without a name";
const named = (key) => `${key.id} ${key.hint}`;
const whose = (key) => (key.state === "blocked" ? `held by ${key.owner || "a holder without a name"}` : key.state);
const isOut = (key) => key.state === "cooling" || key.state === "quarantined";
const several = (keys) => (keys.length === 1 ? "one key" : `${keys.length} keys`);
const shared = (keys) => (keys.some((key) => key.seats > 1) ? " Of a key with several seats, this is about all of them, whoever holds them." : "");
const ids = (keys) => keys.map((key) => `id:${key.id}`);

let pressed = null; // the button that the latest action came from

/**
 * Make a call, and show what it did or why it failed; true if it did it. Until then the button is busy, and takes no
 * further click; it isn't disabled, as it would lose the focus.
 */
export async function done(work, said) {
  const button = pressed;
  let notice = null;
  const slow = setTimeout(() => {
    notice = toast("Waiting for the server…", "waiting");
  }, SLOW);
  button?.setAttribute("aria-busy", "true");
  try {
    toast(said(await work()));
    return true;
  } catch (problem) {
    toast(problem.message, "danger");
    return false;
  } finally {
    clearTimeout(slow);
    notice?.remove();
    button?.removeAttribute("aria-busy");
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
    (answer) => (answer.expires_in === null ? `Key ${key.id} never expires.` : `Key ${key.id} now expires in ${Math.round(answer.expires_in)} s.`),
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
    (answer) => `Key ${key.id} ${answer.changed ? "is" : "was already"} ${answer.state}.`,
  );
}

/** Take a key out of service; asks for a reason, and for a held key whether its lease ends now. */
export async function quarantine(key) {
  const held = key.state === "blocked";
  const asked = await askQuarantine({
    title: `Quarantine key ${named(key)}?`,
    text: `The key is not served until somebody restores it, and expires like others without a keepalive.${held ? ` ${holder(key)} has it until the lease ends.` : ""}${shared([key])}`,
    held: held || key.seats > 1,
  });
  if (!asked) return false;
  return done(
    () => call("POST", `/keys/id:${key.id}/quarantine`, asked),
    (row) => (row.state === "quarantined" ? `Key ${key.id} is quarantined.` : `Key ${key.id} will be quarantined when its lease ends.`),
  );
}

/** Bring a key back into service, or call off a quarantine that is to come. */
export async function restore(key) {
  const why = [key.report, key.reason].filter(Boolean).join(": ");
  const sure = await confirm({
    title: `Restore key ${named(key)}?`,
    text:
      (isOut(key)
        ? `It is ${key.state}${why ? ` (${why})` : ""}. Restored, it is served again at once, whether or not the reason is gone; its failures and last report are forgotten.`
        : "Its failures and last report are forgotten, and a quarantine that was to come is called off. A lease goes on.") + shared([key]),
    go: "Restore",
  });
  if (!sure) return false;
  return done(
    () => call("POST", `/keys/id:${key.id}/restore`),
    (row) => (isOut(key) ? `Key ${key.id} is ${row.state}.` : `The reports on key ${key.id} are forgotten.`),
  );
}

/** Purge a key. */
export async function remove(key) {
  const held = key.state === "blocked" ? `${holder(key)} has it and is not notified; the next call with it gets 404. ` : "";
  const sure = await confirm({
    title: `Delete key ${named(key)}?`,
    text: `${held}The key is permanently deleted. This can't be undone.${shared([key])}`,
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
  const missed = [];
  if (answer.unknown?.length) missed.push(`${number(answer.unknown.length)} already gone`);
  if (answer.stale?.length) missed.push(`${number(answer.stale.length)} leased again in the meantime and left alone`);
  return missed.length ? ` ${missed.join(", ")}.` : "";
};

/** Put off the expiry of several keys. */
export function keepaliveMany(keys) {
  return done(
    () => call("POST", "/batch", { op: "keepalive", keys: ids(keys) }),
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
    title: `Unblock ${several(held)}?`,
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

/** Take several keys out of service. */
export async function quarantineMany(keys) {
  if (keys.length === 1) return quarantine(keys[0]);
  const held = keys.some((key) => key.state === "blocked" || key.seats > 1);
  const asked = await askQuarantine({
    title: `Quarantine ${several(keys)}?`,
    text: `They are not served until somebody restores them.${held ? " Those that are held go when their lease ends." : ""}${shared(keys)}`,
    list: keys.map((key) => [named(key), whose(key)]),
    held,
  });
  if (!asked) return false;
  return done(
    () => call("POST", "/batch", { op: "quarantine", keys: ids(keys), ...asked }),
    (answer) => `${number(answer.done)} quarantined${held && !asked.now ? ", those that are held when their lease ends" : ""}.${counted(answer)}`,
  );
}

/** Bring several keys back into service. */
export async function restoreMany(keys) {
  const out = keys.filter(isOut);
  if (out.length === 0) {
    toast("None of the selected keys is cooling or quarantined.");
    return false;
  }
  const sure = await confirm({
    title: `Restore ${several(out)}?`,
    text: `They are served again at once, whether or not the reasons are gone; their failures and last reports are forgotten.${shared(out)}`,
    list: out.map((key) => [named(key), key.state]),
    go: "Restore",
  });
  if (!sure) return false;
  return done(
    () => call("POST", "/batch", { op: "restore", keys: ids(out) }),
    (answer) => `${number(answer.done)} restored.${counted(answer)}`,
  );
}

/** Purge several keys; their number has to be typed. */
export async function removeMany(keys) {
  if (keys.length === 1) return remove(keys[0]);
  const held = keys.filter((key) => key.state === "blocked").length;
  const sure = await confirm({
    title: `Delete ${keys.length} keys?`,
    text: `${held ? `${held} of them are held; their holders are not notified, and their next call gets 404. ` : ""}The keys are permanently deleted. This can't be undone.${shared(keys)}`,
    list: keys.map((key) => [named(key), whose(key)]),
    word: `delete ${keys.length}`,
    go: `Delete ${keys.length} keys`,
    danger: true,
  });
  if (!sure) return false;
  return done(
    () => call("POST", "/batch", { op: "delete", keys: ids(keys) }),
    (answer) => `${number(answer.done)} deleted.${counted(answer)}`,
  );
}

/** The actions by the names that buttons have: on one key, and on several. */
export const ONE = { unblock, quarantine, restore, keepalive, delete: remove };
export const MANY = {
  unblock: unblockMany,
  quarantine: quarantineMany,
  restore: restoreMany,
  keepalive: keepaliveMany,
  delete: removeMany,
};

document.addEventListener("click", (event) => {
  if (event.target.closest("[data-generate]")) generate();
});
document.addEventListener(
  "click",
  (event) => {
    const button = event.target.closest("button");
    if (!button || button.closest("form")) return; // those of a form only confirm
    if (button.ariaBusy === "true") event.stopImmediatePropagation();
    else pressed = button;
  },
  true,
);
