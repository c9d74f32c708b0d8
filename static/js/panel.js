// The panel of one key: the server's own markup (/keys/ID?part) in a drawer, kept up to date while it is open.
//
// A revealed key is in the page for 30 s at most, is never part of its URL or title, and is removed when the panel closes
// or the tab is hidden. The server leaves out actions that aren't allowed.

import * as actions from "./actions.js";
import { base, call } from "./api.js";
import { adopt, now } from "./clock.js";
import * as feed from "./feed.js";
import { copy, setText, toast } from "./ui.js";

const drawer = document.getElementById("panel");
const content = document.getElementById("panel-content");
const SHOWN_FOR = 30_000;
let open = null; // the id in the drawer
let revealed = null; // {text, until, article}
let loading = false;
let again = false;
let loadedAt = 0;

function describe(article) {
  return {
    id: Number(article.dataset.id),
    hint: article.dataset.hint,
    owner: article.dataset.owner,
    state: article.dataset.state,
    lease: Number(article.dataset.lease) || null,
    report: article.dataset.report,
    reason: article.dataset.reason,
    seats: Number(article.dataset.seats),
  };
}

async function load() {
  if (open === null || revealed) return;
  if (loading) {
    again = true;
    return;
  }
  loading = true;
  try {
    const response = await fetch(`${base}/keys/${open}?part`, { headers: { Accept: "text/html" } });
    if (response.redirected) throw new Error("signed out");
    const html = await response.text();
    if (open !== null && !revealed) {
      const focus = document.activeElement?.dataset?.act;
      const parsed = new DOMParser().parseFromString(html, "text/html").body;
      content.replaceChildren(...parsed.childNodes);
      adopt(content, now());
      if (focus) content.querySelector(`[data-act="${focus}"]`)?.focus();
    }
  } catch {
    if (!content.children.length) drawer.close();
  } finally {
    loading = false;
    loadedAt = performance.now();
    if (again) {
      again = false;
      setTimeout(load, 500);
    }
  }
}

/** Open the drawer on a key. */
export async function show(id) {
  open = id;
  content.replaceChildren();
  await load();
  if (open === id && content.children.length && !drawer.open) drawer.showModal();
}

function hide() {
  if (!revealed) return;
  const { article } = revealed;
  revealed = null;
  article.querySelector(".secret").textContent = "";
  article.querySelector(".reveal-on").hidden = true;
  article.querySelector("[data-hide]").hidden = true;
  article.querySelector("[data-reveal]").hidden = false;
  setText(article.querySelector(".reveal-off"), "Hidden again. Revealing it is recorded in the audit log.");
}

async function reveal(article) {
  try {
    const { key } = await call("POST", `/keys/id:${article.dataset.id}/reveal`);
    // Meanwhile the panel may have been loaded anew, or closed.
    if (!article.isConnected) article = document.querySelector(`.key-panel[data-id="${article.dataset.id}"]`);
    if (!article) return;
    revealed = { text: key, until: performance.now() + SHOWN_FOR, article };
    article.querySelector(".secret").textContent = key;
    article.querySelector(".reveal-on").hidden = false;
    article.querySelector("[data-hide]").hidden = false;
    article.querySelector("[data-reveal]").hidden = true;
    countDown();
  } catch (problem) {
    toast(`${problem.title}. ${problem.message}`, "danger");
  }
}

function countDown() {
  if (!revealed) return;
  const left = Math.ceil((revealed.until - performance.now()) / 1000);
  if (left <= 0) hide();
  else setText(revealed.article.querySelector(".reveal-off"), `Recorded in the audit log. Hidden again in ${left} s.`);
}


document.addEventListener("click", async (event) => {
  const article = event.target.closest(".key-panel");
  const link = event.target.closest(".key-link");
  if (link && !article && event.button === 0 && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
    event.preventDefault();
    show(Number(link.pathname.split("/").pop()));
    return;
  }
  if (!article) return;
  const act = event.target.closest("[data-act]")?.dataset.act;
  if (event.target.closest("[data-close]")) drawer.close();
  else if (event.target.closest("[data-reveal]")) reveal(article);
  else if (event.target.closest("[data-hide]")) hide();
  else if (event.target.closest("[data-copy-secret]")) copy(revealed?.text ?? "", "the key");
  else if (act && (await actions.ONE[act](describe(article)))) {
    if (open === null) location.reload();
    else load();
  }
});
drawer.addEventListener("close", () => {
  hide();
  open = null;
  content.replaceChildren();
});
drawer.addEventListener("click", (event) => {
  if (event.target === drawer) drawer.close();
});
document.addEventListener("visibilitychange", () => document.hidden && hide());
addEventListener("pagehide", hide);
feed.on("delta", (delta) => {
  if (open === null) return;
  const concerned = delta.whole || delta.dropped || delta.events.some((each) => each.id === open);
  if (concerned || performance.now() - loadedAt > 5000) load();
});
setInterval(countDown, 500);
