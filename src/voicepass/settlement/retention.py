"""Deletes what the ledger need not keep: rows older than the retention time, and sealed passes too old to be used."""

from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import structlog

from voicepass.errors import LedgerUnavailable
from voicepass.settlement import repeating

EVERY_SECONDS: Final = 60.0
_LEASE: Final = "retention"

_log = structlog.get_logger("voicepass.settlement")


class Ledger(Protocol):
    """The part of the ledger that this needs. Every method raises LedgerUnavailable."""

    async def lease(self, name: str, seconds: float, /) -> bool:
        """Tell whether this is the caller's alone for that many seconds."""

    async def forget(self, *, age_seconds: int) -> None:
        """Delete what is older."""

    async def erase_sealed(self) -> None:
        """Erase sealed credentials that are too old to be used."""


class Retention:
    """Deletes once a minute, on one instance at a time."""

    def __init__(self, *, ledger: Ledger, keep_seconds: int) -> None:
        self._ledger = ledger
        self._keep_seconds = keep_seconds

    def running(self) -> AbstractAsyncContextManager[None]:
        """Delete every minute until the block ends."""
        return repeating(EVERY_SECONDS, self.round, report=lambda cause: _log.error("retention.failed", cause=cause))

    async def round(self) -> None:
        """Delete what is too old by now, unless another instance has just done so."""
        try:
            if await self._ledger.lease(_LEASE, EVERY_SECONDS * 0.9):
                await self._ledger.erase_sealed()
                await self._ledger.forget(age_seconds=self._keep_seconds)
        except LedgerUnavailable as refusal:
            _log.warning("retention.stopped", code=refusal.code, note=refusal.operator_note)
