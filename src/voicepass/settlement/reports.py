"""What ElevenLabs reports of a conversation: in a webhook, in a row of its list, or in its record of one conversation.

Every value is checked, because the browser chooses some of them and ElevenLabs may change the others.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from voicepass.elevenlabs import ElevenLabs
from voicepass.elevenlabs.answers import find_conversation_id
from voicepass.errors import ConversationUnknown
from voicepass.model import IssuedPass, Settlement

_MAX_SECONDS: Final = 24 * 3600  # A longer conversation is a mistake. Counted, it would lock its user out.
_MAX_COUNT: Final = 2**31 - 1  # the largest INTEGER of PostgreSQL
_MAX_INSTANT: Final = 2**40  # seconds since the epoch
_MAX_ID_CHARACTERS: Final = 256  # No user that voicepass issues to has a longer id.
_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")


class Status(StrEnum):
    """What is known of a conversation."""

    UNOPENED = "unopened"
    OPEN = "open"
    ENDED = "ended"
    """Its figures may still change."""
    DONE = "done"


_STATUSES: Final = {
    "initiated": Status.UNOPENED,
    "processing": Status.ENDED,
    "done": Status.DONE,
    "failed": Status.DONE,
}
"""ElevenLabs' statuses and their meaning. Any other status means that the conversation is open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What ElevenLabs reports of a conversation.

    `started_at`: seconds since the epoch. `settlement`: final only with the status DONE, or in a webhook.
    """

    conversation_id: str
    status: Status
    agent_id: str | None = None
    authorization_method: str | None = None
    started_at: float | None = None
    settlement: Settlement | None = None


async def fetch_report(provider: ElevenLabs, base_url: str, issued: IssuedPass, *, source: str) -> Report:
    """Ask ElevenLabs about the conversation of a pass. Raises what `provider` raises."""
    conversation_id = issued.conversation_id or ""
    try:
        record = await provider.fetch_conversation(base_url, conversation_id, is_lookup=source == "lookup")
    except ConversationUnknown:
        return Report(conversation_id=conversation_id, status=Status.UNOPENED)
    return parse_record(conversation_id, record, source=source)


def parse_record(conversation_id: str, record: Mapping[str, Any], *, source: str) -> Report:
    """Parse ElevenLabs' record of one conversation (`GET /v1/convai/conversations/{id}`)."""
    return _parse(conversation_id, record, _find_object(record, "metadata"), source)


def parse_row(row: Mapping[str, Any], *, source: str) -> Report | None:
    """Parse a row of ElevenLabs' list of conversations. Returns None if it has no usable conversation id."""
    conversation_id = find_conversation_id(row.get("conversation_id"))
    return None if conversation_id is None else _parse(conversation_id, row, row, source)


def _parse(conversation_id: str, record: Mapping[str, Any], figures: Mapping[str, Any], source: str) -> Report:
    """Parse a report. It has no settlement if `figures` has no usable length."""
    agent_id = _parse_text(record.get("agent_id"))
    seconds = _parse_count(figures.get("call_duration_secs"), most=_MAX_SECONDS)
    variables = _find_object(_find_object(record, "conversation_initiation_client_data"), "dynamic_variables")
    settlement = None
    if seconds is not None:
        settlement = Settlement(
            conversation_id=conversation_id,
            seconds=seconds,
            cost=_parse_count(figures.get("cost")),
            cost_fiat=_parse_number(figures.get("cost_fiat")),
            user_id=_parse_user_id(record.get("user_id")),
            variable_user_id=_parse_user_id(variables.get("user_id")),
            agent_id=agent_id,
            source=source,
        )
    return Report(
        conversation_id=conversation_id,
        status=_STATUSES.get(str(record.get("status")), Status.OPEN),
        agent_id=agent_id,
        authorization_method=_parse_text(figures.get("authorization_method")),
        started_at=_parse_number(figures.get("start_time_unix_secs"), most=_MAX_INSTANT) or None,
        settlement=settlement,
    )


def _find_object(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _parse_count(value: object, *, most: int = _MAX_COUNT) -> int | None:
    number = _parse_number(value, most=most)
    return None if number is None else math.ceil(number)


def _parse_number(value: object, *, most: int = _MAX_COUNT) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        return None  # this includes NaN, which is in no range
    return value


def _parse_user_id(value: object) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    return _parse_text(value) or None


def _parse_text(value: object) -> str | None:
    """Return a text that both databases can store. This changes no id that voicepass issued."""
    return _UNSTORABLE.sub("\ufffd", value[:_MAX_ID_CHARACTERS]) if isinstance(value, str) else None
