// The demo page: sign in, fetch a pass, open a conversation with it, and show each step as it happens.
// The token and the signed URL live in this module's memory: never stored, never logged, never drawn unmasked.
// A reload signs in again with the name and the id, which the tab keeps.

import { connect, fetchPass, PassError } from "../v1/client.js";

const { Conversation } = ElevenLabsClient;
const PASS_SECONDS = 15 * 60;
const WORKLETS = "static/vendor/elevenlabs-client/worklets";
const READ_MS = { settling: 500, live: 2000, idle: 30_000 };
const SETTLING_MS = 10_000;
const FRESH_PASS_HELPS = new Set(["connection_lost", "pass_expired", "unauthorized", "agent_failed"]);
// The agent's address without a signature, as a page without voicepass would use it: the agent of demo.toml.
const OPEN_ADDRESS = `${location.origin.replace("http", "ws")}/_elevenlabs/v1/convai/conversation?agent_id=agent_demo`;
const CONSOLE_LINE = "WebSocket is already in CLOSING or CLOSED state.";
const FAULTS = {
  expired: "The pass was 15 minutes old by the emulator's clock. Start again for a fresh one.",
  reused: "A pass opens one conversation, and this one had opened its own already.",
  tampered: "One character of the signature was changed on the way.",
  absent: "The agent requires authentication, and the address carried no signature.",
  variable: "The agent needs user_name and did not get it, so it connects and hangs up.",
};

const $ = (id) => document.getElementById(id);
let user = null; // { token, user_id, name, pass_seconds }
let pass = null; // { deadline, badge, openedAt, endedAt }, for the countdown and the meter
let live = null; // what is under way: { voice, typed, connection, session, waiting }
let minutes = null; // { used, most, resetsAt, aside, note }, in seconds
let reads = 0; // of the minutes, so that the latest wins
let nextRead = 0; // the timer
let settledBy = 0; // until then, what a conversation used may become known any moment

function el(tag, text, className = "") {
  const node = document.createElement(tag);
  node.textContent = text;
  node.className = className;
  return node;
}

const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

/** "today at 14:05", "tomorrow at 07:32", or the date; never a minute too early. */
function when(instant) {
  const at = new Date(Math.ceil(Date.parse(instant) / 60_000) * 60_000);
  const days = Math.round((new Date(at).setHours(0, 0, 0, 0) - new Date().setHours(0, 0, 0, 0)) / 86_400_000);
  const day = ["today", "tomorrow"][days] ?? `on ${at.toLocaleDateString("en", { day: "numeric", month: "long" })}`;
  return `${day} at ${at.toLocaleTimeString("en", { hour: "2-digit", minute: "2-digit", hourCycle: "h23" })}`;
}

// ---------------------------------------------------------------- the service

async function call(path, { token, body } = {}) {
  const response = await fetch(path, {
    method: body ? "POST" : "GET",
    headers: { ...(body && { "Content-Type": "application/json" }), ...(token && { Authorization: `Bearer ${token}` }) },
    body: body && JSON.stringify(body),
  });
  if (response.ok) return response.status === 204 ? null : response.json();
  const { status } = response;
  const unworded = { code: String(status), status, detail: `The service answered ${status}.` };
  throw new PassError(await response.json().catch(() => unworded));
}

const requestSignIn = (body) => call("demo/sign-in", { body });
const fetchUsage = (token) => call("v1/usage", { token });

// ---------------------------------------------------------------- what the page shows

const STEPS = ["step-sign-in", "step-pass", "step-conversation"];

function atStep(current) {
  STEPS.forEach((id, index) => {
    $(id).classList.toggle("done", index < current);
    if (index === current) $(id).setAttribute("aria-current", "step");
    else $(id).removeAttribute("aria-current");
  });
}

