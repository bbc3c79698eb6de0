"""ElevenLabs, or a proxy in its place, sends answers that its API does not describe: the doctor reports a failure."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from websockets.asyncio.server import ServerConnection

from elevenlabs_emulator import create_emulator
from tests.canaries import API_KEY, secrets_in
from tests.cli.test_cli import ENVIRONMENT, run
from tests.conftest import settings_with
from tests.doctor.conftest import AGENT_ID, WEBHOOK_SECRET, State, build_emulator
from tests.doctor.test_checks import try_server
from tests.tables import table
from voicepass.config.build import configure
from voicepass.doctor import examine
from voicepass.doctor.findings import Case
from voicepass.doctor.workspace import check_workspace, open_adapters, sign_url
from voicepass.elevenlabs.codes import Outcome

SIGN, AGENT = "/v1/convai/conversation/get-signed-url", f"/v1/convai/agents/{AGENT_ID}"
SETTINGS, WEBHOOKS = "/v1/convai/settings", "/v1/workspace/webhooks"
TOOL = f"/v1/convai/tools/tool_{AGENT_ID}"
HTML = "<!DOCTYPE html><title>Just a moment…</title>"
CUT = '{"a": 1,'  # its Content-Length is larger
NOTICED = [{"answer_unusable", "answer_unreadable"}, {"elevenlabs_unavailable", "settings_unanswered"}]
SHAPES = [CUT, HTML, "", "null", "5", '"text"', "[]", "[{}]", "{}", '{"a": {"b": [1,', "[" * 100_000, '{"a": "\ufffe']


class EmulatorWithBadAnswer:
    """The emulator, except that one path answers with `body`."""

    def __init__(self, path: str = "", body: str = "") -> None:
        emulator = build_emulator(State(agent={"tool_variables": {"user_id"}}))
        emulator.webhooks.url = "https://voice.example/v1/webhooks/elevenlabs"
        self.emulator: ASGIApp = create_emulator(emulator)
        self.path, self.body = path, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_bad = scope["type"] == "http" and scope["path"] == self.path
        length = {"content-length": "99"} if self.body is CUT else {}
        answer = Response(self.body, media_type="application/json", headers=length) if is_bad else self.emulator
        await answer(scope, receive, send)


def build_case(url: str) -> Case:
    settings = settings_with(
        elevenlabs_agent_id=AGENT_ID,
        elevenlabs_base_url=url,
        elevenlabs_api_key=SecretStr(API_KEY),
        elevenlabs_webhook_secret=SecretStr(WEBHOOK_SECRET),
    )
    return Case(settings=settings, configuration=configure(settings), alias="default", with_conversation=False)


@table(
    ("path", "body", "check", "cause"),
    [
        (SIGN, '{"signed_url": 5}', "api_key", "answer_unusable"),
        (AGENT, '{"conversation_config": {}, "platform_settings": null}', "duration", "answer_unreadable"),
        (AGENT, '{"conversation_config": {"turn": 5}, "platform_settings": {}}', "silence", "answer_unreadable"),
        (AGENT, '{"conversation_config": {}, "platform_settings": {"auth": {"allowlist": [5]}}}', "allowlist",
         "answer_unreadable"),
        (SETTINGS, '{"webhooks": []}', "webhook", "answer_unreadable"),
        (WEBHOOKS, '{"webhooks": [{"webhook_id": "wh_emulated", "webhook_url": "http://["}]}', "webhook",
         "answer_unreadable"),
        (WEBHOOKS, '{"webhooks": [null]}', "webhook", "answer_unreadable"),
    ],
)  # fmt: skip
def test_an_answer_of_another_shape_is_a_failure_with_its_own_cause(
    stage: tuple[Any, str], path: str, body: str, check: str, cause: str
) -> None:
    stage[0].app = EmulatorWithBadAnswer(path, body)

    findings = asyncio.run(examine(build_case(stage[1])))

    assert (check, cause) in {
        (finding.check, finding.cause) for finding in findings if finding.outcome is Outcome.FAILED
    }


@pytest.mark.anyio
async def test_the_doctor_reports_each_answer_that_is_html_cut_off_or_of_another_shape(
    stage: tuple[Any, str],
) -> None:
    routes = {SIGN: "api_key", AGENT: "duration", TOOL: "variables", SETTINGS: "webhook", WEBHOOKS: "webhook"}
    case = build_case(stage[1])
    elevenlabs = stage[0].app = EmulatorWithBadAnswer()
    unnoticed = []

    async with open_adapters(case) as adapters:
        for path, check in routes.items():
            for body in SHAPES:
                elevenlabs.path, elevenlabs.body = path, body
                findings, reader, _ = await sign_url(case, adapters)
                findings += await check_workspace(case, reader) if reader else []
                failed = {finding.check for finding in findings if finding.cause in NOTICED[body is CUT]}
                unnoticed += [] if check in failed else [(path, body[:20])]

    assert unnoticed == []


@pytest.mark.parametrize(("path", "body"), [(AGENT, HTML), (WEBHOOKS, '{"webhooks": "?"}')])
def test_the_command_exits_with_1_and_shows_no_traceback(
    stage: tuple[Any, str], tmp_path: Path, path: str, body: str
) -> None:
    stage[0].app = EmulatorWithBadAnswer(path, body)
    environment = ENVIRONMENT | {"ELEVENLABS_BASE_URL": stage[1], "ELEVENLABS_AGENT_ID": AGENT_ID}

    ended = run("doctor", "--no-conversation", cwd=tmp_path, environment=environment)

    assert (ended.returncode, ended.stderr) == (1, "")
    assert "ElevenLabs' answer is not what its API describes" in " ".join(ended.stdout.split())
    assert secrets_in(ended.stdout) == []


ODD_FRAMES: list[str | bytes] = [
    "[]",
    "5",
    "{",
    b"\xff\xfe",
    "[" * 100_000,
    '{"type": ["ping"]}',
    '{"type": "error", "error_event": "x"}',
    '{"type": "error", "error_event": {"reason": {}}}',
    '{"type": "conversation_initiation_metadata"}',
    '{"type": "ping", "ping_event": "x"}',
    '{"type": "ping"}',
]


@pytest.mark.anyio
async def test_after_odd_frames_the_doctor_explains_a_conversation_by_its_close_reason() -> None:
    async def behave(socket: ServerConnection) -> None:
        await socket.recv()
        for frame in ODD_FRAMES:
            await socket.send(frame)
        await socket.close(1002, "This request exceeds your quota limit.")

    assert (await try_server(behave)).cause == "quota_exhausted"
