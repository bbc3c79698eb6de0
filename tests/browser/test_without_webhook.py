"""The demo without a webhook: short conversations that have ended do not count against the next one."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from starlette.types import ASGIApp

from elevenlabs_emulator import EmulatedAgent, Emulator
from tests.browser.conftest import Demo, _open_demos
from tests.servers import running
from voicepass.demo import AGENT_ID, EMULATOR_PATH, create_demo

pytestmark = [pytest.mark.browser, pytest.mark.long]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of the demo, and the number of ended conversations that would reach one if they still counted."""

    settings: dict[str, Any]
    ended_conversations: int
    minutes_at_the_end: str


# `None` replaces the demo's policy file: three conversations at once, and ten minutes reserved for each.
DEFAULT = Limits(
    settings={"voicepass_policy_file": None}, ended_conversations=3, minutes_at_the_end=r"10:\d\d of 60:00"
)
# The demo's own policy file: five minutes a day, and one reserved for each conversation.
DEMO = Limits(settings={}, ended_conversations=5, minutes_at_the_end=r"1:\d\d of 5:00")


@pytest.fixture
def demo_without_webhook(
    request: pytest.FixtureRequest, chromium: Browser, playwright_thread: ThreadPoolExecutor
) -> Iterator[tuple[Demo, Emulator, Limits]]:
    limits: Limits = request.param
    emulator = Emulator(agents=[EmulatedAgent(agent_id=AGENT_ID)])

    def make_demo(url: str) -> ASGIApp:
        emulator.public_ws_base = f"{url.replace('http', 'ws')}{EMULATOR_PATH}"
        return create_demo(url, emulator=emulator, elevenlabs_webhook_secret=None, **limits.settings)

    with running(make_demo) as url, _open_demos(chromium, url, playwright_thread) as open_page:
        yield playwright_thread.submit(open_page).result(), emulator, limits


@pytest.mark.parametrize("demo_without_webhook", [DEFAULT, DEMO], ids=["default", "demo"], indirect=True)
def test_after_as_many_short_conversations_as_the_limit_allows_the_next_is_granted(
    demo_without_webhook: tuple[Demo, Emulator, Limits],
) -> None:
    demo, emulator, limits = demo_without_webhook
    demo.sign_in()
    for _ in range(limits.ended_conversations):
        demo.start()
        demo.button("End conversation").click()
        expect(demo.status).to_contain_text("Disconnected 1000")

    demo.button("Start conversation").click()

    expect(demo.status).to_have_text("Connected")
    expect(demo.minutes).to_have_attribute("aria-valuetext", re.compile(f"^{limits.minutes_at_the_end} used"))
    expect(demo.minutes).to_have_accessible_description(re.compile(r"^10?:00 of it is set aside for this pass"))
    assert emulator.webhook_statuses == []
    assert len(emulator.records.conversations) == limits.ended_conversations + 1
    assert demo.console == []
