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
const WIDGET_PAUSE_MS = 10_000; // after a refusal; a pointer over the widget would otherwise ask without end
const WIDGET_SPARE_MS = 60_000; // a pass that expires within this time is renewed
/** @type {Cause[]} */
const NOT_OPENED = ["connection_lost", "not_started"]; // what a failed WebRTC connection looks like
const NOT_AVAILABLE = "This service is not available at the moment.";

// codes: written by `python -m tests.elevenlabs.test_codes` from elevenlabs/codes.toml
/**
 * Cause, sentence, close reason, and names of errors, events or close codes. The first row counts.
 * @type {[Cause, string, RegExp | null, (string | number)[]][]}
 */
const CAUSES = [
  ["microphone_denied", "Allow the microphone in your browser, then try again.", null, ["NotAllowedError"]],
  ["microphone_missing", "No microphone was found. Connect one, then try again.", null, ["NotFoundError"]],
  ["microphone_unavailable", "The microphone cannot be opened. Close other programs that use it, then try again.", null, ["NotReadableError"]],
  ["agent_unknown", "This service is not available at the moment.", /agent you are trying to reach does not exist/i, []],
  ["quota_exceeded", "This service is not available at the moment.", /exceeds your quota/i, []],
  ["too_many_concurrent", "Too many people are in a conversation at the moment. Try again in a few minutes.", /too many concurrent/i, [3008]],
  ["variables_missing", "This service is not available at the moment.", /Missing required dynamic variables in [^:]{1,99}: \{[^}]*|Missing dynamic variable after agent transfer/i, []],
  ["override_not_allowed", "This service is not available at the moment.", /Override for field '[^']+' is not allowed|Override is not allowed/i, []],
  ["language_unsupported", "This language is not available.", /Language '[^']+' is not supported/i, []],
  ["daily_limit", "No more conversations are possible today. Try again tomorrow.", /daily call limit of \d+/i, []],
  ["host_not_allowed", "This service is not available at the moment.", /Host \S+ is not allowed/i, []],
  ["agent_misconfigured", "This service is not available at the moment.", /appears to be misconfigured/i, []],
  ["unauthorized", "The conversation could not be started. Try again.", /Could not authorize/i, [3000]],
  ["max_duration", "The conversation reached its time limit.", null, ["max_duration_exceeded"]],
  ["agent_failed", "Something went wrong. Try again.", null, [1002, 1011]],
  ["refused", "This service is not available at the moment.", null, [1008]],
  ["agent_ended", "The agent ended the conversation.", null, [1000]],
  ["connection_lost", "The connection was lost.", null, [1001, 1005, 1006]],
];
const NEW_PASS_HELPS = ["connection_lost"];
// end of codes

/** @type {Ending} */
const INSECURE_PAGE = {
  cause: "microphone_unavailable",
  sentence: NOT_AVAILABLE,
  error: new Error("The browser offers the microphone only to pages that are served over https or from localhost."),
};

/** There is no pass: the service's problem (RFC 9457), or `unreachable`, `bad_answer` or `not_signed_in`. */
export class PassError extends Error {
  /**
   * @param {Record<string, any>} problem
   * @param {string} [message] for the page's developer
   */
  constructor({ code, status, detail, request_id, retry_after_seconds, resets_at }, message = detail) {
    super(message);
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
    const detail = "The service cannot be reached. Check your network and try again.";
    const isBlocked = `, or VOICEPASS_ALLOWED_ORIGINS does not list this page's origin, ${location.origin}`;
    const message = `${url.origin} cannot be reached${url.origin === location.origin ? "" : isBlocked}.`;
    throw new PassError({ code: "unreachable", status: 0, detail }, message);
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", cancel);
  }
  const answer = await new Response(text).json().catch(() => null);
  const { status } = response;
  if (response.ok && answer?.user_id) return answer;
  if (answer?.code) throw new PassError(answer);
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "");
  const problem = { code: "bad_answer", status, detail: NOT_AVAILABLE };
  const retry_after_seconds = Number.isNaN(seconds) ? undefined : seconds;
  throw new PassError({ ...problem, retry_after_seconds }, `A proxy answered ${status} instead of voicepass.`);
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
export function asSession({ signed_url, conversation_token, livekit_url, user_id, dynamic_variables }) {
  const who = { userId: user_id, dynamicVariables: dynamic_variables };
  if (conversation_token === undefined) return { ...who, signedUrl: /** @type {string} */ (signed_url) };
  return { ...who, conversationToken: conversation_token, ...(livekit_url ? { livekitUrl: livekit_url } : {}) };
}