/** The one line that says how things stand; every button follows from it. */
function show(state, title, { code = "", reason = "", hint = "" } = {}) {
  const focused = document.activeElement;
  const running = ["connecting", "connected", "waiting"].includes(state);
  $("status").dataset.state = state;
  $("status").replaceChildren(el("strong", title));
  if (code) $("status").append(" ", el("code", code));
  if (reason) $("status").append(" ", el("span", reason));
  $("hint").textContent = hint;
  $("start").hidden = running;
  $("start").disabled = !user;
  $("end").hidden = !running;
  $("mode").disabled = $("fault").disabled = running;
  $("message").disabled = $("send").disabled = state !== "connected";
  for (const chip of $("chips").children) chip.disabled = state !== "connected";
  if (state !== "connected") hearing("");
  // A control that vanishes must not take the keyboard's place on the page with it.
  // And the page stays where it is: what has just begun is read at the top of the card.
  const focus = (id) => $(id).focus({ preventScroll: true });
  const typing = [$("message"), $("send")].includes(focused);
  if (running && (focused === $("start") || (typing && state !== "connected"))) focus("end");
  if (state === "connected" && !live.voice && document.activeElement === $("end")) focus("message");
  if (!running && user && (focused === $("end") || typing)) focus("start");
}

function hearing(mode) {
  $("mode-now").hidden = !mode;
  $("mode-now").dataset.mode = mode;
  $("mode-now").lastElementChild.textContent = mode === "speaking" ? "Agent speaks" : "Listening";
}

function say(who, text, kind) {
  const line = el("p", "", `line ${kind}`);
  line.append(el("b", who), " ", el("span", text));
  write(line);
}

const note = (text) => write(el("p", text, "note"));

function write(line) {
  $("log").append(line);
  $("log").scrollTop = $("log").scrollHeight;
}

function showPass(voicePass) {
  const { searchParams } = new URL(voicePass.signed_url);
  const signature = searchParams.get("conversation_signature") ?? "";
  const prefix = signature.includes("_") ? signature.slice(0, signature.indexOf("_") + 1) : "";
  pass = { deadline: Date.parse(voicePass.expires_at), badge: "Unused" };
  $("pass-user").textContent = voicePass.dynamic_variables.user_name ?? voicePass.user_id;
  $("pass-agent").textContent = voicePass.agent_id;
  $("pass-conversation").textContent = voicePass.conversation_id;
  $("pass-signature").textContent = `${prefix}••••••••••••`;
  $("pass-variables").textContent = Object.entries(voicePass.dynamic_variables).map(([k, v]) => `${k}: ${v}`).join("\n");
  $("pass-empty").hidden = true;
  $("pass-body").hidden = false;
  atStep(2);
  tick();
}

function stampPass(badge) {
  if (pass) pass.badge = badge;
  tick();
}

function tick() {
  $("pass-badge").hidden = !pass;
  if (!pass) return;
  const left = Math.max(0, Math.min(PASS_SECONDS, Math.ceil((pass.deadline - Date.now()) / 1000)));
  if (left === 0 && pass.badge === "Unused") pass.badge = "Expired";
  $("pass").dataset.state = pass.badge.toLowerCase();
  $("pass-badge").textContent = pass.badge;
  $("pass-time").textContent = clock(left);
  $("pass-ring").style.strokeDashoffset = 100 - (100 * left) / PASS_SECONDS;
}

/** Asks how the user's minutes stand, and again in a while. Say if a pass was just taken: its time is set aside. */
async function readMinutes(isNewPass = false) {
  const whose = user;
  const read = (reads += 1);
  clearTimeout(nextRead);
  if (!whose) return;
  try {
    const { usage } = await fetchUsage(whose.token);
    if (read !== reads || user !== whose) return;
    count(usage.find(({ name }) => name === "user_minutes_per_day"), isNewPass);
    const pace = Date.now() < settledBy ? "settling" : live ? "live" : "idle";
    nextRead = setTimeout(readMinutes, READ_MS[pace]);
  } catch {
    // The next request for a pass shows what is wrong, and reads the minutes again.
  }
}

/** After an end: what was set aside becomes what was used, once ElevenLabs tells. */
function awaitSettlement() {
  settledBy = Date.now() + SETTLING_MS;
  clearTimeout(nextRead);
  nextRead = setTimeout(readMinutes, READ_MS.settling / 2);
}

