/**
 * voicepass in the browser: a fresh pass for every conversation, a new one after a network drop, and why it ended.
 * It imports nothing: hand in the `Conversation` of `@elevenlabs/client`. The types are in client.d.ts beside it.
 * It runs in the browsers of that package (docs/frontends.md), so it uses nothing newer than ES2021 and Safari 14.1.
 *
 * @typedef {import("./client.js").Cause} Cause
 * @typedef {import("./client.js").Ending} Ending
 * @typedef {import("./client.js").Pass} Pass
 * @typedef {import("./client.js").State} State
 */

// Where this module was served from; undefined in a bundle. Not `new URL(…)`: bundlers would look for a file.
const HOME = /^(.*)\/v1\/client\.js$/.exec(import.meta.url)?.[1];
const ANSWER_MS = 15_000; // by default the service answers within 4 s
const PASS_LIFETIME_MS = 15 * 60_000; // by ElevenLabs' documentation
const BACKOFF_MS = 500; // doubled with each attempt
const MOST_BACKOFF_MS = 8_000;
const OFFLINE_GRACE_MS = 10_000;

// codes: written by `python -m tests.elevenlabs.test_codes` from elevenlabs/codes.toml
/**
 * Cause, sentence, close reason, and names of errors, events or close codes. The first row counts.
 * @type {[Cause, string, RegExp | null, (string | number)[]][]}
 */
const CAUSES = [
  ["microphone_denied", "The browser may not use the microphone.", null, ["NotAllowedError"]],
  ["microphone_missing", "There is no microphone.", null, ["NotFoundError"]],
  ["microphone_unavailable", "The microphone cannot be opened.", null, ["NotReadableError"]],
  ["agent_unknown", "There is no such agent.", /agent you are trying to reach does not exist/i, []],
  ["quota_exceeded", "The quota at ElevenLabs is used up.", /exceeds your quota/i, []],
  ["too_many_concurrent", "Too many conversations are open at once. Try again in a while.", /too many concurrent/i, [3008]],
  ["variables_missing", "The agent needs variables that it was not given.", /Missing required dynamic variables in [^:]{1,99}: \{[^}]*|Missing dynamic variable after agent transfer/i, []],
  ["override_not_allowed", "The agent does not let the page change this setting.", /Override for field '[^']+' is not allowed|Override is not allowed/i, []],
  ["language_unsupported", "The agent does not speak this language.", /Language '[^']+' is not supported/i, []],
  ["daily_limit", "The agent has had all its calls for today.", /daily call limit of \d+/i, []],
  ["host_not_allowed", "The agent does not talk to pages of this site.", /Host \S+ is not allowed/i, []],
  ["agent_misconfigured", "The agent is not set up correctly.", /appears to be misconfigured/i, []],
  ["unauthorized", "ElevenLabs did not accept the pass.", /Could not authorize/i, [3000]],
  ["max_duration", "The conversation reached its longest duration.", null, ["max_duration_exceeded"]],
  ["agent_failed", "Something went wrong at ElevenLabs.", null, [1002, 1011]],
  ["refused", "ElevenLabs did not accept what the page sent.", null, [1008]],
  ["agent_ended", "The agent ended the conversation.", null, [1000]],
  ["connection_lost", "The connection was lost.", null, [1001, 1005, 1006]],
];
const NEW_PASS_HELPS = ["connection_lost"];
// end of codes

/** @type {Ending} */
const INSECURE_PAGE = {
  cause: "microphone_unavailable",
  sentence: "The browser offers the microphone only to pages that are served over https or from localhost.",
};

/** There is no pass: the service's problem (RFC 9457), or `unreachable`, `bad_answer` or `not_signed_in`. */
export class PassError extends Error {
  /** @param {Record<string, any>} problem */
  constructor({ code, status, detail, request_id, retry_after_seconds, resets_at }) {
    super(detail);
    this.name = "PassError";
    /** @type {string} */ this.code = code;
    /** @type {number} */ this.status = status;
    /** @type {string} */ this.detail = detail;
    /** @type {string | undefined} */ this.requestId = request_id;
    /** @type {number | undefined} */ this.retryAfterSeconds = retry_after_seconds;
    /** @type {string | undefined} */ this.resetsAt = resets_at;
  }
}

