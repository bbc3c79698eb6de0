// The call: voicepass serves its client below the path of the mount, and the shop's own cookie says who calls.
import { connect } from "/voice/v1/client.js";

const { Conversation } = ElevenLabsClient;
const $ = (id) => document.getElementById(id);

const LATER = "Voice is not available at the moment. Please try again later.";
const BUSY = "Many customers are talking to us. Please try again in a few minutes.";

// Why a call ended, in words for a customer. The keys are the causes of client.js.
const ENDINGS = {
  user_ended: "You ended the call.",
  agent_ended: "Our assistant ended the call.",
  max_duration: "The call reached its longest duration. You can call again.",
  connection_lost: "The connection was lost. Check your internet connection, then call again.",
  pass_expired: "The call took too long to start. Please call again.",
  pass_refused: LATER,
  unauthorized: LATER,
  variables_missing: LATER,
  override_not_allowed: LATER,
  language_unsupported: "Our assistant does not speak your language yet.",
  quota_exceeded: LATER,
  daily_limit: "Our assistant has had all its calls for today. Please call again tomorrow.",
  too_many_concurrent: BUSY,
  agent_misconfigured: LATER,
  agent_unknown: LATER,
  agent_failed: "Something went wrong. Please call again.",
  host_not_allowed: LATER,
  refused: LATER,
  microphone_denied: "We cannot hear you. Allow the microphone for this page, then call again.",
  microphone_missing: "We found no microphone. Connect one, then call again.",
  microphone_unavailable: "Another program uses your microphone. Close that program, then call again.",
  not_started: "The call could not start. Please call again.",
};

// Why there is no pass. The keys are the codes of voicepass; any other code means LATER.
const REFUSALS = {
  token_missing: "You are signed out. Please sign in again.",
  user_blocked: "Voice is switched off for your account. Please write to us.",
  rate_limited: "You called many times. Please wait a minute, then call again.",
  quota_exceeded: "You have no minutes left at the moment. Please call again later.",
  too_many_conversations: "You are in another call. End that call first.",
  elevenlabs_busy: BUSY,
  overloaded: BUSY,
  unreachable: "We cannot reach our shop. Check your internet connection, then call again.",
};

let call = null;
let conversation = null;

function explain({ cause, error }) {
  return (cause === "pass_refused" && REFUSALS[error.code]) || ENDINGS[cause] || LATER;
}

function show(state) {
  conversation = state.status === "connected" ? state.conversation : null;
  $("call").textContent = state.status === "ended" ? "Call us" : "End call";
  $("mute").disabled = !conversation;
  $("mute").setAttribute("aria-pressed", "false");
  $("speaker").textContent = "";
  if (state.isWaitingForMicrophone) $("status").textContent = "Please allow the microphone.";
  else if (state.status === "connecting") $("status").textContent = "We are connecting you.";
  else if (state.status === "connected") $("status").textContent = "You are in a call.";
  else if (state.status === "waiting") $("status").textContent = "The connection was lost. We are trying again.";
  else $("status").textContent = explain(state.ending);
  if (state.status === "connected" || state.status === "ended") showMinutes();
  if (state.status === "ended") call = null;
}

async function showMinutes() {
  const answer = await fetch("/voice/v1/usage").catch(() => null);
  if (!answer?.ok) return;
  const { limits } = await answer.json();
  const seconds = limits.filter(({ unit }) => unit === "seconds").map(({ left }) => left);
  $("minutes").textContent = seconds.length ? `You have ${Math.floor(Math.min(...seconds) / 60)} minutes left.` : "";
}

function addLine(role, message) {
  const line = document.createElement("li");
  line.textContent = `${role === "user" ? "You" : "Assistant"}: ${message}`;
  $("transcript").append(line);
}

$("call").addEventListener("click", () => {
  if (call) return call.end();
  $("transcript").replaceChildren();
  call = connect(Conversation, {
    session: {
      onMessage: ({ role, message }) => addLine(role, message),
      onModeChange: ({ mode }) => {
        $("speaker").textContent = mode === "speaking" ? "Our assistant is speaking." : "We are listening.";
      },
    },
    onChange: show,
  });
});

$("mute").addEventListener("click", () => {
  const isMuted = $("mute").getAttribute("aria-pressed") !== "true";
  conversation.setMicMuted(isMuted);
  $("mute").setAttribute("aria-pressed", String(isMuted));
});

$("sign-in").addEventListener("submit", async (event) => {
  event.preventDefault();
  const headers = { "Content-Type": "application/json" };
  const body = JSON.stringify({ name: $("name").value });
  const { ok } = await fetch("/sign-in", { method: "POST", headers, body });
  $("sign-in").hidden = ok;
  $("shop").hidden = !ok;
  if (ok) showMinutes();
});

$("sign-out").addEventListener("click", async () => {
  await call?.end();
  await fetch("/sign-out", { method: "POST" });
  location.reload();
});
