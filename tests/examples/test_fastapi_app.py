"""The example `fastapi-app` as a shop runs it: in its own process, with Chromium and the emulator."""

import os
import re
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from playwright.async_api import Page, async_playwright, expect

from elevenlabs_emulator import EmulatedAgent, Emulator, create_emulator
from tests.canaries import API_KEY
from tests.servers import free_port, running, started

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "fastapi-app"
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = ["--use-fake-device-for-media-stream", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    emulator = Emulator(
        agents=[EmulatedAgent(agent_id="agent_shop")], api_keys={API_KEY: frozenset({"convai_write", "convai_read"})}
    )
    port = free_port()
    with running(lambda _url: create_emulator(emulator)) as elevenlabs:
        settings = {
            "ELEVENLABS_API_KEY": API_KEY,
            "ELEVENLABS_AGENT_ID": "agent_shop",
            "ELEVENLABS_BASE_URL": elevenlabs,
            "VOICEPASS_DATABASE_URL": f"sqlite:///{tmp_path_factory.mktemp('shop') / 'voicepass.db'}",
        }
        command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port)]
        with started(command, cwd=EXAMPLE, environment={"PATH": os.environ["PATH"], **settings}):
            yield f"http://127.0.0.1:{port}"


@pytest.fixture
async def page(shop: str) -> AsyncIterator[Page]:
    if shutil.which(CHROMIUM) is None:
        missing = "this test needs Debian's Chromium: apt-get install chromium"
        if "REQUIRE_CHROMIUM" in os.environ:
            pytest.fail(missing)
        pytest.skip(missing)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False, args=FLAGS)
        context = await browser.new_context(permissions=["microphone"])
        page = await context.new_page()
        await page.goto(shop)
        yield page
        await browser.close()


@pytest.mark.anyio
@pytest.mark.browser
@pytest.mark.long
async def test_a_customer_signs_in_talks_mutes_and_sees_why_a_call_ended(page: Page) -> None:
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(error.message))
    status, minutes = page.get_by_role("status"), page.locator("#minutes")

    await page.get_by_label("Your name").fill("Ada")
    await page.get_by_role("button", name="Sign in").click()
    await expect(minutes).to_have_text("You have 60 minutes left.")
    await page.get_by_role("button", name="Call us").click()
    await expect(status).to_have_text("You are in a call.", timeout=15_000)
    await expect(page.get_by_role("log")).to_contain_text("Assistant: ")
    await expect(page.locator("#speaker")).to_have_text(re.compile("speaking|listening"))
    await expect(minutes).to_have_text("You have 50 minutes left.")
    await page.get_by_role("button", name="Mute").click()
    await expect(page.get_by_role("button", name="Mute")).to_have_attribute("aria-pressed", "true")
    await page.get_by_role("button", name="End call").click()
    await expect(status).to_have_text("You ended the call.")

    await page.context.clear_cookies()
    await page.get_by_role("button", name="Call us").click()
    await expect(status).to_have_text("You are signed out. Please sign in again.")
    assert problems == []


def test_every_cause_has_a_sentence_for_a_customer() -> None:
    client = (ROOT / "src" / "voicepass" / "api" / "client.d.ts").read_text().split("export type Cause =")[1]
    causes = re.findall(r'"(\w+)"', client.split(";")[0])
    page = (EXAMPLE / "page" / "talk.js").read_text()
    endings = page.split("const ENDINGS = {")[1].split("};")[0]

    assert re.findall(r"^  (\w+): ", endings, re.MULTILINE) == causes
    assert "ElevenLabs" not in page.replace("ElevenLabsClient", "")