function count(limit, isNewPass) {
  // A policy may leave the day's minutes unlimited.
  if (!limit) return hideMinutes();
  const { used, limit: most, resets_at: resetsAt } = limit;
  let { aside, note } = minutes ?? { aside: 0, note: "" };
  if (isNewPass) {
    // Not what `used` grew by: earlier conversations may be settled while the pass is issued.
    aside = Math.min(used, user.pass_seconds);
    note = "";
  } else if (minutes && used !== minutes.used && !live?.session) {
    note = aside ? settled(aside, minutes.used - used) : "";
    aside = settledBy = 0;
  }
  minutes = { used, most, resetsAt, aside, note };
  drawMinutes();
}

/** What the page says once `back` seconds are no longer set aside. More than the last pass had can come back. */
function settled(aside, back) {
  if (back > aside) return `${clock(back)} came back from conversations that have ended.`;
  return `The last pass used ${clock(aside - back)}.${back > 0 ? ` The other ${clock(back)} came back.` : ""}`;
}

function drawMinutes() {
  const { used, most, resetsAt, aside, note } = minutes;
  const spent = used >= most;
  $("minutes").dataset.state = spent ? "spent" : "counted";
  $("minutes-used").textContent = `${clock(used)} of ${clock(most)} used or set aside`;
  $("minutes-note").textContent =
    (aside && `${clock(aside)} of it is set aside for this pass until it is known what it used.`) ||
    (spent && `Minutes come back ${when(resetsAt)}, or when a pass lapses unused.`) ||
    note ||
    "A minute is set aside for each pass until it is known what it used.";
  $("meter").setAttribute("aria-valuemax", most);
  $("meter").setAttribute("aria-valuenow", Math.min(used, most));
  $("meter").setAttribute("aria-valuetext", $("minutes-used").textContent);
  $("minutes").hidden = false;
  moveMeter();
}

/** The conversation eats, second by second, into what is set aside for it. */
function moveMeter() {
  if (!minutes) return;
  const { used, most, aside } = minutes;
  const talked = pass?.openedAt ? ((pass.endedAt ?? Date.now()) - pass.openedAt) / 1000 : 0;
  const width = (seconds) => `${Math.min(100, (100 * seconds) / most)}%`;
  $("meter-aside").style.width = width(used);
  $("meter-used").style.width = width(used - aside + Math.min(aside, talked));
}

function hideMinutes() {
  minutes = null;
  settledBy = 0;
  clearTimeout(nextRead);
  $("minutes").hidden = true;
}

function hidePass() {
  pass = null;
  $("pass").dataset.state = "none";
  $("pass-empty").hidden = false;
  $("pass-body").hidden = true;
  for (const shown of $("pass-body").querySelectorAll("dd > code, #pass-user")) shown.textContent = "";
  tick();
}

/** The client tool: the agent calls it when it has understood an order. */
function createProduct({ item, price, currency, unit }) {
  let amount = `${price} ${currency ?? ""}`;
  try {
    amount = new Intl.NumberFormat("en", { style: "currency", currency }).format(price);
  } catch {
    // Not an ISO 4217 code: the agent's own words will do.
  }
  const product = el("li", "");
  product.append(el("strong", item), " ", el("span", `${amount} ${!unit || unit === "each" ? "each" : `per ${unit}`}`));
  $("products").append(product);
  $("products-empty").hidden = true;
  return "created";
}

// ---------------------------------------------------------------- the conversation

/** What the page makes of each state that the client tells. */
function changed(attempt, state) {
  if (live !== attempt) return;
  attempt.waiting = null;
  attempt.session = state.conversation ?? null;
  const again = state.reconnects > 0;
  if (state.status === "connecting" && !state.pass) {
    atStep(1);
    const hint = state.isWaitingForMicrophone
      ? "Allow the microphone. The page asks for a pass after that."
      : "Fetching a pass and opening the conversation.";
    show("connecting", again ? "Reconnecting" : "Connecting", { hint });
  } else if (state.status === "connecting") {
    attempt.hasPass = true;
    showPass(state.pass);
    readMinutes(true);
  } else if (state.status === "connected") {
    connected(attempt, again);
  } else if (state.status === "waiting") {
    waiting(attempt, state);
  } else {
    ended(attempt, state.ending);
  }
}

