"""Sets up logging: every line goes to standard error, as JSON or as text for people, and holds no secret."""

import json
import logging
import re
import string
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Literal

import structlog

from voicepass.telemetry.logger import Logger, make_logger
from voicepass.telemetry.logwriter import LogWriter

LogFormat = Literal["json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]
Event = structlog.typing.EventDict

_log = Logger("voicepass.telemetry.logs")

# Each of these logs nothing below its level here: at DEBUG they log requests with their secrets.
_THIRD_PARTY_LEVELS: Final = {
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "uvicorn": logging.INFO,
    "websockets": logging.INFO,
    "asyncio": logging.WARNING,
    "psycopg": logging.WARNING,
}

MAX_TEXT_CHARACTERS: Final = 8192
"""Of one value in a line. A longer value is cut before it is searched for secrets."""

_TOKEN_CHARACTERS: Final = string.ascii_letters + string.digits + "_-."

# Each line is searched for the marks first, which takes a hundredth of the pattern's time.
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


def redact(text: str, *, most_characters: int = MAX_TEXT_CHARACTERS) -> str:
    """Cut `text`, then remove what looks like a signature, an API key or a token. Half of one at the cut goes too.

    The time is linear in `most_characters` for any text.
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
"""The only one of the process, because there is one standard error. It starts its thread with the first line."""


def configure_logging(*, log_format: LogFormat, level: LogLevel) -> None:
    """Send every log line of the process to standard error: one JSON object a line, or coloured text for people.

    A second call replaces what the first one set up. Other handlers stay, except those of uvicorn's own command.
    """
    lowest = logging.getLevelNamesMapping()[level.upper()]
    encode: Callable[[Event], str] = json.JSONEncoder(default=repr).encode
    if log_format == "console":
        encode = partial(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()), None, "")
    render = partial(_render, encode)
    # Our own lines do not become records of `logging` first, which would take a tenth of the time of a pass.
    structlog.configure(
        processors=[render],
        wrapper_class=structlog.make_filtering_bound_logger(lowest),
        logger_factory=_StandardError,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    others = [handler for handler in root.handlers if not isinstance(handler, _Handler)]
    root.handlers[:] = [*others, _Handler(render)]
    root.setLevel(lowest)
    _remove_uvicorn_handlers()
    for name, least in _THIRD_PARTY_LEVELS.items():
        logging.getLogger(name).setLevel(max(least, lowest))


@contextmanager
def log_to_app() -> Iterator[None]:
    """Send the lines of what runs in the block to the standard loggers of another app, and change none of them.

    Tasks that start in the block do the same until they end. structlog may belong to that app too.
    """
    token = make_logger.set(_make_app_logger)
    try:
        yield
    finally:
        with suppress(ValueError):  # some test runners end a block in another context than they began it in
            make_logger.reset(token)


def _make_app_logger(name: str) -> Any:  # noqa: ANN401 - as structlog's own
    processors: list[structlog.typing.Processor] = [structlog.stdlib.filter_by_level, _render_text]
    return structlog.wrap_logger(logging.getLogger(name), processors, structlog.stdlib.BoundLogger)


def _render_text(_logger: Any, _level: str, event: Event) -> str:  # noqa: ANN401 - a standard logger
    """Return the name of an event and its fields. A field's repr keeps it on one line."""
    name = event.pop("event")
    return redact(" ".join([name, *(f"{key}={value!r}" for key, value in event.items() if value is not None)]))


def _remove_uvicorn_handlers() -> None:
    # uvicorn's command sets up handlers that write from the event loop. If nobody reads them, the loop stops.
    for name in ("uvicorn", "uvicorn.access"):
        logger = logging.getLogger(name)
        others = [handler for handler in logger.handlers if type(handler) is not logging.StreamHandler]
        if len(others) < len(logger.handlers):
            # The lines of uvicorn.access hold queries. `serve` does not write them either.
            logger.handlers[:], logger.propagate = others, name == "uvicorn"


def write_line(line: str) -> None:
    """Write one line to standard error. This never raises, and does not wait while the service runs.

    A program that replaced standard error, such as a test or a notebook, gets the line at once.
    """
    if sys.stderr is sys.__stderr__ is not None:
        log_writer.write(line)
        return
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):  # there is none, it fails, or it is closed
        log_writer.drop()


class _StandardError:
    """Where structlog's lines go, and the name of the logger that wrote them."""

    def __init__(self, name: str = "voicepass") -> None:
        self.name = name

    def msg(self, line: str) -> None:
        write_line(line)

    debug = info = warning = error = critical = msg


class _Handler(logging.Handler):
    """Writes the lines of uvicorn and other libraries."""

    def __init__(self, render: Callable[[Any, str, Event], str]) -> None:
        super().__init__()
        self._render = render

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event: Event = {"event": record.getMessage(), "exc_info": record.exc_info}
            write_line(self._render(record, record.levelname.lower(), event))
        except Exception:  # noqa: BLE001 - the error handling of `logging` would wait for standard error
            log_writer.drop()


def _render(encode: Callable[[Event], str], logger: Any, level: str, event: Event) -> str:  # noqa: ANN401 - structlog's or a record
    """Return the line of an event, without what looks like a secret."""
    event["level"] = level
    event["logger"] = logger.name
    event["timestamp"] = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    event = structlog.processors.format_exc_info(logger, level, event)
    for name, value in event.items():
        if type(value) is str and len(value) > MAX_TEXT_CHARACTERS:
            event[name] = redact(value)  # before the encoding, because a JSON line that is cut is no JSON
    # The last defence, for text of others: our own events never hold a secret.
    return _hide_secrets(encode(event))
