"""A pass with a single mistake is refused, and the page shows the reason."""

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Demo

pytestmark = [pytest.mark.browser, pytest.mark.long]

_UNAUTHORIZED = "3000 Could not authorize the conversation."


@pytest.mark.parametrize(
    ("fault", "ending"),
    [
        ("Expired", _UNAUTHORIZED),
        ("Used before", _UNAUTHORIZED),
        ("Tampered with", _UNAUTHORIZED),
        ("Signature absent", _UNAUTHORIZED),
        (
            "Variable user_name missing",
            "1008 Missing required dynamic variables in first message: {'user_name'}",
        ),
    ],
)
def test_the_page_shows_the_close_code_and_reason_of_a_broken_pass(used_demo: Demo, fault: str, ending: str) -> None:
    demo = used_demo
    demo.sign_in()
    demo.break_the_pass(fault)

    demo.button("Start conversation").click()

    expect(demo.status).to_have_text(f"Disconnected {ending}")
    expect(demo.button("Send")).to_be_disabled()
    assert not [line for line in demo.console if "CLOSING or CLOSED" in line]


def test_a_voice_conversation_with_a_broken_pass_shows_the_same_reason(used_demo: Demo) -> None:
    demo = used_demo
    demo.sign_in()
    demo.page.get_by_role("radio", name="Voice").check()
    demo.break_the_pass("Tampered with")

    demo.button("Start conversation").click()

    expect(demo.status).to_have_text(f"Disconnected {_UNAUTHORIZED}")
    demo.page.get_by_role("radio", name="Text").check()


def test_an_expired_pass_has_no_time_left_and_the_next_pass_works(used_demo: Demo) -> None:
    demo = used_demo
    demo.sign_in()
    demo.break_the_pass("Expired")
    demo.button("Start conversation").click()
    timer = demo.page.get_by_role("timer", name="Time left")
    expect(timer).to_have_text("0:00")
    expect(demo.voice_pass).to_contain_text("Expired")
    expect(demo.status).to_contain_text("Disconnected")

    demo.break_the_pass("None, a good pass")
    demo.start()

    expect(demo.voice_pass).to_contain_text("Used")
    expect(timer).to_have_count(0)