function connected(attempt, again) {
  attempt.wasConnected = true;
  pass.openedAt = Date.now();
  $("status").dataset.conversationId = attempt.session.getId();
  stampPass("Used");
  if (again) note("Reconnected with a new pass. For the agent, it is a new conversation.");
  show("connected", "Connected", { hint: attempt.voice ? "Speak, or type." : "Type a line, and the agent answers." });
  if (attempt.voice) hearing("listening");
}

function heard(attempt, role, message) {
  if (role !== "user") return say("Agent", message, "agent");
  // Typed lines are on the page already; an echo of one is not a second line.
  const echo = attempt.typed.indexOf(message);
  if (echo >= 0) attempt.typed.splice(echo, 1);
  else if (attempt.voice) say(user.name, message, "user");
}

/** Nothing is open, and something will be: in a while, or once the network is back. */
function waiting(attempt, { because, retryInSeconds }) {
  const isOffline = retryInSeconds === null;
  if (pass) pass.endedAt ??= Date.now();
  awaitSettlement();
  attempt.waiting = { until: isOffline ? null : Date.now() + retryInSeconds * 1000 };
  show("waiting", attempt.wasConnected ? "Reconnecting" : "Waiting", { code: codeOf(because), reason: reasonOf(because) });
  countDown();
}

function countDown() {
  if (!live?.waiting) return;
  const { until } = live.waiting;
  const seconds = Math.ceil((until - Date.now()) / 1000);
  if (until === null) $("hint").textContent = "The network is gone. A new pass is fetched as soon as it is back.";
  else $("hint").textContent = seconds > 1 ? `The next try is in ${seconds} s.` : "The next try is about to begin.";
}

const codeOf = ({ closeCode, error }) => error?.code ?? closeCode;
const reasonOf = ({ closeReason, sentence }) => closeReason || sentence;

function ended(attempt, ending) {
  const { cause, closeReason, sentence, error } = ending;
  live = null;
  if (pass) pass.endedAt ??= Date.now();
  awaitSettlement();
  if (error?.status === 401) signOut();
  atStep(user ? 1 : 0);
  const title = cause === "pass_refused" && !attempt.wasConnected ? "No pass" : "Disconnected";
  const isCalm = ["user_ended", "agent_ended"].includes(cause);
  const code = codeOf(ending) ?? (isCalm && attempt.wasConnected ? 1000 : "");
  show(isCalm ? "ended" : "failed", title, { code, reason: reasonOf(ending), hint: advice() });

  function advice() {
    if (isCalm) return "Start again whenever you like: every start gets a fresh pass.";
    if (cause === "pass_refused") {
      const { retryAfterSeconds: soon, resetsAt, requestId } = error;
      const wait = resetsAt && !(soon < 90) ? `Resets ${when(resetsAt)}. ` : soon ? `Try again in ${soon} s. ` : "";
      return wait + (requestId ? `If you ask for help, say request ${requestId}.` : "");
    }
    if (cause.startsWith("microphone")) {
      return `${attempt.hasPass ? "" : "No pass was taken. "}Text needs no microphone and works in every browser.`;
    }
    const said = closeReason ? `${sentence} ` : "";
    return FAULTS[$("fault").value] ?? (FRESH_PASS_HELPS.has(cause) ? `${said}Start again for a fresh pass.` : said);
  }
}

/** The SDK's `Conversation`, but for what the chosen fault does to a good pass on the way. */
const faulty = (fault) => ({
  startSession: async (options) => Conversation.startSession({ ...options, ...(await broken(fault, options)) }),
});

