import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

const { VOICEPASS_URL = "http://127.0.0.1:8000", SHOP_URL = "http://127.0.0.1:3000" } = process.env;

export default defineConfig({
  plugins: [react()],
  server: { host: "127.0.0.1", port: 5173, strictPort: true, proxy: { "/v1": VOICEPASS_URL, "/api": SHOP_URL } },
});
