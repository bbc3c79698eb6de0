"""No secret is written: the suite searches its own log when it ends, and no repr shows a secret."""

import json
import logging

import pytest

from tests.canaries import API_KEY, JWT_SECRET, SIGNATURE, CanaryLog, secrets_in
from tests.conftest import settings_with, signed_url
from tests.tables import table
from voicepass.model import Agent, Credential, Credentials, PassRequest, Transport, User
from voicepass.telemetry.logger import MAX_TEXT_CHARACTERS, Logger, redact
from voicepass.telemetry.logs import configure_logging

TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ1In0.c2ln"


def test_the_search_of_the_suites_log_finds_a_secret(canary_log: CanaryLog) -> None:
    """Every worker searches its log when it ends (see conftest.py). This test proves that the search works."""
    configure_logging(log_format="json", level="debug")
    at = len(canary_log.text())
    logging.getLogger("some.library").warning("dialling %s", signed_url())
    Logger("voicepass.some").warning("dialling", url=signed_url())

    found = canary_log.leaking()
    canary_log.forget(at)

    assert len(found) == 2
    assert "some.library" in found[0]
    assert "voicepass.some" in found[1]
    assert canary_log.leaking() == []


def test_a_secret_shows_in_no_repr() -> None:
    holders = [
        settings_with(),
        Credential(secret=signed_url(), conversation_id="conv_1", expires_at=1.0, sealed=SIGNATURE.encode()),
        PassRequest(
            request_id="r",
            credentials=Credentials(authorization=(f"Bearer {SIGNATURE}",), cookies=(JWT_SECRET,)),
            alias="a",
            transport=Transport.WEBRTC,
        ),
        User(issuer="i", id="u-1", name=None, claims={"secret": JWT_SECRET}),
        Agent(alias="a", agent_id="agent_1", base_url="https://x"),
    ]

    shown = " ".join(f"{holder!r} {holder!s}" for holder in holders)

    assert secrets_in(shown) == []


@table(
    "text",
    [
        f"GET {signed_url()} failed",
        f"Illegal header value b'{API_KEY}'",
        "Authorization: Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ1In0.c2ln",
        "wss://x/?token=abc123&y=1 " + SIGNATURE,
        f"GET /eyJ-eyJ-{TOKEN}",
        f"GET /x{TOKEN}y",
        f"GET /a_{TOKEN}/{TOKEN}",
        f"GET /x{API_KEY}",
        json.dumps(f"first line\n{TOKEN}\n{API_KEY}\n{signed_url()}"),
    ],
)
def test_redaction_removes_secrets_from_text_that_is_not_ours(text: str) -> None:
    redacted = redact(text)

    assert secrets_in(redacted) == []
    assert "abc123" not in redacted
    assert "c2ln" not in redacted


@pytest.mark.parametrize("secret", [TOKEN, API_KEY, SIGNATURE, signed_url()])
@pytest.mark.parametrize("before", ["GET /", "GET /x", "GET /eyJ-", "key="])
def test_a_text_that_is_cut_within_a_secret_shows_no_part_of_it(before: str, secret: str) -> None:
    text = f"{before}{secret} and more"

    for most in range(len(text)):
        redacted = redact(text, most_characters=most)
        assert secrets_in(redacted) == []
        assert "eyJh" not in redacted
        assert "canary" not in redacted


def test_a_name_that_only_looks_like_a_secret_is_not_redacted() -> None:
    text = "user help_desk_7 of task_force in conv_01keyJab7 and eyJay@example.org"

    assert redact(text) == text


def test_a_long_text_is_cut_and_its_log_line_stays_valid_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(log_format="json", level="debug")
    token, most = "eyJ0eXAiOi.J9.c2ln", MAX_TEXT_CHARACTERS

    Logger("voicepass.some").info("some.event", text=f"{'x ' * 4090}{token}{'y' * 60_000}")
    logging.getLogger("some.library").error("%s", "y" * 60_000, exc_info=ValueError("x " * 30_000))

    ours, foreign = map(json.loads, capsys.readouterr().err.splitlines())
    assert ours["text"] == f"{'x ' * 4090}[redacted]"
    assert len(foreign["event"]) == len(foreign["exception"]) == most