/**
 * Fetches one pass, good for one conversation. Rejects with a PassError, with what `token` throws, or when aborted.
 *
 * @param {import("./client.js").PassOptions} [options]
 * @returns {Promise<Pass>}
 */
export async function fetchPass({ service = HOME, agent, transport = "websocket", token, signal } = {}) {
  if (service === undefined) throw new TypeError("Say where voicepass is: { service: 'https://voice.example' }.");
  const path = transport === "webrtc" ? "conversation-token" : "signed-url";
  const url = new URL(`${service.replace(/\/+$/, "")}/v1/${path}`, location.href);
  /** @type {Record<string, string>} */
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${await userJwt(token)}`;
  const canceller = new AbortController(); // AbortSignal.any and .timeout are newer than our oldest browsers
  const cancel = () => canceller.abort();
  // Built before the `try`: a mistake in the page throws here, and is not taken for a network error.
  const request = new Request(url, {
    method: "POST",
    headers,
    body: JSON.stringify(agent === undefined ? {} : { agent }),
    credentials: token ? "omit" : "include", // a cookie beside a token may name another user
    signal: canceller.signal,
  });
  throwIfAborted(signal);
  const timer = setTimeout(cancel, ANSWER_MS);
  signal?.addEventListener("abort", cancel);
  let response, text;
  try {
    response = await fetch(request);
    text = await response.text();
  } catch {
    throwIfAborted(signal);
    throw new PassError({ code: "unreachable", status: 0, detail: "The service cannot be reached." });
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", cancel);
  }
  const answer = await new Response(text).json().catch(() => null);
  const { status } = response;
  if (response.ok && answer?.user_id) return answer;
  if (answer?.code) throw new PassError(answer);
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "");
  throw new PassError({
    code: "bad_answer",
    status,
    detail: `The service answered ${status}, and not in its own words.`,
    retry_after_seconds: Number.isNaN(seconds) ? undefined : seconds,
  });
}

/** @param {NonNullable<import("./client.js").PassOptions["token"]>} token */
async function userJwt(token) {
  const jwt = await token();
  if (jwt) return jwt;
  throw new PassError({ code: "not_signed_in", status: 0, detail: "Sign in to start a conversation." });
}

/** @param {AbortSignal | undefined} signal */
function throwIfAborted(signal) {
  if (signal?.aborted) throw signal.reason ?? new DOMException("The call was aborted.", "AbortError");
}

/**
 * What a pass is in the words of the SDK's `startSession`.
 *
 * @param {Pass} pass
 */
export function asSession({ signed_url, conversation_token, user_id, dynamic_variables }) {
  const who = { userId: user_id, dynamicVariables: dynamic_variables };
  if (conversation_token !== undefined) return { ...who, conversationToken: conversation_token };
  return { ...who, signedUrl: /** @type {string} */ (signed_url) };
}

/**
 * Says why a conversation ended, or why it did not begin.
 *
 * @param {any} what the details of the SDK's `onDisconnect`, or what `startSession` or `fetchPass` threw
 * @returns {Ending}
 */
export function explain(what) {
  const closeCode = what?.closeCode ?? what?.context?.code;
  const closeReason = what?.closeReason ?? what?.context?.reason;
  const error = what instanceof Error ? what : undefined;
  /** @type {(cause: Cause, sentence: string) => Ending} */
  const because = (cause, sentence) => ({ cause, sentence, closeCode, closeReason, error });
  /** @type {(name: any) => (typeof CAUSES)[number] | undefined} */
  const named = (name) => CAUSES.find(([, , , names]) => names.includes(name));

  if (what instanceof PassError) return because("pass_refused", what.detail);
  if (what?.reason === "user") return because("user_ended", "You ended the conversation.");
  // A drop has no code of its own: 1006, the code of a server that shuts down, or none. LiveKit's error has a name.
  const isDrop = !error || closeCode !== undefined || /ConnectionError$/.test(error.name);
  const known =
    named(what?.reason === "agent" ? 1000 : what?.context?.type) ??
    named(error?.name) ??
    CAUSES.find(([, , reason]) => reason?.test(closeReason ?? "")) ??
    named(closeCode) ??
    (isDrop && named(1006));
  if (known) return because(known[0], known[1]);
  return because("not_started", "The conversation could not be opened.");
}

/** @type {import("./client.js").Timers} */
const TIMERS = {
  now: Date.now,
  random: Math.random,
  sleep: (ms, signal) =>
    new Promise((resolve) => {
      if (signal.aborted) return resolve();
      const timer = setTimeout(resolve, ms);
      signal.addEventListener("abort", () => resolve(clearTimeout(timer)), { once: true });
    }),
};

/**
 * Whether another pass may help. If a wait helps, the service says so. After a drop, the client takes a new pass only
 * if there was a conversation: each pass reserves minutes, and before the first conversation the user can try again.
 *
 * @param {Ending} ending
 * @param {boolean} wasConnected
 */
function mayHelp({ cause, error }, wasConnected) {
  if (cause === "pass_expired") return true;
  if (NEW_PASS_HELPS.includes(cause)) return wasConnected;
  if (!(error instanceof PassError)) return false;
  const inBetween = error.code === "unreachable" || (error.code === "bad_answer" && error.status >= 500);
  return error.retryAfterSeconds !== undefined || (wasConnected && inBetween);
}

/**
 * Opens a conversation, reconnects after network drops, and reports each change. Each attempt takes a new pass.
 *
 * @type {typeof import("./client.js").connect}
 */
export function connect(Conversation, options = {}) {
  const { session = {}, retries = 5, patienceSeconds = 60, onChange, timers: { now, random, sleep } = TIMERS } = options;
  const patienceMs = patienceSeconds * 1000;
  const isVoice = !(session.textOnly ?? session.overrides?.conversation?.textOnly);
  const hangUp = new AbortController();
  const hungUp = new Promise((resolve) => hangUp.signal.addEventListener("abort", resolve, { once: true }));
  /** @type {import("@elevenlabs/client").Conversation | null} */
  let conversation = null;
  let reconnects = 0;
  /** @type {(conversation: import("@elevenlabs/client").Conversation) => void} */
  let isConnected = () => {};
  /** @type {(error: unknown) => void} */
  let isNot = () => {};
  const connected = new Promise((resolve, reject) => ([isConnected, isNot] = [resolve, reject]));
  connected.catch(() => {}); // not every page waits for it
  let releaseMicrophone = () => {};

  /** @param {State} state */
  function tell(state) {
    connection.state = state;
    try {
      onChange?.(state);
    } catch (error) {
      // The page's mistake goes to its console and `error` event; the conversation goes on.
      queueMicrotask(() => {
        throw error;
      });
    }
  }

  /**
   * Asks before the first pass, so a refusal costs none. The SDK takes no stream and opens its own. Ours stays open
   * until then, because some browsers show their prompt again once a stream is closed.
   */
  async function askForMicrophone() {
    tell({ status: "connecting", reconnects, isWaitingForMicrophone: true });
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    releaseMicrophone = () => stream.getTracks().forEach((track) => track.stop());
    hungUp.then(releaseMicrophone); // also a stream that arrives after end()
    throwIfAborted(hangUp.signal);
  }

  /** One pass, and the conversation that it opens, to its end. */
  async function once() {
    const over = new AbortController();
    let heldMs = -1; // it was never open
    let [receivedAt, lifetimeMs, wentOffline, isDead, lacksToken] = [0, 0, false, false, false];
    const token =
      options.token &&
      (async () => {
        lacksToken = true;
        const jwt = await options.token?.();
        lacksToken = false;
        return jwt;
      });
    let ending;
    try {
      tell({ status: "connecting", reconnects });
      const pass = await fetchPass({ ...options, token, signal: hangUp.signal });
      throwIfAborted(hangUp.signal);
      receivedAt = now();
      // If the user's clock is wrong, the pass would seem expired, or seem to last for hours.
      const leftMs = Date.parse(pass.expires_at ?? "") - receivedAt;
      lifetimeMs = leftMs > 0 && leftMs < PASS_LIFETIME_MS ? leftMs : PASS_LIFETIME_MS;
      tell({ status: "connecting", reconnects, pass });
      const details = await new Promise((resolve, reject) => {
        /** @type {import("@elevenlabs/client").Conversation} */
        let created;
        const opening = Conversation.startSession({
          ...session,
          ...asSession(pass),
          dynamicVariables: { ...session.dynamicVariables, ...pass.dynamic_variables },
          onConversationCreated: (own) => {
            created = own;
            session.onConversationCreated?.(own);
          },
          onConnect: (props) => {
            if (hangUp.signal.aborted) return;
            [conversation, heldMs] = [created, now()];
            tell({ status: "connected", reconnects, pass, conversation });
            session.onConnect?.(props);
            isConnected(created);
          },
          onDisconnect: (why) => {
            session.onDisconnect?.(why);
            resolve(why);
          },
        });
        opening.then((own) => {
          releaseMicrophone(); // the SDK has its own stream now
          if (hangUp.signal.aborted) own.endSession(); // it was ended while it was opening
        }, reject);
        // Some browsers leave a dead socket open for minutes.
        const offline = async () => {
          wentOffline = true;
          await sleep(OFFLINE_GRACE_MS, over.signal);
          isDead = navigator.onLine === false && !over.signal.aborted;
          if (isDead) conversation?.endSession();
        };
        addEventListener("offline", offline);
        over.signal.addEventListener("abort", () => removeEventListener("offline", offline));
      });
      ending = explain(isDead ? { reason: "error" } : details);
    } catch (error) {
      ending = explain(error);
    }
    over.abort();
    releaseMicrophone();
    conversation = null;
    if (heldMs >= 0) heldMs = now() - heldMs;
    // LiveKit itself reconnects after drops; if a room closes while the browser is online, the other side closed it.
    const wasClosed = options.transport === "webrtc" && heldMs >= 0 && !wentOffline;
    if (ending.cause === "connection_lost" && wasClosed) ending = explain({ reason: "agent" });
    // The machine slept before the pass was used.
    if (ending.cause === "unauthorized" && now() - receivedAt >= lifetimeMs) {
      ending = { ...ending, cause: "pass_expired", sentence: "The pass was too old." };
    }
    return { ending: /** @type {Ending} */ (ending), heldMs, lacksToken };
  }

  /** @returns {Promise<Ending>} */
  async function run() {
    try {
      throwIfAborted(hangUp.signal); // a page that mounts twice ends its first connection at once
      if (isVoice && !navigator.mediaDevices) return INSECURE_PAGE;
      if (isVoice) await askForMicrophone();
    } catch (error) {
      return explain(hangUp.signal.aborted ? { reason: "user" } : error);
    }
    return converse();
  }

  /** @returns {Promise<Ending>} */
  async function converse() {
    let [attempt, wasConnected] = [0, false];
    /** @type {number | null} */
    let since = null;
    for (;;) {
      const { ending, heldMs, lacksToken } = await once();
      if (heldMs >= 0) {
        [wasConnected, since, reconnects] = [true, null, reconnects + 1];
        if (heldMs >= patienceMs) attempt = 0; // a shorter time would let a bad line take passes without end
      }
      since ??= now();
      attempt += 1;
      // After a drop, the page may be unable to renew the user's token until the network is back.
      const retry = mayHelp(ending, wasConnected) || (wasConnected && lacksToken);
      if (hangUp.signal.aborted || attempt > retries || !retry) return ending;
      const waiting = { status: /** @type {const} */ ("waiting"), reconnects, because: ending, attempt };
      if (navigator.onLine === false) {
        tell({ ...waiting, retryInSeconds: null });
        let isBack = () => {};
        const back = new Promise((resolve) => addEventListener("online", (isBack = () => resolve(undefined))));
        await Promise.race([back, sleep(since + patienceMs - now(), hangUp.signal)]);
        removeEventListener("online", isBack);
        if (hangUp.signal.aborted || !navigator.onLine) return ending;
      }
      const asked = ending.error instanceof PassError ? (ending.error.retryAfterSeconds ?? 0) * 1000 : 0;
      const waitMs = asked + random() * Math.min(BACKOFF_MS * 2 ** (attempt - 1), MOST_BACKOFF_MS);
      if (now() + waitMs > since + patienceMs) return ending;
      tell({ ...waiting, retryInSeconds: waitMs / 1000 });
      await sleep(waitMs, hangUp.signal);
      if (hangUp.signal.aborted) return ending;
    }
  }

  /** @type {import("./client.js").Connection} */
  const connection = {
    state: { status: "connecting", reconnects },
    connected,
    ended: Promise.race([Promise.resolve().then(run), hungUp.then(() => explain({ reason: "user" }))]).then((ending) => {
      tell({ status: "ended", ending });
      isNot(ending.error ?? new Error(ending.sentence));
      return ending;
    }),
    end: async () => {
      hangUp.abort();
      await conversation?.endSession();
      return connection.ended;
    },
  };
  return connection;
}
