"""No secret is ever written: what is logged is searched when the suite ends, and no repr shows one."""

import logging

import pytest
import structlog

from tests.canaries import API_KEY, JWT_SECRET, SIGNATURE, CanaryLog, secrets_in
from tests.conftest import settings_with, signed_url
from voicepass.logs import configure_logging, redact
from voicepass.model import Agent, Credential, Credentials, PassRequest, Transport, User


def test_the_log_of_the_suite_would_show_a_secret(canary_log: CanaryLog) -> None:
    """Every worker searches all that it logged when it ends (see conftest.py); this proves that the search finds."""
    configure_logging(log_format="json", level="debug")
    at = len(canary_log.text())
    logging.getLogger("some.library").warning("dialling %s", signed_url())
    structlog.get_logger("voicepass.some").warning("dialling", url=signed_url())

    found = canary_log.leaking()
    canary_log.forget(at)

    assert len(found) == 2
    assert "some.library" in found[0]
    assert "voicepass.some" in found[1]
    assert canary_log.leaking() == []


def test_a_secret_shows_in_no_repr() -> None:
    holders = [
        settings_with(),
        Credential(secret=signed_url(), conversation_id="conv_1", expires_at=1.0),
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


@pytest.mark.parametrize(
    "text",
    [
        f"GET {signed_url()} failed",
        f"Illegal header value b'{API_KEY}'",
        "Authorization: Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ1In0.c2ln",
        "wss://x/?token=abc123&y=1 " + SIGNATURE,
    ],
)
def test_redaction_takes_secrets_out_of_foreign_text(text: str) -> None:
    redacted = redact(text)

    assert secrets_in(redacted) == []
    assert "abc123" not in redacted