/**
 * How long a pass may be used. If the user's clock is wrong, it would seem expired, or seem to last for hours.
 *
 * @param {Pass} pass
 * @param {number} receivedAt
 */
function lifetimeMs({ expires_at }, receivedAt) {
  const leftMs = Date.parse(expires_at ?? "") - receivedAt;
  return leftMs > 0 && leftMs < PASS_LIFETIME_MS ? leftMs : PASS_LIFETIME_MS;
}

/**
 * Says why a conversation ended, or why it did not begin.
 *
 * @param {any} what the details of the SDK's `onDisconnect`, or what `startSession` or `fetchPass` threw
 * @param {import("./client.js").Sentences} [sentences] the page's own
 * @returns {Ending}
 */
export function explain(what, sentences) {
  const closeCode = what?.closeCode ?? what?.context?.code;
  const closeReason = what?.closeReason ?? what?.context?.reason;
  const error = what instanceof Error ? what : undefined;
  /** @type {(cause: Cause, sentence: string) => Ending} */
  const because = (cause, sentence) => reword({ cause, sentence, closeCode, closeReason, error }, sentences);
  /** @type {(name: any) => (typeof CAUSES)[number] | undefined} */
  const named = (name) => CAUSES.find(([, , , names]) => names.includes(name));

  if (what instanceof PassError) return because("pass_refused", sentenceOf(what));
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
  return because("not_started", "The conversation could not be started. Try again.");
}

/**
 * The details of 401 and of the other statuses below 500 are for the frontend's developer, but for 403 and 429.
 *
 * @param {PassError} error
 */
function sentenceOf({ status, detail }) {
  if (status === 401) return "Sign in again to start a conversation.";
  return status >= 400 && status < 500 && status !== 403 && status !== 429 ? NOT_AVAILABLE : detail;
}

/**
 * Puts the page's own sentence into an ending, if the page has one for this cause.
 *
 * @param {Ending} ending
 * @param {import("./client.js").Sentences} [sentences]
 * @returns {Ending}
 */
function reword(ending, sentences = {}) {
  const own = sentences[ending.cause];
  try {
    const sentence = typeof own === "function" ? own(ending) : own;
    return typeof sentence === "string" ? { ...ending, sentence } : ending;
  } catch (error) {
    throwLater(error);
    return ending;
  }
}

