// Importing keys: what was pasted, or a file, as batches of the API; what failed is listed by line.
//
// Secrets are in the page for as long as the dialog is at work, in variables and in the field that they were pasted into,
// which is emptied as soon as it has been read. They are never shown again, not even in an error.

import { call } from "./api.js";
import { number, toast } from "./ui.js";

const ITEMS = 500; // in one call, and at most so many characters
const CHARACTERS = 1_000_000;
const dialog = document.getElementById("import");

/** The fields of a line of CSV (RFC 4180). A quoted field may not contain a line break here. */
function fieldsOf(line) {
  const fields = [];
  const field = /(?:"((?:[^"]|"")*)"|([^",]*))(,|$)/y;
  for (;;) {
    const found = field.exec(line);
    if (!found) throw new Error("is not CSV: a quote is missing, or stands inside a field");
    fields.push(found[1] === undefined ? found[2].trim() : found[1].replaceAll('""', '"'));
    if (!found[3]) return fields;
  }
}

function fromColumns(header, line) {
  const fields = fieldsOf(line);
  if (fields.length !== header.length) throw new Error(`has ${fields.length} fields; the header has ${header.length}`);
  const item = {};
  header.forEach((column, i) => {
    const [group, name] = column.split(/:(.*)/s);
    if (fields[i] === "" && column !== "secret") return;
    if (column === "secret" || column === "name") item[column] = fields[i];
    else if (column === "seats") {
      if (!/^[0-9]{1,9}$/.test(fields[i])) throw new Error("has seats that are not a whole number"); // the server would refuse all lines
      item.seats = Number(fields[i]);
    } else {
      const of = group === "label" ? "labels" : "data";
      item[of] = { ...item[of], [name]: fields[i] };
    }
  });
  return item;
}

function fromJson(line) {
  try {
    return JSON.parse(line);
  } catch {
    throw new Error("is not JSON");
  }
}

/** How lines are read: by the first one. Returns the reader, and whether the first line is a header. */
function readerOf(first) {
  if (first.startsWith("{")) return [fromJson, false];
  const header = first.split(",").map((column) => column.trim());
  if (!header.includes("secret")) return [(line) => ({ secret: line }), false];
  for (const column of header) {
    if (!/^(secret|name|seats|(label|data):.+)$/.test(column)) throw new Error(`the column ${column} is not one of secret, name, seats, label:…, data:…`);
  }
  return [(line) => fromColumns(header, line), true];
}

/** Items with the number of their line, and lines that can't be read. */
function parse(text) {
  const items = [];
  const failed = [];
  let read = null;
  text.split(/\r?\n/).forEach((raw, i) => {
    const line = raw.trim();
    if (!line) return;
    try {
      if (!read) {
        const [reader, isHeader] = readerOf(line);
        read = reader;
        if (isHeader) return;
      }
      items.push({ line: i + 1, item: read(line) });
    } catch (error) {
      failed.push([i + 1, error.message]);
    }
  });
  return { items, failed };
}

function* batches(items) {
  let some = [];
  let size = 0;
  for (const each of items) {
    const length = JSON.stringify(each.item).length;
    if (some.length === ITEMS || (some.length && size + length > CHARACTERS)) {
      yield some;
      some = [];
      size = 0;
    }
    some.push(each);
    size += length;
  }
  if (some.length) yield some;
}

function show(counts, failed, done, all) {
  const words = ["created", "updated", "existed", "duplicate"].filter((name) => counts[name]).map((name) => `${number(counts[name])} ${name}`);
  const wrong = failed.length ? [`${number(failed.length)} failed`] : [];
  document.getElementById("import-summary").textContent = [...words, ...wrong].join(", ") || "Nothing yet.";
  document.getElementById("import-progress").value = all ? done / all : 1;
  const list = document.getElementById("import-failed");
  list.hidden = failed.length === 0;
  list.replaceChildren(
    ...failed.slice(0, 200).map(([line, why]) => {
      const entry = document.createElement("li");
      entry.textContent = `Line ${line}: ${why}`;
      return entry;
    }),
  );
}

async function send(items, failed, options) {
  const counts = { created: 0, updated: 0, existed: 0, duplicate: 0 };
  let done = 0;
  for (const some of batches(items)) {
    if (!dialog.open) return counts;
    try {
      const answer = await call("POST", "/batch", { op: "import", keys: some.map((each) => each.item), ...options });
      for (const name of Object.keys(counts)) counts[name] += answer[name];
      answer.results.forEach((result, i) => {
        if (result.status === "failed") failed.push([some[i].line, `${result.code}: ${result.detail}`]);
      });
    } catch (problem) {
      failed.push([`${some[0].line} to ${some.at(-1).line}`, problem.message]);
    }
    done += some.length;
    show(counts, failed, done, items.length);
  }
  return counts;
}

async function run() {
  const form = dialog.querySelector("form");
  const file = form.file.files[0];
  const text = form.text.value || (file ? await file.text() : "");
  form.text.value = "";
  form.file.value = "";
  const options = { exists: form.update.checked ? "update" : "skip" };
  if (form.expire?.checked) options.expire = true;
  const { items, failed } = parse(text);
  if (!items.length && !failed.length) {
    toast("Paste keys, or choose a file that has some.");
    return;
  }
  document.getElementById("import-input").hidden = true;
  document.getElementById("import-results").hidden = false;
  document.getElementById("import-go").hidden = true;
  document.getElementById("import-cancel").textContent = "Stop";
  show({}, failed, 0, items.length);
  await send(items, failed, options);
  document.getElementById("import-cancel").textContent = "Close";
}

function open() {
  const form = dialog.querySelector("form");
  form.reset();
  document.getElementById("import-input").hidden = false;
  document.getElementById("import-results").hidden = true;
  document.getElementById("import-go").hidden = false;
  document.getElementById("import-cancel").textContent = "Cancel";
  dialog.showModal();
}

if (dialog) {
  document.addEventListener("click", (event) => {
    if (event.target.closest("[data-import]")) open();
  });
  document.getElementById("import-go").addEventListener("click", run);
  dialog.addEventListener("close", () => dialog.querySelector("form").reset());
}
