// The table of devices: a page of it at a time, in the order and by the search that were chosen.

import { age, byId, bytes, count, figure, fill, make, percent } from "./words.js";

const LIMIT = 50;
const EVERY_MS = 3000; // the table need not follow each look
const COLUMNS = [
  // key of the order, heading, class, first direction is down
  ["name", "device", "", false],
  ["state", "state", "", false],
  ["wrong", "what is wrong", "", false],
  ["seen_at", "seen", "number", true],
  ["answer", "last answer", "", false],
  ["updates", "updates", "number less", true],
  ["staleness", "staleness", "number less", true],
  ["refused_share", "refused", "number less", true],
  ["stale_share", "stale", "number less", true],
  ["loss", "loss", "number less", true],
  ["bytes", "sent", "number less", true],
];

const shown = { search: "", sort: "wrong", descending: false, offset: 0 };
let fetchedAt = 0;
let later = null;
let latest = 0; // of the requests, so that an older answer does not replace a newer one
let revoke = null; // function of a device's name; null: not logged in
let serverNow = () => Date.now() / 1000;
let rows = [];

function headings() {
  const place = document.querySelector("#devices thead tr");
  place.replaceChildren(
    ...COLUMNS.map(([key, text, kind]) => {
      const isSorted = shown.sort === key;
      const arrow = isSorted ? (shown.descending ? " ▼" : " ▲") : "";
      const button = make("button", { type: "button", textContent: text + arrow });
      button.addEventListener("click", () => sortBy(key));
      const order = isSorted ? (shown.descending ? "descending" : "ascending") : "none";
      return make("th", { scope: "col", className: kind, "aria-sort": order }, button);
    }),
    ...(revoke ? [make("th", { scope: "col" }, make("span", { className: "hidden", textContent: "actions" }))] : []),
  );
}

function sortBy(key) {
  shown.descending = shown.sort === key ? !shown.descending : COLUMNS.find(([each]) => each === key)[3];
  shown.sort = key;
  shown.offset = 0;
  headings();
  const index = COLUMNS.findIndex(([each]) => each === key);
  document.querySelectorAll("#devices thead button")[index].focus();
  load();
}

function cell(row, key, kind) {
  const td = make("td", { className: kind });
  if (key === "state") td.textContent = row.role === "evaluator" ? `${row.state}, evaluates` : row.state;
  else if (key === "answer") td.textContent = row.reason ? `${row.answer}: ${row.reason}` : (row.answer ?? "");
  else if (key === "refused_share" || key === "stale_share") td.textContent = percent(row[key], 0);
  else if (key === "loss") td.textContent = figure(row.loss);
  else if (key === "bytes") td.textContent = bytes(row.bytes);
  else if (key === "seen_at") td.textContent = row.seen_at === null ? "never" : age(serverNow() - row.seen_at);
  else if (key === "wrong" && row.wrong) {
    const level = ["note", "degraded", "down"][-row.wrong[0]];
    td.append(make("span", { className: level === "note" ? "" : "wrong", data: { level }, textContent: row.findings.join("; ") }));
  } else if (key !== "wrong") td.textContent = count(row[key]);
  if (key === "answer" || key === "wrong") td.classList.add("wrap");
  return td;
}

function line(row) {
  const about = [row.software && `software ${row.software}`, row.samples && `${count(row.samples)} samples`];
  if (row.epsilon !== null) about.push(`ε ${figure(row.epsilon)}`);
  const name = make("th", { scope: "row", textContent: row.name, title: about.filter(Boolean).join(", ") });
  const cells = COLUMNS.slice(1).map(([key, , kind]) => cell(row, key, kind));
  if (revoke) {
    const button = make("button", { type: "button", className: "grave", textContent: "Revoke …", "aria-label": `Revoke ${row.name} …` });
    button.disabled = row.state === "revoked";
    button.addEventListener("click", () => revoke(row.name));
    cells.push(make("td", { className: "acts" }, button));
  }
  return make("tr", {}, name, ...cells);
}

function render() {
  fill(document.querySelector("#devices tbody"), rows.map(line));
}

function words(found) {
  const last = found.offset + found.rows.length;
  const range = found.matching > found.rows.length ? `${count(found.offset + 1)} to ${count(last)} of ` : "";
  const all = found.matching === found.total ? "" : ` that match, of ${count(found.total)}`;
  return `${range}${count(found.matching)} ${found.matching === 1 ? "device" : "devices"}${all}`;
}

async function load() {
  fetchedAt = Date.now();
  latest += 1;
  const own = latest;
  const query = new URLSearchParams({ ...shown, descending: shown.descending ? "yes" : "no", limit: LIMIT });
  let found;
  try {
    const answer = await fetch(`/devices?${query}`);
    if (!answer.ok) return;
    found = await answer.json();
  } catch {
    return; // the page says that there is no connection
  }
  if (own !== latest) return;
  if (found.offset >= found.matching && found.offset > 0) {
    shown.offset = 0;
    load();
    return;
  }
  const text = words(found);
  if (byId("devices-about").textContent !== text) byId("devices-about").textContent = text;
  byId("devices-back").disabled = found.offset === 0;
  byId("devices-on").disabled = found.offset + found.rows.length >= found.matching;
  rows = found.rows;
  render();
}

/** Look again, unless that was done just now. */
export function follow(now) {
  serverNow = now;
  if (Date.now() - fetchedAt >= EVERY_MS) load();
}

/** With a function, each device has a button for it. */
export function onRevoke(action) {
  revoke = action;
  headings();
  render();
}

export const reload = load;

export function begin() {
  headings();
  byId("search").addEventListener("input", () => {
    clearTimeout(later);
    later = setTimeout(() => {
      shown.search = byId("search").value;
      shown.offset = 0;
      load();
    }, 150);
  });
  byId("devices-back").addEventListener("click", () => {
    shown.offset = Math.max(0, shown.offset - LIMIT);
    load();
  });
  byId("devices-on").addEventListener("click", () => {
    shown.offset += LIMIT;
    load();
  });
}
