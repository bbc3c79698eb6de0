"""Deletes the conversations of forgotten users at ElevenLabs."""

from collections.abc import Mapping
from functools import partial

from voicepass.elevenlabs import ElevenLabs
from voicepass.errors import Refusal
from voicepass.ledger import Ledger
from voicepass.ledger.forgetting import end_erasure, list_erasures


async def erase_conversations(ledger: Ledger, provider: ElevenLabs, base_urls: Mapping[str, str]) -> dict[str, str]:
    """Delete what is left to delete. Returns why a conversation is still there, by its id.

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