async function broken(fault, { signedUrl, userId, dynamicVariables }) {
  const url = new URL(signedUrl);
  const { user_name: _, ...variables } = dynamicVariables;
  if (fault === "expired") {
    await call(`demo/passes/${url.searchParams.get("conversation_id")}/expire`, { body: {} });
    pass.deadline = Date.now();
    stampPass("Expired");
  } else if (fault === "reused") {
    const first = await Conversation.startSession({ signedUrl, userId, dynamicVariables, textOnly: true });
    await first.endSession();
    stampPass("Used");
  } else if (fault === "tampered") {
    const signature = url.searchParams.get("conversation_signature");
    // In the middle: the last character of base64url may carry bits that nobody reads.
    const at = Math.floor(signature.length / 2);
    const swapped = signature[at] === "A" ? "B" : "A";
    url.searchParams.set("conversation_signature", signature.slice(0, at) + swapped + signature.slice(at + 1));
  } else if (fault === "absent") {
    url.searchParams.delete("conversation_signature");
  }
  return { signedUrl: url.href, ...(fault === "variable" && { dynamicVariables: variables }) };
}

function send(text) {
  if (!text || !live?.session?.isOpen()) return false;
  live.typed.push(text);
  say(user.name, text, "user");
  live.session.sendUserMessage(text);
  return true;
}

function start() {
  const voice = document.querySelector("input[name=mode]:checked").value === "voice";
  const attempt = (live = { voice, typed: [], session: null });
  const isLive = () => live === attempt && attempt.session;
  $("log").replaceChildren();
  $("status").dataset.conversationId = "";
  // In one column, the transcript is below the fold.
  if (!matchMedia("(min-width: 58rem)").matches) $("conversation").scrollIntoView({ block: "nearest" });
  attempt.connection = connect(faulty($("fault").value), {
    agent: "default",
    token: () => user.token,
    session: {
      textOnly: !voice,
      clientTools: { create_product: createProduct },
      // Served from here, because a strict script-src allows neither blob: nor data:.
      workletPaths: {
        rawAudioProcessor: `${WORKLETS}/rawAudioProcessor.js`,
        audioConcatProcessor: `${WORKLETS}/audioConcatProcessor.js`,
      },
      onModeChange: ({ mode }) => isLive() && voice && hearing(mode),
      onMessage: ({ role, message }) => isLive() && heard(attempt, role, message),
    },
    onChange: (state) => changed(attempt, state),
  });
}

async function signIn(who) {
  try {
    user = await requestSignIn(who);
    sessionStorage.setItem("user", JSON.stringify({ name: user.name, user_id: user.user_id }));
    $("user-name").textContent = user.name;
    $("user-id").textContent = user.user_id;
    $("initial").textContent = [...user.name][0].toUpperCase();
    $("sign-in-form").hidden = true;
    $("signed-in").hidden = false;
    atStep(1);
    readMinutes();
    show("idle", "Not connected", { hint: "Ready when you are." });
    $("start").focus();
  } catch (error) {
    show("failed", "Not signed in", { code: error.code, reason: error.message });
  }
}

function signOut() {
  const connection = live?.connection;
  live = null;
  connection?.end();
  user = null;
  sessionStorage.removeItem("user");
  hidePass();
  hideMinutes();
  $("sign-in-form").hidden = false;
  $("signed-in").hidden = true;
  $("status").dataset.conversationId = "";
  atStep(0);
  show("idle", "Not connected", { hint: "Sign in first, then start." });
  $("name").focus();
}

// ---------------------------------------------------------------- before and after

function tracer(list) {
  list.replaceChildren();
  return (kind, text, code) => {
    const item = el("li", text, kind);
    if (code) item.append(" ", el("code", code));
    list.insertBefore(item, list.querySelector(".last"));
    return item;
  };
}

/** The socket that people write by hand: it opens, and it sends without looking whether it is still open. */
function handWritten(url, variables, { onOpen, onFrame, onClose, onLost }) {
  const socket = new WebSocket(url, ["convai"]);
  const send = (frame) => {
    if (socket.readyState > WebSocket.OPEN) onLost();
    socket.send(JSON.stringify(frame));
  };
  socket.onopen = () => {
    onOpen();
    send({
      type: "conversation_initiation_client_data",
      conversation_config_override: { conversation: { text_only: true } },
      dynamic_variables: variables,
    });
  };
  socket.onmessage = ({ data }) => onFrame(JSON.parse(data));
  socket.onclose = onClose;
  return { send, close: () => socket.close(1000, "User ended conversation") };
}

