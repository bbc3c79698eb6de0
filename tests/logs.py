"""Collects what voicepass logs, so that a test can read it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from voicepass.telemetry.logger import Event


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.msg, Event):
            level = record.levelname.lower()
            self.events.append({"event": record.msg.name, "log_level": level, **record.msg.fields})


@contextmanager
def capture_logs() -> Iterator[list[dict[str, Any]]]:
    """Collect the events that voicepass logs in the block, each with its level and fields."""
    collector, logger = _Collector(), logging.getLogger("voicepass")
    logger.addHandler(collector)
    try:
        yield collector.events
    finally:
        logger.removeHandler(collector)
