"""The browser client in a browser, over real sockets: when it requests a pass, when it waits, and why it stops."""

import re
from typing import Any

import pytest

from elevenlabs_emulator import CLOSINGS, Fault
from tests.browser.conftest import World
from tests.browser.laboratory import Laboratory
from tests.conftest import policy_file
from tests.servers import running
from voicepass.api.schemas import list_refusals
from voicepass.demo import create_demo
from voicepass.elevenlabs.codes import CAUSES

pytestmark = pytest.mark.browser

REFUSALS = list_refusals("pass")
ONE_PASS_A_MINUTE = '[limits.user]\npasses_per_minute = 1\nopen_conversations = "off"\nminutes_per_day = "off"\n'


def test_each_conversation_opens_with_its_own_pass(lab: Laboratory, world: World) -> None:
    seen = lab.begin(
        """
        const seen = [];
        for (let round = 0; round < 2; round += 1) {
          const connection = lab.open({ agent: "default" });
          const conversation = await connection.connected;
          const { status, pass, reconnects } = connection.state;
          const { user_name: name } = pass.dynamic_variables;
          seen.push([status, conversation.getId() === pass.conversation_id, reconnects, name]);
          seen.push((await connection.end()).cause, connection.state.status);
        }
        return seen;"""
    )

    assert seen == [["connected", True, 0, "Ada"], "user_ended", "ended"] * 2
    first, second = (conversation.conversation_id for conversation in world.emulator.records.conversations)
    assert first != second
    assert world.passes_asked_for == 2


def test_after_a_dropped_network_the_client_connects_with_a_new_pass(lab: Laboratory, world: World) -> None:
    lab.begin(
        "const connection = window.connection = lab.open(); await connection.connected; await lab.until('connected')"
    )

    world.cable.pull()
    dropped = lab.go_on(
        "const { because, ...state } = await lab.until('waiting'); return { ...state, why: because.cause }"
    )
    world.cable.plug_in()
    back = lab.go_on("""
        lab.sleeps.at(-1).pass();
        const { reconnects, conversation, pass } = await lab.until('connected');
        conversation.sendUserMessage("Hello");
        return { reconnects, opensItsOwn: conversation.getId() === pass.conversation_id }""")
    world.cable.pull()
    again = lab.go_on("""
        const { attempt, retryInSeconds } = await lab.until('waiting');
        await connection.end();
        return { attempt, retryInSeconds }""")

    assert dropped == {
        "status": "waiting",
        "reconnects": 1,
        "attempt": 1,
        "retryInSeconds": 0.5,
        "why": "connection_lost",
    }
    assert back == {"reconnects": 1, "opensItsOwn": True}
    assert again == {"attempt": 2, "retryInSeconds": 1}, "a bad connection must not use up passes"
    assert world.passes_asked_for == 2
    assert len({conversation.conversation_id for conversation in world.emulator.records.conversations}) == 2


def test_the_client_backs_off_and_stops_after_five_retries(lab: Laboratory, world: World) -> None:
    lab.begin("window.connection = lab.open(); await connection.connected")

    world.cable.pull()
    seen = lab.go_on("""
        for (let attempt = 0; attempt < 5; attempt += 1) {
          await lab.until('waiting');
          lab.sleeps.at(-1).pass();
        }
        const { cause, error, sentence } = await connection.ended;
        return { waits: lab.sleeps.map(({ ms }) => ms), cause, code: error.code, status: error.status, sentence }""")

    assert seen == {
        "waits": [500, 1000, 2000, 4000, 8000],
        "cause": "pass_refused",
        "code": "unreachable",
        "status": 0,
        "sentence": "The service cannot be reached. Check your network and try again.",
    }
    assert world.passes_asked_for == 1


def test_the_client_stops_after_its_time_limit_even_with_attempts_left(lab: Laboratory, world: World) -> None:
    lab.begin("""
        const timers = { ...lab.timers, random: () => 0.5 };
        window.connection = lab.open({ patienceSeconds: 3, timers });
        await connection.connected""")

    world.cable.pull()
    waits = lab.go_on("""
        await lab.until('waiting');
        lab.timers.late = 2_900;
        lab.sleeps.at(-1).pass();
        await connection.ended;
        return lab.sleeps.map(({ ms }) => ms)""")

    assert waits == [250]


