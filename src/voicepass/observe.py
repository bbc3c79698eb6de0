"""An attempt or a settlement becomes a log line and metrics."""

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram

from voicepass.model import Attempt, IssuedPass

_log = structlog.get_logger("voicepass.passes")
_settlement_log = structlog.get_logger("voicepass.settlement")


class AttemptLog:
    """Writes one line per attempt: `pass.granted`, or `pass.refused` with the code and what to do about it."""

    def __call__(self, attempt: Attempt) -> None:
        fields: dict[str, object] = {
            "request_id": attempt.request_id,
            "client": attempt.client,
            "transport": attempt.transport.value,
            "agent": attempt.alias if attempt.agent else None,  # an alias that named no agent is the caller's text
            "user_id": attempt.user.id if attempt.user else None,
            "conversation_id": attempt.conversation_id,
            "duration_ms": round(attempt.duration_seconds * 1000, 1),
        }
        if attempt.outcome == "granted":
            _log.info("pass.granted", credential_sha256=attempt.credential_sha256, warm=attempt.is_warm, **fields)
            if attempt.conversation_id is None:
                _log.warning(
                    "conversation_id.missing",
                    request_id=attempt.request_id,
                    note="ElevenLabs named no conversation; nothing binds this conversation to its user",
                )
            return
        write = _log.error if attempt.is_operators_fault else _log.info
        write(
            "pass.refused",
            code=attempt.outcome,
            note=attempt.operator_note or None,
            cause=type(attempt.cause).__name__ if attempt.cause else None,
            **fields,
        )


class AttemptMetrics:
    """Counts attempts. Labels are bounded: outcomes are our codes, transports are two."""

    def __init__(self, *, registry: CollectorRegistry) -> None:
        self._attempts = Counter(
            "voicepass_attempts", "Requests for a pass, by outcome", ["transport", "outcome"], registry=registry
        )
        self._seconds = Histogram(
            "voicepass_attempt_duration_seconds",
            "From the request to the pass or the refusal",
            ["transport"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8),
            registry=registry,
        )
        self._unbound = Counter(
            "voicepass_conversation_id_missing",
            "Passes granted though ElevenLabs named no conversation",
            ["transport"],
            registry=registry,
        )

    def __call__(self, attempt: Attempt) -> None:
        transport = attempt.transport.value
        self._attempts.labels(transport, attempt.outcome).inc()
        self._seconds.labels(transport).observe(attempt.duration_seconds)
        if attempt.outcome == "granted" and attempt.conversation_id is None:
            self._unbound.labels(transport).inc()


class SettlementLog:
    """Writes `conversation.settled`, and a warning where the browser claimed to be another user."""

    def __call__(self, settled: IssuedPass) -> None:
        fields: dict[str, object] = {
            "conversation_id": settled.conversation_id,
            "user_id": settled.user_id,
            "agent": settled.agent_alias,
            "request_id": settled.request_id,
        }
        _settlement_log.info(
            "conversation.settled",
            source=settled.settled_by,
            seconds=settled.seconds,
            cost=settled.cost,
            lag_seconds=round(_lag_seconds(settled), 1),
            **fields,
        )
        if settled.identity_mismatch:  # the name that was claimed is the browser's text: it stands in the ledger only
            _settlement_log.warning(
                "conversation.identity_mismatch",
                note="the browser told ElevenLabs another user; it is charged to the one it was issued to",
                **fields,
            )


class SettlementMetrics:
    """Counts settlements. The label is bounded: `webhook` or `reconciler`."""

    def __init__(self, *, registry: CollectorRegistry) -> None:
        self._settled = Counter("voicepass_settlements", "Conversations settled", ["source"], registry=registry)
        self._seconds = Counter(
            "voicepass_settled_seconds", "Seconds of conversation that were used", ["source"], registry=registry
        )
        self._lag = Histogram(
            "voicepass_settlement_lag_seconds",
            "From the pass to its settlement, without the conversation itself",
            ["source"],
            buckets=(1, 5, 15, 60, 300, 900, 1800, 3600, 4 * 3600, 24 * 3600),
            registry=registry,
        )
        self._mismatches = Counter(
            "voicepass_identity_mismatches",
            "Conversations in which the browser told ElevenLabs another user than the one they were issued to",
            registry=registry,
        )

    def __call__(self, settled: IssuedPass) -> None:
        source = settled.settled_by or ""
        self._settled.labels(source).inc()
        self._seconds.labels(source).inc(settled.seconds)
        self._lag.labels(source).observe(_lag_seconds(settled))
        if settled.identity_mismatch:
            self._mismatches.inc()


def _lag_seconds(settled: IssuedPass) -> float:
    return max(0.0, (settled.settled_at or settled.reserved_at) - settled.reserved_at - settled.seconds)
