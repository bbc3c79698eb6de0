import { useEffect, useRef, useState } from "react";
import { fetchMinutes, type Minutes } from "./minutes.js";

/** Reads the minutes at once and every ten seconds, but not while a conversation is open: its minutes are reserved. */
export function useMinutes(service: string, token: () => Promise<string | null>, isOpen: boolean) {
  const [minutes, setMinutes] = useState<Minutes | null>(null);
  const isOpenNow = useRef(isOpen);
  useEffect(() => {
    isOpenNow.current = isOpen;
  }, [isOpen]);
  useEffect(() => {
    let isCurrent = true;
    const read = async () => {
      if (document.hidden || isOpenNow.current) return;
      const now = await fetchMinutes(service, token);
      if (isCurrent) setMinutes(now);
    };
    read();
    const timer = setInterval(read, 10_000);
    return () => {
      isCurrent = false;
      clearInterval(timer);
    };
  }, [service, token]);
  return minutes;
}