def test_a_socket_that_stays_open_offline_is_replaced_when_the_network_is_back(lab: Laboratory, world: World) -> None:
    """Chromium does not close sockets when Playwright sets it offline."""
    lab.begin("window.connection = lab.open(); await connection.connected; await lab.until('connected')")

    with lab.offline():
        offline = lab.go_on("""
            while (!lab.sleeps.length) await new Promise((resolve) => setTimeout(resolve, 5));
            const [grace] = lab.sleeps;
            grace.pass();
            const { because, retryInSeconds } = await lab.until('waiting');
            return [grace.ms, because.cause, retryInSeconds]""")
        asked_for_offline = world.passes_asked_for
    back = lab.go_on("""
        const { retryInSeconds } = await lab.until('waiting');
        lab.sleeps.at(-1).pass();
        await lab.until('connected');
        await connection.end();
        return retryInSeconds""")

    assert offline == [10_000, "connection_lost", None]
    assert back == 0.5
    assert (asked_for_offline, world.passes_asked_for) == (1, 2)


def test_the_client_does_not_retry_the_first_connection(lab: Laboratory, world: World) -> None:
    """The user can press the button again, and every pass reserves minutes."""
    seen = lab.begin("""
        const starter = { startSession: (options) => lab.Conversation.startSession({
          ...options, signedUrl: "ws://127.0.0.1:1/?" }) };
        const connection = lab.open({ starter });
        const { cause, sentence } = await connection.ended;
        return [cause, sentence, await connection.connected.catch((error) => error.name)]""")

    assert seen == ["connection_lost", "The connection was lost.", "SessionConnectionError"]
    assert world.passes_asked_for == 1


def test_a_pass_that_expires_before_it_is_opened_is_replaced(lab: Laboratory, world: World) -> None:
    lab.begin("""
        let late = true;
        const starter = { startSession: async (options) => {
          if (late) await new Promise((resolve) => (window.wakeUp = resolve));
          late = false;
          return lab.Conversation.startSession(options);
        } };
        window.connection = lab.open({ starter });
        while (!window.wakeUp) await new Promise((resolve) => setTimeout(resolve, 5))""")

    world.emulator.advance(901)
    seen = lab.go_on("""
        lab.timers.late += 901_000;
        wakeUp();
        const { because } = await lab.until('waiting');
        lab.sleeps.at(-1).pass();
        await lab.until('connected');
        await connection.end();
        return [because.cause, because.closeCode]""")

    assert seen == ["pass_expired", 3000]
    assert world.passes_asked_for == 2


@pytest.mark.parametrize(
    ("closing", "cause"),
    [
        ("quota_exceeded", "quota_exceeded"),
        ("unauthorized", "unauthorized"),
        ("internal_error", "agent_failed"),
        ("too_many_concurrent", "too_many_concurrent"),
    ],
)
def test_the_client_retries_only_if_another_pass_helps(lab: Laboratory, world: World, closing: str, cause: str) -> None:
    world.emulator.faults["conversation"] = Fault(target="conversation", closing=closing)

    ending = lab.begin("""
        lab.timers.late = 3_600_000; // a clock that is an hour fast makes no pass old
        const { error, ...ending } = await lab.open().ended;
        return ending""")

    assert (ending["cause"], ending["closeCode"]) == (cause, CLOSINGS[closing].code)
    assert ending.get("closeReason") == (CLOSINGS[closing].reason or None)
    assert world.passes_asked_for == 1


def test_the_client_finds_a_cause_for_every_closing_of_the_emulator(lab: Laboratory) -> None:
    rows = [[row.name, row.code, row.reason] for row in CLOSINGS.values()]

    causes = lab.page.evaluate(
        """(rows) => Object.fromEntries(rows.map(([name, closeCode, closeReason]) =>
          [name, laboratory().explain({ reason: "error", closeCode, closeReason }).cause]))""",
        rows,
    )

    assert causes == {
        "unauthorized": "unauthorized",
        "unknown_agent": "agent_unknown",
        "host_not_allowed": "host_not_allowed",
        "request_error": "unauthorized",
        "invalid_message": "refused",
        "first_frame_timeout": "agent_failed",
        "variables_missing": "variables_missing",
        "override_not_allowed": "override_not_allowed",
        "language_unsupported": "language_unsupported",
        "quota_exceeded": "quota_exceeded",
        "agent_misconfigured": "agent_misconfigured",
        "daily_limit": "daily_limit",
        "too_many_concurrent": "too_many_concurrent",
        "internal_error": "agent_failed",
        "max_duration": "agent_ended",  # only its error event distinguishes it from agent_ended, and a row has no event
        "agent_ended": "agent_ended",
    }


