"""The meter of the user's minutes: it rises with each pass, falls to what was used, and counts one user only."""

import re

import pytest
from playwright.sync_api import Route, expect

from tests.browser.conftest import Demo, OpenDemo

pytestmark = [pytest.mark.browser, pytest.mark.long]

# Opens each conversation, because voicepass would return an unopened pass again.
OPEN_CONVERSATIONS = """async ([token, count]) => {
  const asUser = { method: "POST", headers: { Authorization: `Bearer ${token}` } };
  for (let opened = 0; opened < count; opened += 1) {
    const pass = await (await fetch("/v1/signed-url", asUser)).json();
    const socket = new WebSocket(pass.signed_url, ["convai"]);
    await new Promise((resolve) => socket.addEventListener("open", resolve));
    const initiation = { type: "conversation_initiation_client_data", dynamic_variables: pass.dynamic_variables };
    socket.send(JSON.stringify(initiation));
    await new Promise((resolve) => socket.addEventListener("message", resolve, { once: true }));
  }
}"""


def sign_in_and_read_token(demo: Demo) -> str:
    with demo.page.expect_response("**/demo/sign-in") as answer:
        demo.sign_in()
    return str(answer.value.json()["token"])


def expect_used(demo: Demo, time: str) -> None:
    expect(demo.minutes).to_have_attribute("aria-valuetext", re.compile(f"^{time} of 5:00 used or set aside$"))


def test_a_pass_reserves_a_minute_and_the_end_gives_the_unused_part_back(used_demo: Demo) -> None:
    demo = used_demo
    demo.sign_in()
    expect_used(demo, "0:00")

    demo.start()
    expect_used(demo, "1:00")
    expect(demo.minutes).to_have_attribute("aria-valuenow", "60")
    expect(demo.minutes).to_have_attribute("aria-valuemax", "300")
    expect(demo.minutes).to_have_accessible_description(re.compile("^1:00 of it is set aside for this pass"))

    demo.button("End conversation").click()
    expect_used(demo, "0:0[0-5]")
    expect(demo.minutes).to_have_accessible_description(
        re.compile(r"^The last pass used 0:0[0-5]\. The other (1:00|0:5\d) came back\.$")
    )
    assert demo.console == []


def test_while_connected_the_meter_shows_minutes_that_another_page_uses(demo_in_own_time: Demo) -> None:
    demo = demo_in_own_time
    token = sign_in_and_read_token(demo)
    demo.start()
    expect_used(demo, "1:00")

    demo.page.evaluate(OPEN_CONVERSATIONS, [token, 1])
    demo.wait(2)

    expect_used(demo, "2:00")
    expect(demo.minutes).to_have_accessible_description(re.compile("^1:00 of it is set aside for this pass"))


def test_a_user_without_minutes_sees_code_and_reset_and_other_users_can_talk(demo: Demo, open_demo: OpenDemo) -> None:
    token = sign_in_and_read_token(demo)
    demo.page.evaluate(OPEN_CONVERSATIONS, [token, 5])

    demo.button("Start conversation").click()

    expect(demo.status).to_have_text("No pass quota_exceeded The minutes of conversation are used up. Try again later.")
    at = r"(tomorrow|on [\w ]+) at \d\d:\d\d"
    expect(
        demo.page.get_by_text(re.compile(rf"^Resets {at}\. If you ask for help, say request \w+\.$"))
    ).to_be_visible()
    expect(demo.button("Start conversation")).to_be_enabled()
    expect_used(demo, "5:00")
    expect(demo.minutes).to_have_accessible_description(re.compile(f"^Minutes come back {at}"))
    expect(demo.minutes.locator("i").last).to_have_css("background-color", "rgb(163, 39, 28)")

    other = open_demo()
    other.sign_in("Grace")
    other.start()
    expect_used(other, "1:00")


def test_minutes_that_earlier_conversations_give_back_are_not_shown_as_the_last_passs(demo: Demo) -> None:
    """Without a webhook, several conversations can be settled at the same time, also while a pass is issued."""
    used = 240

    def show_used(route: Route) -> None:
        limit = {"name": "user_minutes_per_day", "used": used, "limit": 300, "resets_at": "2030-01-01T00:00:00Z"}
        route.fulfill(json={"usage": [limit]})

    demo.page.route("**/v1/usage", show_used)
    demo.sign_in()
    expect_used(demo, "4:00")

    used = 123  # ended conversations gave 2:57 back, and this pass reserved 1:00
    demo.start()
    expect_used(demo, "2:03")
    expect(demo.minutes).to_have_accessible_description(re.compile("^1:00 of it is set aside for this pass"))

    used = 6
    demo.button("End conversation").click()
    expect_used(demo, "0:06")
    expect(demo.minutes).to_have_accessible_description("1:57 came back from conversations that have ended.")


def test_signing_out_removes_the_minutes(used_demo: Demo) -> None:
    used_demo.sign_in()
    expect_used(used_demo, "0:00")

    used_demo.sign_out()

    expect(used_demo.minutes).to_have_count(0)


def test_a_refused_sign_in_gets_a_problem_document_like_the_services(shared_demo: Demo) -> None:
    page = shared_demo.page

    answer = page.request.post(f"{page.url}demo/sign-in", data={"name": ""})

    problem = answer.json()
    assert (answer.status, answer.headers["content-type"]) == (422, "application/problem+json")
    assert (problem["code"], problem["request_id"]) == ("request_invalid", answer.headers["x-request-id"])
