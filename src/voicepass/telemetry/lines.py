"""Writes a log line for each attempt and each settlement."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from voicepass.model import IssuedPass
from voicepass.telemetry.attempt import Attempt
from voicepass.telemetry.logger import Logger

Event = TypeVar("Event")

_log = Logger("voicepass.telemetry.lines")
_pass_log = Logger("voicepass.passes")
_settlement_log = Logger("voicepass.settlement")


def log_attempt(attempt: Attempt) -> None:
    """Write `pass.granted`, or `pass.refused` with the code and what the operator should do."""
    fields: dict[str, object] = {
        "request_id": attempt.request.request_id,
        "client_request_id": attempt.request.client_request_id,
        "client": attempt.request.client,
        "transport": attempt.request.transport.value,
        "agent": attempt.alias,
        "token_issuer": attempt.user.issuer if attempt.user else None,
        "user_id": attempt.user.id if attempt.user else None,
        "plan": attempt.plan,
        "conversation_id": attempt.conversation_id,
        "duration_ms": round(attempt.seconds * 1000, 1),
    }
    if attempt.outcome != "granted":
        write = _pass_log.error if attempt.is_operators_fault else _pass_log.info
        cause = type(attempt.cause).__name__ if attempt.cause else None
        write("pass.refused", code=attempt.outcome, note=attempt.operator_note or None, cause=cause, **fields)
        return
    _pass_log.info(
        "pass.granted",
        credential_sha256=attempt.credential_sha256,
        warm=attempt.is_warm,
        reissued=attempt.is_reissued,
        **fields,
    )
    if attempt.conversation_id is None:
        note = "ElevenLabs named no conversation, so voicepass cannot say whose it is"
        _pass_log.warning("conversation_id.missing", request_id=attempt.request.request_id, note=note)


def log_settlement(settled: IssuedPass) -> None:
    """Write `conversation.settled`, and a warning if the browser named another user."""
    fields: dict[str, object] = {
        "conversation_id": settled.conversation_id,
        "token_issuer": settled.token_issuer,
        "user_id": settled.user_id,
        "agent": settled.agent_alias,
        "request_id": settled.request_id,
    }
    _settlement_log.info(
        "conversation.settled",
        source=settled.settled_by,
        seconds=settled.seconds,
        cost=settled.cost,
        lag_seconds=round(settled.lag_seconds, 1),
        **fields,
    )
    if settled.identity_mismatch:  # only the ledger holds the other name, which is text of the browser
        note = "the browser told ElevenLabs another user id; the user of the pass is charged"
        _settlement_log.warning("conversation.identity_mismatch", note=note, **fields)


def notify(observers: Iterable[Callable[[Event], None]], event: Event) -> None:
    """Show `event` to each of `observers`. An exception is logged as `observer.failed` and changes nothing."""
    for observe in observers:
        try:
            observe(event)
        except Exception as error:  # noqa: BLE001 - a mistake here must not take a pass back
            name = getattr(observe, "__qualname__", type(observe).__name__)
            _log.error("observer.failed", observer=name, cause=type(error).__name__)