def test_the_client_distinguishes_what_the_sdk_reports_without_a_code(lab: Laboratory) -> None:
    causes = lab.go_on("""
        const named = (name) => Object.assign(new Error("x"), { name });
        return [
          { reason: "user" },
          { reason: "agent", closeCode: 1000 },
          { reason: "agent", context: { type: "end_call", reason: "Agent ended the call" } },
          { reason: "error", message: "x", context: { type: "max_duration_exceeded" } },
          { reason: "error", message: "x", context: { type: "error" } },
          { reason: "error", message: "x", closeCode: 1006 },
          { reason: "error", message: "x", closeCode: 1012 },
          named("NotAllowedError"), named("NotFoundError"), named("NotReadableError"),
          named("ConnectionError"), named("TypeError"),
        ].map((what) => laboratory().explain(what).cause)""")

    assert causes == [
        *("user_ended", "agent_ended", "agent_ended", "max_duration"),
        *("connection_lost", "connection_lost", "connection_lost"),
        *("microphone_denied", "microphone_missing", "microphone_unavailable"),
        *("connection_lost", "not_started"),
    ]


def test_the_client_recognises_a_refused_override_and_a_user_who_ends_by_real_frames(lab: Laboratory) -> None:
    seen = lab.begin("""
        const forbidden = await lab.open({ session: { overrides: { agent: { firstMessage: "Hi" } } } }).ended;
        const connection = lab.open();
        (await connection.connected).endSession();
        return [forbidden.cause, forbidden.sentence, (await connection.ended).cause]""")

    assert seen == ["override_not_allowed", "This service is not available at the moment.", "user_ended"]


def test_a_refused_token_gives_an_error_with_the_services_detail(lab: Laboratory) -> None:
    seen = lab.begin("""
        const { cause, sentence, error } = await lab.open({ token: async () => "x.y.z" }).ended;
        return { cause, sentence, isPassError: error instanceof lab.PassError, ...error }""")

    request_id = seen.pop("requestId")
    assert re.fullmatch(r"\w{32}", request_id)
    detail = "The token was not accepted. Sign in again to get a new one."
    assert {name: value for name, value in seen.items() if name != "name" and value is not None} == {
        "cause": "pass_refused",
        "sentence": "Sign in again to start a conversation.",
        "isPassError": True,
        "code": "token_invalid",
        "status": 401,
        "detail": detail,
    }


def test_without_a_token_the_client_reports_not_signed_in_and_sends_no_request(lab: Laboratory, world: World) -> None:
    seen = lab.begin("""
        const summarise = ({ cause, error }) => [cause, error.name, error.code, error.status];
        const seen = [];
        for (const nothing of [null, undefined, ""]) {
          seen.push(summarise(await lab.open({ token: () => nothing }).ended));
          seen.push(summarise(await lab.open({ token: async () => nothing }).ended));
        }
        return seen;""")

    assert seen == [["pass_refused", "PassError", "not_signed_in", 0]] * 6
    assert world.passes_asked_for == 0


def test_after_a_drop_the_client_asks_again_for_a_token_that_it_did_not_get(lab: Laboratory, world: World) -> None:
    lab.begin("""
        const answers = [() => lab.token, () => { throw new Error("offline"); }, () => lab.token, () => null];
        const token = async () => answers.shift()();
        window.connection = lab.open({ token });
        await connection.connected; await lab.until('connected')""")

    world.cable.pull()
    dropped = lab.go_on("const { because } = await lab.until('waiting'); return because.cause")
    world.cable.plug_in()
    failed = lab.go_on("""
        lab.sleeps.at(-1).pass();
        const { because, attempt } = await lab.until('waiting');
        return [because.error.message, attempt]""")
    back = lab.go_on("lab.sleeps.at(-1).pass(); return (await lab.until('connected')).reconnects")
    world.cable.pull()
    signed_out = lab.go_on("""
        await lab.until('waiting');
        lab.sleeps.at(-1).pass();
        return (await connection.ended).error.code""")
    world.cable.plug_in()

    assert (dropped, failed, back, signed_out) == ("connection_lost", ["offline", 2], 1, "not_signed_in")
    assert world.passes_asked_for == 2


