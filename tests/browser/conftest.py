"""A real Chromium against a real demo server, both shared by this folder; every test gets a context of its own."""

import json
import math
import os
import shutil
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, WebSocket, expect, sync_playwright

from tests.servers import running
from voicepass.demo import create_demo

_CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
_FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    # Listing requests would not do: AudioWorklet fetches are invisible to Playwright.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


@dataclass(frozen=True)
class Demo:
    """The demo page as a person meets it, and what the browser says behind it."""

    page: Page
    console: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)
    sockets: list[WebSocket] = field(default_factory=list)
    received: list[dict[str, Any]] = field(default_factory=list)
    sent: list[dict[str, Any]] = field(default_factory=list)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def status(self) -> Locator:
        return self.page.get_by_role("status")

    @property
    def transcript(self) -> Locator:
        return self.page.get_by_role("log", name="Transcript")

    @property
    def message(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message")

    @property
    def voice_pass(self) -> Locator:
        return self.page.get_by_role("region", name="Pass")

    @property
    def products(self) -> Locator:
        return self.page.get_by_role("list", name="Products")

    def sign_in(self, name: str = "Ada") -> None:
        self.page.get_by_role("textbox", name="Your name").fill(name)
        self.button("Sign in").click()

    def start(self) -> None:
        self.button("Start conversation").click()
        expect(self.status).to_contain_text("Connected")

    def say(self, line: str) -> None:
        self.message.fill(line)
        self.button("Send").click()


def _watched(page: Page) -> Demo:
    demo = Demo(page)

    def opened(socket: WebSocket) -> None:
        demo.hosts.add(socket.url.split("/")[2].split(":")[0])
        demo.sockets.append(socket)
        socket.on("framereceived", lambda frame: demo.received.append(json.loads(frame)))
        socket.on("framesent", lambda frame: demo.sent.append(json.loads(frame)))

    page.on("console", lambda message: demo.console.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: demo.console.append(f"uncaught: {error.message}"))
    page.on("request", lambda request: demo.hosts.add(request.url.split("/")[2].split(":")[0]))
    page.on("websocket", opened)
    return demo


def _hum(path: Path) -> None:
    """Write what the fake microphone hears, over and over: its own beeps would take seconds to count as speech."""
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, 48_000, 0, "NONE", "not compressed"))
        swing = (round(8_000 * math.sin(math.tau * 220 * n / 48_000)) for n in range(48_000))
        sound.writeframes(b"".join(sample.to_bytes(2, "little", signed=True) for sample in swing))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object:
    """Run this folder's browser tests in Playwright's thread."""
    thread = pyfuncitem.funcargs.get("playwright_thread")
    if not isinstance(thread, ThreadPoolExecutor):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    thread.submit(pyfuncitem.obj, **arguments).result()
    return True


@pytest.fixture(scope="session")
def playwright_thread() -> Iterator[ThreadPoolExecutor]:
    """Where all of Playwright lives. Its sync API keeps a loop running in its thread for as long as the browser is
    open; in the main thread, no asynchronous test of another folder could start its own any more.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        yield thread


@pytest.fixture(scope="session")
def chromium(playwright_thread: ThreadPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not Path(_CHROMIUM).exists():
        missing = "these tests drive Debian's Chromium, which is not here: apt-get install chromium"
        if "VOICEPASS_REQUIRE_BROWSER" in os.environ:
            pytest.fail(missing)
        pytest.skip(missing)
    speech = tmp_path_factory.mktemp("microphone") / "speech.wav"
    _hum(speech)
    playwright = playwright_thread.submit(sync_playwright().start).result()
    launch = partial(
        playwright.chromium.launch,
        executable_path=_CHROMIUM,
        chromium_sandbox=False,
        args=[*_FLAGS, f"--use-file-for-fake-audio-capture={speech}"],
    )
    browser = playwright_thread.submit(launch).result()
    yield browser
    playwright_thread.submit(browser.close).result()
    playwright_thread.submit(playwright.stop).result()


@pytest.fixture(scope="session")
def base_url() -> Iterator[str]:
    with running(lambda url: create_demo(url, voicepass_log_level="debug")) as url:
        yield url


OpenDemo = Callable[..., Demo]


@pytest.fixture
def open_demo(chromium: Browser, base_url: str, playwright_thread: ThreadPoolExecutor) -> Iterator[OpenDemo]:
    """Opens the page in a fresh context. Tests call it, for they run in Playwright's thread; fixtures submit it."""
    contexts: list[BrowserContext] = []

    def opened(*, width: int = 1280, dark: bool = False) -> Demo:
        context = chromium.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
            permissions=["microphone"],
        )
        context.set_default_timeout(10_000)
        contexts.append(context)
        demo = _watched(context.new_page())
        demo.page.goto(base_url, wait_until="domcontentloaded")
        return demo

    yield opened
    for context in contexts:
        playwright_thread.submit(context.close).result()


@pytest.fixture
def demo(open_demo: OpenDemo, playwright_thread: ThreadPoolExecutor) -> Demo:
    return playwright_thread.submit(open_demo).result()
