// The page: follows the server's looks, and shows health first.

import * as actions from "./actions.js";
import { charts, onThemeChange } from "./charts.js";
import * as devices from "./devices.js";
import * as versions from "./versions.js";
import { age, byId, bytes, clock, count, fill, make, moment, percent, rate } from "./words.js";

const SILENT_MS = 10_000; // without a word of the server, which has one every 4 s
const AGAIN_MS = 5000;
const LATE_S = 10; // figures older than that, and than the server's usual pace, are old
const HISTORY_MAX = 5000;
const MARKS = { fine: "✓", degraded: "!", down: "✕", unknown: "?" };
const WORDS = { fine: "Fine", degraded: "Degraded", down: "Down", unknown: "Unknown" };

let state = null; // of the last look that could read the ledger
let fault = ""; // of the last look
let refusal = ""; // why the server did not say who we are
let heardAt = 0;
let clockAhead = 0; // the server's clock, in seconds
let history = null; // columns
let wanted = { metric: null, across: "version" };
let stream = null;
let mayRead = null; // not known yet

const now = () => Date.now() / 1000 + clockAhead;

// Following

/** Ask who we are, which opens the stream of who may read. A restart of the server has ended all logins. */
async function follow() {
  try {
    await actions.look();
    refusal = "";
  } catch (error) {
    refusal = error.message;
    setTimeout(follow, AGAIN_MS);
  }
  showLive();
}

function open() {
  stream?.close();
  stream = new EventSource("/events");
  stream.onopen = () => heardAt > 0 && follow();
  stream.onmessage = (event) => take(JSON.parse(event.data));
  stream.addEventListener("alive", () => {
    heardAt = Date.now();
    show();
  });
  stream.addEventListener("logout", () => {
    stream.close();
    follow();
  });
  // A browser gives up for good at an answer that is no stream, as while the server restarts behind a proxy,
  // or where the restarted server wants a new login.
  stream.onerror = () => {
    if (stream.readyState === EventSource.CLOSED) setTimeout(follow, AGAIN_MS);
    showLive();
  };
}

async function take(found) {
  heardAt = Date.now();
  clockAhead = found.at - Date.now() / 1000; // the same machine's, or another's
  fault = found.fault ?? "";
  if (found.head !== null) {
    state = found;
    await keepUp(found.recent);
  }
  show();
}

/** Add the newest versions to those known, or read all of them where some are missing. */
async function keepUp(recent) {
  const newest = history?.version.at(-1) ?? -1;
  if (!recent.version.length) return;
  if (history === null || recent.version[0] > newest + 1) {
    const answer = await fetch("/history").catch(() => null);
    if (answer?.ok) history = await answer.json();
    return;
  }
  const keep = history.version.findIndex((version) => version >= recent.version[0]);
  const upTo = keep < 0 ? history.version.length : keep;
  const from = Math.max(0, upTo + recent.version.length - HISTORY_MAX);
  const joined = {};
  for (const name of Object.keys(recent)) {
    if (name !== "metrics") joined[name] = [...history[name].slice(from, upTo), ...recent[name]];
  }
  joined.metrics = {};
  for (const name of new Set([...Object.keys(history.metrics), ...Object.keys(recent.metrics)])) {
    const before = history.metrics[name] ?? history.version.map(() => null);
    joined.metrics[name] = [...before.slice(from, upTo), ...(recent.metrics[name] ?? recent.version.map(() => null))];
  }
  history = joined;
}

// Showing

/** Why the figures cannot be believed to be of now; empty where they can. */
function doubt() {
  if (heardAt > 0 && Date.now() - heardAt > SILENT_MS) {
    return actions.SILENCE;
  }
  if (refusal) return refusal;
  if (fault) return `${fault}.`;
  const isOld = state !== null && now() - state.at > LATE_S + 3 * state.every_s;
  return isOld ? "The aggregator has not answered for a while: look at its log." : "";
}

function showLive() {
  if (mayRead === false) return;
  const why = doubt();
  const live = byId("live");
  live.dataset.level = why ? "down" : heardAt === 0 ? "unknown" : "fine";
  const text = why ? (state ? `no news for ${age(now() - state.at)}` : "no news") : heardAt === 0 ? "connecting …" : `live, ${clock(now())}`;
  if (live.textContent !== text) live.textContent = text;
  document.body.dataset.stale = why ? "yes" : "no";
  if (why) showHealth();
}