def test_before_the_first_conversation_the_client_asks_for_a_token_only_once(lab: Laboratory) -> None:
    seen = lab.begin("""
        let requests = 0;
        const { cause, error } = await lab.open({ token: () => { requests += 1; throw new Error("offline"); } }).ended;
        return [requests, cause, error.message]""")

    assert seen == [1, "not_started", "offline"]


def test_the_client_says_that_a_proxy_answered(lab: Laboratory) -> None:
    answers = iter([(502, "text/html", "<h1>Bad Gateway</h1>"), (200, "text/html", "<h1>Please log in</h1>")])

    def answer_as_proxy(route: Any) -> None:
        status, content_type, body = next(answers)
        route.fulfill(status=status, content_type=content_type, body=body, headers={"Retry-After": "7"})

    lab.page.route("**/v1/signed-url", answer_as_proxy)
    seen = lab.begin("""
        const summarise = ({ code, status, detail, retryAfterSeconds }) => [code, status, detail, retryAfterSeconds];
        const refused = () => lab.fetchPass({ token: () => lab.token }).catch(summarise);
        return [await refused(), await refused()]""")
    lab.page.unroute("**/v1/signed-url")

    assert seen == [["bad_answer", status, "This service is not available at the moment.", 7] for status in (502, 200)]


def test_a_session_cookie_works_in_place_of_a_token(lab: Laboratory) -> None:
    token = lab.begin("return lab.token")
    context, url = lab.page.context, lab.page.url
    context.add_cookies([{"name": "session", "value": token, "url": url, "httpOnly": True}])

    by_cookie = lab.go_on("return (await lab.fetchPass()).user_id")
    context.clear_cookies()
    without = lab.go_on("return lab.fetchPass().catch((error) => error.code)")

    assert by_cookie.startswith("user_")
    assert without == "token_missing"


def test_a_token_works_even_if_the_browser_has_a_cookie_of_another_user(lab: Laboratory) -> None:
    cookie = {"name": "session", "value": lab.begin("return lab.token"), "url": lab.page.url}
    lab.page.context.add_cookies([cookie])  # type: ignore[list-item]

    given = lab.begin("return (await lab.fetchPass({ token: () => lab.token })).user_id")
    lab.page.context.clear_cookies()

    assert given.startswith("user_")


def test_across_origins_the_client_waits_as_a_429_says_within_its_time_limit(lab: Laboratory, world: World) -> None:
    """The page imports the module of another service, which must call its own service and read Retry-After by CORS."""

    def make_neighbour(url: str) -> Any:
        origins = [world.cable.url]
        return create_demo(url, voicepass_allowed_origins=origins, voicepass_policy_file=policy_file(ONE_PASS_A_MINUTE))

    with running(make_neighbour) as url:
        answer = lab.page.request.post(f"{url}/demo/sign-in", data={"name": "Ada"})
        seen = lab.go_on(
            """
            const [url, token] = given;
            const theirs = await import(`${url}/v1/client.js`);
            const lab = laboratory(token);
            await theirs.fetchPass({ token: () => token });
            const options = { token: () => token, onChange: () => {}, timers: lab.timers };
            const impatient = await theirs.connect(lab.Conversation, { ...options, patienceSeconds: 1 }).ended;
            const { code, status, retryAfterSeconds, resetsAt } = impatient.error;
            const patient = lab.open({ service: url, patienceSeconds: 90 });
            const { because, retryInSeconds } = await lab.until("waiting");
            const ended = await patient.end();
            const causes = { because: because.cause, ended: ended.cause };
            return { code, status, retryAfterSeconds, resetsAt, retryInSeconds, ...causes };""",
            [url, answer.json()["token"]],
        )

    assert 50 < seen["retryAfterSeconds"] <= 60
    assert seen["resetsAt"].endswith("Z")
    assert seen["retryInSeconds"] == pytest.approx(seen["retryAfterSeconds"] + 0.5, abs=3)
    causes = {name: seen[name] for name in ("code", "status", "because", "ended")}
    assert causes == {"code": "rate_limited", "status": 429, "because": "pass_refused", "ended": "user_ended"}


