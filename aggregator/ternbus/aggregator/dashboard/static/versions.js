// The table of versions, and the log of merges of one.

import { byId, bytes, count, figure, fill, make, moment, percent } from "./words.js";

const PAGE = 20;
let rowsShown = PAGE;
let actions = null; // { tag, rollBack }, functions of a version; null: not logged in
let last = null;

const HEADINGS = [
  ["version", "number"], ["updates", "number less"], ["staleness", "number less"], ["metric", "number"], ["size", "number less"],
  ["tags", ""], ["digest", "less"], ["made", ""], ["", ""],
];

function headings(metric) {
  const cell = ([text, kind]) => {
    if (text === "") return make("th", { scope: "col" }, make("span", { className: "hidden", textContent: "actions" }));
    return make("th", { scope: "col", className: kind, textContent: text === "metric" ? metric || text : text });
  };
  fill(document.querySelector("#versions thead tr"), HEADINGS.map(cell));
}

function line(history, i, metric, keptFrom, tags) {
  const version = history.version[i];
  const names = Object.keys(tags).filter((name) => tags[name] === version).sort();
  const isKept = version >= keptFrom || names.length > 0;
  const number = (text, kind = "") => make("td", { className: `number ${kind}`, textContent: text });
  const buttons = [];
  const button = (text, act, kind = "") => {
    const made = make("button", { type: "button", className: kind, textContent: text, "aria-label": `${text} version ${version}` });
    made.addEventListener("click", act);
    buttons.push(made);
  };
  button("Merge log", () => openEntry(version));
  if (actions && isKept) {
    button("Tag …", () => actions.tag(version));
    button("Roll back …", () => actions.rollBack(version), "grave");
  }
  return make(
    "tr",
    {},
    make("th", { scope: "row", className: "number", textContent: String(version) }),
    number(count(history.updates[i]), "less"),
    number(`${history.staleness_mean[i].toFixed(2)} / ${history.staleness_max[i]}`, "less"),
    number(figure(history.metrics[metric]?.[i])),
    number(bytes(history.down_bytes[i]), "less"),
    make("td", { textContent: names.join(", ") || (isKept ? "kept" : "") }),
    make("td", { className: "code less", textContent: history.digest[i] }),
    make("td", { className: "time", textContent: moment(history.time[i]) }),
    make("td", { className: "acts" }, ...buttons),
  );
}

/** Show the newest rows of a history (columns). */
export function show(history, metric, keptFrom, tags) {
  last = [history, metric, keptFrom, tags];
  headings(metric);
  const all = history.version.length;
  const rows = [];
  for (let i = all - 1; i >= Math.max(0, all - rowsShown); i -= 1) rows.push(line(history, i, metric, keptFrom, tags));
  fill(document.querySelector("#versions tbody"), rows);
  byId("versions-more").disabled = rowsShown >= all;
}

export function onActions(given) {
  actions = given;
  if (last) show(...last);
}

function listed(headings, rows) {
  return make(
    "table",
    {},
    make("thead", {}, make("tr", {}, ...headings.map((text) => make("th", { scope: "col", textContent: text })))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((text) => make("td", { textContent: text }))))),
  );
}

async function openEntry(version) {
  byId("entry-title").textContent = `Version ${version} in the log of merges`;
  const place = byId("entry-content");
  place.replaceChildren(make("p", { textContent: "looking …" }));
  byId("entry").showModal();
  let entry;
  try {
    entry = await (await fetch(`/versions/${version}`)).json();
  } catch {
    entry = { error: "No answer: the aggregator may have ended, or the network is cut." };
  }
  if (entry.error) {
    place.replaceChildren(make("p", { textContent: entry.error }));
    return;
  }
  const fact = (name, text) => [make("dt", { textContent: name }), make("dd", { className: "code", textContent: text })];
  const facts = make("dl", {}, ...fact("digest of the model", entry.digest), ...fact("hash of the entry before", entry.previous));
  if (!entry.same_in_ledger) facts.append(...fact("warning", "the ledger has another digest: run ternbus aggregator log verify"));
  if (entry.rollback !== null) {
    const what = entry.rollback < 0 ? "the model of a file" : `version ${entry.rollback} again`;
    facts.append(...fact("rollback", what));
  }
  const total = entry.updates.reduce((sum, [, , weight]) => sum + (weight ?? 0), 0);
  const rows = entry.updates.map(([device, seq, weight]) =>
    weight === null ? [device, String(seq), "in a sum", ""] : [device, String(seq), weight.toFixed(4), total ? percent(weight / total) : ""],
  );
  const more = entry.updates_count - entry.updates.length;
  place.replaceChildren(
    facts,
    make("h3", { textContent: `${count(entry.updates_count)} updates${more > 0 ? `, the first ${entry.updates.length} of them` : ""}` }),
    listed(["device", "number", "weight", "share"], rows),
  );
  if (entry.dropped.length) {
    place.append(make("h3", { textContent: "Dropped since the entry before" }), listed(["device", "number", "reason"], entry.dropped.map((row) => row.map(String))));
  }
}

export function begin() {
  byId("versions-more").addEventListener("click", () => {
    rowsShown += 5 * PAGE;
    if (last) show(...last);
  });
  byId("entry-close").addEventListener("click", () => byId("entry").close());
}
