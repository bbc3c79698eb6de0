"""The official JavaScript client, unchanged, against the emulator."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from elevenlabs_emulator import CLOSINGS
from tests.elevenlabs_emulator.wire import Service

HERE = Path(__file__).parent
BUNDLE = HERE.parents[1] / "src" / "voicepass" / "demo" / "static" / "vendor" / "elevenlabs-client" / "lib.iife.js"


@pytest.mark.long
def test_the_client_reports_every_closing_to_its_caller(service: Service) -> None:
    node = shutil.which("node")
    if node is None:
        if "REQUIRE_NPM" in os.environ:
            pytest.fail("this test needs Node.js")
        pytest.skip("this test needs Node.js")

    command = [node, "--experimental-websocket", "--no-warnings", str(HERE / "drive_client.mjs"), str(BUNDLE)]
    arguments = [service.url, service.mint(), json.dumps(list(CLOSINGS))]
    output = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True, timeout=60).stdout

    outcomes = json.loads(output.splitlines()[-1])
    expected = {
        name: ["rejected" if row.moment == "before_metadata" else "error", row.code, row.reason or None]
        for name, row in CLOSINGS.items()
    }
    expected["agent_ended"][0] = "agent"
    expected["max_duration"] = ["error", None, None]  # the client hangs up on the error event, before the close
    assert outcomes == expected
