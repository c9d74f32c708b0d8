// Keyboard shortcuts: single keys that only navigate and change nothing. They can be switched off, since speech input
// types them by accident (WCAG 2.1.4).

import { base } from "./api.js";

const help = document.getElementById("help");
const choice = document.getElementById("shortcuts");
const STORE = "keypool-shortcuts";

const typing = (element) => element.closest("input:not([type=checkbox]):not([type=radio]), textarea, select, [contenteditable]");

function rows() {
  return [...document.querySelectorAll(".key-row:not(.gone), .events .event")].filter((row) => row.offsetParent !== null);
}

function move(step) {
  const all = rows();
  if (all.length === 0) return;
  const at = all.findIndex((row) => row.contains(document.activeElement) || row.classList.contains("at"));
  const next = all[Math.min(all.length - 1, Math.max(0, at === -1 ? 0 : at + step))];
  for (const row of all) row.classList.toggle("at", row === next);
  next.querySelector(".key-link").focus();
  next.scrollIntoView({ block: "nearest" });
}

function search() {
  const field = document.getElementById("search");
  if (field) field.focus();
  else location.assign(`${base}/keys#search`);
}

const KEYS = { "/": search, "?": () => help.showModal(), j: () => move(1), k: () => move(-1) };

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    document.dispatchEvent(new CustomEvent("escape"));
    if (typing(event.target)) event.target.blur();
    return;
  }
  if (!choice.checked || typing(event.target)) return;
  const act = KEYS[event.key];
  if (act) {
    event.preventDefault();
    act();
  } else if (event.key === " ") {
    const box = event.target.closest(".key-row")?.querySelector(".picked");
    if (box && event.target !== box) {
      event.preventDefault();
      box.click();
    }
  }
});
document.addEventListener("focusout", (event) => event.target.closest?.(".at")?.classList.remove("at"));

choice.checked = localStorage.getItem(STORE) !== "off";
choice.addEventListener("change", () => localStorage.setItem(STORE, choice.checked ? "on" : "off"));
if (location.hash === "#search") search();
