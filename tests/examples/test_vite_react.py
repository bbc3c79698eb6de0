"""The React page behind Vite's proxy, and on another origin than voicepass."""

import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext

from elevenlabs_emulator import Emulator
from tests.examples.conftest import SERVICE, VITE, Street, open_window
from tests.examples.journey import shop_and_talk, stay_muted_after_a_reconnect
from tests.examples.packages import install_example
from tests.servers import started

pytestmark = [pytest.mark.browser, pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def vite(street: Street, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = street.copy("vite-react", tmp_path_factory.mktemp("vite"))
    install_example(folder, client_in="src")
    return folder


def test_a_shopper_writes_and_talks_through_the_proxy_of_vite(
    chromium: Browser, contexts: list[BrowserContext], emulator: Emulator, street: Street, vite: Path
) -> None:
    dev = ["node", "node_modules/vite/bin/vite.js", "--port", street.port(VITE)]

    with street.shop(vite), started(dev, cwd=vite, environment=street.environment, until="Local:"):
        shop_and_talk(open_window(chromium, contexts), emulator, street.url(VITE), name="Vera")
        stay_muted_after_a_reconnect(open_window(chromium, contexts).page, street.url(VITE), name="Vito")


def test_a_shopper_writes_and_talks_from_another_origin(
    chromium: Browser, contexts: list[BrowserContext], emulator: Emulator, street: Street, vite: Path
) -> None:
    environment = street.environment | {"VITE_VOICEPASS_URL": street.url(SERVICE)}
    build = ["npm", "run", "build"]
    subprocess.run(build, cwd=vite, env=environment, check=True, capture_output=True, timeout=110)

    with street.shop(vite / "dist") as url:
        shop_and_talk(open_window(chromium, contexts), emulator, url, name="Otto")
