"use client";

import { Assistant } from "./Assistant";

async function fetchToken(): Promise<string | null> {
  const response = await fetch("/api/voice-token", { method: "POST" });
  if (response.status === 401) return null;
  if (!response.ok) throw new Error(`the shop answered ${response.status}`);
  return (await response.json()).token;
}

export const Talk = () => <Assistant service="/voice" token={fetchToken} />;
