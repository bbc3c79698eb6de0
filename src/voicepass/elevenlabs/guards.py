"""How calls to ElevenLabs are guarded, and which refusal a caller gets whose call was not made or not answered."""

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import structlog

from voicepass.elevenlabs.resilience import BreakerOpenError, DeadlinePassedError, FullError, Guard, PausedError
from voicepass.errors import Busy, ElevenLabsRefusal, KeyRejected, Overloaded, Timeout, Unavailable

_log = structlog.get_logger("voicepass.elevenlabs")


def make_guard(base_url: str, calls: str, deadline_seconds: float, ticks: Callable[[], float]) -> Guard:
    """Return the guard of one kind of `calls` to a host; it logs when its breaker opens or closes."""
    host = urlsplit(base_url).hostname

    def log_change(is_open: bool) -> None:  # noqa: FBT001 - the breaker's own signature
        if is_open:
            _log.error("breaker.opened", host=host, calls=calls, note="ElevenLabs is out of order: not called for now")
        else:
            _log.info("breaker.closed", host=host, calls=calls)

    return Guard(
        deadline_seconds=deadline_seconds,
        clock=ticks,
        sleep=asyncio.sleep,
        jitter=random.random,
        on_change=log_change,
    )


def _refuse_again(error: PausedError) -> ElevenLabsRefusal:
    """Return the refusal that began the pause, for a caller who was not let through."""
    reason = error.reason
    note, vendor_code = "", ""
    if isinstance(reason, ElevenLabsRefusal):
        note, vendor_code = f"not asked again so soon: {reason.operator_note}", reason.vendor_code
    return (Busy if isinstance(reason, Busy) else KeyRejected)(
        operator_note=note,
        # A rejected key has no Retry-After: it stays until the operator does something.
        retry_after_seconds=error.retry_after_seconds if isinstance(reason, Busy) else None,
        vendor_code=vendor_code,
        has_reached_elevenlabs=False,
    )


@contextmanager
def refusing() -> Iterator[None]:
    """Word what kept a call from being made, or from being answered."""
    try:
        yield
    except FullError:
        raise Overloaded(operator_note="too many calls to ElevenLabs at once: see VOICEPASS_MAX_CALLS") from None
    except BreakerOpenError as error:
        note = "not asked: ElevenLabs has been failing; see breaker.opened"
        raise Unavailable(
            operator_note=note, retry_after_seconds=error.retry_after_seconds, has_reached_elevenlabs=False
        ) from None
    except PausedError as error:
        raise _refuse_again(error) from None
    except DeadlinePassedError:
        raise Timeout(operator_note="no complete answer within VOICEPASS_DEADLINE_SECONDS") from None
