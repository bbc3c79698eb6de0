"""The page without a framework."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext

from elevenlabs_emulator import Emulator
from tests.examples.conftest import Street, open_window
from tests.examples.journey import LATER, expect_refusal, press, shop_and_talk, stay_muted_after_a_reconnect

pytestmark = [pytest.mark.browser, pytest.mark.long]


def test_a_shopper_writes_talks_and_reads_why_a_conversation_ended(
    chromium: Browser, contexts: list[BrowserContext], emulator: Emulator, street: Street, tmp_path: Path
) -> None:
    with street.shop(street.copy("plain-html", tmp_path)) as url:
        shop_and_talk(open_window(chromium, contexts), emulator, url, name="Paula")


def test_the_page_shows_a_sentence_when_voicepass_does_not_answer(
    chromium: Browser, contexts: list[BrowserContext], street: Street, tmp_path: Path
) -> None:
    with street.shop(street.copy("plain-html", tmp_path)) as url:
        shopper = open_window(chromium, contexts)
        shopper.page.route("**/v1/**", lambda route: route.abort())
        shopper.page.goto(url)
        shopper.page.get_by_role("textbox", name="Your name").fill("Petra")
        press(shopper.page, "Sign in")

        expect_refusal(shopper.page, "Talk", LATER)

    assert shopper.errors == []


def test_a_muted_microphone_stays_muted_after_a_network_drop(
    chromium: Browser, contexts: list[BrowserContext], street: Street, tmp_path: Path
) -> None:
    with street.shop(street.copy("plain-html", tmp_path)) as url:
        stay_muted_after_a_reconnect(open_window(chromium, contexts).page, url, name="Pia")
