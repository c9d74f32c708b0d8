// Every page starts here: what all of them share, then the page's own module, then the connection.

import "./alarm.js";
import "./clock.js";
import "./import.js";
import "./keyboard.js";
import "./panel.js";
import "./status.js";
import * as feed from "./feed.js";
import { begin, go } from "./model.js";

feed.on("hello", begin);
feed.on("delta", go);

const theme = document.getElementById("theme");
theme.addEventListener("change", () => {
  // A cookie, so that the server already renders the page in this theme.
  document.cookie = `keypool_theme=${theme.value}; path=/; samesite=strict; max-age=${theme.value ? 31536000 : 0}`;
  if (theme.value) document.documentElement.dataset.theme = theme.value;
  else delete document.documentElement.dataset.theme;
});

const pool = document.getElementById("pool-switch");
pool?.addEventListener("change", () => {
  const { page } = document.body.dataset;
  const path = ["keys", "owners", "waiters", "events"].includes(page) ? `/${page}` : "";
  location.assign((pool.value === "default" ? "" : `/pools/${pool.value}`) + path || "/");
});

for (const current of document.querySelectorAll(".side [aria-current], .tabs [aria-current]")) {
  current.scrollIntoView({ block: "nearest", inline: "center" }); // on a phone they scroll
}

const page = document.body.dataset.page;
if (["overview", "keys", "owners", "waiters", "events", "pools", "system"].includes(page)) await import(`./pages/${page}.js`);
feed.start();
