"""A signed-in user talks to the agent, by text and by voice."""

import json
import re
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Demo, OpenDemo

pytestmark = pytest.mark.browser


def test_a_signed_in_user_orders_and_ends_with_an_empty_console(demo: Demo) -> None:
    demo.sign_in("Ada")
    demo.start()
    expect(demo.transcript).to_contain_text(re.compile(r"Agent.*Ada"))
    demo.say("I want to sell eggs for 2 dollars each")

    expect(demo.transcript.locator("p", has_text="Ada I want to sell eggs")).to_have_count(1)
    expect(demo.transcript).to_contain_text(re.compile(r"eggs for \$2 each"))
    expect(demo.products.get_by_role("listitem")).to_have_text(re.compile(r"eggs \$2\.00 each"))
    expect(demo.status).to_have_attribute("data-conversation-id", re.compile(r"^conv_\w+$"))

    demo.button("End conversation").click()

    expect(demo.status).to_have_text("Disconnected 1000 You ended the conversation.")
    expect(demo.button("Start conversation")).to_be_focused()
    assert demo.console == []


@pytest.mark.long
def test_a_suggestion_is_sent_as_a_line(demo: Demo) -> None:
    demo.sign_in()
    demo.start()

    demo.button("Hello").click()

    expect(demo.transcript.get_by_text("Hello", exact=True)).to_be_visible()
    demo.button("Goodbye").click()
    expect(demo.status).to_contain_text("Disconnected 1000")


def test_the_conversation_that_is_open_is_the_one_of_the_pass(used_demo: Demo) -> None:
    demo = used_demo
    demo.sign_in()
    demo.start()

    shown = demo.status.get_attribute("data-conversation-id") or "nothing"

    expect(demo.voice_pass).to_contain_text(shown)
    assert parse_qs(urlsplit(demo.sockets[-1].url).query)["conversation_id"] == [shown]


@pytest.mark.long
def test_on_a_narrow_screen_a_conversation_that_starts_is_in_view(open_demo: OpenDemo) -> None:
    demo = open_demo(width=390)
    demo.sign_in()

    demo.start()

    expect(demo.status).to_be_in_viewport(ratio=1)
    expect(demo.transcript.get_by_text("Hello Ada!")).to_be_in_viewport(ratio=1)
    expect(demo.message).to_be_in_viewport(ratio=1)


def test_a_second_conversation_gets_its_own_pass(used_demo: Demo) -> None:
    demo = used_demo
    demo.sign_in()
    demo.start()
    first = demo.status.get_attribute("data-conversation-id")
    demo.button("End conversation").click()
    expect(demo.status).to_contain_text("Disconnected")

    demo.start()

    expect(demo.transcript).to_contain_text("Ada")
    assert demo.status.get_attribute("data-conversation-id") != first
    assert demo.console == []


def test_send_is_disabled_without_a_connection(used_demo: Demo) -> None:
    demo = used_demo
    expect(demo.button("Start conversation")).to_be_disabled()
    expect(demo.button("Send")).to_be_disabled()

    demo.sign_in()
    expect(demo.button("Send")).to_be_disabled()
    demo.start()
    expect(demo.button("Send")).to_be_enabled()
    demo.button("End conversation").click()

    expect(demo.button("Send")).to_be_disabled()
    expect(demo.message).to_be_disabled()


def test_markup_in_a_name_or_a_message_is_shown_as_text(used_demo: Demo) -> None:
    demo = used_demo
    demo.sign_in("<b>Eve</b>")
    demo.start()
    demo.say("I want to sell <i>eggs</i> for 2 dollars each")

    expect(demo.transcript).to_contain_text("I want to sell <i>eggs</i>")
    expect(demo.transcript.locator("i")).to_have_count(0)
    expect(demo.page.get_by_role("region", name="Sign in")).to_contain_text("<b>Eve</b>")


def test_signing_out_ends_the_conversation_and_removes_the_pass(used_demo: Demo) -> None:
    demo = used_demo
    demo.sign_in()
    demo.start()

    demo.button("Sign out").click()

    expect(demo.status).to_contain_text("Not connected")
    expect(demo.button("Start conversation")).to_be_disabled()
    expect(demo.voice_pass).not_to_contain_text("conv_")
    if not demo.sockets[-1].is_closed():
        demo.sockets[-1].wait_for_event("close")


@pytest.mark.long
def test_the_time_left_of_a_pass_counts_down_until_it_is_used(demo_in_own_time: Demo) -> None:
    demo = demo_in_own_time
    demo.sign_in()
    demo.break_the_pass("Tampered with")
    demo.button("Start conversation").click()
    timer = demo.page.get_by_role("timer", name="Time left")
    expect(timer).to_have_text(re.compile(r"^(15:00|14:5\d)$"))
    at_first = timer.inner_text()

    demo.wait(2)
    expect(timer).not_to_have_text(at_first)

    demo.break_the_pass("None, a good pass")
    demo.start()
    expect(timer).to_have_count(0)


