"""The logger of each module. It writes events with fields to the standard logger of its name.

`logs` writes them as the lines of the service. An app around voicepass gets them as text, in its own log.
"""

import logging
import re
import string
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Final

MAX_TEXT_CHARACTERS: Final = 8192  # of one value in a line; a longer value is cut before it is searched for secrets

_TOKEN_CHARACTERS: Final = string.ascii_letters + string.digits + "_-."

# Each text is searched for the marks first, which takes a hundredth of the pattern's time.
# Each pattern consumes the whole run of characters, so that it reads none twice.
_SECRETS: Final = (
    (
        ("conversation_signature=", "token="),
        re.compile(r"(conversation_signature|token)=[^&\s\"']++"),
        lambda found: f"{found[1]}=[redacted]",
    ),
    # An alias such as "help_desk_2" contains the mark of a key too; a real key goes on for 48 characters.
    (
        ("sk_", "cvtkn_"),
        re.compile(r"(?:cvtkn_|(?<![A-Za-z0-9_])sk_|sk_(?=[A-Za-z0-9]{24}))[A-Za-z0-9_-]*+"),
        lambda _: "[redacted]",
    ),
    # Only two dots make a token: a random id may contain the mark by chance.
    (
        ("eyJ",),
        re.compile(r"eyJ[A-Za-z0-9_-]*+(?:\.[A-Za-z0-9_-]*+)*+"),
        lambda found: "[redacted token]" if found[0].count(".") > 1 else found[0],
    ),
)


@dataclass(frozen=True, slots=True)
class Event:
    """What happened. As text it is one line without secrets: a field's repr has no line breaks."""

    name: str
    fields: Mapping[str, object]

    def __str__(self) -> str:
        fields = (f"{name}={value!r}" for name, value in self.fields.items() if value is not None)
        return redact(" ".join([self.name, *fields]))


class Logger:
    """Writes events, such as `info("keys.refreshed", count=2)`."""

    def __init__(self, name: str) -> None:
        self._name = name

    @cached_property
    def _logger(self) -> logging.Logger:
        # Not at import: an app's dictConfig disables the loggers that exist before it.
        return logging.getLogger(self._name)

    def info(self, event: str, /, **fields: object) -> None:
        """Write an event that is part of normal work."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: object) -> None:
        """Write an event that an operator should know."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: object) -> None:
        """Write an event that an operator has to act on."""
        self._write(logging.ERROR, event, fields)

    def _write(self, level: int, event: str, fields: Mapping[str, object]) -> None:
        logger = self._logger
        if logger.isEnabledFor(level):
            # A handler of an app around voicepass may raise, and a line must never stop a pass.
            with suppress(Exception):
                # `logger.log` would also find the line of the code, which takes a third of the time.
                logger.handle(logger.makeRecord(logger.name, level, "", 0, Event(event, fields), (), None))


def redact(text: str, *, most_characters: int = MAX_TEXT_CHARACTERS) -> str:
    """Cut `text`, then remove what looks like a signature, an API key or a token. Half of one at the cut goes too.

    The time is linear in `most_characters` for any text.
    """
    if len(text) <= most_characters:
        return hide_secrets(text)
    text = hide_secrets(text[:most_characters])
    last_run = len(text.rstrip(_TOKEN_CHARACTERS))
    starts = [start for mark in ("eyJ", "sk_") if (start := text.find(mark, last_run)) >= 0]
    return f"{text[: min(starts)]}[redacted]" if starts else text


def hide_secrets(text: str) -> str:
    """Remove what looks like a signature, an API key or a token. The time is linear in the length of `text`."""
    for marks, pattern, replacement in _SECRETS:
        if any(mark in text for mark in marks):
            text = pattern.sub(replacement, text)
    return text
