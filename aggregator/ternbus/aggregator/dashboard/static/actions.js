// Logging in, and what a person who is logged in may do. Each action is confirmed, and the server writes it down.

import { byId, fill, make, moment, say } from "./words.js";

let csrf = null;
let command = ""; // that prints the token
let changed = () => {};
const tabs = new BroadcastChannel("session"); // other pages of this browser, which have the same cookie

const NO_ANSWER =
  "No answer: the aggregator may have ended, or the network is cut. Look whether it was done before you try again.";

export const SILENCE = "The dashboard does not answer: the aggregator may have ended, or the network is cut.";

async function post(path, body) {
  const headers = { "Content-Type": "application/json", ...(csrf ? { "X-CSRF-Token": csrf } : {}) };
  const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body) }).catch(() => {
    throw new Error(NO_ANSWER);
  });
  const found = await answer.json().catch(() => ({ error: `the answer was ${answer.status}` }));
  if (answer.ok) return found;
  if (answer.status === 401) await look();
  throw new Error(found.error);
}

/** Ask the server who we are. Throws an error, in words, where it does not say so. */
export async function look() {
  const answer = await fetch("/session").catch(() => {
    throw new Error(SILENCE);
  });
  if (!answer.ok) throw new Error(`The dashboard does not say who is logged in: its answer was ${answer.status}. Look at the aggregator's log.`);
  const found = await answer.json();
  csrf = found.csrf;
  command = found.token_command;
  changed(found);
}

// fields: { name, label, type, value, options, needed }. `match`: what has to be typed to confirm.
function ask({ title, text, does, grave = false, fields = [], act }) {
  const dialog = byId("dialog");
  const form = byId("dialog-form");
  byId("dialog-title").textContent = title;
  byId("dialog-text").textContent = text;
  byId("dialog-fault").textContent = "";
  const button = byId("dialog-do");
  button.textContent = does;
  button.className = grave ? "grave" : "";
  button.disabled = false;
  byId("dialog-fields").replaceChildren(
    ...fields.map(({ name, label, type = "text", options, ...more }) => {
      const input = options
        ? make("select", { name }, ...options.map(([value, shown]) => make("option", { value, textContent: shown })))
        : make("input", { name, type, autocomplete: type === "password" ? "current-password" : "off", spellcheck: false, ...more });
      return type === "checkbox" ? make("label", {}, input, ` ${label}`) : make("label", {}, label, input);
    }),
  );
  form.onsubmit = async (event) => {
    event.preventDefault();
    const given = Object.fromEntries(
      [...form.querySelectorAll("[name]")].map((each) => [each.name, each.type === "checkbox" ? each.checked : each.value.trim()]),
    );
    button.disabled = true;
    byId("dialog-fault").textContent = "";
    try {
      await act(given);
      dialog.close();
    } catch (error) {
      byId("dialog-fault").textContent = error.message;
    } finally {
      button.disabled = false;
    }
  };
  byId("dialog-cancel").onclick = () => dialog.close();
  dialog.showModal();
}

async function perform(name, body) {
  say("");
  const done = await post(`/actions/${name}`, body);
  say(done.text);
  if (done.file) download(done.file, done.content);
  await records();
}

/** Hand the browser a file that is nowhere else. */
function download(name, content) {
  const url = URL.createObjectURL(new Blob([content], { type: "application/toml" }));
  const link = make("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function typed(given, expected) {
  if (given !== String(expected)) throw new Error(`type ${expected} to confirm`);
}

export const tag = (version) =>
  ask({
    title: `Tag version ${version}`,
    text: "A tag is a name. The version is then kept for good, and can be exported or rolled back to.",
    does: "Tag",
    fields: [{ name: "name", label: "Name: a-z, 0-9, '.', '_', '-'", required: true, maxLength: 64 }],
    act: ({ name }) => perform("tag", { version, name }),
  });

export const rollBack = (version) =>
  ask({
    title: `Roll back to version ${version}`,
    text: `Version ${version} is published again as a new version, and every later one is withdrawn. All devices take it over. Updates that wait are dropped.`,
    does: "Roll back",
    grave: true,
    fields: [{ name: "confirm", label: `Type ${version} to confirm`, required: true, inputMode: "numeric" }],
    act: ({ confirm }) => {
      typed(confirm, version);
      return perform("rollback", { version });
    },
  });

export const revoke = (device) =>
  ask({
    title: `Revoke ${device}`,
    text: "Its key is void for good. It returns only with a new invitation and a new key. Merged updates stay merged.",
    does: "Revoke",
    grave: true,
    fields: [
      { name: "reason", label: "Reason; the device is told", maxLength: 200 },
      { name: "keep", label: "still merge its accepted updates", type: "checkbox" },
      { name: "confirm", label: `Type ${device} to confirm`, required: true },
    ],
    act: ({ reason, keep, confirm }) => {
      typed(confirm, device);
      return perform("revoke", { device, reason, keep });
    },
  });

function invite() {
  ask({
    title: "Invite a device",
    text: "The invitation is a file that this browser downloads, once. It is secret: whoever has it can join under the name. An open invitation of the same name becomes void.",
    does: "Invite and download",
    fields: [
      { name: "device", label: "Name: a-z, 0-9, '_', '-'", required: true, maxLength: 64 },
      { name: "role", label: "Role", options: [["device", "device: trains"], ["evaluator", "evaluator: measures versions"]] },
      { name: "expires_in", label: "Ends after", options: [["", "the usual time"], ["1h", "1 hour"], ["24h", "1 day"], ["7d", "7 days"]] },
    ],
    act: ({ device, role, expires_in }) => perform("invite", { device, evaluator: role === "evaluator", expires_in }),
  });
}

/** Pause or resume, whichever is possible. */
function change(isOpen) {
  ask({
    title: isOpen ? "Pause training" : "Resume training",
    text: isOpen ? "Devices follow the model, but do not train." : "Devices train again.",
    does: isOpen ? "Pause" : "Resume",
    act: () => perform(isOpen ? "pause" : "resume", {}),
  });
}

function logIn() {
  ask({
    title: "Log in",
    text: `The token is in the aggregator's directory. This prints it:\n${command}`,
    does: "Log in",
    fields: [{ name: "token", label: "Token", type: "password", required: true, maxLength: 256 }],
    act: async ({ token }) => {
      csrf = (await post("/login", { token })).csrf;
      await look();
      tabs.postMessage("");
      say("logged in");
    },
  });
}

/** Show what was done, to who is logged in. */
export async function records() {
  byId("audit-section").hidden = csrf === null;
  if (csrf === null) return;
  const answer = await fetch("/audit").catch(() => null);
  if (!answer?.ok) return;
  const found = await answer.json();
  const rows = found.records.map((row) =>
    make(
      "tr",
      {},
      ...[moment(row.at), row.who, row.what, row.about].map((text) => make("td", { textContent: text })),
      make("td", { className: "wrap", textContent: row.result }),
    ),
  );
  fill(document.querySelector("#audit tbody"), rows);
}

async function logOut() {
  try {
    await post("/logout", {});
    await look();
    tabs.postMessage("");
    say("logged out");
  } catch (error) {
    say(error.message);
  }
}

export function begin(onChange) {
  changed = onChange;
  tabs.onmessage = () => look().catch((error) => say(error.message));
  byId("login").addEventListener("click", logIn);
  byId("logout").addEventListener("click", logOut);
  byId("invite").addEventListener("click", invite);
  byId("pause").addEventListener("click", () => change(byId("pause").dataset.open === "yes"));
}
