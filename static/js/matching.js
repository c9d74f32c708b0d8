// One action on all keys that match a list, however many: page by page of the API and a batch for each, so that neither the
// server nor the tab has long to work at a time. It can be stopped between two pages, and what was done stays done.
//
// It goes on to as many keys as the list had when it was confirmed: what comes later isn't meant.

import { call } from "./api.js";
import { askQuarantine, confirm, number, toast } from "./ui.js";

const PAGE = 500;
const isOut = (key) => key.state === "cooling" || key.state === "quarantined";
const byId = (key) => `id:${key.id}`;
const ACTS = {
  unblock: { done: "unblocked", title: "Unblock", fits: (key) => key.state === "blocked", item: (key) => ({ key: byId(key), lease: key.lease }),
    text: "Their holders are not notified, and may still use the keys while they are leased to someone else." },
  restore: { done: "restored", title: "Restore", fits: isOut, item: byId,
    text: "Those that are cooling or quarantined are served again at once; their failures and last reports are forgotten." },
  quarantine: { done: "quarantined", title: "Quarantine", fits: (key) => key.state !== "quarantined", item: byId,
    text: "They are not served until somebody restores them. Those that are held go when their lease ends." },
  keepalive: { done: "kept alive", title: "Keep alive", fits: () => true, item: byId, text: "Their expiry is put off." },
  delete: { done: "deleted", title: "Delete", fits: () => true, item: byId, danger: true,
    text: "They are permanently deleted, also those that are held. This can't be undone." },
};

/**
 * Do `act` with all keys of the list `query`, which has `count` keys, or at most so many if it isn't `exact`. `progress` is called
 * with the number of keys that were looked at; true from it stops. Returns false if the user doesn't confirm.
 */
export async function actOnMatching(act, query, { count, exact }, progress) {
  const { done, title, fits, item, text, danger = false } = ACTS[act];
  const which = exact ? `all ${number(count)} keys` : "all keys that match";
  const asked = { title: `${title} ${which}?`, text };
  const extra = act === "quarantine" ? await askQuarantine({ ...asked, held: true }) : {};
  if (!extra) return false;
  const word = danger ? `delete ${exact ? count : "all"}` : "";
  if (act !== "quarantine" && !(await confirm({ ...asked, word, go: `${title} ${which}`, danger }))) return false;

  const sums = { seen: 0, done: 0, left: 0 };
  let why = "";
  try {
    let next = null;
    do {
      if (progress(sums.seen)) {
        why = " Stopped: the others were left alone.";
        break;
      }
      query.set("limit", String(Math.min(PAGE, count - sums.seen)));
      if (next) query.set("after", next);
      const page = await call("GET", `/keys?${query}`);
      const keys = page.keys.filter(fits).map(item);
      if (keys.length) {
        const answer = await call("POST", "/batch", { op: act, keys, ...extra });
        sums.done += answer.done;
        sums.left += answer.unknown.length + (answer.stale?.length ?? 0);
      }
      sums.seen += page.keys.length;
      next = page.next;
    } while (next && sums.seen < count);
  } catch (problem) {
    why = ` Then it ended: ${problem.title}. ${problem.message}`;
  }
  const left = sums.left ? ` ${number(sums.left)} already gone, or leased again in the meantime and left alone.` : "";
  toast(`${number(sums.done)} ${done}.${left}${why}`, why.startsWith(" Then") ? "danger" : undefined);
  return true;
}
