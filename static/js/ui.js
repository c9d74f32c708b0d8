// Small things that pages share: numbers, toasts, copying, the confirm dialog, filling a template.
//
// Text is always set as text, never as HTML.

const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 1 });

/** A count with thousands separators. The same as number() in keypool/web/dashboard.py. */
export function number(value) {
  return grouped.format(value);
}

/** Set an element's text, only if it differs, so that nothing is redrawn without need. */
export function setText(element, text) {
  if (element && element.textContent !== text) element.textContent = text;
}

const STAYS = { danger: 9000, waiting: 60_000 };

/**
 * Show a message that disappears by itself; with `tone` danger it stays a little longer, with waiting until the caller
 * removes it. An open drawer has a place of its own for messages: what is outside of it is neither seen nor announced.
 */
export function toast(text, tone = "available") {
  const element = document.createElement("div");
  element.className = "toast";
  element.dataset.tone = tone;
  element.textContent = text;
  (document.querySelector("dialog[open] > .toasts") ?? document.getElementById("toasts")).append(element);
  setTimeout(() => element.remove(), STAYS[tone] ?? 4500);
  return element;
}

/** Copy to the clipboard, and show a message. */
export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    toast(`Copied: ${what}`);
  } catch {
    toast("The browser didn't allow copying: select the text instead.", "danger");
  }
}

/** A new element from a template of the page. */
export function made(id) {
  return document.getElementById(id).content.firstElementChild.cloneNode(true);
}

/** Put a row at this place among its siblings, in one step if it is there already: then it keeps focus and selection. */
export function place(parent, row, at) {
  const next = parent.children[at] ?? null;
  if (row === next) return;
  if (row.parentNode === parent && parent.moveBefore) parent.moveBefore(row, next);
  else parent.insertBefore(row, next);
}

/** Show a dialog; true if it was closed with its button `go`. */
export function ask(dialog) {
  return new Promise((resolve) => {
    dialog.returnValue = "cancel";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "go"), { once: true });
    dialog.showModal();
  });
}

function fillList(items, list) {
  items.hidden = list.length === 0;
  items.replaceChildren(
    ...list.map(([what, whose]) => {
      const item = document.createElement("li");
      const left = document.createElement("span");
      const right = document.createElement("span");
      left.textContent = what;
      right.textContent = whose;
      right.className = "muted";
      item.append(left, right);
      return item;
    }),
  );
}

/**
 * Ask for confirmation. `word` has to be typed; `list` has pairs of a key and its state.
 */
export function confirm({ title, text, list = [], word = "", go, danger = false }) {
  const dialog = document.getElementById("confirm");
  const button = dialog.querySelector("#confirm-go");
  const typed = dialog.querySelector("#confirm-typed");
  const input = typed.querySelector("input");
  dialog.querySelector("#confirm-title").textContent = title;
  dialog.querySelector("#confirm-text").textContent = text;
  fillList(dialog.querySelector(".affected"), list);
  typed.hidden = !word;
  dialog.querySelector("#confirm-word").textContent = word;
  input.value = "";
  button.textContent = go;
  button.className = danger ? "danger" : "";
  button.disabled = Boolean(word);
  input.oninput = () => {
    button.disabled = input.value.trim() !== word;
  };
  return ask(dialog);
}

/** Ask for the reason of a quarantine, and, if some key is `held`, whether to end its lease; null if cancelled. */
export async function askQuarantine({ title, text, list = [], held }) {
  const dialog = document.getElementById("quarantine");
  const reason = dialog.querySelector("[name=reason]");
  const now = dialog.querySelector("[name=now]");
  dialog.querySelector("#quarantine-title").textContent = title;
  dialog.querySelector("#quarantine-text").textContent = text;
  fillList(dialog.querySelector(".affected"), list);
  dialog.querySelector("#quarantine-now").hidden = !held;
  reason.value = "";
  now.checked = false;
  if (!(await ask(dialog))) return null;
  return { reason: reason.value.trim() || null, now: now.checked };
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (button) copy(button.parentElement.querySelector("code").textContent, button.getAttribute("aria-label").replace("Copy: ", ""));
});
