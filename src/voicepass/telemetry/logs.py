"""How logging is set up: every line goes to standard error, for machines or for people, and no secret is in it."""

import logging
import re
import string
import sys
from collections.abc import MutableMapping
from typing import Any, Final, Literal

import structlog

from voicepass.telemetry.logwriter import LogWriter

LogFormat = Literal["json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]

_HANDLER_NAME: Final = "voicepass"

_log = structlog.get_logger("voicepass.telemetry.logs")

# Whatever level we are set to, these never speak below theirs: at DEBUG they print requests with their secrets.
_THIRD_PARTY_LEVELS: Final = {
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "uvicorn": logging.INFO,
    "websockets": logging.INFO,
    "asyncio": logging.WARNING,
    "psycopg": logging.WARNING,
}

MAX_TEXT_CHARACTERS: Final = 8192
"""Of one value in a line; what is longer is cut before anything searches it."""

_TOKEN_CHARACTERS: Final = string.ascii_letters + string.digits + "_-."

# The marks are searched first: that takes a hundredth of the pattern's time, in every line.
# Each pattern consumes the whole run that it begins in, so that no character is read twice.
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


def redact(text: str, *, most_characters: int = MAX_TEXT_CHARACTERS) -> str:
    """Cut `text`, then remove whatever looks like a signature, an API key or a token, or at the cut like half of one.

    The work is linear in `most_characters`, whatever the text is.
    """
    if len(text) <= most_characters:
        return _hide_secrets(text)
    text = _hide_secrets(text[:most_characters])
    last_run = len(text.rstrip(_TOKEN_CHARACTERS))
    starts = [start for mark in ("eyJ", "sk_") if (start := text.find(mark, last_run)) >= 0]
    return f"{text[: min(starts)]}[redacted]" if starts else text


def _hide_secrets(text: str) -> str:
    for marks, pattern, replacement in _SECRETS:
        if any(mark in text for mark in marks):
            text = pattern.sub(replacement, text)
    return text


def _report_lost_lines(lost: int) -> None:
    _log.warning("log.resumed", lost=lost)


log_writer: Final = LogWriter(2, on_resumed=_report_lost_lines)
"""The only one of the process, as standard error is. It starts no thread before the first line."""


def configure_logging(*, log_format: LogFormat, level: LogLevel) -> None:
    """Send every log line of the process to standard error: one JSON object a line, or coloured text for people.

    Called again, it replaces what it set up before. Other handlers stay, except those of uvicorn's own command.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _cut_values,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    lowest = logging.getLevelNamesMapping()[level.upper()]
    # Our own lines do not become records of logging first: one took a tenth of the time of a whole pass.
    structlog.configure(
        processors=[*shared, renderer, _redacted],
        wrapper_class=structlog.make_filtering_bound_logger(lowest),
        logger_factory=_StandardError,
        cache_logger_on_first_use=False,
    )
    handler = _Handler()
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
    _take_over_from_uvicorn()
    for name, least in _THIRD_PARTY_LEVELS.items():
        logging.getLogger(name).setLevel(max(least, lowest))


def _take_over_from_uvicorn() -> None:
    # Its command sets up handlers that write from the event loop: a reader that stops reading would stop the loop.
    for name in ("uvicorn", "uvicorn.access"):
        logger = logging.getLogger(name)
        kept = [handler for handler in logger.handlers if type(handler) is not logging.StreamHandler]
        if len(kept) < len(logger.handlers):
            # The lines of uvicorn.access hold queries. `serve` writes none of them either.
            logger.handlers[:], logger.propagate = kept, name == "uvicorn"


def write_line(line: str) -> None:
    """Write one line to standard error. This neither raises nor, while the service runs, waits.

    A program that has put another stream there, such as a test or a notebook, gets the line at once.
    """
    if sys.stderr is sys.__stderr__ is not None:
        log_writer.write(line)
        return
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):  # none at all, one that fails, one that is closed
        log_writer.drop()


class _StandardError:
    """What structlog's lines end up in, and by which name they go."""

    def __init__(self, name: str = "voicepass") -> None:
        self.name = name

    def msg(self, line: str) -> None:
        write_line(line)

    debug = info = warning = error = critical = msg


class _Handler(logging.Handler):
    """Takes the lines of uvicorn and other libraries."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            write_line(self.format(record))
        except Exception:  # noqa: BLE001 - logging's own handler of errors would wait for standard error
            log_writer.drop()


def _cut_values(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    # Before the line is rendered: a rendered line that is cut would be no JSON any more.
    for name, value in event.items():
        if type(value) is str and len(value) > MAX_TEXT_CHARACTERS:
            event[name] = redact(value)
    return event


def _redacted(_logger: object, _method: str, line: str | MutableMapping[str, Any]) -> str:
    # The last line of defence, for text that is not ours: our own events never carry a secret.
    return _hide_secrets(str(line))