def test_a_conversation_that_is_ended_while_it_opens_does_not_stay_open(lab: Laboratory) -> None:
    seen = lab.begin("""
        let opening;
        const starter = { startSession: (options) => (opening = lab.Conversation.startSession(options)) };
        const connection = lab.open({ starter });
        while (!opening) await new Promise((resolve) => setTimeout(resolve, 1));
        const { cause } = await connection.end();
        const isOpen = (await opening).isOpen();
        const error = await connection.connected.catch((refusal) => refusal.message);
        return [cause, isOpen, connection.state.status, error]""")

    assert seen == ["user_ended", False, "ended", "You ended the conversation."]


def test_an_error_in_the_pages_onchange_does_not_end_the_conversation(lab: Laboratory) -> None:
    seen = lab.begin("""
        const reported = [];
        const listen = (event) => { reported.push(event.message); event.preventDefault(); };
        addEventListener("error", listen);
        const connection = lab.open({ onChange: () => { throw new Error("oops"); } });
        await connection.connected;
        await connection.end();
        removeEventListener("error", listen);
        return reported""")

    assert set(seen) == {"Uncaught Error: oops"}


def test_webrtc_uses_a_conversation_token_and_leaves_reconnects_to_livekit(lab: Laboratory, world: World) -> None:
    """The tests have no WebRTC server, so a fake replaces the SDK. The pass is real."""
    seen = lab.begin("""
        let given, session;
        const starter = { startSession: async (options) => {
          given = options;
          session = { endSession: () => options.onDisconnect({ reason: "user" }), getId: () => "conv_1" };
          options.onConversationCreated(session);
          options.onConnect({ conversationId: "conv_1" });
          return session;
        } };
        const gone = { reason: "error", message: "x", context: { type: "connection_state_changed" } };
        const connection = lab.open({ starter, transport: "webrtc" });
        await connection.connected;
        given.onDisconnect(gone);
        const closed = await connection.ended;
        const again = window.connection = lab.open({ starter, transport: "webrtc" });
        await again.connected;
        window.drop = () => given.onDisconnect(gone);
        const isToken = given.conversationToken.split(".").length === 3;
        return [isToken, given.signedUrl === undefined, given.userId, closed.cause]""")
    with lab.offline():
        lost = lab.go_on("""
            while (!lab.sleeps.length) await new Promise((resolve) => setTimeout(resolve, 5));
            drop();
            const { because } = await lab.until('waiting');
            await connection.end();
            return because.cause""")

    assert seen[:2] == [True, True]
    assert seen[2].startswith("user_")
    assert seen[3] == "agent_ended"
    assert lost == "connection_lost"
    assert [call.path for call in world.emulator.records.calls] == ["/v1/convai/conversation/token"] * 2


def test_if_webrtc_fails_the_client_tries_the_websocket_once_if_that_is_allowed(lab: Laboratory, world: World) -> None:
    """The real SDK connects to LiveKit's real host, which does not resolve in these tests."""
    seen = lab.begin("""
        const dialled = [];
        const starter = { startSession: (options) => {
          dialled.push("conversationToken" in options ? "webrtc" : "websocket");
          return lab.Conversation.startSession(options);
        } };
        const refused = await lab.open({ starter, transport: "webrtc" }).ended;
        const connection = lab.open({ starter, transport: "webrtc", fallback: "websocket" });
        await connection.connected;
        await connection.end();
        const broken = { startSession: (options) => {
          dialled.push("signedUrl" in options ? "websocket" : "webrtc");
          return lab.Conversation.startSession({ ...options, signedUrl: "ws://127.0.0.1:1/?" });
        } };
        const given_up = await lab.open({ starter: broken, transport: "webrtc", fallback: "websocket" }).ended;
        return { refused: refused.cause, dialled, given_up: given_up.cause, waits: lab.sleeps.length }""")

    assert seen == {
        "refused": "connection_lost",
        "dialled": ["webrtc", "webrtc", "websocket", "webrtc", "websocket"],
        "given_up": "connection_lost",
        "waits": 0,
    }
    requested = [call.path.rpartition("/")[2] for call in world.emulator.records.calls]
    assert requested == ["token", "token", "get-signed-url", "token", "get-signed-url"]


