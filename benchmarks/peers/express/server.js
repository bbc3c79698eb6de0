import { createSecretKey } from "node:crypto";
import express from "express";
import jwt from "jsonwebtoken";

const { API_KEY, AGENT_ID, UPSTREAM, JWT_SECRET, JWT_ISSUER, JWT_AUDIENCE, PORT, KEY_BUILT_ONCE } = process.env;
// Tutorials pass the secret as text. jsonwebtoken then first tries it as a public key, at every request.
const key = KEY_BUILT_ONCE ? createSecretKey(JWT_SECRET, "utf8") : JWT_SECRET;
const app = express();

app.post("/v1/signed-url", async (request, response) => {
  let user;
  try {
    user = jwt.verify((request.headers.authorization ?? "").replace(/^Bearer /, ""), key, {
      algorithms: ["HS256"],
      issuer: JWT_ISSUER,
      audience: JWT_AUDIENCE,
    });
    if (!user.sub || !user.exp) throw new Error("sub or exp is missing");
  } catch {
    return response.status(401).json({ error: "sign in" });
  }
  const query = new URLSearchParams({ agent_id: AGENT_ID, include_conversation_id: "true" });
  const answer = await fetch(`${UPSTREAM}/v1/convai/conversation/get-signed-url?${query}`, {
    headers: { "xi-api-key": API_KEY },
  });
  if (!answer.ok) return response.status(502).json({ error: "no signed URL" });
  const { signed_url } = await answer.json();
  response.json({ signed_url, dynamic_variables: { user_id: user.sub, user_name: user.name } });
});

app.listen(PORT, "127.0.0.1");