function showHealth() {
  const doubted = doubt();
  const health = state?.health;
  const level = doubted || !health ? "unknown" : health.state;
  byId("health").dataset.level = level;
  byId("mark").textContent = MARKS[level];
  const verdict = byId("verdict");
  if (verdict.textContent !== WORDS[level]) verdict.textContent = WORDS[level];
  const name = state?.federation ?? "Ternbus";
  document.title = `${MARKS[level]} ${name}: ${WORDS[level].toLowerCase()}`;
  const old = state ? ` What stands below is of ${moment(state.at)}.` : "";
  byId("why").textContent = doubted ? doubted + old : health ? inWords(health) : "";
  const findings = health?.findings ?? [];
  fill(
    byId("findings"),
    findings.map((each) =>
      make(
        "li",
        {},
        make("span", { className: "level", data: { level: each.level }, textContent: each.level }),
        ` ${each.subject ? `${each.subject} ` : ""}${each.text}${each.since === null ? "" : `, since ${moment(each.since)}`}`,
      ),
    ),
  );
  const more = health ? health.findings_count - findings.length : 0;
  byId("more-findings").hidden = more <= 0;
  byId("more-findings").textContent = `and ${count(more)} more, in the table of devices`;
}

function inWords(health) {
  const wrong = health.findings.filter((each) => each.level !== "note").length;
  if (wrong) return `${wrong === 1 ? "One thing needs" : `${wrong} things need`} somebody to look.`;
  const online = `${health.online} of ${health.devices} devices online`;
  return `Nothing needs you. Version ${health.version}, ${online}.`;
}

function waits(health) {
  if (health.waiting_since === null || health.federation_state !== "open") return "";
  if (!health.waits_for.length) return health.online ? "waits for nobody" : "waits for a device to come online";
  const names = health.waits_for.slice(0, 3).join(", ");
  const more = health.waits_for_count - Math.min(3, health.waits_for.length);
  return `waits for ${names}${more > 0 ? ` and ${more} more` : ""}`;
}

function tile(name, value, ...notes) {
  const said = notes.filter(Boolean).map((text) => make("span", { className: "note", textContent: text }));
  return make("div", {}, make("dt", { textContent: name }), make("dd", {}, make("span", { className: "value", textContent: value }), ...said));
}

function showTiles() {
  const { health, head, buffer, work } = state;
  const often = health.usual_s === null ? "" : `usually one every ${age(health.usual_s)}`;
  const connected = health.connected ? `since ${moment(health.connected_since)}` : health.fault;
  const certificates = health.certificates.map((each) => `certificate of ${each.name}: ${Math.round(each.days_left)} days`);
  fill(byId("tiles"), [
    tile("Head", `version ${count(head.version)}`, `${age(now() - head.made_at)} ago`, often, `digest ${head.digest.slice(0, 12)}`),
    tile("Buffer", `${count(buffer.updates)} of ${count(buffer.size)}`, waits(health)),
    tile("Devices online", `${count(health.online)} of ${count(health.devices)}`),
    tile("Throughput", rate(state.rate_per_s) || "none yet", `${count(work.accepted)} updates accepted`),
    tile("Wasted work", percent(work.share) || "none", "of all updates sent"),
    tile("Up", bytes(state.bytes.up), "sent by devices so far"),
    tile("Down", bytes(state.bytes.delta) || "none yet", "to each device, the last version"),
    tile("Broker", health.connected ? "connected" : "not connected", state.broker, connected),
    tile("Disk", `${percent(state.disk.free, 0)} free`, ...certificates),
  ]);
}

function bars(id, rows, total) {
  fill(
    byId(id),
    rows.map(([name, value]) => {
      const share = total ? value / total : 0;
      const bar = make("i");
      bar.style.width = `${Math.max(0, Math.min(1, share)) * 60}%`;
      const meter = make("div", { className: "meter" }, bar, percent(share));
      return make("tr", {}, make("th", { scope: "row", textContent: String(name) }), make("td", { className: "number", textContent: count(value) }), make("td", {}, meter));
    }),
  );
}

