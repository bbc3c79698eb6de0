"""Failures while a user uses the page: it shows a sentence, and retries only if a retry can help."""

import re
from typing import Literal

import pytest
from playwright.sync_api import Locator, expect

from elevenlabs_emulator import Fault
from tests.browser.conftest import Demo, World
from tests.browser.test_accessibility import _POOR_CONTRAST
from tests.browser.test_minutes import OPEN_CONVERSATIONS, sign_in_and_read_token

pytestmark = [pytest.mark.browser, pytest.mark.long]

_SCHEMES: tuple[Literal["light"], Literal["dark"]] = ("light", "dark")
# Answers the first `answered` requests for the microphone, and keeps the others open until `allow`.
_PENDING_PERMISSION = """(answered) => {
  const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
  const permission = new Promise((resolve) => (window.allow = resolve));
  navigator.mediaDevices.getUserMedia = async (wish) => (answered-- > 0 || (await permission), ask(wish));
}"""


def find_hint(demo: Demo) -> Locator:
    return demo.page.locator("#hint")


def test_after_a_network_drop_the_page_reconnects_with_a_new_pass(demo_in_world: Demo, world: World) -> None:
    demo = demo_in_world
    demo.sign_in()
    demo.start()
    first = demo.status.get_attribute("data-conversation-id")
    demo.say("I want to sell eggs for 2 dollars each")
    expect(demo.products).to_contain_text("eggs")

    demo.page.clock.pause_at(demo.page.evaluate("Date.now() / 1000 + 1"))  # else the next try may begin after 1 ms
    world.cable.pull()
    expect(demo.status).to_have_text("Reconnecting 1006 The connection was lost.")
    expect(find_hint(demo)).to_have_text("The next try is about to begin.")
    expect(demo.button("End conversation")).to_be_enabled()
    expect(demo.message).to_be_disabled()
    for scheme in _SCHEMES:
        demo.page.emulate_media(color_scheme=scheme)
        assert demo.page.evaluate(_POOR_CONTRAST) == []
    world.cable.plug_in()
    demo.page.clock.resume()
    demo.wait(1)

    expect(demo.status).to_have_text("Connected")
    expect(demo.transcript).to_contain_text("Reconnected with a new pass. For the agent, it is a new conversation.")
    expect(demo.transcript).to_contain_text("I want to sell eggs")
    assert demo.status.get_attribute("data-conversation-id") != first
    expect(demo.voice_pass).to_contain_text(demo.status.get_attribute("data-conversation-id") or "nothing")
    demo.say("I want to sell milk for 3 dollars each")
    expect(demo.products).to_contain_text("milk")
    assert world.passes_asked_for == 2


def test_the_page_stops_waiting_for_a_network_that_stays_away(demo_in_world: Demo, world: World) -> None:
    demo = demo_in_world
    demo.sign_in()
    demo.start()

    world.cable.pull()
    expect(demo.status).to_contain_text("Reconnecting")
    for _ in range(12):  # enough waits, because the time until each retry fails varies
        if "Reconnecting" in (demo.status.text_content() or ""):
            demo.wait(9)

    expect(demo.status).to_have_text(
        "Disconnected unreachable The service cannot be reached. Check your network and try again."
    )
    expect(demo.button("Start conversation")).to_be_focused()
    assert world.passes_asked_for == 1


def test_a_pass_that_expired_while_the_page_waited_is_replaced(demo_in_world: Demo, world: World) -> None:
    """The page has the microphone and the pass, but the SDK waits a quarter of an hour for its own stream."""
    demo = demo_in_world
    demo.page.evaluate(_PENDING_PERMISSION, 1)
    demo.sign_in()
    demo.page.get_by_role("radio", name="Voice").check()
    demo.button("Start conversation").click()
    expect(demo.voice_pass).to_contain_text("Unused")

    world.emulator.advance(16 * 60)
    demo.wait(16 * 60)
    expect(demo.voice_pass).to_contain_text("Expired")
    demo.page.evaluate("() => allow()")

    expect(demo.status).to_have_text("Connected")  # within a second after the refusal
    assert world.passes_asked_for == 2


def test_while_a_microphone_prompt_waits_for_an_answer_no_pass_is_requested(demo_in_world: Demo, world: World) -> None:
    demo = demo_in_world
    demo.page.evaluate(_PENDING_PERMISSION, 0)
    demo.sign_in()
    demo.page.get_by_role("radio", name="Voice").check()
    demo.button("Start conversation").click()
    expect(find_hint(demo)).to_have_text("Allow the microphone. The page asks for a pass after that.")

    world.emulator.advance(16 * 60)
    demo.wait(16 * 60)
    asked_for_meanwhile = world.passes_asked_for
    demo.page.evaluate("() => allow()")

    expect(demo.status).to_have_text("Connected")
    assert (asked_for_meanwhile, world.passes_asked_for) == (0, 1)


def test_a_user_without_minutes_cannot_reconnect_after_a_drop(demo_in_world: Demo, world: World) -> None:
    demo = demo_in_world
    world.emulator.conversation_seconds = 60
    token = sign_in_and_read_token(demo)
    demo.start()
    demo.page.evaluate(OPEN_CONVERSATIONS, [token, 4])
    demo.say("I want to sell eggs for 2 dollars each")
    expect(demo.products).to_contain_text("eggs")  # an open conversation continues without minutes

    world.cable.pull()
    expect(demo.status).to_contain_text("Reconnecting")
    world.cable.plug_in()
    demo.wait(1)

    expect(demo.status).to_have_text(
        "Disconnected quota_exceeded The minutes of conversation are used up. Try again later."
    )
    expect(find_hint(demo)).to_have_text(
        re.compile(r"^Resets (tomorrow|on [\w ]+) at \d\d:\d\d\. If you ask for help, say")
    )
    expect(demo.minutes).to_have_attribute("aria-valuetext", "5:00 of 5:00 used or set aside")


def test_while_elevenlabs_is_down_the_page_waits_and_then_connects(demo_in_world: Demo, world: World) -> None:
    demo = demo_in_world
    world.emulator.faults["signed_url"] = Fault(status=503)
    demo.sign_in()

    demo.button("Start conversation").click()
    expect(demo.status).to_contain_text("Waiting elevenlabs_")
    expect(find_hint(demo)).to_have_text(re.compile(r"^The next try is in \d+ s\.$"))
    world.emulator.faults.clear()
    demo.wait(40)

    expect(demo.status).to_have_text("Connected")


def test_the_user_can_end_the_wait(demo_in_world: Demo, world: World) -> None:
    demo = demo_in_world
    world.emulator.faults["signed_url"] = Fault(status=503)
    demo.sign_in()
    demo.button("Start conversation").click()
    expect(demo.status).to_contain_text("Waiting")
    before = world.passes_asked_for

    demo.button("End conversation").click()
    demo.wait(60)

    expect(demo.status).to_have_text("Disconnected You ended the conversation.")
    expect(demo.button("Start conversation")).to_be_focused()
    assert world.passes_asked_for == before
