"""A page on which the tests of the browser client run scripts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page

# Gives each script a signed-in user, and `open`, which connects with timers that end when the script calls `pass`.
LABORATORY = """async () => {
  const { Conversation } = ElevenLabsClient;
  const voicepass = await import("/v1/client.js");
  const signIn = async (at = "") => {
    const answer = await fetch(`${at}/demo/sign-in`, { method: "POST", body: JSON.stringify({ name: "Ada" }) });
    return (await answer.json()).token;
  };
  window.laboratory = (token) => {
    const states = [], sleeps = [], waiting = [];
    const until = async (status) => {
      while (!states.some((state) => state.status === status)) await new Promise((resolve) => waiting.push(resolve));
      return states.splice(0).at(-1);
    };
    const timers = {
      late: 0,
      now: () => Date.now() + timers.late,
      random: () => 1,
      sleep: (ms, signal) => new Promise((resolve) => {
        sleeps.push({ ms, pass: resolve });
        signal.addEventListener("abort", resolve);
      }),
    };
    const onChange = (state) => {
      states.push(state);
      waiting.splice(0).forEach((resolve) => resolve());
    };
    const open = ({ starter = Conversation, session, ...options } = {}) => voicepass.connect(starter, {
      token: () => token, session: { textOnly: true, ...session }, onChange, timers, ...options,
    });
    return { ...voicepass, Conversation, signIn, token, until, timers, sleeps, open };
  };
  window.signIn = signIn;
  window.soon = (work) => Promise.race([work(), new Promise((_, late) => setTimeout(late, 10_000, new Error("late")))]);
}"""


class Laboratory:
    """The page of one user, on which a test runs scripts."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def begin(self, script: str, given: object = None) -> Any:
        """Run the body of an async function as a new user. Its `lab` stays available for `go_on`."""
        return self.go_on(f"window.lab = laboratory(await signIn()); {script}", given)

    def go_on(self, script: str, given: object = None) -> Any:
        return self.page.evaluate(f"(given) => soon(async () => {{ {script} }})", given)

    @contextmanager
    def offline(self) -> Iterator[None]:
        self.page.context.set_offline(offline=True)
        try:
            yield
        finally:
            self.page.context.set_offline(offline=False)
