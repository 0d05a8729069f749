// Numbers, times and elements for people. What comes from the federation is only ever set as text.

export const byId = (id) => document.getElementById(id);

/** An element with properties and children; a string is text, never markup. */
export function make(tag, about = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(about)) {
    if (name === "data") Object.assign(made.dataset, value);
    else if (name.startsWith("aria-") || name === "scope" || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((each) => each !== null && each !== undefined));
  return made;
}

const DAY = 86400;

export function age(seconds) {
  const s = Math.max(0, seconds);
  if (s > 0 && s < 1) return `${s.toFixed(1)} s`;
  if (s < 120) return `${Math.round(s)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  if (s < 2 * DAY) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / DAY)} days`;
}

export const clock = (at) => new Date(at * 1000).toLocaleTimeString();

export function moment(at) {
  const date = new Date(at * 1000);
  const isToday = date.toDateString() === new Date().toDateString();
  return isToday ? date.toLocaleTimeString() : date.toLocaleString();
}

export const count = (value) => (value === null || value === undefined ? "" : value.toLocaleString("en"));

export function bytes(value) {
  if (value === null || value === undefined) return "";
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let size = value;
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${unit && size < 100 ? size.toFixed(1) : Math.round(size)} ${units[unit]}`;
}

export function figure(value) {
  if (value === null || value === undefined) return "";
  return Math.abs(value) < 1e4 ? value.toFixed(4) : value.toPrecision(5);
}

export function percent(share, digits = 1) {
  return share === null || share === undefined ? "" : `${(100 * share).toFixed(digits)} %`;
}

export function rate(perSecond) {
  if (perSecond === null || perSecond === undefined) return "";
  if (perSecond >= 1) return `${perSecond.toFixed(perSecond < 10 ? 1 : 0)} / s`;
  if (perSecond >= 1 / 60) return `${(60 * perSecond).toFixed(1)} / min`;
  return `${(3600 * perSecond).toFixed(1)} / h`;
}

const filled = new WeakMap(); // element -> text of its children

/** Give an element these children, if they differ in their text. A button that is there again keeps the focus. */
export function fill(element, rows) {
  const key = rows.map((row) => row.textContent).join("\u0000");
  if (filled.get(element) === key) return;
  filled.set(element, key);
  const focused = element.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
  element.replaceChildren(...rows);
  if (focused) element.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
}

const SAID_MS = 20_000;
let silence = null;

/** Say what was done, for a while. */
export function say(text) {
  byId("said").textContent = text;
  clearTimeout(silence);
  if (text) silence = setTimeout(() => say(""), SAID_MS);
}
