/**
 * What the page tells a shopper. Developers and operators read `cause`, `code` and the log instead.
 *
 * @typedef {import("./voicepass/client.js").Ending} Ending
 * @typedef {import("./voicepass/client.js").State} State
 */

const LATER = "Our assistant is not available at the moment. Please try again later.";
const SIGN_IN = "Please sign out, and sign in again. Then you can talk to us.";
const ACCOUNT = "Your account cannot use our assistant. Please write to us.";

/** @type {Record<Ending["cause"], string>} */
const BY_CAUSE = {
  user_ended: "You ended the conversation.",
  agent_ended: "Our assistant ended the conversation.",
  max_duration: "This conversation reached its longest time. You can start another one.",
  connection_lost: "The connection was lost. Please check your internet connection, and start again.",
  pass_expired: "You were away for a while. Please start again.",
  pass_refused: LATER,
  daily_limit: "Our assistant takes no more conversations today. Please come back tomorrow.",
  too_many_concurrent: "All our assistants are busy. Please try again in a few minutes.",
  microphone_denied: "Please allow the microphone in your browser's settings for this page, or choose Write.",
  microphone_missing: "We found no microphone. Please connect one, or choose Write.",
  microphone_unavailable: "Your microphone cannot be used here. Please close other programs that use it, or choose Write.",
  unauthorized: LATER,
  variables_missing: LATER,
  override_not_allowed: LATER,
  language_unsupported: LATER,
  quota_exceeded: LATER,
  agent_misconfigured: LATER,
  agent_unknown: LATER,
  agent_failed: LATER,
  host_not_allowed: LATER,
  refused: LATER,
  not_started: LATER,
};

/** The codes of `pass_refused` that a shopper can act on. @type {Record<string, string>} */
const BY_CODE = {
  not_signed_in: SIGN_IN,
  token_missing: SIGN_IN,
  token_invalid: SIGN_IN,
  token_expired: SIGN_IN,
  agent_not_allowed: ACCOUNT,
  user_blocked: ACCOUNT,
  quota_exceeded: "You have no minutes left.",
  rate_limited: "You started many conversations in a short time.",
  too_many_conversations: "You have other conversations open. Please end one of them first.",
  unreachable: "We cannot be reached. Please check your internet connection.",
};

/**
 * Explains why a conversation ended, or why it did not begin.
 *
 * @param {Ending} ending
 */
export function explainToShopper({ cause, error }) {
  const { code = "", resetsAt } = /** @type {{ code?: string, resetsAt?: string }} */ (error ?? {});
  const sentence = (cause === "pass_refused" && BY_CODE[code]) || BY_CAUSE[cause] || LATER;
  return resetsAt ? `${sentence} You can start again on ${writeTime(resetsAt)}.` : sentence;
}

/** @param {string} instant */
function writeTime(instant) {
  const style = /** @type {const} */ ({ day: "numeric", month: "long", hour: "2-digit", minute: "2-digit" });
  return new Date(instant).toLocaleString("en-GB", style);
}

/**
 * Describes the state of the conversation in one line.
 *
 * @param {State | undefined} state
 */
export function describe(state) {
  if (!state) return "Ask about an order, or about anything that we sell.";
  if (state.status === "ended") return explainToShopper(state.ending);
  if (state.status === "connected") return "You are connected.";
  if (state.status === "connecting") {
    if (state.isWaitingForMicrophone) return "Please allow the microphone.";
    return state.reconnects ? "Connecting again …" : "Connecting …";
  }
  if (state.retryInSeconds === null) return "You are offline. The conversation continues when you are online again.";
  if (state.because.cause === "connection_lost") return "The connection was lost. Connecting again …";
  return `${explainToShopper(state.because)} We try again in ${Math.ceil(state.retryInSeconds)} s.`;
}
