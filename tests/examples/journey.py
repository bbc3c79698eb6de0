"""The steps of a shopper in each example. All examples have the same controls."""

import base64
import contextlib
import json
from dataclasses import dataclass, field

from playwright.sync_api import Page, WebSocketRoute, expect

from elevenlabs_emulator import Emulator, Fault
from tests.examples.conftest import Shopper

LATER = "Our assistant is not available at the moment. Please try again later."
ALLOW = "Please allow the microphone in your browser's settings for this page, or choose Write."
UNREACHABLE = "We cannot be reached. Please check your internet connection."
SIDEWAYS = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def expect_status(page: Page, text: str) -> None:
    # Waits 15 s like the context, because a busy machine needs seconds to open the microphone.
    expect(page.get_by_role("status")).to_have_text(text, timeout=15_000)


def expect_focus(page: Page, role: str, name: str) -> None:
    expect(page.get_by_role("button" if role == "button" else "textbox", name=name, exact=True)).to_be_focused()


def shop_and_talk(shopper: Shopper, emulator: Emulator, url: str, *, name: str) -> None:
    """Sign in, write, talk, be refused, sign out. Each name is a user with their own minutes."""
    page = shopper.page
    page.goto(url)
    sign_in(page, name)
    write_a_message(page, name)
    emulator.advance(90)
    end_the_conversation(page)
    read_the_minutes(page)
    talk_to_the_assistant(page)
    say_goodbye(page)
    learn_why_it_does_not_begin(page, emulator)
    press(page, "Sign out")
    expect(page.get_by_role("textbox", name="Your name")).to_be_visible()
    assert shopper.errors == []


def sign_in(page: Page, name: str) -> None:
    page.get_by_role("textbox", name="Your name").fill(name)
    page.keyboard.press("Enter")
    expect_focus(page, "button", "Talk")
    expect(page.get_by_text("60 of 60 minutes left today")).to_be_visible()
    assert page.evaluate(SIDEWAYS) == 0


def write_a_message(page: Page, name: str) -> None:
    transcript = page.get_by_role("log", name="Transcript")
    press(page, "Write")
    expect_status(page, "You are connected.")
    expect_focus(page, "textbox", "Message")
    expect(transcript).to_contain_text(f"Hello {name}!")
    expect(page.get_by_role("button", name="Mute")).to_be_hidden()

    line = "Hello"
    page.keyboard.type(line)
    page.keyboard.press("Enter")

    expect(transcript.locator(".agent")).not_to_have_count(1)
    expect(transcript.locator(".user")).to_have_count(1)  # the server's echo of it adds no second line


def end_the_conversation(page: Page) -> None:
    press(page, "End")
    expect_status(page, "You ended the conversation.")
    expect_focus(page, "button", "Talk")
    assert page.evaluate(SIDEWAYS) == 0


def read_the_minutes(page: Page) -> None:
    """Wait for the minutes. The page asks every ten seconds, and the webhook may arrive after the first answer."""
    minutes = page.get_by_text("58 of 60 minutes left today")
    for _ in range(30):
        with page.expect_response("**/v1/usage"):
            page.clock.fast_forward(10_000)
        with contextlib.suppress(AssertionError):
            expect(minutes).to_be_visible(timeout=250)
            return
    raise AssertionError("the minutes of the conversation were not counted")


def talk_to_the_assistant(page: Page) -> None:
    press(page, "Talk")
    expect_status(page, "You are connected.")
    expect(page.get_by_text("Assistant speaks")).to_be_visible(timeout=15_000)
    expect(page.get_by_text("We listen to you")).to_be_visible()
    press(page, "Mute")
    press(page, "Unmute")
    expect(page.get_by_role("button", name="Mute", exact=True)).to_be_visible()
    end_the_conversation(page)


def say_goodbye(page: Page) -> None:
    press(page, "Write")
    expect_status(page, "You are connected.")
    page.keyboard.type("Goodbye")
    page.keyboard.press("Enter")
    expect_status(page, "Our assistant ended the conversation.")
    expect_focus(page, "button", "Talk")


def learn_why_it_does_not_begin(page: Page, emulator: Emulator) -> None:
    """Cause one failure after another, and check that the page says each time what a shopper can do."""
    emulator.faults["signed_url"] = Fault(status=401)
    expect_refusal(page, "Write", LATER)
    emulator.faults.clear()

    for path, sentence in (("v1/signed-url", UNREACHABLE), ("api/voice-token", LATER)):
        page.route(f"**/{path}", lambda route: route.abort())
        expect_refusal(page, "Write", sentence)
        page.unroute(f"**/{path}")

    page.context.clear_permissions()
    expect_refusal(page, "Talk", ALLOW)


def expect_refusal(page: Page, button: str, sentence: str) -> None:
    press(page, button)
    expect_status(page, sentence)
    expect_focus(page, "button", "Talk")
    assert page.evaluate(SIDEWAYS) == 0


@dataclass
class Line:
    """The page's WebSocket to the agent. A test can close it, and can check whether the microphone is silent."""

    sockets: list[WebSocketRoute] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        page.route_web_socket("**/convai/conversation?**", self.connect)

    def connect(self, socket: WebSocketRoute) -> None:
        self.sockets.append(socket)
        server = socket.connect_to_server()

        def forward(frame: str | bytes) -> None:
            self.chunks.append(base64.b64decode(json.loads(frame).get("user_audio_chunk", "")))
            server.send(frame)

        socket.on_message(forward)

    def wait_for(self, page: Page, *, silent: bool) -> None:
        """Wait until the last ten chunks of the microphone are silent, or are not."""
        for _ in range(200):
            page.wait_for_timeout(50)  # Playwright forwards frames only while it waits
            last = [any(chunk) for chunk in self.chunks[-10:] if chunk]
            if len(last) == 10 and (not any(last) if silent else all(last)):
                return
        raise AssertionError(f"the microphone was {'not ' if silent else ''}silent")


def stay_muted_after_a_reconnect(page: Page, url: str, *, name: str) -> None:
    line = Line()
    line.watch(page)
    page.goto(url)
    sign_in(page, name)
    press(page, "Talk")
    expect_status(page, "You are connected.")
    line.wait_for(page, silent=False)
    press(page, "Mute")
    line.wait_for(page, silent=True)

    line.chunks.clear()
    line.sockets[0].close(code=1001)

    line.wait_for(page, silent=True)
    assert len(line.sockets) == 2
    expect(page.get_by_role("button", name="Unmute")).to_be_visible()
    press(page, "End")
    expect_status(page, "You ended the conversation.")
