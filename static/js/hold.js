// Rows hold still while somebody aims at them, so that nobody presses, reads or copies the wrong one: for ten seconds after the
// mouse has moved over a list or a finger has touched it, while the keyboard's focus or a text selection is in it, and while a
// dialog is open. Rows then change in place only; a page brings its list up to date when the hold ends.

const AIMED_FOR = 10_000; // ms; a mouse that was left there holds nothing any more
const chip = document.getElementById("held");
const holding = new Set();

/**
 * Watch over a list: the result tells whether it holds still. `release` is called when it no longer does; `also` is one more
 * reason to hold.
 */
export function hold(area, release, also = () => false) {
  let until = -Infinity;

  function aimed() {
    const selection = getSelection();
    return (
      performance.now() < until ||
      area.querySelector(":focus-visible") !== null ||
      (!selection.isCollapsed && area.contains(selection.anchorNode)) ||
      document.querySelector("dialog[open]") !== null ||
      also()
    );
  }

  function still() {
    const now = aimed();
    if (now !== holding.has(area)) {
      if (now) holding.add(area);
      else holding.delete(area);
      chip.hidden = holding.size === 0;
      if (!now) release();
    }
    return now;
  }

  function point() {
    until = performance.now() + AIMED_FOR;
    still();
  }

  for (const type of ["pointerdown", "pointermove", "pointercancel", "touchmove"]) area.addEventListener(type, point, { passive: true });
  area.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") until = -Infinity;
    still();
  });
  area.addEventListener("focusin", still);
  setInterval(still, 250);
  return still;
}
