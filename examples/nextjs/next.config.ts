import type { NextConfig } from "next";

// `next build` writes this address into its output: set it for the build too.
const voicepass = process.env.VOICEPASS_URL ?? "http://127.0.0.1:8000";
const paths = ["signed-url", "conversation-token", "usage"]; // every other path of voicepass stays private

const config: NextConfig = {
  rewrites: async () => paths.map((path) => ({ source: `/voice/v1/${path}`, destination: `${voicepass}/v1/${path}` })),
};

export default config;
