"""Schemathesis reads the OpenAPI document and sends valid and invalid requests to a real server."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jose import jwt

from elevenlabs_emulator import EmulatedAgent, Emulator, create_emulator
from tests.canaries import API_KEY, JWT_SECRET
from tests.conftest import AGENT_ID, AUDIENCE, TOKEN_ISSUER, settings_with
from tests.servers import running
from voicepass.app import create_app

SERVICE_TOKEN = "service-token-of-at-least-32-characters"


def fuzz(url: str, *, token: str | None, examples: int) -> int:
    """Run schemathesis with every check, and fail with its output if a check fails; return the number of cases."""
    header = ["-H", f"Authorization: Bearer {token}"] if token else []
    ended = subprocess.run(
        [
            str(Path(sys.executable).with_name("st")),
            f"--config-file={Path(__file__).with_name('schemathesis.toml')}",
            "run",
            f"{url}/openapi.json",
            *header,
            "--checks=all",
            "--continue-on-failure",
            f"--max-examples={examples}",
            "--warnings=off",
            "--no-color",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    cases = re.search(r"(\d+) generated", ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert cases is not None
    return int(cases[1])


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ten_thousand_cases_find_no_server_error_and_no_answer_outside_the_schema() -> None:
    expires_at = int(time.time()) + 3600
    claims = {"iss": TOKEN_ISSUER, "aud": AUDIENCE, "sub": "u-1", "name": "Ada", "exp": expires_at}
    user_token = str(jwt.encode(claims, JWT_SECRET, "HS256"))
    emulator = Emulator(agents=[EmulatedAgent(agent_id=AGENT_ID)], api_keys={API_KEY: frozenset({"convai_write"})})
    settings = {"voicepass_docs": True, "voicepass_log_level": "error", "voicepass_service_tokens": SERVICE_TOKEN}

    with (
        running(lambda _url: create_emulator(emulator)) as elevenlabs,
        running(lambda _url: create_app(settings_with(elevenlabs_base_url=elevenlabs, **settings))) as url,
    ):
        cases = fuzz(url, token=user_token, examples=1500)  # ten cases each
        cases += fuzz(url, token=SERVICE_TOKEN, examples=400)
        cases += fuzz(url, token=None, examples=400)

    print(f"{cases} cases")
    assert cases >= 10_000
