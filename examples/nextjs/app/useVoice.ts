import { Conversation } from "@elevenlabs/client";
import { useEffect, useRef, useState } from "react";
import { connect, type Connection, type ConnectOptions, type State } from "./voicepass/client.js";

/** Opens one conversation at a time, and ends it with the component. */
export function useVoice(options: Omit<ConnectOptions, "onChange" | "session">) {
  const [state, setState] = useState<State>();
  const current = useRef<Connection>(undefined);
  const end = () => {
    current.current?.end();
    current.current = undefined;
  };
  useEffect(() => end, []);
  const start = (session: ConnectOptions["session"] = {}) => {
    if (current.current) return; // a second press takes no second pass
    const own = connect(Conversation, {
      ...options,
      session,
      onChange: (now) => {
        if (current.current && current.current !== own) return; // a newer connection has replaced it
        if (now.status === "ended") current.current = undefined;
        setState(now);
      },
    });
    current.current = own;
  };
  return { state, start, end };
}
