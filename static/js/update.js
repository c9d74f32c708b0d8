// Bringing markup up to date in place: what hasn't changed stays in the document, and with it focus, a selection of text
// and the scroll position. Used with markup that the server draws again, of a few dozen elements.

const nameOf = (node) => (node.nodeType === Node.ELEMENT_NODE ? `${node.localName} ${node.dataset.key ?? node.dataset.act ?? ""}` : node.nodeName);

/**
 * Make `old` look like `fresh`. Children stay if an equal one is wanted; else one of the same name (`data-key` or
 * `data-act`, and the kind of element) is updated. An element with `data-own` is left as its script made it.
 */
export function update(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeType !== Node.ELEMENT_NODE) {
    old.data = fresh.data;
  } else if (old.matches(".countdown")) {
    if (old.dataset.kind !== fresh.dataset.kind) old.shown = null; // clock.js draws it anew
    Object.assign(old.dataset, fresh.dataset);
  } else if (!("own" in old.dataset)) {
    attributes(old, fresh);
    children(old, fresh);
  }
}

function attributes(old, fresh) {
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name) && name !== "aria-busy") old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
}

function children(old, fresh) {
  const free = new Set(old.childNodes);
  const take = (fits) => {
    const found = [...free].find(fits);
    free.delete(found);
    return found;
  };
  const wanted = [...fresh.childNodes];
  const kept = wanted.map((node) => take((each) => each.isEqualNode(node)));
  wanted.forEach((node, i) => {
    kept[i] ??= take((each) => nameOf(each) === nameOf(node));
    if (kept[i]) update(kept[i], node);
  });
  for (const node of free) node.remove();
  let next = old.firstChild;
  wanted.forEach((node, i) => {
    const child = kept[i] ?? node;
    if (child === next) next = next.nextSibling;
    else old.insertBefore(child, next);
  });
}
