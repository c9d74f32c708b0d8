// The connection to the feed: opened, watched, re-established.
//
//   connecting --hello--> live --silence, close, gap--> lost --back-off--> connecting
//                                  \--1001--> draining --/      (lost when --drain-seconds are over; loading when it is back)
//   polling: the server has no room for another viewer.   signed-out: the session has ended.   paused: the tab is hidden.
//
// A connection can be dead without being closed, so the page watches for the heartbeat: the server is never silent for
// longer than 5 s. A hidden tab holds no connection; it reconnects at once when it is shown, or when the network is back.

import { base, Problem, request, whenSignedOut } from "./api.js";
import { hear } from "./clock.js";

const SILENCE = 12_000;
const LONGEST_WAIT = 5_000;
const HIDDEN_FOR = 5_000;
const POLL = 5_000;
const RETRY_WHILE_POLLING = 30_000;

// Only the overview draws the history, and these pages list no events.
const { page } = document.body.dataset;
const LEFT_OUT = page === "overview" ? "" : ["pools", "system", "calls"].includes(page) ? "?history=no&events=no" : "?history=no";

const listeners = { state: [], hello: [], delta: [], figures: [] };
let socket = null;
let seq = 0;
let heardAt = performance.now();
let attempt = 0;
let retryTimer = 0;
let hiddenTimer = 0;
let figuresTimer = 0;
let triedAt = 0;
let drainedAt = 0; // when a server that said that it stops has stopped

/** The state of the connection, as drawn above. */
export let state = "connecting";

/** Call `then` at each `state`, `hello`, `delta` or `figures`. */
export function on(type, then) {
  listeners[type].push(then);
}

/** Seconds since the last frame. */
export function age() {
  return (performance.now() - heardAt) / 1000;
}

/** Reconnect at once, without waiting for the back-off. */
export function retryNow() {
  attempt = 0;
  connect();
}

/** Fetch the figures now instead of in some seconds. */
export function refresh() {
  if (state === "live") poll();
}

/** Begin. Called once, when all listeners are registered. */
export function start() {
  whenSignedOut(signedOut);
  document.addEventListener("visibilitychange", seen);
  addEventListener("online", retryNow);
  addEventListener("offline", () => dropped("lost"));
  addEventListener("pagehide", () => close());
  setInterval(listen, 1000);
  connect();
  poll();
}

function tell(type, value) {
  for (const then of listeners[type]) then(value);
}

function become(next) {
  if (state === next) return;
  state = next;
  tell("state", next);
}

function connect() {
  clearTimeout(retryTimer);
  close();
  if (document.hidden || state === "signed-out") return;
  triedAt = performance.now();
  if (!["polling", "lost", "draining", "loading"].includes(state)) become("connecting");
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  const opened = new WebSocket(`${scheme}//${location.host}/api/v1${base}/feed${LEFT_OUT}`);
  let heard = false;
  socket = opened;
  opened.onmessage = ({ data }) => {
    if (socket !== opened) return;
    heard = true;
    take(JSON.parse(data));
  };
  opened.onclose = ({ code }) => {
    if (socket !== opened) return;
    socket = null;
    if (code === 1001) drainedAt = performance.now() + document.body.dataset.drain * 1000;
    if (code === 4401) signedOut();
    else if (heard) dropped(code === 1001 ? "draining" : "lost");
    else whyNot();
  };
}

function close() {
  const old = socket;
  socket = null;
  old?.close();
}

function take(frame) {
  heardAt = performance.now();
  hear(frame.now);
  const expected = seq + 1;
  seq = frame.seq;
  if (frame.type === "hello") {
    attempt = 0;
    become("live");
    tell("hello", frame);
    poll();
  } else if (frame.seq !== expected) {
    retryNow(); // a frame was lost: begin again with a hello
  } else if (frame.type === "delta") {
    tell("delta", frame);
  }
}

/** The heartbeat: a connection that is silent for too long is dead, even if it never delivered a frame. */
function listen() {
  if (socket && performance.now() - Math.max(heardAt, triedAt) > SILENCE) dropped("lost");
}

function dropped(next) {
  if (state === "signed-out" || document.hidden) return;
  close();
  become(next);
  again();
}

function again() {
  clearTimeout(retryTimer);
  const wait = Math.min(LONGEST_WAIT, 500 * 2 ** attempt) * (0.5 + Math.random() / 2);
  attempt = Math.min(attempt + 1, 10);
  retryTimer = setTimeout(connect, wait);
}

/** Browsers don't report why a websocket was refused, so request the figures. */
async function whyNot() {
  try {
    const figures = await request("GET", `${base}/figures?state`);
    if (figures.viewers < figures.max_viewers) again();
    else pollInstead(figures);
  } catch (problem) {
    if (problem instanceof Problem && problem.status === 401) return;
    if (problem.code === "loading") dropped("loading");
    else dropped(state === "draining" && performance.now() < drainedAt ? "draining" : "lost");
  }
}

function pollInstead(figures) {
  become("polling");
  onFigures(figures);
}

function onFigures(figures) {
  if (figures.state) {
    heardAt = performance.now();
    hear(figures.state.now);
    tell("delta", { ...figures.state, dropped: 0, whole: true });
  }
  tell("figures", figures);
}

/** Every few seconds, fetch what the feed doesn't send; while polling, fetch everything. */
async function poll() {
  clearTimeout(figuresTimer);
  figuresTimer = setTimeout(poll, POLL);
  if (document.hidden || (state !== "live" && state !== "polling")) return;
  if (state === "polling" && performance.now() - triedAt > RETRY_WHILE_POLLING) {
    connect();
    return;
  }
  try {
    onFigures(await request("GET", `${base}/figures${state === "polling" ? "?state" : ""}`));
  } catch (problem) {
    if (state === "polling" && problem.status !== 401) dropped("lost");
  }
}

function signedOut() {
  close();
  clearTimeout(retryTimer);
  become("signed-out");
}

function seen() {
  clearTimeout(hiddenTimer);
  if (document.hidden) {
    hiddenTimer = setTimeout(() => {
      close();
      clearTimeout(retryTimer);
      if (state !== "signed-out") become("paused");
    }, HIDDEN_FOR);
  } else if (!socket) {
    retryNow();
  }
}
