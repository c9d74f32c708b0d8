// The title and the icon of the tab: the most urgent verdict of the server, or that there is no connection.

import * as feed from "./feed.js";

const plain = document.title.replace(/^\(!\) .+? · /, "");
const icon = document.querySelector('link[rel="icon"]');
const LOST = { lost: "no connection", draining: "stopping", loading: "loading", "signed-out": "signed out" };
let short = document.title.match(/^\(!\) (.+?) · /)?.[1] ?? "";

function show() {
  const said = LOST[feed.state] ?? short;
  const wanted = (said && `(!) ${said} · `) + plain;
  if (document.title !== wanted) document.title = wanted;
  const href = said ? icon.dataset.alarm : icon.dataset.plain;
  if (icon.getAttribute("href") !== href) icon.href = href;
}

feed.on("state", show);
feed.on("figures", ({ health }) => {
  short = health.find((verdict) => verdict.short)?.short ?? "";
  show();
});
