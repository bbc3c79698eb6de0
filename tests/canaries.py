"""The secrets of the suite, which a search can recognise, and a log handler that keeps every line for that search."""

import io
import logging

from voicepass.telemetry.logger import Event

API_KEY = "sk_canary5c6ee1f0f3a94c0b9e5d7a1b2c3d4e5f60718293a4b5c6d7"
JWT_SECRET = "canary-jwt-secret-4f9a1c7e2b8d5036e1f0a9b8c7d6e5f4"
SIGNATURE = "cvtkn_canary01k0abcdefghjkmnpqrstvwx"

FORBIDDEN = (API_KEY, JWT_SECRET, SIGNATURE, "cvtkn_", "conversation_signature=c", "eyJhbGciOi", "xi-api-key")
"""No log line may contain these. Every signature, signed URL and token begins with one of the last four."""


def secrets_in(text: str) -> list[str]:
    """List the forbidden texts that `text` contains."""
    lowered = text.lower()
    return [secret for secret in FORBIDDEN if secret.lower() in lowered]


class _Formatter(logging.Formatter):
    """Formats our events without redaction."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - `logging` calls it by this name
        event = record.msg
        message = f"{event.name} {dict(event.fields)!r}" if isinstance(event, Event) else record.message
        return f"{record.name} {record.levelname} {message}"


class CanaryLog:
    """Keeps every log line as it was before voicepass redacted it."""

    def __init__(self) -> None:
        self._lines = io.StringIO()
        self._handler = logging.StreamHandler(self._lines)
        self._handler.setFormatter(_Formatter())
        logging.getLogger().addHandler(self._handler)

    def text(self) -> str:
        return self._lines.getvalue()

    def leaking(self) -> list[str]:
        """List the lines so far that contain a secret, each cut to 400 characters."""
        text = self.text()
        return [line[:400] for line in text.splitlines() if secrets_in(line)] if secrets_in(text) else []

    def forget(self, since: int) -> None:
        """Delete what was logged from the character number `since` on."""
        self._lines.truncate(since)
        self._lines.seek(since)

    def close(self) -> None:
        logging.getLogger().removeHandler(self._handler)
