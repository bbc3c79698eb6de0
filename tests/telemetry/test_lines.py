"""The log line of an attempt: one line that programs can parse, with the cause and without any secret."""

import json
import logging
from collections.abc import Iterator

import pytest

from tests.canaries import secrets_in
from tests.conftest import signed_url
from tests.tables import table
from voicepass import errors
from voicepass.model import Agent, Credentials, PassRequest, Transport, User
from voicepass.telemetry.attempt import Attempt
from voicepass.telemetry.lines import log_attempt, notify
from voicepass.telemetry.logger import Logger
from voicepass.telemetry.logs import LogFormat, configure_logging

HOSTILE = 'u"\n\r\x1b[31m\u2028{"event": "pass.granted"}'


@pytest.fixture(autouse=True)
def default_logging() -> Iterator[None]:
    yield
    configure_logging(log_format="json", level="debug")


def make_attempt(**changes: object) -> Attempt:
    request = PassRequest(
        request_id="r-1",
        credentials=Credentials(),
        alias=str(changes.pop("alias", "default")),
        transport=Transport.WEBSOCKET,
    )
    values: dict[str, object] = {
        "user": User(issuer="i", id="u-1", name=None, claims={}),
        "agent": Agent(alias="default", agent_id="agent_1", base_url="https://x"),
        "conversation_id": "conv_1",
        "credential_sha256": "0" * 64,
        "outcome": "granted",
    }
    return Attempt(request, **(values | changes))  # type: ignore[arg-type]


def test_a_granted_pass_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(log_format="json", level="info")

    log_attempt(make_attempt(seconds=0.0123))

    (line,) = capsys.readouterr().err.splitlines()
    event = json.loads(line)
    assert (event["event"], event["level"], event["logger"]) == ("pass.granted", "info", "voicepass.passes")
    assert (event["token_issuer"], event["user_id"]) == ("i", "u-1")
    assert (event["conversation_id"], event["duration_ms"]) == ("conv_1", 12.3)


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_claim_can_forge_a_line(capsys: pytest.CaptureFixture[str], log_format: LogFormat) -> None:
    configure_logging(log_format=log_format, level="info")

    log_attempt(make_attempt(user=User(issuer="i", id=HOSTILE, name=None, claims={})))

    written = capsys.readouterr().err
    assert len(written.splitlines()) == 1
    assert "\x1b[31m" not in written


@table(
    ("refusal", "level"),
    [
        (errors.TokenExpired, "info"),
        (errors.AgentNotAllowed, "info"),
        (errors.RateLimited, "info"),
        (errors.KeysUnavailable, "error"),
        (errors.KeyRejected, "error"),
        (errors.LedgerUnavailable, "error"),
        (errors.InternalError, "error"),
    ],
)
def test_a_refusal_is_logged_with_its_cause_and_as_an_error_only_if_the_operator_can_fix_it(
    capsys: pytest.CaptureFixture[str], refusal: type[errors.Refusal], level: str
) -> None:
    configure_logging(log_format="json", level="info")

    failed = make_attempt(
        outcome=refusal.code,
        is_operators_fault=refusal.is_operators_fault,
        operator_note="give the key convai_write",
        cause=ValueError(signed_url()),
    )
    log_attempt(failed)

    written = capsys.readouterr().err
    event = json.loads(written)
    assert (event["event"], event["code"], event["level"]) == ("pass.refused", refusal.code, level)
    assert (event["note"], event["cause"]) == ("give the key convai_write", "ValueError")
    assert secrets_in(written) == []


def test_an_unknown_alias_is_not_logged_because_it_is_the_callers_text(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(log_format="json", level="info")

    log_attempt(make_attempt(alias="x" * 64, agent=None, outcome="agent_not_allowed"))

    assert "xxxx" not in capsys.readouterr().err


def test_texts_of_other_libraries_are_redacted_and_their_debug_lines_are_dropped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging(log_format="json", level="debug")

    logging.getLogger("some.library").warning("dialling wss://x/?conversation_signature=zzz9&a=b")
    logging.getLogger("httpcore").debug("send_request_headers xi-api-key")
    logging.getLogger("uvicorn.error").debug("< GET %s", signed_url())
    Logger("voicepass.x").info("thing.happened", text="token=zzz9")

    written = capsys.readouterr().err
    assert len(written.splitlines()) == 2
    assert "zzz9" not in written
    assert secrets_in(written) == []


class Broken:
    """An observer that raises."""

    def __call__(self, _attempt: Attempt) -> None:
        raise ValueError(signed_url())


def test_an_observer_that_raises_is_named_in_one_line_and_the_others_still_get_the_attempt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging(log_format="json", level="info")
    seen: list[Attempt] = []

    notify([Broken(), seen.append], make_attempt())

    written = capsys.readouterr().err
    line = json.loads(written)
    assert len(seen) == 1
    assert (line["event"], line["level"]) == ("observer.failed", "error")
    assert (line["observer"], line["cause"]) == ("Broken", "ValueError")
    assert secrets_in(written) == []