def test_after_a_refused_pass_the_client_does_not_change_to_the_websocket(lab: Laboratory, world: World) -> None:
    world.emulator.faults["token"] = Fault(target="token", status=401)

    cause = lab.begin("return (await lab.open({ transport: 'webrtc', fallback: 'websocket' }).ended).cause")

    assert cause == "pass_refused"
    assert {call.path for call in world.emulator.records.calls} == {"/v1/convai/conversation/token"}


def test_the_sdk_gets_the_livekit_host_that_the_pass_names(lab: Laboratory) -> None:
    seen = lab.go_on("""
        const pass = { conversation_token: "x", user_id: "u-1", dynamic_variables: {} };
        return [null, undefined, "wss://livekit.example"].map((livekit_url) =>
          laboratory().asSession({ ...pass, livekit_url }))""")

    session = {"conversationToken": "x", "userId": "u-1", "dynamicVariables": {}}
    assert seen == [session, session, session | {"livekitUrl": "wss://livekit.example"}]


def test_a_page_can_replace_each_sentence_also_by_the_code_of_a_refusal(lab: Laboratory) -> None:
    seen = lab.begin("""
        const sentences = { user_ended: "Fini.", pass_refused: ({ error, sentence }) => `${error.code}: ${sentence}` };
        const connection = lab.open({ sentences });
        await connection.connected;
        const ended = await connection.end();
        const refused = await lab.open({ sentences, token: () => null }).ended;
        const explained = lab.explain({ reason: "user" }, sentences);
        return [ended, connection.state.ending, explained, refused].map(({ sentence }) => sentence)""")

    assert seen == ["Fini.", "Fini.", "Fini.", "not_signed_in: Sign in to start a conversation."]


@pytest.mark.parametrize("own", ["null", "() => undefined", "() => { throw new Error('a mistake of the page'); }"])
def test_if_the_pages_sentence_fails_the_default_is_shown_and_the_connection_ends(own: str, lab: Laboratory) -> None:
    seen = lab.begin(f"""
        addEventListener("error", (event) => event.preventDefault());
        const connection = lab.open({{ sentences: {{ user_ended: {own} }} }});
        await connection.connected;
        return [(await connection.end()).sentence, connection.state.status]""")

    assert seen == ["You ended the conversation.", "ended"]


def test_only_the_developers_message_says_that_the_origin_may_not_be_allowed(lab: Laboratory) -> None:
    with running(create_demo) as elsewhere:
        seen = lab.begin(
            """
            const of = async (service) => {
              const { error, sentence } = await lab.open({ service }).ended;
              return [sentence, error.message];
            };
            return [await of(given), location.origin]""",
            elsewhere,
        )

    (sentence, message), origin = seen
    assert sentence == "The service cannot be reached. Check your network and try again."
    blocked = f"VOICEPASS_ALLOWED_ORIGINS does not list this page's origin, {origin}"
    assert message == f"{elsewhere} cannot be reached, or {blocked}."


def test_no_sentence_for_a_page_names_a_company_a_setting_or_a_header(lab: Laboratory) -> None:
    details = {kind.code: [kind.status, kind.detail] for kind in REFUSALS}

    sentences = lab.page.evaluate(
        """(details) => {
          const { PassError, explain } = laboratory();
          return Object.entries(details).map(([code, [status, detail]]) =>
            explain(new PassError({ code, status, detail })).sentence);
        }""",
        details,
    )

    sentences += [cause.browser["sentence"] for cause in CAUSES.values() if cause.browser]
    for sentence in sentences:
        assert sentence[-1] == "."
        assert len(sentence) <= 90
        assert not re.search(r"ElevenLabs|voicepass|VOICEPASS|API|operator|log\b|JWT|header|'", sentence), sentence
