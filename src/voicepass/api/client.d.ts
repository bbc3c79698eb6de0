/** voicepass in the browser. The code is client.js beside this file; see docs/frontends.md. */

import type { Conversation as SdkConversation, DisconnectionDetails, PartialOptions } from "@elevenlabs/client";

/** What the service gives for one conversation. It has `signed_url` (WebSocket) or `conversation_token` (WebRTC). */
export interface Pass {
  signed_url?: string;
  conversation_token?: string;
  /** Beside a `conversation_token`: the LiveKit host of the agent's region, or null if the service does not know it. */
  livekit_url?: string | null;
  conversation_id: string | null;
  agent: string;
  agent_id: string;
  /** The conversation must begin before; an open one is not cut. */
  expires_at: string | null;
  user_id: string;
  dynamic_variables: Record<string, string | number | boolean>;
}

export interface PassOptions {
  /** Where voicepass is: `https://voice.example`, or `/voice` on the page's host. Left out: where this module is from. */
  service?: string;
  /** The agent's alias. Left out: `default`. */
  agent?: string;
  transport?: "websocket" | "webrtc";
  /**
   * Gives the user's JWT, asked for each pass. Without this option, the session cookie is sent instead.
   * If it gives nothing, nobody is signed in: no request is sent. If it throws after a drop, the client tries again.
   */
  token?: () => string | null | undefined | Promise<string | null | undefined>;
  signal?: AbortSignal;
}

/** A pass was not given. */
export class PassError extends Error {
  /** Stable; branch on this. The service's own, or `unreachable`, `not_signed_in`, or `bad_answer` from a proxy. */
  readonly code: string;
  /** The HTTP status; 0 where there was no answer. */
  readonly status: number;
  /** What the user or the frontend's developer should do. `message` is for the developer. */
  readonly detail: string;
  /** Leads to the line in the service's log. */
  readonly requestId?: string;
  /** Set where a wait helps. */
  readonly retryAfterSeconds?: number;
  /** Of a limit: from when a new try can succeed. */
  readonly resetsAt?: string;
  constructor(problem: Record<string, unknown>, message?: string);
}

/** Why a conversation ended, or did not begin. Stable. */
export type Cause =
  | "user_ended"
  | "agent_ended"
  | "max_duration"
  | "connection_lost"
  | "pass_expired"
  | "pass_refused"
  | "unauthorized"
  | "variables_missing"
  | "override_not_allowed"
  | "language_unsupported"
  | "quota_exceeded"
  | "daily_limit"
  | "too_many_concurrent"
  | "agent_misconfigured"
  | "agent_unknown"
  | "agent_failed"
  | "host_not_allowed"
  | "refused"
  | "microphone_denied"
  | "microphone_missing"
  | "microphone_unavailable"
  | "not_started";

export interface Ending {
  cause: Cause;
  /** The cause in words that a page can show to its users. */
  sentence: string;
  /** Of the WebSocket; `closeReason` is in ElevenLabs' words. */
  closeCode?: number;
  closeReason?: string;
  /** What was thrown, if something was: a PassError where the cause is `pass_refused`. */
  error?: Error;
}

/** The page's own sentences, by cause. A function gets the ending, such as to choose by `error.code` of a refused pass. */
export type Sentences = Partial<Record<Cause, string | ((ending: Ending) => string)>>;

/** How things stand. `reconnects` says how many conversations came before: 0 for the first. */
export type State =
  | {
      /** `isWaitingForMicrophone`: the user has not yet answered the browser's prompt, and no pass was asked for. */
      status: "connecting";
      reconnects: number;
      pass?: Pass;
      isWaitingForMicrophone?: boolean;
    }
  | { status: "connected"; reconnects: number; pass: Pass; conversation: SdkConversation }
  | {
      /** Another pass will be asked for: in a while, or (`retryInSeconds` is null) once the network is back. */
      status: "waiting";
      reconnects: number;
      because: Ending;
      attempt: number;
      retryInSeconds: number | null;
    }
  | { status: "ended"; ending: Ending };

/** Options of the SDK's `startSession`, but for what the pass decides. */
export type SessionOptions = Omit<
  PartialOptions,
  "agentId" | "authorization" | "connectionType" | "conversationToken" | "orchestrator" | "signedUrl" | "userId"
>;

export interface ConnectOptions extends Omit<PassOptions, "signal"> {
  session?: SessionOptions;
  onChange?: (state: State) => void;
  /** Replaces the sentences of `State`, such as for another language. */
  sentences?: Sentences;
  /** With `transport: "webrtc"`: what to use once WebRTC cannot connect, as where a network blocks UDP. Takes a new pass. */
  fallback?: "websocket";
  /** How many passes may be asked for after one failed, until a conversation has held for a while. Left out: 5. */
  retries?: number;
  /** How long to try before giving up, waits that the service asked for included. Left out: 60. */
  patienceSeconds?: number;
  /** For tests. */
  timers?: Timers;
}

export interface Timers {
  /** Milliseconds since 1970. */
  now(): number;
  /** From 0 to 1. */
  random(): number;
  /** Resolves after that time, or when aborted. */
  sleep(milliseconds: number, signal: AbortSignal): Promise<void>;
}

export interface Connection {
  /** The last one that `onChange` was told. */
  state: State;
  /** The first conversation, once it is open. Rejects if there will be none. */
  readonly connected: Promise<SdkConversation>;
  /** Never rejects. */
  readonly ended: Promise<Ending>;
  /** Hangs up, or stops trying. */
  end(): Promise<Ending>;
}

/** The SDK's `Conversation`, or what wraps it. */
export interface Starter {
  startSession(options: PartialOptions): Promise<SdkConversation>;
}

/** Fetches one pass. Rejects with a PassError, with what `token` throws, or when aborted. */
export function fetchPass(options?: PassOptions): Promise<Pass>;

/** What a pass is in the words of the SDK's `startSession`. */
export function asSession(
  pass: Pass,
): { userId: string; dynamicVariables: Pass["dynamic_variables"] } & (
  | { signedUrl: string; conversationToken?: never; livekitUrl?: never }
  | { conversationToken: string; livekitUrl?: string; signedUrl?: never }
);

/**
 * Says why a conversation ended. Takes the details of `onDisconnect`, or what `startSession` or `fetchPass` threw.
 * `sentences` replaces its sentences.
 */
export function explain(what: DisconnectionDetails | unknown, sentences?: Sentences): Ending;

/** Opens a conversation, keeps it open through network drops, and tells how it goes. Each attempt takes a new pass. */
export function connect(Conversation: Starter, options?: ConnectOptions): Connection;

export interface WidgetOptions extends Omit<PassOptions, "signal" | "transport"> {
  /** Gets the reason why there is no pass. Left out: the developer's message goes to the console. */
  onError?: (ending: Ending) => void;
  /** Replaces the sentences that `onError` gets. */
  sentences?: Sentences;
  /** For tests. */
  timers?: Timers;
}

/**
 * Gives a new pass to each call of ElevenLabs' widget, `<elevenlabs-convai>`. Returns a function that stops this.
 * The element must have no `agent-id`: with it, the widget ignores the signed URL.
 */
export function attachWidget(element: HTMLElement, options?: WidgetOptions): () => void;
