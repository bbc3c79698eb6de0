import { SignJWT } from "jose";
import { auth } from "../../../auth";

/** Reads a setting that voicepass has too. */
function read(name: string): string {
  const value = process.env[name];
  if (!value) throw new Error(`set ${name}`);
  return value;
}

export async function POST() {
  const session = await auth();
  if (!session?.user?.id) return Response.json({ error: "sign in first" }, { status: 401 });
  const token = await new SignJWT({ name: session.user.name })
    .setProtectedHeader({ alg: "HS256" })
    .setSubject(session.user.id)
    .setIssuer(read("VOICEPASS_JWT_ISSUER"))
    .setAudience(read("VOICEPASS_JWT_AUDIENCE"))
    .setExpirationTime("5m")
    .sign(new TextEncoder().encode(read("VOICEPASS_JWT_SECRET")));
  return Response.json({ token }, { headers: { "Cache-Control": "no-store" } });
}
