// Curves by version or time, drawn by uPlot (loaded before as a plain script).

import { byId, bytes, figure, make, moment } from "./words.js";

const WINDOW = 5; // versions whose updates make a rate
const HEIGHT = 220;
const BINARY = Array.from({ length: 50 }, (_, power) => 2 ** power); // so that ticks are whole KiB or MiB
const drawn = new Map(); // by the id of their place
const dark = matchMedia("(prefers-color-scheme: dark)");

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function atEnd(plot) {
  const last = plot.data[0].length - 1;
  if (plot.legend.idx !== last) plot.setLegend({ idx: last });
}

function options(place, series, across, { show, tick = show, steps }) {
  const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
  return {
    width: Math.max(200, place.clientWidth),
    height: HEIGHT,
    scales: { x: { time: across === "time" } },
    series: [
      { label: across, value: (_, x) => (x === null ? "" : across === "time" ? moment(x) : String(x)) },
      ...series.map(([label, shade]) => ({
        label,
        stroke: colour(shade),
        width: 2,
        spanGaps: true,
        value: (_, y) => (y === null || y === undefined ? "" : show(y)),
      })),
    ],
    axes: [
      { ...axis, ...(across === "version" ? { values: (_, ticks) => ticks.map((x) => (Number.isInteger(x) ? String(x) : "")) } : {}) },
      { ...axis, size: 70, values: (_, ticks) => ticks.map(tick), ...(steps ? { incrs: steps } : {}) },
    ],
    // where nobody points, the legend has the newest values
    hooks: { setLegend: [(plot) => plot.cursor.idx === null && plot.data[0].length && atEnd(plot)] },
  };
}

/** What the curve says in a sentence, for who cannot see it. */
function inWords(series, rows, xs, across, show) {
  const parts = series.map(([label], index) => {
    const known = rows[index].map((y, i) => [y, xs[i]]).filter(([y]) => y !== null && y !== undefined);
    if (!known.length) return `${label}: no value`;
    const values = known.map(([y]) => y);
    const least = values.reduce((a, b) => Math.min(a, b));
    const most = values.reduce((a, b) => Math.max(a, b));
    const [last, x] = known.at(-1);
    const where = across === "time" ? `at ${moment(x)}` : `in version ${x}`;
    return `${label}: ${show(last)} ${where}, between ${show(least)} and ${show(most)}`;
  });
  return parts.join("; ");
}

function draw(id, series, rows, xs, across, scale) {
  const place = byId(id);
  if (!place.clientWidth) return;
  const isEmpty = xs.length === 0 || rows.every((row) => row.every((y) => y === null || y === undefined));
  place.setAttribute("aria-label", isEmpty ? "no value yet" : inWords(series, rows, xs, across, scale.show));
  const key = JSON.stringify([series, across, dark.matches, isEmpty]);
  const before = drawn.get(id);
  if (before && before.key === key) {
    if (!isEmpty) before.plot.setData([xs, ...rows]);
    if (!isEmpty && before.plot.cursor.idx === null) atEnd(before.plot);
    return;
  }
  before?.plot?.destroy();
  place.replaceChildren();
  if (isEmpty) {
    place.append(make("p", { className: "none", textContent: "No value yet." }));
    drawn.set(id, { key, plot: null });
    return;
  }
  const plot = new uPlot(options(place, series, across, scale), [xs, ...rows], place);
  atEnd(plot);
  drawn.set(id, { key, plot });
}

/** Updates a minute at each version, over the versions just before it. */
function rates(history) {
  return history.version.map((_, i) => {
    const from = Math.max(0, i - WINDOW);
    const elapsed = history.time[i] - history.time[from];
    if (i === 0 || elapsed <= 0) return null;
    let sum = 0;
    for (let j = from + 1; j <= i; j += 1) sum += history.updates[j];
    return (60 * sum) / elapsed;
  });
}

/** Draw all curves of a history (columns) with one of its metrics. */
export function charts(history, metric, across) {
  const xs = across === "time" ? history.time : history.version;
  const values = history.metrics[metric] ?? xs.map(() => null);
  const perMinute = (y) => (y >= 100 ? String(Math.round(y)) : y.toFixed(1));
  const short = (y) => String(Number(y.toPrecision(4)));
  draw("metric-chart", [[metric || "metric", "--accent"]], [values], xs, across, { show: figure, tick: short });
  draw("rate-chart", [["updates a minute", "--accent"]], [rates(history)], xs, across, { show: perMinute, tick: short });
  const traffic = [history.up_bytes, history.down_bytes];
  draw("bytes-chart", [["up", "--accent"], ["down", "--second"]], traffic, xs, across, { show: bytes, steps: BINARY });
}

new ResizeObserver(() => {
  for (const [id, { plot }] of drawn) plot?.setSize({ width: Math.max(200, byId(id).clientWidth), height: HEIGHT });
}).observe(document.body);

export function onThemeChange(redraw) {
  dark.addEventListener("change", redraw);
}
