import { fetchMinutes } from "./minutes.js";
import { describe } from "./sentences.js";

const VOICEPASS = "http://127.0.0.1:8000"; // "" if your own host forwards /v1 to voicepass

const element = (id) => document.getElementById(id);
let connection = null;
let conversation = null;
let state; // undefined before the first conversation
let isText = false;
let isMuted = false;
let mode = "listening";
let typedLines = [];

/** Sends a request to the shop's own backend. Throws if the shop cannot be reached. */
function callShop(path, body) {
  const headers = { "Content-Type": "application/json" };
  return fetch(`/api/${path}`, { method: "POST", headers, body: JSON.stringify(body ?? {}) });
}

/** Returns the user's JWT, or null if nobody is signed in. */
async function fetchToken() {
  const response = await callShop("voice-token");
  if (response.status === 401) return null;
  if (!response.ok) throw new Error(`the shop answered ${response.status}`);
  return (await response.json()).token;
}

// ---------------------------------------------------------------- the account

function showUser(name) {
  element("user-name").textContent = name;
  element("account").hidden = element("assistant").hidden = !name;
  element("sign-in").hidden = Boolean(name);
  (name ? element("main") : element("name")).focus();
  render();
  showMinutes();
}

async function showAccount() {
  const response = await callShop("me").catch(() => null);
  showUser(response?.ok ? (await response.json()).name : "");
}

async function signIn(event) {
  event.preventDefault();
  const response = await callShop("sign-in", { name: element("name").value }).catch(() => null);
  element("sign-in-problem").hidden = Boolean(response?.ok);
  element("sign-in-problem").textContent = response?.ok ? "" : "You could not be signed in. Please try again.";
  if (response?.ok) showUser((await response.json()).name);
}

async function signOut() {
  connection?.end?.();
  connection = null; // so the page shows nothing of its end
  state = undefined;
  await callShop("sign-out").catch(() => null);
  element("transcript").replaceChildren();
  await showAccount();
}

// ---------------------------------------------------------------- the conversation

async function start(text) {
  if (connection) return; // a second press takes no second pass
  [isText, isMuted, mode, typedLines] = [text, false, "listening", []];
  element("transcript").replaceChildren();
  const own = {};
  connection = own;
  change(own, { status: "connecting", reconnects: 0 });
  try {
    const { connect } = await import(`${VOICEPASS}/v1/client.js`);
    if (connection !== own) return; // ended, or signed out, in the meantime
    const opened = connect(globalThis.ElevenLabsClient.Conversation, {
      service: VOICEPASS,
      token: fetchToken,
      session: { textOnly: text, onMessage: addMessage, onModeChange: (now) => render((mode = now.mode)) },
      onChange: (now) => change(opened, now),
    });
    connection = opened;
  } catch {
    change(own, { status: "ended", ending: { cause: "not_started" } });
  }
}

function end() {
  if (connection?.end) connection.end();
  else change(connection, { status: "ended", ending: { cause: "user_ended" } });
}

function change(of, now) {
  if (connection !== of) return; // a newer connection has replaced it
  state = now;
  conversation = now.conversation ?? null;
  if (now.status === "connected" && !isText) conversation.setMicMuted(isMuted); // also after a reconnect
  if (now.status === "ended") connection = null;
  render();
}

function addMessage({ role, message }) {
  const echo = typedLines.indexOf(message);
  if (role === "user" && echo >= 0) typedLines.splice(echo, 1); // the transcript has it already
  else addLine(role, message);
}

function addLine(role, text) {
  const line = document.createElement("p");
  const speaker = document.createElement("b");
  line.className = role === "user" ? "user" : "agent";
  speaker.textContent = role === "user" ? "You" : "Assistant";
  line.append(speaker, text);
  element("transcript").append(line);
  element("transcript").scrollTop = element("transcript").scrollHeight;
}

function send(event) {
  event.preventDefault();
  const text = element("message").value.trim();
  if (!text || !conversation?.isOpen()) return;
  typedLines.push(text);
  addLine("user", text);
  conversation.sendUserMessage(text);
  element("message").value = "";
}

function toggleMute() {
  isMuted = !isMuted;
  conversation?.setMicMuted(isMuted);
  render();
}

// ---------------------------------------------------------------- what the page shows

function render() {
  const focused = document.activeElement;
  const isRunning = connection !== null;
  const isConnected = state?.status === "connected";
  const sentence = describe(state);
  if (element("status").textContent !== sentence) element("status").textContent = sentence;
  element("speaker").hidden = !isConnected || isText;
  element("speaker").dataset.mode = isMuted && mode !== "speaking" ? "muted" : mode;
  const silent = isMuted ? "Your microphone is off" : "We listen to you";
  element("speaker").textContent = mode === "speaking" ? "Assistant speaks" : silent;
  element("main").textContent = isRunning ? "End" : "Talk";
  element("main").className = isRunning ? "stop" : "primary";
  element("write").hidden = isRunning;
  element("mute").hidden = !isConnected || isText;
  element("mute").textContent = isMuted ? "Unmute" : "Mute";
  element("message").disabled = element("send").disabled = !isConnected;
  // The keyboard's place must not be lost with a control that is no longer there.
  if (focused?.hidden || focused?.disabled) element("main").focus();
  if (isConnected && isText && document.activeElement === element("main")) element("message").focus();
}

async function showMinutes() {
  const minutes = element("assistant").hidden ? null : await fetchMinutes(VOICEPASS, fetchToken);
  element("minutes").hidden = !minutes;
  if (!minutes) return;
  element("minutes-left").textContent = minutes.sentence;
  element("meter").max = minutes.most;
  element("meter").value = minutes.left;
}

element("sign-in").addEventListener("submit", signIn);
element("sign-out").addEventListener("click", signOut);
element("main").addEventListener("click", () => (connection ? end() : start(false)));
element("write").addEventListener("click", () => start(true));
element("mute").addEventListener("click", toggleMute);
element("composer").addEventListener("submit", send);
// Not during a conversation, nor at its very end: its minutes are still reserved then, so the number would be too small.
setInterval(() => connection || document.hidden || showMinutes(), 10_000);
showAccount();
