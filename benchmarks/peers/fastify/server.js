import { createSecretKey } from "node:crypto";
import Fastify from "fastify";
import jwt from "jsonwebtoken";
import { Pool } from "undici";

const { API_KEY, AGENT_ID, UPSTREAM, JWT_SECRET, JWT_ISSUER, JWT_AUDIENCE, PORT } = process.env;
const key = createSecretKey(JWT_SECRET, "utf8"); // jsonwebtoken first tries a text as a public key
const app = Fastify();
const upstream = new Pool(UPSTREAM);

app.post("/v1/signed-url", async (request, reply) => {
  let user;
  try {
    user = jwt.verify((request.headers.authorization ?? "").replace(/^Bearer /, ""), key, {
      algorithms: ["HS256"],
      issuer: JWT_ISSUER,
      audience: JWT_AUDIENCE,
    });
    if (!user.sub || !user.exp) throw new Error("sub or exp is missing");
  } catch {
    return reply.code(401).send({ error: "sign in" });
  }
  const { statusCode, body } = await upstream.request({
    method: "GET",
    path: "/v1/convai/conversation/get-signed-url",
    query: { agent_id: AGENT_ID, include_conversation_id: "true" },
    headers: { "xi-api-key": API_KEY },
  });
  const answer = await body.json();
  if (statusCode !== 200) return reply.code(502).send({ error: "no signed URL" });
  return { signed_url: answer.signed_url, dynamic_variables: { user_id: user.sub, user_name: user.name } };
});

await app.listen({ port: Number(PORT), host: "127.0.0.1" });
