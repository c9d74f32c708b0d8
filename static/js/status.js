// The state of the connection to the server: the pill, and the banner that explains what to do.
//
// When the connection is lost, what is shown is greyed and its age is given; nothing is removed. feed.js
// reconnects.

import { now } from "./clock.js";
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
  polling: () => "Polling every 5 s",
  draining: () => `Stopping · ${old()}`,
  loading: () => "Loading…",
  lost: () => `No connection · ${old()}`,
  paused: () => "Paused",
  "signed-out": () => "Signed out",
};

const BANNERS = {
  lost: () => ["danger", "The server can't be reached", `The data shown is from ${heard()}. This page keeps trying, less and less often.`, "Try now", feed.retryNow],
  draining: () => ["warn", "The server is stopping", "It finishes the calls in progress and accepts no new ones. This page reconnects when it is back, or when another server takes its place.", "Try now", feed.retryNow],
  loading: () => ["warn", "The server is loading", "It has just started and reads its keys. This page goes on when that is done.", "", null],
  polling: () => ["info", "Too many viewers for live updates", "This page polls every 5 s instead; --max-viewers raises the limit.", "", null],
  "signed-out": () => ["danger", "You are signed out", "The data shown is no longer updated. Sign in to return to this page.", "Sign in", () => location.assign(back())],
};

function old() {
  const age = Math.round(feed.age());
  return age < 90 ? `${age} s` : age < 5400 ? `${Math.round(age / 60)} min` : `${Math.round(age / 3600)} h`;
}

/** The time of the last message. Unlike an age it doesn't change, so screen readers read the banner only once. */
function heard() {
  return `${new Date(now() - feed.age() * 1000).toISOString().slice(11, 19)} UTC`;
}

function show() {
  const state = feed.state;
  if (pill.dataset.state !== state) pill.dataset.state = state;
  setText(pillText, PILLS[state]());
  document.body.classList.toggle("stale", ["lost", "draining", "loading", "signed-out"].includes(state));
  let wanted = BANNERS[state]?.() ?? null;
  if (!wanted && ready) {
    const next = ready.code === "storage-unavailable" ? "Reads go on; calls that change something get 503 until a write succeeds. Check the disk and the server's log." : "";
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
