"""Deletes data that the ledger need not keep: rows older than the retention time, and expired sealed credentials."""

from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Final

import structlog

from voicepass.errors import LedgerUnavailable
from voicepass.ledger import Ledger
from voicepass.settlement import run_periodically

EVERY_SECONDS: Final = 60.0

_log = structlog.get_logger("voicepass.settlement")


class Retention:
    """Deletes old data once a minute, on one instance at a time."""

    def __init__(self, *, ledger: Ledger, keep_seconds: int) -> None:
        self._ledger = ledger
        self._keep_seconds = keep_seconds

    def run(self) -> AbstractAsyncContextManager[None]:
        """Hold a round every minute until the block ends."""
        return run_periodically(EVERY_SECONDS, self.run_round, on_failure=partial(_log.error, "retention.failed"))

    async def run_round(self) -> None:
        """Delete old data, unless another instance has just deleted it."""
        try:
            if await self._ledger.lease("retention", EVERY_SECONDS * 0.9):
                await self._ledger.erase_sealed()
                await self._ledger.forget(age_seconds=self._keep_seconds)
        except LedgerUnavailable as refusal:
            _log.warning("retention.stopped", code=refusal.code, note=refusal.operator_note)
