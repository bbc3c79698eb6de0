"""client.js in a browser of 2021: Chromium from which a script deletes the newer functions."""

from collections.abc import Callable

import pytest
from playwright.sync_api import Browser

from tests.browser.conftest import World

pytestmark = pytest.mark.browser

# Deletes what Safari 14.1, Chrome 85 or Firefox 79 lack. They also ignore the option `signal` of addEventListener.
MAKE_OLD = """
  for (const [owner, names] of [
    [AbortSignal, ["any", "timeout", "abort"]],
    [AbortSignal.prototype, ["throwIfAborted", "reason"]],
    [Promise, ["any", "try", "withResolvers"]],
    [Object, ["hasOwn", "groupBy"]],
    [Map, ["groupBy"]],
    [Array, ["fromAsync"]],
    [Array.prototype, ["at", "findLast", "findLastIndex", "toReversed", "toSorted", "toSpliced", "with"]],
    [String.prototype, ["at", "isWellFormed", "toWellFormed"]],
    [Set.prototype, ["union", "intersection", "difference", "isSubsetOf"]],
    [URL, ["canParse", "parse"]],
    [Response, ["json"]],
    [Crypto.prototype, ["randomUUID"]],
    [globalThis, ["structuredClone", "reportError", "Iterator", "scheduler", "navigation"]],
  ]) for (const name of names) delete owner[name];
  const add = EventTarget.prototype.addEventListener;
  EventTarget.prototype.addEventListener = function (type, listener, options) {
    const { signal, ...known } = typeof options === "object" && options ? options : { capture: Boolean(options) };
    return add.call(this, type, listener, known);
  };
"""

CONVERSE = """async () => {
  const { connect, explain, fetchPass } = await import("/v1/client.js");
  const answer = await fetch("/demo/sign-in", { method: "POST", body: JSON.stringify({ name: "Ada" }) });
  const { token } = await answer.json();
  const seen = [];
  const errors = [];
  addEventListener("error", (event) => { errors.push(event.message); event.preventDefault(); });
  const onChange = ({ status }) => { seen.push(status); throw new Error("the page's mistake"); };
  const options = { token: () => token, onChange, session: { textOnly: true } };
  const connection = connect(ElevenLabsClient.Conversation, options);
  const conversation = await connection.connected;
  const isItsOwn = conversation.getId() === connection.state.pass.conversation_id;
  const { cause } = await connection.end();

  const aborted = new AbortController();
  aborted.abort();
  const reasons = [
    await fetchPass({ token: () => token, signal: aborted.signal }).catch((error) => error.name),
    await fetchPass({ token: () => "x\\ny" }).catch(explain).then(({ cause, error }) => [cause, error.name]),
    await fetchPass({ service: "https://user:password@voice.example" }).catch((error) => error.name),
    await fetchPass({ agent: 1n }).catch((error) => error.name),
  ];
  return { seen: [...new Set(seen)], errors: [...new Set(errors)], isItsOwn, cause, reasons };
}"""


@pytest.fixture
def run_in_old_browser(
    chromium: Browser, world: World, playwright_thread: object
) -> Callable[[str], dict[str, object]]:
    """Runs a script in a page without the newer functions."""
    del playwright_thread  # requested because the test must run in it

    def run(script: str) -> dict[str, object]:
        context = chromium.new_context()
        try:
            page = context.new_page()
            page.goto(world.cable.url, wait_until="load")
            # Deletes them and runs the script in one task, because Playwright's own scripts need some of them.
            late = "new Promise((_, reject) => setTimeout(reject, 20_000, new Error('late')))"
            work = f"async () => {{ {MAKE_OLD} return Promise.race([({script})(), {late}]); }}"
            result: dict[str, object] = page.evaluate(work)
            return result
        finally:
            context.close()

    return run


@pytest.mark.long
def test_a_conversation_works_and_mistakes_of_the_page_are_reported(
    run_in_old_browser: Callable[[str], dict[str, object]], world: World
) -> None:
    ran = run_in_old_browser(CONVERSE)

    assert ran == {
        "seen": ["connecting", "connected", "ended"],
        "errors": ["Uncaught Error: the page's mistake"],
        "isItsOwn": True,
        "cause": "user_ended",
        "reasons": ["AbortError", ["not_started", "TypeError"], "TypeError", "TypeError"],
    }
    assert world.passes_asked_for == 1, "a mistake of the page uses no pass"
