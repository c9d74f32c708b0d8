// One key: the server's own markup (/keys/ID?part), in a drawer over any page or on the key's own page, kept up to date.
//
// The drawer is in the history: the page's URL ends in #key-ID while it is open, so that Back closes it, and a reload or
// somebody who gets the URL opens it again. It opens at once and says that it waits for the server.
//
// A revealed key is in the page for 30 s at most, is never part of its URL or title, and is removed when the drawer closes
// or the tab is hidden. The server leaves out actions that aren't allowed.

import * as actions from "./actions.js";
import { base, call, PATIENCE, Problem } from "./api.js";
import { adopt, now } from "./clock.js";
import * as feed from "./feed.js";
import { copy, made, setText, toast } from "./ui.js";
import { update } from "./update.js";

const SHOWN_FOR = 30_000;
const EVERY = 1000;
const FLOODED = 2000; // ms between loads while events are left out, which may have been this key's
const QUIET = 5000; // and otherwise: keepalives are no events
const drawer = document.getElementById("panel");
const page = document.querySelector(".key-page");
const place = page ?? document.getElementById("panel-content");
let open = page ? Number(page.firstElementChild.dataset.id) : null; // the id of the key that is shown
let revealed = null; // {text, until}
let underway = null; // the AbortController of a load
let again = false;
let timer = 0;
let loadedAt = -EVERY;
let leaving = null; // a promise: the drawer was closed, and its entry of the history is being left

