"""The console error that voicepass prevents: it occurs without a pass, and not with one."""

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Demo

pytestmark = [pytest.mark.browser, pytest.mark.long]

_ERROR = "error: WebSocket is already in CLOSING or CLOSED state."


def test_without_a_pass_the_socket_closes_and_the_console_shows_the_error(demo_in_own_time: Demo) -> None:
    demo = demo_in_own_time
    demo.button("Try without a pass").click()

    steps = demo.page.get_by_role("list", name="What happened without a pass")
    expect(steps).to_contain_text("3000 Could not authorize the conversation.")
    demo.wait(1)
    expect(steps).to_contain_text("WebSocket is already in CLOSING or CLOSED state.")
    assert demo.console == [_ERROR]


def test_with_a_pass_the_same_socket_stays_open_and_the_console_is_empty(demo_in_own_time: Demo) -> None:
    demo = demo_in_own_time
    demo.sign_in("Ada")

    demo.button("Try with a pass").click()

    steps = demo.page.get_by_role("list", name="What happened with a pass")
    expect(steps.get_by_text("Agent:")).to_have_count(2)
    expect(steps).to_contain_text("Ada")
    expect(steps).to_contain_text("Still open after 0 s")
    demo.wait(1)
    expect(steps).to_contain_text("Still open after 1 s")
    demo.button("Close the connection").click()
    expect(steps).to_contain_text("Closed: 1000")
    expect(demo.button("Try with a pass")).to_be_visible()
    assert demo.console == []


def test_a_user_who_is_not_signed_in_can_try_a_pass_as_a_guest(demo: Demo) -> None:
    demo.button("Try with a pass").click()

    expect(demo.page.get_by_role("list", name="What happened with a pass")).to_contain_text("Guest")
    assert demo.console == []
