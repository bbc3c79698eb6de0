"""`attachWidget` with the real widget of ElevenLabs, in a browser, with the emulator as ElevenLabs."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Route

from tests.browser.conftest import World
from tests.browser.laboratory import Laboratory
from tests.test_frontends import install

pytestmark = [pytest.mark.browser, pytest.mark.long, pytest.mark.timeout(240)]

PACKAGE = "@elevenlabs/convai-widget-embed"
VENDOR = "https://api.us.elevenlabs.io"  # this version of the widget fetches its settings only from this host
# The image replaces the animated one, which takes seconds to draw without a graphics card.
PUT_A_WIDGET = """
    const attributes = {
      "text-input": "false",
      "avatar-image-url": "data:image/gif;base64,R0lGODlhAQABAAAAACw=",
      "dynamic-variables": '{"shop": "Berlin", "user_id": "mallory"}',
    };
    const element = window.widget = document.createElement("elevenlabs-convai");
    Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
    document.body.append(element);
    window.warnings = [];
    const { warn } = console;
    console.warn = (text) => warnings.push(text);
    window.putAway = () => {
      detach();
      element.remove();
      console.warn = warn;
    };
    const attach = (options) => { window.detach = lab.attachWidget(element, { token: () => lab.token, ...options }); };
"""


@pytest.fixture(scope="module")
def widget_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("widget")
    install(folder, {PACKAGE: "0.5.4"})
    return folder / "node_modules" / PACKAGE / "dist" / "index.js"


@pytest.fixture
def widget(
    lab: Laboratory, world: World, widget_script: Path, playwright_thread: ThreadPoolExecutor
) -> Iterator[Laboratory]:
    """A page with the widget's code. The emulator answers its calls of ElevenLabs' API."""

    def ask_the_emulator(route: Route) -> None:
        answer = route.fetch(url=route.request.url.replace(VENDOR, f"{world.cable.url}/_elevenlabs"))
        route.fulfill(response=answer, headers={**answer.headers, "Access-Control-Allow-Origin": "*"})

    def set_up(page: Page) -> None:
        page.route(f"{VENDOR}/**", ask_the_emulator)
        page.add_script_tag(path=widget_script, type="module")

    playwright_thread.submit(set_up, lab.page).result()
    yield lab
    playwright_thread.submit(lab.page.evaluate, "() => putAway()").result()
    playwright_thread.submit(lab.page.unroute_all, behavior="wait").result()


def find_button(lab: Laboratory, name: str) -> Locator:
    return lab.page.locator("elevenlabs-convai").get_by_role("button", name=name, exact=True)


def list_initiations(world: World) -> list[Any]:
    return [conversation.initiation for conversation in world.emulator.records.conversations]


def test_each_call_of_the_widget_uses_its_own_pass_of_the_signed_in_user(widget: Laboratory, world: World) -> None:
    widget.begin(f"{PUT_A_WIDGET} attach()")

    for _ in range(2):
        with widget.page.expect_response("**/v1/signed-url"):  # the pass for the next call
            find_button(widget, "Start a call").click()
        find_button(widget, "End").click()
    user_id, warnings = widget.go_on("return [(await lab.fetchPass({ token: () => lab.token })).user_id, warnings]")

    first, second = world.emulator.records.conversations
    assert first.conversation_id != second.conversation_id
    for initiation in list_initiations(world):
        assert initiation["source_info"]["source"] == "widget"
        assert initiation["user_id"] == user_id
        assert initiation["dynamic_variables"] == {"shop": "Berlin", "user_id": user_id, "user_name": "Ada"}
    assert world.passes_asked_for == 4, "one for each of two calls, one for the next call, and one of this test"
    assert warnings == []


def test_an_expired_pass_is_renewed_when_the_pointer_enters_the_widget(widget: Laboratory, world: World) -> None:
    widget.begin(f"{PUT_A_WIDGET} attach({{ timers: lab.timers }})")
    find_button(widget, "Start a call").wait_for()
    widget.page.mouse.move(0, 0)

    world.emulator.advance(901)
    widget.go_on("lab.timers.late += 901_000")
    with widget.page.expect_response("**/v1/signed-url"):
        find_button(widget, "Start a call").hover()
    with widget.page.expect_response("**/v1/signed-url"):
        find_button(widget, "Start a call").click()

    assert [conversation.signed for conversation in world.emulator.records.conversations] == [True]
    assert list_initiations(world)[0]["dynamic_variables"]["user_name"] == "Ada"


def test_a_widget_with_an_agent_id_causes_a_warning_and_is_not_changed(widget: Laboratory, world: World) -> None:
    warnings = widget.begin(f"""{PUT_A_WIDGET}
        element.setAttribute("agent-id", "agent_demo");
        attach();
        const config = {{ agentId: "agent_demo" }};
        element.dispatchEvent(new CustomEvent("elevenlabs-convai:call", {{ detail: {{ config }} }}));
        return [warnings, config]""")

    warning = "voicepass: remove agent-id from the widget. With it, the widget ignores the signed URL."
    assert warnings == [[warning, warning], {"agentId": "agent_demo"}]
    assert world.passes_asked_for == 0


def test_a_refused_pass_is_reported_to_the_page_and_retried_after_the_wait(widget: Laboratory, world: World) -> None:
    seen = widget.begin(f"""{PUT_A_WIDGET}
        const endings = [];
        const tokens = [() => null, () => lab.token];
        const options = {{ token: () => tokens.shift()(), timers: lab.timers, sentences: {{ pass_refused: "Non." }} }};
        attach({{ ...options, onError: ({{ error, sentence }}) => endings.push([error.code, sentence]) }});
        while (!lab.sleeps.length) await new Promise((resolve) => setTimeout(resolve, 5));
        element.dispatchEvent(new Event("pointermove"));
        const [pause] = lab.sleeps;
        pause.pass();
        await new Promise((resolve) => setTimeout(resolve));
        element.dispatchEvent(new Event("pointermove"));
        while (!element.hasAttribute("signed-url")) await new Promise((resolve) => setTimeout(resolve, 5));
        return [endings, pause.ms, tokens.length]""")

    assert seen == [[["not_signed_in", "Non."]], 10_000, 0]
    assert world.passes_asked_for == 1
