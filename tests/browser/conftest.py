"""A real Chromium and a real demo server, which the tests of this folder share. Most tests get their own context."""

import inspect
import json
import math
import os
import shutil
import signal
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, WebSocket, expect, sync_playwright
from starlette.types import ASGIApp

from elevenlabs_emulator import EmulatedAgent, Emulator
from elevenlabs_emulator.script import ORDERS
from tests.browser.laboratory import LABORATORY, Laboratory
from tests.servers import Cable, behind_a_cable, running
from voicepass.demo import AGENT_ID, create_demo

_CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
_FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Playwright does not report the requests of an AudioWorklet, so only the resolver can block other hosts.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


@dataclass(frozen=True)
class Demo:
    """The demo page by its roles and names, with the browser's console, requests and sockets."""

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
    def minutes(self) -> Locator:
        return self.page.get_by_role("meter", name="Minutes today")

    @property
    def products(self) -> Locator:
        return self.page.get_by_role("list", name="Products")

    def sign_in(self, name: str = "Ada") -> None:
        self.page.get_by_role("textbox", name="Your name").fill(name)
        self.button("Sign in").click()

    def sign_out(self) -> None:
        if self.button("Sign out").is_visible():
            self.button("Sign out").click()

    def start(self) -> None:
        self.button("Start conversation").click()
        self.page.locator("[data-state=connected]").wait_for()  # polls more often than `expect`
        expect(self.status).to_contain_text("Connected")

    def break_the_pass(self, fault: str) -> None:
        faults = self.page.get_by_role("group").filter(has=self.page.locator("summary"))
        faults.evaluate("(details) => (details.open = true)")
        self.page.get_by_role("combobox", name="Try a broken pass").select_option(fault)

    def say(self, line: str) -> None:
        self.message.fill(line)
        self.button("Send").click()

    def wait(self, seconds: float) -> None:
        """Advance the page's timers at once. Only for a page that was opened with `own_time`."""
        self.page.clock.fast_forward(round(seconds * 1000))


def _watch(page: Page) -> Demo:
    demo = Demo(page)

    def record_socket(socket: WebSocket) -> None:
        demo.hosts.add(socket.url.split("/")[2].split(":")[0])
        demo.sockets.append(socket)
        socket.on("framereceived", lambda frame: demo.received.append(json.loads(frame)))
        socket.on("framesent", lambda frame: demo.sent.append(json.loads(frame)))

    page.on("console", lambda message: demo.console.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: demo.console.append(f"uncaught: {error.message}"))
    page.on("request", lambda request: demo.hosts.add(request.url.split("/")[2].split(":")[0]))
    page.on("websocket", record_socket)
    return demo


def _write_speech(path: Path) -> None:
    """Write the sound that the fake microphone repeats. Its default beeps count as speech only after seconds."""
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
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    thread.submit(pyfuncitem.obj, **arguments).result()
    return True


@pytest.fixture(scope="session")
def playwright_thread() -> Iterator[ThreadPoolExecutor]:
    """The thread for all calls of Playwright, whose sync API runs an event loop until the browser is closed.

    In the main thread, that loop would prevent the asynchronous tests of other folders.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        yield thread


@pytest.fixture(scope="session")
def launch_chromium(playwright_thread: ThreadPoolExecutor) -> Iterator[Callable[..., Browser]]:
    """Launches Debian's Chromium with more flags. Call it in Playwright's thread."""
    if not Path(_CHROMIUM).exists():
        missing = "these tests need Debian's Chromium: apt-get install chromium"
        if "REQUIRE_CHROMIUM" in os.environ:
            pytest.fail(missing)
        pytest.skip(missing)
    playwright = playwright_thread.submit(sync_playwright().start).result()

    def launch(*flags: str) -> Browser:
        return playwright.chromium.launch(executable_path=_CHROMIUM, chromium_sandbox=False, args=[*_FLAGS, *flags])

    yield launch
    stopped = playwright_thread.submit(playwright.stop)
    try:
        stopped.result(timeout=30)
    except TimeoutError:  # rarely, the driver does not end although its input is closed
        _kill_driver()
        stopped.result(timeout=30)


def _kill_driver() -> None:
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            if b"playwright/driver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)


@pytest.fixture(scope="session")
def chromium(
    launch_chromium: Callable[..., Browser],
    playwright_thread: ThreadPoolExecutor,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Browser]:
    speech = tmp_path_factory.mktemp("microphone") / "speech.wav"
    _write_speech(speech)
    microphone = ("--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={speech}")
    browser = playwright_thread.submit(launch_chromium, *microphone).result()
    yield browser
    playwright_thread.submit(browser.close).result()


@pytest.fixture(scope="module")  # not "session", because the demo would log lines during tests of other folders
def base_url() -> Iterator[str]:
    with running(lambda url: create_demo(url, voicepass_log_level="debug")) as url:
        yield url


@dataclass(frozen=True)
class World:
    """A demo with a network that a test can cut, and an emulator that a test can make fail."""

    cable: Cable
    emulator: Emulator

    @property
    def passes_asked_for(self) -> int:
        return sum("get-signed-url" in call.path for call in self.emulator.records.calls)


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    made: list[Emulator] = []

    def make_demo(url: str) -> ASGIApp:
        made.append(
            Emulator(
                agents=[EmulatedAgent(agent_id=AGENT_ID, spoken_lines=ORDERS)],
                public_ws_base=f"{url.replace('http', 'ws')}/_elevenlabs",
                webhook_url=f"{url}/v1/webhooks/elevenlabs",
                webhook_secret="wsec_of_the_world",
            )
        )
        return create_demo(url, emulator=made[0], voicepass_session_cookie="session")

    with behind_a_cable(make_demo) as cable:
        yield World(cable, made[0])


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    """The module's world, with an empty record before the test and without faults after it."""
    shared_world.emulator.records.clear()
    yield shared_world
    shared_world.cable.plug_in()
    shared_world.emulator.faults.clear()
    shared_world.emulator.conversation_seconds = None


