// Holds conversations through the official JavaScript client, one for each closing, and prints how each ended.
import { readFileSync } from "node:fs";
import vm from "node:vm";

const [bundle, emulator, signedUrl, names] = process.argv.slice(2);
globalThis.navigator ??= { platform: "", userAgent: "" }; // the bundle is made for browsers
vm.runInThisContext(readFileSync(bundle, "utf8"));

const outcomes = {};
for (const closing of JSON.parse(names)) {
  await fetch(`${emulator}/_emulator/faults`, {
    method: "PUT",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ target: "conversation", closing, times: 1 }),
  });
  outcomes[closing] = await new Promise((resolve) => {
    const report = (reason, { closeCode, closeReason }) => resolve([reason, closeCode, closeReason]);
    ElevenLabsClient.Conversation.startSession({
      signedUrl,
      textOnly: true,
      dynamicVariables: { user_name: "Ada" },
      onDisconnect: (details) => report(details.reason, details),
    }).catch((error) => report("rejected", error));
  });
}
console.log(JSON.stringify(outcomes));
process.exit();
