"""The examples in real processes: an emulator, `voicepass serve` with their settings, and a shop backend."""

import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from elevenlabs_emulator import EmulatedAgent, Emulator, create_emulator
from tests.browser.conftest import chromium, launch_chromium, playwright_thread, pytest_pyfunc_call
from tests.cli.test_cli import CLEAN
from tests.servers import free_port, running, started

__all__ = ["chromium", "launch_chromium", "playwright_thread", "pytest_pyfunc_call"]

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CLIENT = ROOT / "src" / "voicepass" / "api"
VENDOR = ROOT / "src" / "voicepass" / "demo" / "static" / "vendor" / "elevenlabs-client"
SETTINGS = (EXAMPLES / "shop.env").read_text()
SERVICE, SHOP, VITE, EMULATOR = "127.0.0.1:8000", "127.0.0.1:3000", "127.0.0.1:5173", "127.0.0.1:9000"
TEXT_FILES = {".css", ".html", ".js", ".ts", ".tsx", ".json", ".env"}


def read_environment(settings: str) -> dict[str, str]:
    """Read an env file's text as an environment."""
    lines = re.findall(r"^([A-Z_]+)=(.*)$", settings, re.MULTILINE)
    return CLEAN | dict(lines)


@dataclass(frozen=True)
class Street:
    """Real addresses in this test, which replace those that the examples name."""

    addresses: dict[str, str]

    def url(self, address: str) -> str:
        return f"http://{self.addresses[address]}"

    def port(self, address: str) -> str:
        return self.addresses[address].rpartition(":")[2]

    def translate(self, text: str) -> str:
        for written, real in self.addresses.items():
            text = text.replace(written, real)
        return text

    @property
    def environment(self) -> dict[str, str]:
        return read_environment(self.translate(SETTINGS))

    def copy(self, example: str, to: Path) -> Path:
        """Copy an example, and replace its addresses by those of this test."""
        folder = to / example
        shutil.copytree(EXAMPLES / example, folder, ignore=shutil.ignore_patterns("node_modules", "dist", ".next"))
        for path in folder.rglob("*"):
            if path.suffix in TEXT_FILES:
                path.write_text(self.translate(path.read_text()))
        return folder

    @contextmanager
    def shop(self, folder: Path, *, at: str = SHOP) -> Iterator[str]:
        """Run the shop's backend, which serves `folder`."""
        command = [sys.executable, str(EXAMPLES / "shop.py"), str(folder)]
        environment = self.environment | {"PORT": self.port(at)}
        with started(command, cwd=folder, environment=environment):
            yield self.url(at)


@pytest.fixture(scope="module")
def addresses() -> dict[str, str]:
    return {address: f"127.0.0.1:{free_port()}" for address in (SERVICE, SHOP, VITE)}


@pytest.fixture(scope="module")
def emulator(addresses: dict[str, str]) -> Emulator:
    return Emulator(
        agents=[EmulatedAgent(agent_id="agent_demo")],
        api_keys={"sk_emulator": frozenset({"convai_write", "convai_read"})},
        webhook_url=f"http://{addresses[SERVICE]}/v1/webhooks/elevenlabs",
        webhook_secret=read_environment(SETTINGS)["ELEVENLABS_WEBHOOK_SECRET"],
    )


@pytest.fixture(scope="module")
def street(addresses: dict[str, str], emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Street]:
    """An emulator and a real service, with the settings of the examples."""
    folder = tmp_path_factory.mktemp("street")
    with running(lambda _url: create_emulator(emulator)) as elevenlabs:
        street = Street(addresses | {EMULATOR: elevenlabs.removeprefix("http://")})
        (folder / "shop.env").write_text(street.translate(SETTINGS))
        serve = [sys.executable, "-m", "voicepass", "--env-file", "shop.env", "serve", "--port", street.port(SERVICE)]
        with started(serve, cwd=folder, environment=CLEAN):
            yield street


@dataclass(frozen=True)
class Shopper:
    """A browser window, and the errors of its pages."""

    page: Page
    errors: list[str] = field(default_factory=list)


@pytest.fixture
def contexts(playwright_thread: ThreadPoolExecutor) -> Iterator[list[BrowserContext]]:
    opened: list[BrowserContext] = []
    yield opened
    for context in opened:
        playwright_thread.submit(context.close).result()


def open_window(chromium: Browser, contexts: list[BrowserContext], *, dark: bool = False) -> Shopper:
    """Open a window as narrow as a phone, with a clock that the test can advance. Call it in Playwright's thread."""
    context = chromium.new_context(
        viewport={"width": 390, "height": 844},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
        permissions=["microphone"],
    )
    context.set_default_timeout(15_000)
    context.clock.install()
    contexts.append(context)
    # Answers for the content delivery network; the page compares the hash.
    sdk = {"path": VENDOR / "lib.iife.js", "headers": {"Access-Control-Allow-Origin": "*"}}
    context.route("https://cdn.jsdelivr.net/**/lib.iife.js", lambda route: route.fulfill(**sdk))
    shopper = Shopper(context.new_page())
    shopper.page.on("pageerror", lambda error: shopper.errors.append(error.message))
    context.on("weberror", lambda error: shopper.errors.append(error.error.message))
    return shopper