OpenDemo = Callable[..., Demo]


@contextmanager
def _open_demos(chromium: Browser, base_url: str, playwright_thread: ThreadPoolExecutor) -> Iterator[OpenDemo]:
    contexts: list[BrowserContext] = []

    def open_page(*, width: int = 1280, dark: bool = False, own_time: bool = False, any_origin: bool = False) -> Demo:
        context = chromium.new_context(
            bypass_csp=any_origin,
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
            permissions=["microphone"],
        )
        context.set_default_timeout(10_000)
        if own_time:
            context.clock.install()
        contexts.append(context)
        demo = _watch(context.new_page())
        demo.page.goto(base_url, wait_until="domcontentloaded")
        return demo

    yield open_page
    for context in contexts:
        playwright_thread.submit(context.close).result()


@pytest.fixture
def open_demo(chromium: Browser, base_url: str, playwright_thread: ThreadPoolExecutor) -> Iterator[OpenDemo]:
    """Opens the page in a new context. Tests call it directly, and fixtures submit it to Playwright's thread."""
    with _open_demos(chromium, base_url, playwright_thread) as open_page:
        yield open_page


@pytest.fixture
def demo_in_world(chromium: Browser, world: World, playwright_thread: ThreadPoolExecutor) -> Iterator[Demo]:
    """A demo in the world, whose clock the test can advance."""
    with _open_demos(chromium, world.cable.url, playwright_thread) as open_page:
        yield playwright_thread.submit(open_page, own_time=True).result()


@pytest.fixture
def demo(open_demo: OpenDemo, playwright_thread: ThreadPoolExecutor) -> Demo:
    return playwright_thread.submit(open_demo).result()


@pytest.fixture
def demo_in_own_time(open_demo: OpenDemo, playwright_thread: ThreadPoolExecutor) -> Demo:
    """A demo whose clock the test can advance with `wait`."""
    return playwright_thread.submit(open_demo, own_time=True).result()


@pytest.fixture(scope="module")
def shared_demo(chromium: Browser, base_url: str, playwright_thread: ThreadPoolExecutor) -> Iterator[Demo]:
    """One page for a module, because a short test spends half of its time on loading."""
    with _open_demos(chromium, base_url, playwright_thread) as open_page:
        yield playwright_thread.submit(open_page).result()


@pytest.fixture
def used_demo(shared_demo: Demo, playwright_thread: ThreadPoolExecutor) -> Iterator[Demo]:
    """The module's page, signed out. Each sign-in makes a new user."""
    yield shared_demo
    playwright_thread.submit(shared_demo.sign_out).result()


@pytest.fixture(scope="module")
def shared_page(
    chromium: Browser, shared_world: World, playwright_thread: ThreadPoolExecutor
) -> Iterator[tuple[Demo, ThreadPoolExecutor]]:
    with _open_demos(chromium, shared_world.cable.url, playwright_thread) as open_page:
        demo = playwright_thread.submit(open_page, any_origin=True).result()
        playwright_thread.submit(demo.page.evaluate, LABORATORY).result()
        yield demo, playwright_thread


@pytest.fixture
def lab(shared_page: tuple[Demo, ThreadPoolExecutor], world: World) -> Laboratory:
    del world
    return Laboratory(shared_page[0].page)
