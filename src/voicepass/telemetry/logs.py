"""Sets up logging: every line goes to standard error, as JSON or as text for people, and holds no secret."""

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Literal

from voicepass.telemetry.logger import MAX_TEXT_CHARACTERS, Event, Logger, hide_secrets, redact
from voicepass.telemetry.logwriter import LogWriter

LogFormat = Literal["json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]

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

_TEXT: Final = logging.Formatter()
_encode: Final = json.JSONEncoder(default=repr).encode


def _report_lost_lines(lost: int) -> None:
    _log.warning("log.resumed", lost=lost)


log_writer: Final = LogWriter(2, on_resumed=_report_lost_lines)  # the only one, because there is one standard error


def configure_logging(*, log_format: LogFormat, level: LogLevel) -> None:
    """Send every log line of the process to standard error: one JSON object a line, or text for people.

    A second call replaces what the first one set up. Other handlers stay, except those of uvicorn's own command.
    """
    lowest = logging.getLevelNamesMapping()[level.upper()]
    root = logging.getLogger()
    others = [handler for handler in root.handlers if not isinstance(handler, _Handler)]
    root.handlers[:] = [*others, _Handler(_write_json if log_format == "json" else _write_text)]
    root.setLevel(lowest)
    _remove_uvicorn_handlers()
    for name, least in _THIRD_PARTY_LEVELS.items():
        logging.getLogger(name).setLevel(max(least, lowest))


def _remove_uvicorn_handlers() -> None:
    # uvicorn's command sets up handlers that write from the event loop. If nobody reads them, the loop stops.
    for name in ("uvicorn", "uvicorn.access"):
        logger = logging.getLogger(name)
        others = [handler for handler in logger.handlers if type(handler) is not logging.StreamHandler]
        if len(others) < len(logger.handlers):
            # The lines of uvicorn.access hold queries. `serve` does not write them either.
            logger.handlers[:], logger.propagate = others, name == "uvicorn"


class _Handler(logging.Handler):
    """Writes our events and the lines of libraries. It never raises, and does not wait while the service runs."""

    def __init__(self, write_line: Callable[[logging.LogRecord], str]) -> None:
        super().__init__()
        self._write_line = write_line

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._write_line(record)
            if sys.stderr is sys.__stderr__ is not None:
                log_writer.write(line)
            else:  # there is none, which raises, or a program replaced standard error, such as a test or a notebook
                sys.stderr.write(f"{line}\n")
                sys.stderr.flush()
        except Exception:  # noqa: BLE001 - the error handling of `logging` would wait for standard error
            log_writer.drop()


def _write_text(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    text = f"{at} {record.levelname:<7} {record.name}: {redact(record.getMessage())}"
    return f"{text}\n{redact(_TEXT.formatException(record.exc_info))}" if record.exc_info else text


def _write_json(record: logging.LogRecord) -> str:
    event = record.msg if isinstance(record.msg, Event) else Event(record.getMessage(), {})
    line = {
        "event": event.name,
        **event.fields,
        "level": record.levelname.lower(),
        "logger": record.name,
        "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z"),
    }
    if record.exc_info:
        line["exception"] = _TEXT.formatException(record.exc_info)
    for name, value in line.items():
        if type(value) is str and len(value) > MAX_TEXT_CHARACTERS:
            line[name] = redact(value)  # before the encoding, because a JSON line that is cut is no JSON
    # The last defence, for text of others: our own events never hold a secret.
    return hide_secrets(_encode(line))
