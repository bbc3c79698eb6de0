"""Deletes data that the ledger need not keep: rows older than the retention time, and expired sealed credentials."""

from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Final

from voicepass.errors import LedgerUnavailable
from voicepass.ledger import Ledger
from voicepass.settlement import run_periodically
from voicepass.telemetry.logger import Logger

EVERY_SECONDS: Final = 60.0

_log = Logger("voicepass.settlement")


def run_retention(ledger: Ledger, *, keep_seconds: int) -> AbstractAsyncContextManager[None]:
    """Delete old data once a minute until the block ends."""
    delete = partial(delete_old_data, ledger, keep_seconds=keep_seconds)
    return run_periodically(EVERY_SECONDS, delete, on_failure=partial(_log.error, "retention.failed"))


async def delete_old_data(ledger: Ledger, *, keep_seconds: int) -> None:
    """Delete old data, unless another instance has just deleted it."""
    try:
        if await ledger.take_lease("retention", EVERY_SECONDS * 0.9):
            await ledger.erase_sealed()
            await ledger.delete_old(age_seconds=keep_seconds)
    except LedgerUnavailable as refusal:
        _log.warning("retention.stopped", code=refusal.code, note=refusal.operator_note)
