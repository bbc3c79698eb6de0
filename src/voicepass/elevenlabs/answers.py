"""Parses ElevenLabs' good answers. It checks them like any other input, because a proxy may have changed them."""

import base64
import json
import re
from typing import Final, NamedTuple
from urllib.parse import SplitResult, parse_qsl, urlsplit

from voicepass.errors import BadAnswer
from voicepass.model import Agent, Credential
from voicepass.telemetry.logger import Logger

VENDOR_DOMAIN: Final = "elevenlabs.io"

_CONVERSATION_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
_ROOM_CONVERSATION_ID: Final = re.compile(r"conv_[A-Za-z0-9]+", re.ASCII)  # as the official JavaScript SDK reads it
_HEADER_SAFE: Final = re.compile(r"[\x21-\x7e]+", re.ASCII)
_DEFAULT_PORTS: Final = {"ws": 80, "http": 80, "wss": 443, "https": 443}

_UNSIGNED: Final = frozenset({"agent_id", "conversation_id", "branch_id", "version_id", "environment"})
"""The parameters of a signed URL that are no signature."""

_UNUSABLE: Final = "the answer holds no usable signed_url; is the base URL right, or does a proxy change the answers?"

_log = Logger("voicepass.elevenlabs")


class Origin(NamedTuple):
    """The origin of a URL. `port` is None if the URL names none and its scheme has no default."""

    scheme: str
    host: str
    port: int | None


def origin_of(url: SplitResult) -> Origin:
    """Return the origin of `url`. Raises ValueError for an invalid port."""
    return Origin(url.scheme, url.hostname or "", url.port or _DEFAULT_PORTS.get(url.scheme))


def parse_signed_url(answer: dict[str, object], agent: Agent, base: Origin, *, expires_at: float) -> Credential:
    """Return the signed URL of an answer. Raises BadAnswer if it is unusable, or of another agent or host."""
    url = answer.get("signed_url")
    if not isinstance(url, str) or not _HEADER_SAFE.fullmatch(url) or "\\" in url:
        raise BadAnswer(operator_note=_UNUSABLE)
    try:
        parts = urlsplit(url)
        origin = origin_of(parts)
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise BadAnswer(operator_note=_UNUSABLE) from error
    # Settings allow http:// only for loopback, where the emulator runs.
    is_secure = origin.scheme == "wss" or (origin.scheme, base.scheme) == ("ws", "http")
    is_signed = any(name not in _UNSIGNED for name, _ in query)
    if not is_secure or not is_signed or parts.username is not None or parts.fragment:
        raise BadAnswer(operator_note=_UNUSABLE)
    _check_host(origin, base)
    if any(value != agent.agent_id for name, value in query if name == "agent_id"):
        raise BadAnswer(operator_note="the signed_url is for another agent; does a proxy cache the answers?")
    in_query = [value for name, value in query if name == "conversation_id"]
    conversation_id = find_conversation_id(*in_query, answer.get("conversation_id"))
    return Credential(secret=url, conversation_id=conversation_id, expires_at=expires_at)


def _check_host(origin: Origin, base: Origin) -> None:
    if (origin.host, origin.port) == (base.host, base.port):
        return
    if origin.port == base.port and _is_vendor(origin.host) and _is_vendor(base.host):
        _log.warning("signed_url.host_differed", configured=base.host, answered=origin.host)
        return
    raise BadAnswer(operator_note=f"the signed_url leads to {origin.host}, not to {base.host}; is the base URL right?")


def _is_vendor(host: str) -> bool:
    return host == VENDOR_DOMAIN or host.endswith("." + VENDOR_DOMAIN)


def parse_conversation_token(answer: dict[str, object]) -> Credential:
    """Return the LiveKit token of an answer, with the expiry and the conversation that the token itself names."""
    token = answer.get("token")
    if not isinstance(token, str) or not _HEADER_SAFE.fullmatch(token):
        raise BadAnswer(operator_note="the answer holds no usable token; is the base URL right?")
    unverified_claims = _parse_unverified_claims(token)
    expires_at = unverified_claims.get("exp")
    video = unverified_claims.get("video")
    room = video.get("room") if isinstance(video, dict) else None
    in_room = _ROOM_CONVERSATION_ID.search(room) if isinstance(room, str) else None
    return Credential(
        secret=token,
        conversation_id=find_conversation_id(answer.get("conversation_id"), in_room and in_room.group()),
        expires_at=expires_at if isinstance(expires_at, int) and 0 < expires_at < 2**32 else None,
    )


def _parse_unverified_claims(token: str) -> dict[str, object]:
    # LiveKit verifies the token. voicepass only needs to know when it expires and which conversation it opens.
    try:
        payload = token.split(".")[1]
        return parse_json_object(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (IndexError, ValueError, BadAnswer):
        return {}


class ConversationsPage(NamedTuple):
    """A page of the list of conversations, each row as ElevenLabs sent it. The last page has an empty `next_cursor`."""

    rows: list[dict[str, object]]
    next_cursor: str


def parse_conversations_page(answer: dict[str, object]) -> ConversationsPage:
    """Parse a page (the SDK's `GetConversationsPageResponseModel`), or raise BadAnswer."""
    rows, has_more, cursor = answer.get("conversations"), answer.get("has_more"), answer.get("next_cursor")
    if not isinstance(rows, list) or not isinstance(has_more, bool):
        raise BadAnswer(operator_note="the answer is no page of conversations; is the base URL right?")
    if has_more and not (isinstance(cursor, str) and cursor):
        raise BadAnswer(operator_note="the page of conversations says that there are more, and not where")
    return ConversationsPage([row for row in rows if isinstance(row, dict)], str(cursor) if has_more else "")


def find_conversation_id(*candidates: object) -> str | None:
    """Return the first candidate that is a usable conversation id, or None."""
    for candidate in candidates:
        if isinstance(candidate, str) and _CONVERSATION_ID.fullmatch(candidate):
            return candidate
    return None


def parse_json_object(body: bytes) -> dict[str, object]:
    """Parse an answer that must be a JSON object, or raise BadAnswer."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise BadAnswer(operator_note="the answer is no JSON object; is the base URL right?")
    return answer
