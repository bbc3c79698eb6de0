"""How logging is set up: every line goes to standard error, for machines or for people, and no secret is in it."""

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Final, Literal

import structlog

LogFormat = Literal["json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]

_HANDLER_NAME: Final = "voicepass"

# Whatever level we are set to, these never speak below theirs: at DEBUG they print requests with their secrets.
_THIRD_PARTY_LEVELS: Final = {
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "uvicorn": logging.INFO,
    "websockets": logging.INFO,
    "asyncio": logging.WARNING,
    "psycopg": logging.WARNING,
}

# By the marks that each begins with: to look for those takes a hundredth of what the pattern takes, in every line.
_SECRETS: Final = (
    (("conversation_signature=", "token="), re.compile(r"(conversation_signature|token)=[^&\s\"']+"), r"\1=[redacted]"),
    (("sk_", "cvtkn_"), re.compile(r"\b(?:sk_|cvtkn_)[A-Za-z0-9_-]+"), "[redacted]"),
    (("eyJ",), re.compile(r"\beyJ[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*"), "[redacted token]"),
)


def redact(text: str) -> str:
    """Take out of `text` whatever looks like a signature, an API key or a token."""
    for marks, pattern, replacement in _SECRETS:
        if any(mark in text for mark in marks):
            text = pattern.sub(replacement, text)
    return text


def configure_logging(*, log_format: LogFormat, level: LogLevel) -> None:
    """Send every log line of the process to standard error: one JSON object a line, or coloured text for people.

    Called again, it replaces what it set up before and leaves other handlers alone.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    lowest = logging.getLevelNamesMapping()[level.upper()]
    # Our own lines go straight out: by way of logging's records, one took a tenth of the time of a whole pass.
    structlog.configure(
        processors=[*shared, renderer, _redacted],
        wrapper_class=structlog.make_filtering_bound_logger(lowest),
        logger_factory=_StandardError,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer, _redacted],
        )
    )
    root = logging.getLogger()
    handler.set_name(_HANDLER_NAME)
    root.handlers[:] = [other for other in root.handlers if other.get_name() != _HANDLER_NAME] + [handler]
    root.setLevel(lowest)
    for name, least in _THIRD_PARTY_LEVELS.items():
        logging.getLogger(name).setLevel(max(least, lowest))


class _StandardError:
    """What structlog's lines end up in, and by which name they go."""

    def __init__(self, name: str = "voicepass") -> None:
        self.name = name

    def msg(self, line: str) -> None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    debug = info = warning = error = critical = msg


def _redacted(_logger: object, _method: str, line: str | MutableMapping[str, Any]) -> str:
    # The last line of defence, for text that is not ours: our own events never carry a secret.
    return redact(str(line))
