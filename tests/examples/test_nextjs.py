"""The Next.js app: Auth.js signs users in, and Next.js forwards three paths to voicepass."""

import subprocess
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext

from elevenlabs_emulator import Emulator
from tests.examples.conftest import SERVICE, SHOP, Street, open_window
from tests.examples.journey import shop_and_talk
from tests.examples.packages import install_example
from tests.servers import started

pytestmark = [pytest.mark.browser, pytest.mark.long, pytest.mark.timeout(500)]


def test_a_shopper_who_signs_in_with_auth_js_writes_and_talks(
    chromium: Browser, contexts: list[BrowserContext], emulator: Emulator, street: Street, tmp_path: Path
) -> None:
    folder = street.copy("nextjs", tmp_path)
    install_example(folder, client_in="app")
    environment = street.environment | {
        "AUTH_SECRET": "only-for-the-examples-auth",
        "VOICEPASS_URL": street.url(SERVICE),
        "NEXT_TELEMETRY_DISABLED": "1",
    }
    build = ["npm", "run", "build"]
    subprocess.run(build, cwd=folder, env=environment, check=True, capture_output=True, timeout=300)
    next_js = ["node", "node_modules/next/dist/bin/next", "start", "--hostname", "127.0.0.1", "--port"]

    with started([*next_js, street.port(SHOP)], cwd=folder, environment=environment, until="Ready in"):
        shop_and_talk(open_window(chromium, contexts), emulator, street.url(SHOP), name="Nora")
        paths = {path: httpx.get(f"{street.url(SHOP)}/voice{path}") for path in ("/v1/usage", "/metrics", "/v1/blocks")}

    assert {path: answer.status_code for path, answer in paths.items()} == {
        "/v1/usage": 401,
        "/metrics": 404,
        "/v1/blocks": 404,
    }
