"""What ElevenLabs answers where all is well, read with distrust: an answer is input like any other."""

import base64
import json
import re
from typing import Final, NamedTuple
from urllib.parse import SplitResult, parse_qsl, urlsplit

import structlog

from voicepass.errors import BadAnswer
from voicepass.model import Agent, Credential

VENDOR_DOMAIN: Final = "elevenlabs.io"

_CONVERSATION_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
_ROOM_CONVERSATION_ID: Final = re.compile(r"conv_[A-Za-z0-9]+", re.ASCII)  # as the official JavaScript SDK reads it
_HEADER_SAFE: Final = re.compile(r"[\x21-\x7e]+", re.ASCII)
_DEFAULT_PORTS: Final = {"ws": 80, "http": 80, "wss": 443, "https": 443}

_log = structlog.get_logger("voicepass.elevenlabs")


class Origin(NamedTuple):
    """Where a URL leads; `port` is None where the scheme has no usual one."""

    scheme: str
    host: str
    port: int | None


def origin_of(url: SplitResult) -> Origin:
    """Return where `url` leads. Raises ValueError for a port that is none."""
    return Origin(url.scheme, url.hostname or "", url.port or _DEFAULT_PORTS.get(url.scheme))


def read_signed_url(answer: dict[str, object], agent: Agent, base: Origin, *, expires_at: float) -> Credential:
    """Return the signed URL of an answer, or raise BadAnswer where it is none, another agent's or leads elsewhere."""
    url = answer.get("signed_url")
    if not isinstance(url, str) or not _HEADER_SAFE.fullmatch(url) or "\\" in url:
        raise BadAnswer(operator_note="the answer holds no usable signed_url")
    try:
        parts = urlsplit(url)
        _check_destination(parts, base)
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise BadAnswer(operator_note="the signed_url is malformed") from error
    if {name for name, _ in query} <= {"agent_id", "conversation_id"}:
        # Opened, it would be closed at once: the very fault that voicepass is there to cure.
        raise BadAnswer(operator_note="the signed_url carries no signature")
    if any(value != agent.agent_id for name, value in query if name == "agent_id"):
        raise BadAnswer(operator_note="the signed_url is for another agent than the one asked for")
    named = [value for name, value in query if name == "conversation_id"]
    conversation_id = _conversation_id(*named, answer.get("conversation_id"))
    return Credential(secret=url, conversation_id=conversation_id, expires_at=expires_at)


def _check_destination(url: SplitResult, base: Origin) -> None:
    leads_to = origin_of(url)
    # Settings admit http:// to loopback only, where the emulator answers.
    if leads_to.scheme != "wss" and (leads_to.scheme, base.scheme) != ("ws", "http"):
        raise BadAnswer(operator_note=f"the signed_url's scheme is {url.scheme!r}, not wss")
    if url.username is not None or url.password is not None or url.fragment:
        raise BadAnswer(operator_note="the signed_url holds a user name or a fragment")
    if (leads_to.host, leads_to.port) == (base.host, base.port):
        return
    if leads_to.port == base.port and _is_vendor(leads_to.host) and _is_vendor(base.host):
        _log.warning("signed_url.host_differed", configured=base.host, answered=leads_to.host)
        return
    raise BadAnswer(operator_note=f"the signed_url leads to {leads_to.host}, not to {base.host}")


def _is_vendor(host: str) -> bool:
    return host == VENDOR_DOMAIN or host.endswith("." + VENDOR_DOMAIN)


def read_conversation_token(answer: dict[str, object]) -> Credential:
    """Read a LiveKit token: opaque to us, except for when it ends and which room (so conversation) it opens."""
    token = answer.get("token")
    if not isinstance(token, str) or not _HEADER_SAFE.fullmatch(token):
        raise BadAnswer(operator_note="the answer holds no usable token")
    claims = _unverified_claims(token)
    expires_at = claims.get("exp")
    video = claims.get("video")
    room = video.get("room") if isinstance(video, dict) else None
    in_room = _ROOM_CONVERSATION_ID.search(room) if isinstance(room, str) else None
    return Credential(
        secret=token,
        conversation_id=_conversation_id(answer.get("conversation_id"), in_room and in_room.group()),
        expires_at=expires_at if isinstance(expires_at, int) and 0 < expires_at < 2**32 else None,
    )


class ConversationsPage(NamedTuple):
    """A page of the list of conversations, each row as ElevenLabs wrote it; `next_cursor` is empty on the last page."""

    rows: list[dict[str, object]]
    next_cursor: str


def read_conversations_page(answer: dict[str, object]) -> ConversationsPage:
    """Read a page (the SDK's `GetConversationsPageResponseModel`), or raise BadAnswer."""
    rows, has_more, cursor = answer.get("conversations"), answer.get("has_more"), answer.get("next_cursor")
    if not isinstance(rows, list) or not isinstance(has_more, bool):
        raise BadAnswer(operator_note="the answer is no page of conversations; is the base URL right?")
    if has_more and not (isinstance(cursor, str) and cursor):
        raise BadAnswer(operator_note="the page of conversations says that there are more, and not where")
    return ConversationsPage([row for row in rows if isinstance(row, dict)], str(cursor) if has_more else "")


def _unverified_claims(token: str) -> dict[str, object]:
    # Not ours to verify: the claims only tell the reader of the pass what to expect.
    try:
        payload = token.split(".")[1]
        return json_object(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (IndexError, ValueError, BadAnswer):
        return {}


def _conversation_id(*candidates: object) -> str | None:
    for candidate in candidates:
        if isinstance(candidate, str) and _CONVERSATION_ID.fullmatch(candidate):
            return candidate
    return None


def json_object(body: bytes) -> dict[str, object]:
    """Return the JSON object that an answer is, or raise BadAnswer."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(operator_note="the answer is not JSON; is the base URL right?") from error
    if not isinstance(answer, dict):
        raise BadAnswer(operator_note="the answer is not a JSON object")
    return answer
