"""The emulator's frames and answers match what the vendor publishes on npm: message types and the server's client."""

import json
import subprocess
from pathlib import Path

import pytest

from elevenlabs_emulator import Emulator
from tests.elevenlabs_emulator.contract import FRAMES
from tests.elevenlabs_emulator.test_conversation import hold_every_kind_of_conversation
from tests.elevenlabs_emulator.wire import AGENT, KEY, Serve
from tests.test_frontends import install

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]

# "latest", so that this test finds what the vendor has changed.
PACKAGES = {"@elevenlabs/client": "latest", "@elevenlabs/elevenlabs-js": "latest", "typescript": "latest"}
TYPES = """
import type { IncomingSocketEvent } from "@elevenlabs/client";
import type { Incoming } from "@elevenlabs/types";
type Frame = IncomingSocketEvent | Incoming.TentativeUserTranscriptionClientEvent; // which the client does not use
// @ts-expect-error - a frame without its event is wrong
const wrong: Frame = { type: "ping", ping_event: {} };
"""
MINT = """
import { ElevenLabsClient } from "@elevenlabs/elevenlabs-js";
const [baseUrl, apiKey, agentId] = process.argv.slice(2);
const { conversations } = new ElevenLabsClient({ apiKey, baseUrl }).conversationalAi;
const { signedUrl } = await conversations.getSignedUrl({ agentId, includeConversationId: true });
const conversationId = new URL(signedUrl).searchParams.get("conversation_id");
const missing = await conversations.get(conversationId).catch((error) => error);
const { conversations: rows } = await conversations.list({ agentId });
console.log(JSON.stringify([signedUrl, missing.statusCode, rows.length]));
"""


@pytest.fixture(scope="module")
def npm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npm")
    install(folder, PACKAGES)
    return folder


def test_every_frame_has_the_type_that_the_vendors_client_expects(
    serve: Serve, npm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = hold_every_kind_of_conversation(serve, monkeypatch)
    known = [frame for frame in frames if frame["type"] != "queue_status"]  # the schema does not have it yet
    lines = [f"const frame{number}: Frame = {json.dumps(frame)};" for number, frame in enumerate(known)]
    (npm_folder / "frames.ts").write_text(TYPES + "\n".join(lines))

    options = ["--strict", "--noEmit", "--skipLibCheck", "--target", "es2022", "--module", "esnext"]
    tsc = ["node", "node_modules/typescript/bin/tsc", *options, "--moduleResolution", "bundler", "frames.ts"]
    output = subprocess.run(tsc, cwd=npm_folder, capture_output=True, text=True, check=False, timeout=200).stdout

    assert {frame["type"] for frame in known} == FRAMES.keys() - {"queue_status"}
    assert output == ""


def test_the_vendors_server_side_client_gets_a_url_and_lists_conversations(serve: Serve, npm_folder: Path) -> None:
    service = serve(Emulator(agents=[AGENT]))
    (npm_folder / "mint.mjs").write_text(MINT)

    node = ["node", "mint.mjs", service.url, KEY, AGENT.agent_id]
    output = subprocess.run(node, cwd=npm_folder, capture_output=True, text=True, check=True, timeout=60).stdout

    signed_url, missing, rows = json.loads(output)
    assert signed_url.startswith("ws://127.0.0.1:")
    assert (missing, rows) == (404, 0)
