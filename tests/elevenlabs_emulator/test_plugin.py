"""The pytest plugin works in a test suite that does not use voicepass."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

SUITE = """
import sys

def test_the_plugin_alone_imports_no_server():
    assert "fastapi" not in sys.modules

def test_a_call(elevenlabs):
    import httpx

    answer = httpx.get(
        elevenlabs.base_url + "/v1/convai/conversation/get-signed-url",
        params={"agent_id": elevenlabs.agent_id},
        headers={"xi-api-key": elevenlabs.api_key},
    )
    assert answer.json()["signed_url"].startswith("ws://127.0.0.1:")
    assert [call.status for call in elevenlabs.requests] == [200]
    assert "voicepass" not in sys.modules

def test_another_call(elevenlabs):
    assert elevenlabs.requests == []
"""


@pytest.mark.long
def test_another_test_suite_gets_a_running_emulator_for_each_test(tmp_path: Path) -> None:
    (tmp_path / "test_shop.py").write_text(SUITE)
    (entry_point,) = entry_points(group="pytest11", name="elevenlabs")
    options = ["-q", "-p", "no:cacheprovider", "-p", entry_point.value]

    suite = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_shop.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # other plugins take seconds to load
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert "3 passed" in suite.stdout, suite.stdout + suite.stderr
