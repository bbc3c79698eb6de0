"""The logger of each module. Its lines go to standard error, or inside another app to that app's logging."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import structlog

make_logger: Final[ContextVar[Callable[[str], Any]]] = ContextVar("make_logger", default=structlog.get_logger)
"""Makes structlog's logger of a name. `telemetry.logs.log_to_app` replaces it for what runs inside another app."""


@dataclass(frozen=True, slots=True)
class Logger:
    """Has the methods of structlog's logger, such as `info` and `bind`."""

    name: str

    def __getattr__(self, method: str) -> Any:  # noqa: ANN401 - as structlog's own
        return getattr(make_logger.get()(self.name), method)