function showBars() {
  const { staleness, work, rejections, helpers } = state;
  const merged = staleness.updates.reduce((sum, [, value]) => sum + value, 0);
  const from = staleness.from_version === null ? "" : `Since version ${staleness.from_version}. `;
  byId("staleness-about").textContent = `${from}An update may be ${staleness.bound} versions late.`;
  bars("staleness", staleness.updates, merged);
  const weight = work.mean_weight === null ? "" : ` Merged ones count ${percent(work.mean_weight, 0)} on average, by their staleness.`;
  byId("work-about").textContent = `Updates that devices trained and sent, and that no version has.${weight}`;
  const sent = work.accepted + work.stale + work.invalid;
  const waiting = Math.max(0, work.accepted - work.merged - work.dropped);
  bars("work", [["merged", work.merged], ["waiting", waiting], ["stale", work.stale], ["invalid", work.invalid], ["dropped", work.dropped]], sent);
  bars("rejections", rejections.length ? rejections : [["none", 0]], rejections.reduce((sum, [, value]) => sum + value, 0));
  byId("helpers-section").hidden = helpers === null;
  const row = (name, each) => [name, each.state, each.answered_at === null ? "never" : `${age(now() - each.answered_at)} ago`, each.waits_for ?? ""];
  const rows = Object.entries(helpers ?? {}).map(([name, each]) => make("tr", {}, ...row(name, each).map((text) => make("td", { textContent: text }))));
  fill(byId("helpers"), rows);
}

function showMetrics() {
  if (history === null) return;
  const names = Object.keys(history.metrics);
  const select = byId("metric");
  fill(select, names.map((name) => make("option", { value: name, textContent: name })));
  const metric = names.includes(wanted.metric) ? wanted.metric : names.includes(state.metric) ? state.metric : (names[0] ?? null);
  if (metric !== null && select.value !== metric) select.value = metric;
  const better = state.better[metric];
  byId("metric-caption").textContent = metric === null ? "Metric: no evaluation yet" : `${metric}${better ? `, ${better} is better` : ""}`;
  charts(history, metric, wanted.across);
  versions.show(history, metric, state.kept_from, state.tags);
}

function showState() {
  byId("federation").textContent = state.federation;
  const badge = byId("state");
  badge.hidden = false;
  badge.textContent = state.head.state;
  badge.dataset.level = { open: "fine", paused: "degraded" }[state.head.state] ?? "unknown";
  const isOpen = state.head.state === "open";
  byId("pause").textContent = isOpen ? "Pause …" : "Resume …";
  byId("pause").dataset.open = isOpen ? "yes" : "no";
}

function show() {
  if (mayRead === false) return; // a look that was under way when the login ended
  showLive();
  showHealth();
  if (state === null) return;
  showState();
  showTiles();
  showBars();
  showMetrics();
  devices.follow(now);
}

// Who is logged in

function who(found) {
  const isIn = found.logged_in;
  byId("login").hidden = isIn;
  for (const id of ["logout", "invite", "pause"]) byId(id).hidden = !isIn;
  byId("locked").hidden = found.may_read;
  byId("figures").hidden = !found.may_read;
  mayRead = found.may_read;
  devices.onRevoke(isIn ? actions.revoke : null);
  versions.onActions(isIn ? { tag: actions.tag, rollBack: actions.rollBack } : null);
  actions.records();
  const isFollowing = stream !== null && stream.readyState !== EventSource.CLOSED;
  if (mayRead && !isFollowing) open();
  if (!mayRead) forget();
}

/** No figure is left to who may not read, nor to the title of the page. */
function forget() {
  stream?.close();
  [state, history, fault, heardAt] = [null, null, "", 0];
  document.title = "Ternbus: log in";
  byId("federation").textContent = "Ternbus";
  byId("state").hidden = true;
  byId("live").dataset.level = "unknown";
  byId("live").textContent = "log in to read";
}

devices.begin();
versions.begin();
byId("metric").addEventListener("change", (event) => {
  wanted.metric = event.target.value;
  if (state) showMetrics();
});
for (const each of document.querySelectorAll("[name=across]")) {
  each.addEventListener("change", () => {
    wanted.across = each.value;
    if (state) showMetrics();
  });
}
onThemeChange(() => state && showMetrics());
setInterval(() => {
  showLive();
  if (state !== null && document.body.dataset.stale === "no") showTiles();
}, 1000);
actions.begin(who);
follow();