@pytest.mark.long
def test_the_page_masks_the_signature_of_a_pass(demo: Demo) -> None:
    demo.sign_in()
    demo.start()

    signature = parse_qs(urlsplit(demo.sockets[0].url).query)["conversation_signature"][0]
    expect(demo.voice_pass).to_contain_text("cvtkn_••••")
    assert signature not in demo.page.content()
    assert signature.removeprefix("cvtkn_")[:4] not in demo.voice_pass.inner_text()


@pytest.mark.long
def test_after_the_sign_in_the_browser_stores_only_the_name_and_the_id(demo: Demo) -> None:
    with demo.page.expect_response("**/demo/sign-in") as answer:
        demo.sign_in()
    token, user_id = answer.value.json()["token"], answer.value.json()["user_id"]
    demo.start()

    kept = demo.page.evaluate(
        "() => JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
    )

    local, session, cookies, _ = json.loads(kept)
    assert (local, json.loads(session.pop("user")), session, cookies) == (
        {},
        {"name": "Ada", "user_id": user_id},
        {},
        "",
    )
    assert token not in kept + demo.page.content()
    assert demo.page.context.cookies() == []


def test_a_reload_keeps_the_user_signed_in_until_the_user_signs_out(demo: Demo) -> None:
    demo.sign_in("Ada")
    expect(demo.button("Start conversation")).to_be_enabled()
    user_id = demo.page.locator("#user-id").inner_text()

    demo.page.reload()
    expect(demo.page.locator("#user-id")).to_have_text(user_id)
    expect(demo.button("Start conversation")).to_be_enabled()

    demo.sign_out()
    demo.page.reload()
    expect(demo.button("Sign in")).to_be_visible()
    expect(demo.button("Start conversation")).to_be_disabled()


@pytest.mark.long
def test_the_page_shows_a_refusal_with_its_code_and_request_id(demo: Demo) -> None:
    problem = {
        "type": "about:blank",
        "title": "Too Many Requests",
        "status": 429,
        "detail": "Too many passes in the last minute.",
        "code": "rate_limited",
        "request_id": "req-7",
        "retry_after_seconds": 75,
    }
    demo.page.route(
        "**/v1/signed-url",
        lambda route: route.fulfill(status=429, content_type="application/problem+json", body=json.dumps(problem)),
    )
    demo.sign_in()

    demo.button("Start conversation").click()

    expect(demo.status).to_have_text("No pass rate_limited Too many passes in the last minute.")
    expect(demo.page.get_by_text("Try again in 75 s. If you ask for help, say request req-7.")).to_be_visible()
    expect(demo.button("Start conversation")).to_be_enabled()


@pytest.mark.long
def test_a_voice_conversation_plays_and_records_audio(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elevenlabs_emulator.conversation._SECONDS_PER_SPOKEN_LINE", 1.5)
    demo.sign_in("Ada")
    demo.page.get_by_role("radio", name="Voice").check()

    demo.start()

    expect(demo.transcript).to_contain_text(re.compile(r"Agent.*Ada"))
    expect(demo.page.get_by_text("Agent speaks", exact=True)).to_be_visible()
    expect(demo.page.get_by_text("Listening", exact=True)).to_be_visible()
    expect(demo.transcript.locator("p", has_text="Ada I want to sell")).to_be_visible()
    demo.button("End conversation").click()
    expect(demo.status).to_contain_text("Disconnected 1000")
    assert any("user_audio_chunk" in frame for frame in demo.sent)
    # The resolver resolves only 127.0.0.1, so a request to another host would have logged an error.
    assert demo.hosts == {"127.0.0.1"}
    assert demo.console == []


@pytest.mark.long
def test_a_refused_microphone_uses_no_pass(demo: Demo) -> None:
    demo.page.context.clear_permissions()
    demo.sign_in()
    demo.page.get_by_role("radio", name="Voice").check()

    demo.button("Start conversation").click()

    expect(demo.status).to_have_text("Disconnected Allow the microphone in your browser, then try again.")
    expect(demo.page.get_by_text("No pass was taken. Text needs no microphone")).to_be_visible()
    expect(demo.minutes).to_have_attribute("aria-valuenow", "0")


@pytest.mark.long
def test_a_conversation_stays_connected_and_answers_every_ping(demo: Demo) -> None:
    demo.sign_in()
    demo.start()

    demo.page.wait_for_timeout(35_000)

    pings = [frame["ping_event"]["event_id"] for frame in demo.received if frame["type"] == "ping"]
    pongs = [frame["event_id"] for frame in demo.sent if frame["type"] == "pong"]
    expect(demo.status).to_have_text("Connected")
    assert len(pings) > 3
    assert pongs == pings
    demo.say("I want to sell eggs for 2 dollars each")
    expect(demo.products).to_contain_text("eggs")
    assert demo.console == []
