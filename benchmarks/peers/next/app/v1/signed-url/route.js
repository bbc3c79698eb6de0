import { jwtVerify } from "jose";

const { API_KEY, AGENT_ID, UPSTREAM, JWT_SECRET, JWT_ISSUER, JWT_AUDIENCE } = process.env;
const secret = new TextEncoder().encode(JWT_SECRET);

export async function POST(request) {
  let user;
  try {
    const token = (request.headers.get("authorization") ?? "").replace(/^Bearer /, "");
    const verified = await jwtVerify(token, secret, {
      algorithms: ["HS256"],
      issuer: JWT_ISSUER,
      audience: JWT_AUDIENCE,
      requiredClaims: ["sub", "exp"],
    });
    user = verified.payload;
  } catch {
    return Response.json({ error: "sign in" }, { status: 401 });
  }
  const query = new URLSearchParams({ agent_id: AGENT_ID, include_conversation_id: "true" });
  const answer = await fetch(`${UPSTREAM}/v1/convai/conversation/get-signed-url?${query}`, {
    headers: { "xi-api-key": API_KEY },
    cache: "no-store",
  });
  if (!answer.ok) return Response.json({ error: "no signed URL" }, { status: 502 });
  const { signed_url } = await answer.json();
  return Response.json({ signed_url, dynamic_variables: { user_id: user.sub, user_name: user.name } });
}
