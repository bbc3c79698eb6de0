import { type FormEvent, useEffect, useRef, useState } from "react";
import { describe } from "./sentences.js";
import { useMinutes } from "./useMinutes";
import { useVoice } from "./useVoice";

interface Line {
  role: "user" | "agent";
  text: string;
}

/** The whole conversation. `token` returns the user's JWT, or null if nobody is signed in. Give the same function on each render. */
export function Assistant({ service, token }: { service: string; token: () => Promise<string | null> }) {
  const { state, start, end } = useVoice({ service, token });
  const [lines, setLines] = useState<Line[]>([]);
  const [isText, setIsText] = useState(false);
  const [isMuted, setIsMuted] = useState(false);
  const [mode, setMode] = useState<"speaking" | "listening">("listening");
  const typed = useRef<string[]>([]);
  const mainButton = useRef<HTMLButtonElement>(null);
  const message = useRef<HTMLInputElement>(null);
  const conversation = state?.status === "connected" ? state.conversation : undefined;
  const isRunning = state !== undefined && state.status !== "ended";
  const minutes = useMinutes(service, token, isRunning);

  const begin = (textOnly: boolean) => {
    setLines([]);
    setIsText(textOnly);
    setIsMuted(false);
    setMode("listening");
    typed.current = [];
    mainButton.current?.focus(); // the other buttons disappear
    start({
      textOnly,
      onModeChange: (now) => setMode(now.mode),
      onMessage: ({ role, message: text }) => {
        const echo = typed.current.indexOf(text);
        if (role === "user" && echo >= 0) typed.current.splice(echo, 1); // the transcript has it already
        else setLines((before) => [...before, { role, text }]);
      },
    });
  };
  const send = (event: FormEvent) => {
    event.preventDefault();
    const text = message.current?.value.trim();
    if (!text || !message.current || !conversation?.isOpen()) return;
    message.current.value = "";
    typed.current.push(text);
    setLines((before) => [...before, { role: "user", text }]);
    conversation.sendUserMessage(text);
  };

  // After a reconnect, the conversation is a new one, and its microphone is on.
  useEffect(() => {
    if (!isText) conversation?.setMicMuted(isMuted);
  }, [conversation, isMuted, isText]);
  useEffect(() => {
    if (conversation && isText) message.current?.focus();
    else if (!isRunning && isHidden(document.activeElement)) mainButton.current?.focus();
  }, [conversation, isRunning, isText]);

  return (
    <section className="card" aria-label="Assistant">
      <div className="now">
        <p role="status">{describe(state)}</p>
        {conversation && !isText && <Speaker mode={mode} isMuted={isMuted} />}
      </div>
      <div className="controls">
        <button type="button" ref={mainButton} className={isRunning ? "stop" : "primary"} onClick={isRunning ? end : () => begin(false)}>
          {isRunning ? "End" : "Talk"}
        </button>
        {!isRunning && <button type="button" onClick={() => begin(true)}>Write</button>}
        {conversation && !isText && (
          <button type="button" onClick={() => setIsMuted(!isMuted)}>{isMuted ? "Unmute" : "Mute"}</button>
        )}
      </div>
      <Transcript lines={lines} />
      <form className="row" onSubmit={send}>
        <label className="visually-hidden" htmlFor="message">Message</label>
        <input id="message" ref={message} autoComplete="off" maxLength={500} placeholder="Write a message" disabled={!conversation} />
        <button disabled={!conversation}>Send</button>
      </form>
      {minutes && (
        <p className="minutes">
          <span id="minutes-left">{minutes.sentence}</span>
          <meter aria-labelledby="minutes-left" min={0} max={minutes.most} value={minutes.left} />
        </p>
      )}
    </section>
  );
}

function Speaker({ mode, isMuted }: { mode: "speaking" | "listening"; isMuted: boolean }) {
  if (mode === "speaking") return <p className="speaker" data-mode="speaking">Assistant speaks</p>;
  if (isMuted) return <p className="speaker" data-mode="muted">Your microphone is off</p>;
  return <p className="speaker" data-mode="listening">We listen to you</p>;
}

function Transcript({ lines }: { lines: Line[] }) {
  const log = useRef<HTMLDivElement>(null);
  useEffect(() => {
    if (log.current) log.current.scrollTop = log.current.scrollHeight;
  }, [lines]);
  return (
    <div className="transcript" ref={log} role="log" aria-label="Transcript" tabIndex={0}>
      {lines.map(({ role, text }, index) => (
        <p key={index} className={role}><b>{role === "user" ? "You" : "Assistant"}</b>{text}</p>
      ))}
    </div>
  );
}

/** Whether the keyboard's place was on a control that is no longer there. */
function isHidden(focused: Element | null) {
  return focused === null || focused === document.body || focused.matches(":disabled");
}
