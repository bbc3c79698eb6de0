"""The browser client asks for the microphone before it requests a pass, and always switches the microphone off."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route

from elevenlabs_emulator import Fault
from tests.browser.conftest import World
from tests.browser.laboratory import Laboratory

pytestmark = [pytest.mark.browser, pytest.mark.long]

CLIENT = Path(__file__).parents[2] / "src" / "voicepass" / "api" / "client.js"

# Counts the page's requests for the microphone and for passes. `hold` keeps the browser's prompt open until `answer`.
WATCH = """() => {
  const devices = navigator.mediaDevices;
  const [ask, send] = [devices.getUserMedia.bind(devices), window.fetch];
  const tracks = [];
  const watch = (window.watch = { asked: 0, arrived: 0, sent: 0, prompt: null, liveAtEachRequest: [] });
  watch.live = () => tracks.filter((track) => track.readyState === "live").length;
  watch.hold = () => (watch.prompt = new Promise((resolve) => (watch.answer = resolve)));
  watch.turn = () => new Promise((resolve) => setTimeout(resolve));
  devices.getUserMedia = async (wish) => {
    watch.asked += 1;
    watch.liveAtEachRequest.push(watch.live());
    await watch.prompt;
    const stream = await ask(wish);
    tracks.push(...stream.getTracks());
    watch.arrived += 1;
    return stream;
  };
  window.fetch = (url, ...rest) => {
    if (/signed-url|conversation-token/.test(url.url ?? url)) watch.sent += 1;
    return send(url, ...rest);
  };
  window.unwatch = () => ([devices.getUserMedia, window.fetch] = [ask, send]);
}"""
VOICE = "{ session: { textOnly: false } }"


@pytest.fixture
def watched(lab: Laboratory, playwright_thread: ThreadPoolExecutor) -> Iterator[Laboratory]:
    playwright_thread.submit(lab.page.evaluate, WATCH).result()
    yield lab
    playwright_thread.submit(lab.page.evaluate, "() => unwatch()").result()


@contextmanager
def refuse_microphone(lab: Laboratory) -> Iterator[None]:
    """Make Chromium refuse the microphone, as it does after the user pressed Block."""
    lab.page.context.clear_permissions()
    try:
        yield
    finally:
        lab.page.context.grant_permissions(["microphone"])


def test_a_refused_microphone_sends_no_request(watched: Laboratory, world: World) -> None:
    with refuse_microphone(watched):
        seen = watched.begin(f"""
            let tokens = 0;
            const connection = lab.open({{ token: () => `${{tokens += 1}}`, ...{VOICE} }});
            const {{ cause, sentence, error }} = await connection.ended;
            const refusal = await connection.connected.catch((error) => error.name);
            return {{ cause, sentence, refusal, isKept: error.name === refusal, tokens, sent: watch.sent }}""")

    assert seen == {
        "cause": "microphone_denied",
        "sentence": "Allow the microphone in your browser, then try again.",
        "refusal": "NotAllowedError",
        "isKept": True,
        "tokens": 0,
        "sent": 0,
    }
    assert world.passes_asked_for == 0


def end_on_a_bare_page(page: Page, url: str) -> tuple[list[str], list[str]]:
    """Connect on a page that has only the client. Return the ending, and the paths that the page requested."""
    asked_for: list[str] = []

    def serve(route: Route) -> None:
        path = route.request.url.removeprefix(url)
        asked_for.append(path)
        if path == "v1/client.js":
            route.fulfill(content_type="text/javascript", body=CLIENT.read_text())
        else:
            route.fulfill(content_type="text/html", body="<!doctype html>")

    page.route("**/*", serve)
    page.goto(url)
    ending = page.evaluate("""async () => {
      const { connect } = await import("/v1/client.js");
      const connection = connect({ startSession: () => Promise.reject(new Error("never")) });
      const { cause, sentence } = await connection.ended;
      return [cause, sentence, await connection.connected.catch((error) => error.message)];
    }""")
    return ending, asked_for


def test_a_missing_microphone_sends_no_request(launch_chromium: Callable[..., Browser]) -> None:
    browser = launch_chromium("--disable-audio-input")
    try:
        page = browser.new_context(permissions=["microphone"]).new_page()
        ending, asked_for = end_on_a_bare_page(page, "http://127.0.0.1:1/")
    finally:
        browser.close()

    assert ending == [
        "microphone_missing",
        "No microphone was found. Connect one, then try again.",
        "Requested device not found",
    ]
    assert asked_for == ["", "v1/client.js"]


def test_an_insecure_page_sends_no_request(lab: Laboratory) -> None:
    page = lab.page.context.new_page()
    try:
        ending, asked_for = end_on_a_bare_page(page, "http://shop.example/")
    finally:
        page.close()

    for_developers = "The browser offers the microphone only to pages that are served over https or from localhost."
    assert ending == ["microphone_unavailable", "This service is not available at the moment.", for_developers]
    assert asked_for == ["", "v1/client.js"]


def test_a_text_conversation_never_asks_for_the_microphone(watched: Laboratory) -> None:
    seen = watched.begin("""
        const overrides = { conversation: { textOnly: true } };
        for (const session of [{ textOnly: true }, { textOnly: undefined, overrides }]) {
          const connection = lab.open({ session });
          await connection.connected;
          await connection.end();
        }
        return [watch.asked, watch.sent]""")

    assert seen == [0, 2]


def test_no_pass_is_requested_until_the_user_has_answered_the_prompt(watched: Laboratory, world: World) -> None:
    prompted = watched.begin(f"""
        watch.hold();
        window.connection = lab.open({VOICE});
        await lab.until("connecting");
        const {{ status, isWaitingForMicrophone, pass }} = connection.state;
        await watch.turn();
        return [status, isWaitingForMicrophone, pass === undefined, watch.asked, watch.sent]""")
    passes_before_the_answer = world.passes_asked_for
    answered = watched.go_on("""
        watch.answer();
        const { isWaitingForMicrophone } = await lab.until("connecting");
        await connection.connected;
        await connection.end();
        return [isWaitingForMicrophone === undefined, watch.sent]""")

    assert prompted == ["connecting", True, True, 1, 0]
    assert answered == [True, 1]
    assert (passes_before_the_answer, world.passes_asked_for) == (0, 1)


def test_the_client_keeps_its_stream_until_the_sdk_has_one_and_asks_once(watched: Laboratory, world: World) -> None:
    """For each conversation the SDK requests two streams: a first one, and the one that it sends."""
    first = watched.begin(f"""
        window.connection = lab.open({VOICE});
        await connection.connected;
        await watch.turn();
        return [watch.liveAtEachRequest, watch.live()]""")

    world.cable.pull()
    dropped = watched.go_on("await lab.until('waiting'); return watch.live()")
    world.cable.plug_in()
    back = watched.go_on("""
        lab.sleeps.at(-1).pass();
        await lab.until("connected");
        return watch.asked""")
    ended = watched.go_on("""
        await connection.end();
        return watch.live()""")

    assert first == [[0, 1, 2], 1]
    assert dropped == 0
    assert back == 5, "the client asks once, and the SDK twice for each of the two conversations"
    assert ended == 0


def test_an_end_during_the_prompt_takes_effect_at_once_and_stops_a_later_stream(
    watched: Laboratory, world: World
) -> None:
    seen = watched.begin(f"""
        watch.hold();
        const connection = lab.open({VOICE});
        while (watch.asked < 1) await watch.turn();
        const {{ cause }} = await connection.end();
        await lab.until("ended");
        watch.answer();
        while (!watch.arrived) await watch.turn();
        await watch.turn();
        return [cause, watch.live(), watch.sent, connection.state.status]""")

    assert seen == ["user_ended", 0, 0, "ended"]
    assert world.passes_asked_for == 0


FAILURES = {
    "the pass is refused": ("{ token: () => 'x.y.z' }", "pass_refused"),
    "the token cannot be had": ("{ token: () => Promise.reject(new Error('no')) }", "not_started"),
    "the service cannot be reached": ("{ service: 'http://127.0.0.1:1' }", "pass_refused"),
    "the SDK cannot begin": ("{ starter: { startSession: () => { throw new TypeError('no'); } } }", "not_started"),
    "the socket does not open": ("{ starter: withoutSocket }", "connection_lost"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_no_microphone_stays_on_after_a_failed_start(watched: Laboratory, failure: str) -> None:
    options, cause = FAILURES[failure]

    seen = watched.begin(f"""
        const withoutSocket = {{ startSession: (given) =>
          lab.Conversation.startSession({{ ...given, signedUrl: "ws://127.0.0.1:1/?" }}) }};
        const {{ cause }} = await lab.open({{ ...{VOICE}, ...{options} }}).ended;
        return [cause, watch.asked > 0, watch.live()]""")

    assert seen == [cause, True, 0]


ENDS = {
    "while the pass is on its way": "while (!watch.sent) await watch.turn(); await connection.end()",
    "while the SDK opens it": "while (!connection.state.pass) await watch.turn(); await connection.end()",
    "by the user": "await connection.connected; await connection.end()",
    "by the SDK": "(await connection.connected).endSession(); await connection.ended",
}


@pytest.mark.parametrize("when", ENDS)
def test_no_microphone_stays_on_after_the_end(watched: Laboratory, when: str) -> None:
    """The SDK cannot be stopped while it opens a conversation. It stops its streams when the conversation is open."""
    seen = watched.begin(f"""
        const openings = [];
        const starter = {{ startSession: (options) => {{
          openings.push(lab.Conversation.startSession(options));
          return openings[0];
        }} }};
        const connection = lab.open({{ starter, ...{VOICE} }});
        {ENDS[when]};
        await Promise.all(openings);
        while (watch.live()) await watch.turn();
        return (await connection.ended).cause""")

    assert seen == "user_ended"


def test_the_microphone_is_off_while_the_client_waits_to_retry(watched: Laboratory, world: World) -> None:
    world.emulator.faults["signed_url"] = Fault(status=503)

    seen = watched.begin(f"""
        const connection = lab.open({VOICE});
        const {{ because }} = await lab.until("waiting");
        const isLive = watch.live() > 0;
        await connection.end();
        return [because.cause, isLive, watch.asked]""")

    assert seen == ["pass_refused", False, 1]


@pytest.mark.parametrize("session", ["{ textOnly: false }", "{ textOnly: true }"])
def test_a_page_that_mounts_twice_uses_one_pass_and_one_that_ends_at_once_uses_none(
    watched: Laboratory, world: World, session: str
) -> None:
    seen = watched.begin(f"""
        const states = [];
        const options = {{ session: {session}, token: () => (states.push("token"), lab.token) }};
        const left = lab.open({{ ...options, onChange: ({{ status }}) => states.push(status) }});
        const {{ cause }} = await left.end();
        await watch.turn();
        const leftAtOnce = [cause, watch.asked, watch.sent, ...states];
        const first = lab.open(options);
        first.end();
        const second = lab.open(options);
        await second.connected;
        await second.end();
        return [leftAtOnce, watch.sent, (await first.ended).cause]""")

    assert seen == [["user_ended", 0, 0, "ended"], 1, "user_ended"]
    assert world.passes_asked_for == 1


def test_a_pass_that_arrives_after_the_user_ended_opens_no_conversation(watched: Laboratory) -> None:
    seen = watched.begin("""
        let [connection, started] = [null, false];
        const read = Response.prototype.text;
        Response.prototype.text = async function () {
          const text = await read.call(this);
          if (text.includes("signed_url")) connection.end();
          return text;
        };
        connection = lab.open({ starter: { startSession: async () => (started = true) } });
        await connection.ended;
        Response.prototype.text = read;
        await watch.turn();
        await watch.turn();
        return [connection.state.status, started]""")

    assert seen == ["ended", False]
