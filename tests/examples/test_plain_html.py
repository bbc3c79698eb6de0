"""The page without a framework."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext

from elevenlabs_emulator import Emulator
from tests.examples.conftest import Street, open_window
from tests.examples.journey import shop_and_talk

pytestmark = [pytest.mark.browser, pytest.mark.long]


def test_a_shopper_writes_talks_and_learns_why_it_ended(
    chromium: Browser, contexts: list[BrowserContext], emulator: Emulator, street: Street, tmp_path: Path
) -> None:
    with street.shop(street.copy("plain-html", tmp_path)) as url:
        shop_and_talk(open_window(chromium, contexts), emulator, url, name="Paula")