async function before() {
  const trace = tracer($("before-trace"));
  $("before").disabled = true;
  try {
    const { send } = handWritten(OPEN_ADDRESS, {}, {
      onOpen: () => trace("good", "The socket opens, so the page believes it is connected."),
      onFrame: () => {},
      onClose: ({ code, reason }) => {
        trace("bad", "The server closes it at once:", `${code} ${reason}`);
        setTimeout(() => {
          trace("", "The user types “Hello”, and the page sends it.");
          send({ type: "user_message", text: "Hello" });
          $("before").disabled = false;
        }, 350);
      },
      onLost: () => trace("bad", "Nobody hears it. The console prints:", CONSOLE_LINE),
    });
  } catch (error) {
    trace("bad", error.message);
    $("before").disabled = false;
  }
}

let closeAfter = null;

async function after() {
  if (closeAfter) return closeAfter();
  const trace = tracer($("after-trace"));
  let pings = 0;
  let spoken = false;
  let timer = 0;
  $("after").disabled = true;
  try {
    const { token } = user ?? (await requestSignIn({ name: $("name").value.trim() || "Guest" }));
    const voicePass = await fetchPass({ agent: "default", token: () => token });
    readMinutes(true);
    trace("good", "The service checks the sign-in and answers with a pass.");
    const { send, close } = handWritten(voicePass.signed_url, voicePass.dynamic_variables, {
      onOpen: () => trace("good", "The socket opens."),
      onFrame: (frame) => {
        if (frame.type === "ping") pings += 1;
        if (frame.type === "ping") send({ type: "pong", event_id: frame.ping_event.event_id });
        if (frame.type !== "agent_response") return;
        trace("good", `Agent: ${frame.agent_response_event.agent_response}`);
        if (spoken) return;
        spoken = true;
        trace("", "The user types “Hello”, and the page sends it.");
        send({ type: "user_message", text: "Hello" });
        const opened = Date.now();
        const item = trace("good last", "");
        const count = () => {
          const seconds = Math.round((Date.now() - opened) / 1000);
          item.textContent = `Still open after ${seconds} s, ${pings} ${pings === 1 ? "ping" : "pings"} answered. The console stays empty.`;
        };
        // Counting aloud every second would drown a screen reader.
        item.setAttribute("aria-live", "off");
        count();
        timer = setInterval(count, 1000);
      },
      onClose: ({ code, reason }) => {
        clearInterval(timer);
        closeAfter = null;
        awaitSettlement();
        $("after").textContent = "Try with a pass";
        $("after-trace").querySelector(".last")?.classList.remove("last");
        trace(code === 1000 ? "" : "bad", "Closed:", `${code} ${reason}`);
      },
      onLost: () => trace("bad", "The console prints:", CONSOLE_LINE),
    });
    closeAfter = close;
    $("after").textContent = "Close the connection";
  } catch (error) {
    trace("bad", error.message, error.code);
  }
  $("after").disabled = false;
}

// ---------------------------------------------------------------- wiring

$("sign-in-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = event.submitter;
  if (button) button.disabled = true;
  await signIn({ name: $("name").value.trim() });
  if (button) button.disabled = false;
});
$("sign-out").addEventListener("click", signOut);
$("start").addEventListener("click", start);
$("end").addEventListener("click", () => live?.connection.end());
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (send($("message").value.trim())) $("message").value = "";
});
$("chips").addEventListener("click", ({ target }) => {
  if (target.matches("button")) send(target.textContent);
});
$("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText($("use-code").textContent);
  $("copy").textContent = "Copied";
});
$("before").addEventListener("click", before);
$("after").addEventListener("click", after);
setInterval(() => {
  tick();
  moveMeter();
  countDown();
}, 1000);

const remembered = sessionStorage.getItem("user");
if (remembered) signIn(JSON.parse(remembered));

if (!navigator.mediaDevices) {
  document.querySelector("input[value=voice]").disabled = true;
  $("hint").textContent = "Voice needs https or localhost. Text works here.";
}
