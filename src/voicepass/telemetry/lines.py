"""Writes a log line for each attempt and each settlement."""

from collections.abc import Callable
from typing import TypeVar

from voicepass.model import IssuedPass
from voicepass.telemetry.attempt import Attempt
from voicepass.telemetry.logger import Logger

Event = TypeVar("Event")

_log = Logger("voicepass.telemetry.lines")
_settlement_log = Logger("voicepass.settlement")


class AttemptLog:
    """Writes one line per attempt: `pass.granted`, or `pass.refused` with the code and what the operator should do."""

    def __init__(self) -> None:
        self._log = Logger("voicepass.passes").bind()  # once, because it takes long

    def __call__(self, attempt: Attempt) -> None:
        fields: dict[str, object] = {
            "request_id": attempt.request_id,
            "client_request_id": attempt.client_request_id,
            "client": attempt.client,
            "transport": attempt.transport.value,
            "agent": attempt.alias if attempt.agent else None,  # any other alias is text of the caller
            "token_issuer": attempt.user.issuer if attempt.user else None,
            "user_id": attempt.user.id if attempt.user else None,
            "plan": attempt.plan,
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
                    note="ElevenLabs named no conversation, so voicepass cannot say whose it is",
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
    """Writes `conversation.settled`, and a warning if the browser named another user."""

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
        if settled.identity_mismatch:  # only the ledger holds the other name, which is text of the browser
            _settlement_log.warning(
                "conversation.identity_mismatch",
                note="the browser told ElevenLabs another user id; the user of the pass is charged",
                **fields,
            )


def isolate(*observers: Callable[[Event], None]) -> Callable[[Event], None]:
    """Return an observer that calls each of `observers`. It logs `observer.failed` for one that raises."""

    def observe(event: Event) -> None:
        for observer in observers:
            try:
                observer(event)
            except Exception as error:  # noqa: BLE001 - a mistake here must not take a pass back
                _log.error("observer.failed", observer=type(observer).__name__, cause=type(error).__name__)

    return observe
