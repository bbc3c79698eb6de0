"""A real Chromium against a real demo server, both shared by this folder; most tests get a context of their own."""

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
        self.page.locator("[data-state=connected]").wait_for()  # looks oftener than `expect` does
        expect(self.status).to_contain_text("Connected")

    def break_the_pass(self, fault: str) -> None:
        faults = self.page.get_by_role("group").filter(has=self.page.locator("summary"))
        faults.evaluate("(details) => (details.open = true)")
        self.page.get_by_role("combobox", name="Try a broken pass").select_option(fault)

    def say(self, line: str) -> None:
        self.message.fill(line)
        self.button("Send").click()

    def wait(self, seconds: float) -> None:
        """Let this time pass for the page's timers, at once. For a page of its own time."""
        self.page.clock.fast_forward(round(seconds * 1000))


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
    """Write the sound of the fake microphone, which it repeats: its own beeps count as speech only after seconds."""
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
    """Where all of Playwright lives. Its sync API keeps a loop running in its thread for as long as the browser is
    open; in the main thread, no asynchronous test of another folder could start its own any more.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        yield thread


@pytest.fixture(scope="session")
def launch_chromium(playwright_thread: ThreadPoolExecutor) -> Iterator[Callable[..., Browser]]:
    """Launch Debian's Chromium with more flags. To be called in Playwright's thread."""
    if not Path(_CHROMIUM).exists():
        missing = "these tests drive Debian's Chromium, which is not here: apt-get install chromium"
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
    except TimeoutError:  # once in many runs, the driver does not end although its input has ended
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
    _hum(speech)
    microphone = ("--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={speech}")
    browser = playwright_thread.submit(launch_chromium, *microphone).result()
    yield browser
    playwright_thread.submit(browser.close).result()


@pytest.fixture(scope="module")  # longer, and the demo would write lines while tests of other folders read theirs
def base_url() -> Iterator[str]:
    with running(lambda url: create_demo(url, voicepass_log_level="debug")) as url:
        yield url


@dataclass(frozen=True)
class World:
    """A demo whose network can be cut, and whose ElevenLabs can be told to fail."""

    cable: Cable
    emulator: Emulator

    @property
    def passes_asked_for(self) -> int:
        return sum("get-signed-url" in call.path for call in self.emulator.records.calls)


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    made: list[Emulator] = []

    def demo_at(url: str) -> ASGIApp:
        made.append(
            Emulator(
                agents=[EmulatedAgent(agent_id=AGENT_ID, spoken_lines=ORDERS)],
                public_ws_base=f"{url.replace('http', 'ws')}/_elevenlabs",
                webhook_url=f"{url}/v1/webhooks/elevenlabs",
                webhook_secret="wsec_of_the_world",
            )
        )
        return create_demo(url, emulator=made[0], voicepass_session_cookie="session")

    with behind_a_cable(demo_at) as cable:
        yield World(cable, made[0])


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    """The module's world, in order before and after."""
    shared_world.emulator.records.clear()
    yield shared_world
    shared_world.cable.plug_in()
    shared_world.emulator.faults.clear()
    shared_world.emulator.conversation_seconds = None


OpenDemo = Callable[..., Demo]


@contextmanager
def _opening(chromium: Browser, base_url: str, playwright_thread: ThreadPoolExecutor) -> Iterator[OpenDemo]:
    contexts: list[BrowserContext] = []

    def opened(*, width: int = 1280, dark: bool = False, own_time: bool = False, any_origin: bool = False) -> Demo:
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
        demo = _watched(context.new_page())
        demo.page.goto(base_url, wait_until="domcontentloaded")
        return demo

    yield opened
    for context in contexts:
        playwright_thread.submit(context.close).result()


@pytest.fixture
def open_demo(chromium: Browser, base_url: str, playwright_thread: ThreadPoolExecutor) -> Iterator[OpenDemo]:
    """Opens the page in a fresh context. Tests call it, for they run in Playwright's thread; fixtures submit it."""
    with _opening(chromium, base_url, playwright_thread) as opened:
        yield opened


@pytest.fixture
def demo_in_world(chromium: Browser, world: World, playwright_thread: ThreadPoolExecutor) -> Iterator[Demo]:
    """A demo whose clock the test may put forward, in a world where things break."""
    with _opening(chromium, world.cable.url, playwright_thread) as opened:
        yield playwright_thread.submit(opened, own_time=True).result()


@pytest.fixture
def demo(open_demo: OpenDemo, playwright_thread: ThreadPoolExecutor) -> Demo:
    return playwright_thread.submit(open_demo).result()


@pytest.fixture
def demo_in_own_time(open_demo: OpenDemo, playwright_thread: ThreadPoolExecutor) -> Demo:
    """A demo whose clock the test may put forward, with `wait`."""
    return playwright_thread.submit(open_demo, own_time=True).result()


@pytest.fixture(scope="module")
def shared_demo(chromium: Browser, base_url: str, playwright_thread: ThreadPoolExecutor) -> Iterator[Demo]:
    """One page for a module: half of a short test's time is spent loading it."""
    with _opening(chromium, base_url, playwright_thread) as opened:
        yield playwright_thread.submit(opened).result()


@pytest.fixture
def used_demo(shared_demo: Demo, playwright_thread: ThreadPoolExecutor) -> Iterator[Demo]:
    """The module's page, signed out. Who signs in on it is a new user each time."""
    yield shared_demo
    playwright_thread.submit(shared_demo.sign_out).result()


@pytest.fixture(scope="module")
def shared_page(
    chromium: Browser, shared_world: World, playwright_thread: ThreadPoolExecutor
) -> Iterator[tuple[Demo, ThreadPoolExecutor]]:
    with _opening(chromium, shared_world.cable.url, playwright_thread) as opened:
        demo = playwright_thread.submit(opened, any_origin=True).result()
        playwright_thread.submit(demo.page.evaluate, LABORATORY).result()
        yield demo, playwright_thread


@pytest.fixture
def lab(shared_page: tuple[Demo, ThreadPoolExecutor], world: World) -> Laboratory:
    del world
    return Laboratory(shared_page[0].page)
