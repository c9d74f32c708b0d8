// How the page stands with the server: the pill, and the banner that says what to do about it.
//
// Losing the server greys what is shown and says how old it is; nothing is taken away. What this module does not
// do: mend the connection (feed.js).

import * as feed from "./feed.js";
import { setText } from "./ui.js";

const pill = document.getElementById("pill");
const pillText = document.getElementById("pill-text");
const banner = document.getElementById("banner");
let ready = null;

const back = () => (location.pathname === "/" && !location.search ? "/login" : `/login?next=${encodeURIComponent(location.pathname + location.search)}`);

const PILLS = {
  connecting: () => "Connecting…",
  live: () => "Live",
  polling: () => "Every 5 s",
  draining: () => `Stopping · ${old()}`,
  lost: () => `No connection · ${old()}`,
  paused: () => "Paused",
  "signed-out": () => "Signed out",
};

const BANNERS = {
  lost: () => ["danger", "The server can't be reached", `What you see is from ${heard()}. This page keeps trying, more and more rarely.`, "Try now", feed.retryNow],
  draining: () => ["warn", "The server is stopping", "It answers what is under way and takes nothing new. This page comes back when it does, or when another one takes its place.", "Try now", feed.retryNow],
  polling: () => ["info", "As many watch as may", "This page asks every 5 s instead of being told; --max-viewers raises the limit.", "", null],
  "signed-out": () => ["danger", "You are signed out", "What you see is the last that you were told. Sign in to come back to this page.", "Sign in", () => location.assign(back())],
};

function old() {
  const age = Math.round(feed.age());
  return age < 90 ? `${age} s` : age < 5400 ? `${Math.round(age / 60)} min` : `${Math.round(age / 3600)} h`;
}

/** When the server was last heard. It doesn't change, as an age would: the banner is read aloud. */
function heard() {
  return new Date(Date.now() - feed.age() * 1000).toLocaleTimeString();
}

function show() {
  const state = feed.state;
  if (pill.dataset.state !== state) pill.dataset.state = state;
  setText(pillText, PILLS[state]());
  document.body.classList.toggle("stale", state === "lost" || state === "draining" || state === "signed-out");
  let wanted = BANNERS[state]?.() ?? null;
  if (!wanted && ready) {
    const next = ready.code === "storage-unavailable" ? "Reading goes on; calls that change something are answered 503 until a write gets through. Look at the disk and at the server's log." : "";
    wanted = ["danger", ready.title, `${ready.detail[0].toUpperCase()}${ready.detail.slice(1)}. ${next}`, "", null];
  }
  if (wanted && banner.dataset.title !== wanted[1]) fill(...wanted);
  if (!wanted) delete banner.dataset.title;
  if (banner.hidden !== !wanted) banner.hidden = !wanted;
}

function fill(tone, title, text, label, act) {
  banner.dataset.title = title;
  banner.dataset.tone = tone;
  banner.replaceChildren(document.createElement("strong"), document.createElement("span"));
  banner.firstChild.textContent = title;
  banner.lastChild.textContent = text;
  if (!label) return;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = label;
  button.addEventListener("click", act);
  banner.append(button);
}

feed.on("state", show);
feed.on("figures", (figures) => {
  ready = figures.ready;
  show();
});
setInterval(() => document.hidden || show(), 1000);
