import { type FormEvent, useEffect, useState } from "react";
import { Assistant } from "./Assistant";

// "" if this page's host forwards /v1 to voicepass, as vite.config.ts does. Otherwise the address of voicepass.
const VOICEPASS = import.meta.env.VITE_VOICEPASS_URL ?? "";

/** Sends a request to the shop's own backend. */
const callShop = (path: string, body = {}) =>
  fetch(`/api/${path}`, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

async function fetchToken(): Promise<string | null> {
  const response = await callShop("voice-token");
  if (response.status === 401) return null;
  if (!response.ok) throw new Error(`the shop answered ${response.status}`);
  return (await response.json()).token;
}

async function fetchName(path: string, body?: object): Promise<string> {
  const response = await callShop(path, body).catch(() => null);
  return response?.ok ? (await response.json()).name : "";
}

export function App() {
  const [name, setName] = useState<string>(); // undefined until the shop has answered
  useEffect(() => {
    fetchName("me").then(setName);
  }, []);
  const signOut = async () => {
    await callShop("sign-out").catch(() => null);
    setName(await fetchName("me"));
  };
  return (
    <>
      <header className="bar">
        <p className="brand">Corner Shop</p>
        {name && (
          <p className="account">
            <span>{name}</span> <button type="button" className="quiet" onClick={signOut}>Sign out</button>
          </p>
        )}
      </header>
      <main>
        <h1>Talk to us</h1>
        {name === "" && <SignIn onSignIn={setName} />}
        {name && <Assistant service={VOICEPASS} token={fetchToken} />}
      </main>
    </>
  );
}

function SignIn({ onSignIn }: { onSignIn: (name: string) => void }) {
  const [problem, setProblem] = useState("");
  const signIn = async (event: FormEvent<HTMLFormElement>) => {
    event.preventDefault();
    const name = await fetchName("sign-in", { name: new FormData(event.currentTarget).get("name") });
    if (name) onSignIn(name);
    else setProblem("You could not be signed in. Please try again.");
  };
  return (
    <form className="card" onSubmit={signIn}>
      <div>
        <label htmlFor="name">Your name</label>
        <div className="row">
          <input id="name" name="name" autoComplete="given-name" autoFocus required maxLength={60} />
          <button className="primary">Sign in</button>
        </div>
      </div>
      {problem && <p role="alert">{problem}</p>}
    </form>
  );
}
