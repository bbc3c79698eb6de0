"""Deletes old rows and expired sealed credentials, and at ElevenLabs the conversations of forgotten users."""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Final

from voicepass.elevenlabs import ElevenLabs
from voicepass.errors import LedgerUnavailable, Refusal
from voicepass.ledger import Ledger
from voicepass.ledger.forgetting import end_erasure, list_erasures
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


async def erase_conversations(ledger: Ledger, provider: ElevenLabs, base_urls: Mapping[str, str]) -> dict[str, str]:
    """Delete the conversations of forgotten users at ElevenLabs. Returns why one is still there, by its id.

    The ledger keeps the list of what is left, so that a second call goes on from there.
    """
    left: dict[str, str] = {}
    for erasure in await ledger.run(list_erasures):
        conversation_id, base_url = erasure["conversation_id"], base_urls.get(erasure["agent_id"])
        if erasure["may_be_open"]:
            left[conversation_id] = "it is open, or may still begin"
        elif base_url is None:
            left[conversation_id] = f"the policy has no agent {erasure['agent_id']}"
        else:
            try:
                await provider.delete_conversation(base_url, conversation_id)
                await ledger.run(partial(end_erasure, conversation_id=conversation_id))
            except Refusal as refusal:
                left[conversation_id] = refusal.operator_note or refusal.detail
    return left
