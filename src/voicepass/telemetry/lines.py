"""An attempt or a settlement becomes a log line."""

from collections.abc import Callable
from typing import Generic, TypeVar

import structlog

from voicepass.model import IssuedPass
from voicepass.telemetry.attempt import Attempt

Event = TypeVar("Event")

_log = structlog.get_logger("voicepass.telemetry.lines")
_settlement_log = structlog.get_logger("voicepass.settlement")


class AttemptLog:
    """Writes one line per attempt: `pass.granted`, or `pass.refused` with the code and what to do about it."""

    def __init__(self) -> None:
        self._log = structlog.get_logger("voicepass.passes").bind()  # once, not for each line

    def __call__(self, attempt: Attempt) -> None:
        fields: dict[str, object] = {
            "request_id": attempt.request_id,
            "client_request_id": attempt.client_request_id,
            "client": attempt.client,
            "transport": attempt.transport.value,
            "agent": attempt.alias if attempt.agent else None,  # an alias that named no agent is the caller's text
            "token_issuer": attempt.user.issuer if attempt.user else None,
            "user_id": attempt.user.id if attempt.user else None,
            "conversation_id": attempt.conversation_id,
            "duration_ms": round(attempt.duration_seconds * 1000, 1),
        }
        if attempt.outcome == "granted":
            self._log.info(
                "pass.granted",
                credential_sha256=attempt.credential_sha256,
                warm=attempt.is_warm,
                reissued=attempt.is_reissued,
                **fields,
            )
            if attempt.conversation_id is None:
                self._log.warning(
                    "conversation_id.missing",
                    request_id=attempt.request_id,
                    note="ElevenLabs named no conversation; nothing binds this conversation to its user",
                )
            return
        write = self._log.error if attempt.is_operators_fault else self._log.info
        write(
            "pass.refused",
            code=attempt.outcome,
            note=attempt.operator_note or None,
            cause=type(attempt.cause).__name__ if attempt.cause else None,
            **fields,
        )


class SettlementLog:
    """Writes `conversation.settled`, and a warning where the browser claimed to be another user."""

    def __call__(self, settled: IssuedPass) -> None:
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
        if settled.identity_mismatch:  # the name that was claimed is the browser's text: it stands in the ledger only
            _settlement_log.warning(
                "conversation.identity_mismatch",
                note="the browser told ElevenLabs another user; it is charged to the one it was issued to",
                **fields,
            )


class Isolated(Generic[Event]):
    """Calls each observer, and writes `observer.failed` for one that raises; the others still see the event."""

    def __init__(self, *observers: Callable[[Event], None]) -> None:
        self._observers = observers

    def __call__(self, event: Event) -> None:
        for observe in self._observers:
            try:
                observe(event)
            except Exception as error:  # noqa: BLE001 - whatever it is, the pass stays granted
                _log.error("observer.failed", observer=type(observe).__name__, cause=type(error).__name__)