const article = () => place.firstElementChild;
const part = (selector) => place.querySelector(selector);
const inHash = () => Number(/^#key-(\d+)$/.exec(location.hash)?.[1]) || null;

function describe({ dataset }) {
  return {
    id: Number(dataset.id),
    hint: dataset.hint,
    owner: dataset.owner,
    state: dataset.state,
    lease: Number(dataset.lease) || null,
    report: dataset.report,
    reason: dataset.reason,
    seats: Number(dataset.seats),
  };
}

// -- loading

/** Load the key again soon, at most once a second. */
function reload() {
  if (open === null) return;
  if (underway) again = true;
  else timer ||= setTimeout(load, Math.max(0, loadedAt + EVERY - performance.now()));
}

function stop() {
  clearTimeout(timer);
  timer = 0;
  underway?.abort();
  underway = null;
}

async function load() {
  stop();
  const mine = new AbortController();
  underway = mine;
  again = false;
  loadedAt = performance.now();
  try {
    const fresh = await fetchPanel(mine.signal);
    if (underway === mine) draw(fresh);
  } catch (problem) {
    if (underway === mine) fail(problem);
  }
  if (underway !== mine) return;
  underway = null;
  if (again) reload();
}

/** The panel as the server draws it now. Throws Problem. */
async function fetchPanel(signal) {
  const url = new URL(page ? location.href : `${base}/keys/${open}`, location.href);
  url.searchParams.set("part", "");
  let response, html;
  try {
    response = await fetch(url, { headers: { Accept: "text/html" }, signal: AbortSignal.any([signal, AbortSignal.timeout(PATIENCE)]) });
    html = await response.text();
  } catch (error) {
    throw Problem.of(error);
  }
  const fresh = new DOMParser().parseFromString(html, "text/html").querySelector(".key-panel");
  if (fresh) return fresh;
  throw new Problem(response.status, response.redirected ? { title: "Signed out", detail: "sign in again to see this key" } : { title: `The server answered with status ${response.status}` });
}

function draw(fresh) {
  const focused = place.contains(document.activeElement);
  update(article(), fresh);
  adopt(place, now());
  if (!part(".reveal")) revealed = null;
  if (focused) keepFocus();
}

/** What had the focus is gone, such as the button of an action that makes no sense any more: go on from the title. */
function keepFocus() {
  if (document.activeElement === document.body && open !== null) part("#panel-title").focus();
}

/** Say why there is nothing to see. A key that is shown stays: the pill and the banner say that it is old. */
function fail(problem) {
  if (article().dataset.state !== "pending") return;
  setText(part("[role=status]"), problem.message);
  part(".buttons").hidden = false;
}

// -- the drawer

/** Open the drawer on a key. */
export async function show(id) {
  await leaving;
  if (id === open) return;
  history.pushState({ drawer: true }, "", `#key-${id}`);
  openDrawer(id);
}

function openDrawer(id) {
  hide();
  open = id;
  const pending = made("panel-template");
  pending.dataset.id = id;
  pending.querySelector(".key-id").textContent = id;
  place.replaceChildren(pending);
  if (!drawer.open) drawer.showModal();
  load();
}

/** Forget the key that the drawer has shown. */
function clear() {
  hide();
  stop();
  open = null;
  place.replaceChildren();
  document.getElementById("toasts").append(...drawer.querySelectorAll(".toast"));
  // The focus is back on what opened the drawer, unless that has gone meanwhile.
  if (document.activeElement === document.body) document.getElementById("main").focus({ preventScroll: true });
}

drawer.addEventListener("close", () => {
  if (open === null || drawer.open) return; // closed by Back, some time ago, and maybe opened again since
  clear();
  if (history.state?.drawer) {
    leaving = new Promise((resolve) => addEventListener("popstate", resolve, { once: true }));
    history.back();
  } else {
    history.replaceState(null, "", location.pathname + location.search); // it came with the URL
  }
});
drawer.addEventListener("click", (event) => {
  if (event.target === drawer) drawer.close();
});

/** Show what the URL says. */
function follow() {
  const id = inHash();
  if (page || id === open) return;
  if (id !== null) return openDrawer(id);
  drawer.close();
  clear();
}

addEventListener("popstate", follow);

// -- the key itself

function hide() {
  if (!revealed) return;
  revealed = null;
  showSecret("");
  setText(part(".reveal-off"), "Hidden again. Revealing it is recorded in the audit log.");
}

function showSecret(text) {
  part(".secret").textContent = text;
  part(".reveal-on").hidden = !text;
  part("[data-hide]").hidden = !text;
  part("[data-reveal]").hidden = Boolean(text);
}

async function reveal() {
  const shown = article();
  try {
    const { key } = await call("POST", `/keys/id:${open}/reveal`);
    if (!shown.isConnected || !part(".reveal")) return; // closed meanwhile, or the key is gone
    revealed = { text: key, until: performance.now() + SHOWN_FOR };
    showSecret(key);
    countDown();
  } catch (problem) {
    toast(problem.message, "danger");
  }
}

function countDown() {
  if (!revealed) return;
  const left = Math.ceil((revealed.until - performance.now()) / 1000);
  if (left <= 0) hide();
  else setText(part(".reveal-off"), `Recorded in the audit log. Hidden again in ${left} s.`);
}

document.addEventListener("click", async (event) => {
  const inside = event.target.closest(".key-panel");
  const link = event.target.closest(".key-link");
  if (link && !inside && event.button === 0 && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
    event.preventDefault();
    show(Number(link.pathname.split("/").pop()));
    return;
  }
  if (!inside) return;
  const act = event.target.closest("[data-act]")?.dataset.act;
  if (event.target.closest("[data-close]")) drawer.close();
  else if (event.target.closest("[data-again]")) openDrawer(open);
  else if (event.target.closest("[data-reveal]")) reveal();
  else if (event.target.closest("[data-hide]")) hide();
  else if (event.target.closest("[data-copy-secret]")) copy(revealed?.text ?? "", "the key");
  else if (act && (await actions.ONE[act](describe(inside)))) {
    keepFocus();
    if (open !== null) load();
  }
});
document.addEventListener("visibilitychange", () => document.hidden && hide());
addEventListener("pagehide", hide);
feed.on("hello", reload); // for what happened without a connection
feed.on("delta", (delta) => {
  if (open === null) return;
  const gone = article().dataset.state === "gone"; // for good, unless there never was such a key
  const late = performance.now() - loadedAt > (delta.dropped ? FLOODED : QUIET);
  if (delta.whole || delta.events.some((each) => each.id === open) || (late && !gone)) reload();
});
setInterval(countDown, 500);
follow();