/** @param {unknown} error the page's mistake: it goes to its console and `error` event, and the client goes on */
function throwLater(error) {
  queueMicrotask(() => {
    throw error;
  });
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
 * How long the service asked to wait.
 *
 * @param {Ending} ending
 */
function askedMs({ error }) {
  return error instanceof PassError ? (error.retryAfterSeconds ?? 0) * 1000 : 0;
}

/**
 * Opens a conversation, reconnects after network drops, and reports each change. Each attempt takes a new pass.
 *
 * @type {typeof import("./client.js").connect}
 */
export function connect(Conversation, options = {}) {
  const { session = {}, retries = 5, patienceSeconds = 60, onChange, sentences } = options;
  const { now, random, sleep } = options.timers ?? TIMERS;
  let { transport } = options;
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
      throwLater(error);
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
    let [receivedAt, usableMs, wentOffline, isDead, lacksToken] = [0, 0, false, false, false];
    const token =
      options.token &&
      (async () => {
        lacksToken = true;
        const jwt = await options.token?.();
        lacksToken = false;
        return jwt;
      });
    /** @type {Ending} */
    let ending;
    try {
      tell({ status: "connecting", reconnects });
      const pass = await fetchPass({ ...options, transport, token, signal: hangUp.signal });
      throwIfAborted(hangUp.signal);
      receivedAt = now();
      usableMs = lifetimeMs(pass, receivedAt);
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
    conversation = null;
    if (heldMs >= 0) heldMs = now() - heldMs;
    // LiveKit itself reconnects after drops; if a room closes while the browser is online, the other side closed it.
    const wasClosed = transport === "webrtc" && heldMs >= 0 && !wentOffline;
    if (ending.cause === "connection_lost" && wasClosed) ending = explain({ reason: "agent" });
    // The machine slept before the pass was used.
    if (ending.cause === "unauthorized" && now() - receivedAt >= usableMs) {
      ending = { ...ending, cause: "pass_expired", sentence: "The conversation was not started in time. Try again." };
    }
    const hasNotOpened = receivedAt > 0 && heldMs < 0 && NOT_OPENED.includes(ending.cause);
    return { ending, heldMs, lacksToken, hasNotOpened };
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
      const { ending, heldMs, lacksToken, hasNotOpened } = await once();
      if (hasNotOpened && transport === "webrtc" && options.fallback === "websocket" && !hangUp.signal.aborted) {
        transport = "websocket"; // a firewall that blocks WebRTC's UDP lets a WebSocket through
        continue;
      }
      releaseMicrophone();
      if (heldMs >= 0) {
        [wasConnected, since, reconnects] = [true, null, reconnects + 1];
        if (heldMs >= patienceMs) attempt = 0; // a shorter time would let a bad line take passes without end
      }
      since ??= now();
      attempt += 1;
      // After a drop, the page may be unable to renew the user's token until the network is back.
      const retry = mayHelp(ending, wasConnected) || (wasConnected && lacksToken);
      if (hangUp.signal.aborted || attempt > retries || !retry) return ending;
      const because = reword(ending, sentences);
      const waiting = { status: /** @type {const} */ ("waiting"), reconnects, because, attempt };
      if (navigator.onLine === false) {
        tell({ ...waiting, retryInSeconds: null });
        let isBack = () => {};
        const back = new Promise((resolve) => addEventListener("online", (isBack = () => resolve(undefined))));
        await Promise.race([back, sleep(since + patienceMs - now(), hangUp.signal)]);
        removeEventListener("online", isBack);
        if (hangUp.signal.aborted || !navigator.onLine) return ending;
      }
      const waitMs = askedMs(ending) + random() * Math.min(BACKOFF_MS * 2 ** (attempt - 1), MOST_BACKOFF_MS);
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
    ended: Promise.race([Promise.resolve().then(run), hungUp.then(() => explain({ reason: "user" }))]).then((why) => {
      const ending = reword(why, sentences);
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

/**
 * Gives each call of ElevenLabs' widget a pass of its own. The widget takes it at once or not at all, so the next one
 * is fetched ahead: when a call has begun, and when a pointer or the focus comes to a widget whose pass is used or old.
 *
 * @type {typeof import("./client.js").attachWidget}
 */
export function attachWidget(element, options = {}) {
  const { onError = ({ error }) => console.warn(`voicepass: ${error?.message}`), sentences } = options;
  const { now, sleep } = options.timers ?? TIMERS;
  const detached = new AbortController();
  /** @type {Pass | null} */
  let pass = null;
  let [usableUntil, isBusy] = [0, false];

  async function renew() {
    const isUseless = detached.signal.aborted || element.hasAttribute("agent-id");
    if (isBusy || isUseless || (pass && now() < usableUntil)) return;
    isBusy = true;
    let shouldRetry = false;
    try {
      pass = await fetchPass({ ...options, transport: "websocket", signal: detached.signal });
      usableUntil = now() + lifetimeMs(pass, now()) - WIDGET_SPARE_MS;
      // Only the first: at each change the widget loads its settings, and it closes an open call if that fails.
      if (!element.hasAttribute("signed-url")) element.setAttribute("signed-url", pass.signed_url ?? "");
    } catch (error) {
      if (detached.signal.aborted) return;
      const ending = explain(error, sentences);
      onError(ending);
      await sleep(Math.max(askedMs(ending), WIDGET_PAUSE_MS), detached.signal);
      shouldRetry = mayHelp(ending, true);
    }
    isBusy = false;
    if (shouldRetry) renew();
  }

  function hasAgentId() {
    const isSet = element.hasAttribute("agent-id");
    if (isSet) console.warn("voicepass: remove agent-id from the widget. With it, the widget ignores the signed URL.");
    return isSet;
  }

  /** @param {any} event */
  function handOver({ detail: { config } }) {
    if (hasAgentId() || !pass) return;
    const dynamicVariables = { ...config.dynamicVariables, ...pass.dynamic_variables };
    const { onConnect } = config;
    /** @param {unknown} props */
    const isOpen = (props) => {
      onConnect?.(props);
      renew(); // not before: the service would return the same pass to a user who has reached a limit
    };
    Object.assign(config, asSession(pass), { dynamicVariables, onConnect: isOpen });
    pass = null;
  }

  const listeners = Object.entries({
    "elevenlabs-convai:call": handOver,
    pointermove: renew,
    pointerdown: renew,
    focusin: renew,
  });
  hasAgentId();
  listeners.forEach(([name, listener]) => element.addEventListener(name, listener));
  renew();
  return () => {
    detached.abort();
    listeners.forEach(([name, listener]) => element.removeEventListener(name, listener));
  };
}
