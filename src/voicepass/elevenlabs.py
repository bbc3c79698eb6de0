"""Everything voicepass knows of ElevenLabs' HTTP: how a credential is asked for, checked, and refused.

Sources of the vendor's facts: the API reference ("Get signed URL", "Get conversation token", "Errors"), the official
SDKs' source, and error bodies that users published. Paths, field names and error codes stand in this file alone, but
for the account of a conversation, which its webhook carries too (`settlement`).
"""

import asyncio
import base64
import json
import re
from collections.abc import Coroutine, Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar
from urllib.parse import SplitResult, parse_qsl, quote, urlsplit

import httpx
import structlog

from voicepass.errors import (
    AgentUnknown,
    BadAnswer,
    Busy,
    ConversationUnknown,
    ElevenLabsRefusal,
    KeyRejected,
    QuotaExhausted,
    Timeout,
    Unavailable,
)
from voicepass.model import Agent, Clock, Credential, Transport

SIGNED_URL_SECONDS: Final = 900
"""A signed URL opens a conversation for 15 minutes after it was made (documentation, "Signed URLs")."""

MAX_ANSWER_BYTES: Final = 64 * 1024
MAX_ACCOUNT_BYTES: Final = 4 * 1024 * 1024  # it holds the whole transcript
VENDOR_DOMAIN: Final = "elevenlabs.io"

_PATHS: Final = {
    Transport.WEBSOCKET: "/v1/convai/conversation/get-signed-url",
    Transport.WEBRTC: "/v1/convai/conversation/token",
}
_ACCOUNT_PATH: Final = "/v1/convai/conversations/"
_CONVERSATION_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
_ROOM_CONVERSATION_ID: Final = re.compile(r"conv_[A-Za-z0-9]+", re.ASCII)  # as the official JavaScript SDK reads it
_HEADER_SAFE: Final = re.compile(r"[\x21-\x7e]+", re.ASCII)
_DEFAULT_PORTS: Final = {"ws": 80, "http": 80, "wss": 443, "https": 443}
_MAX_RETRY_AFTER_SECONDS: Final = 3600
_QUOTED_CHARACTERS: Final = 300  # of the vendor's text, in the operator's log

_Answered = TypeVar("_Answered")
_Meaning = tuple[type[ElevenLabsRefusal], str]
_KEY: _Meaning = (
    KeyRejected,
    "the API key was not accepted: mistyped, revoked, or of another region than the base URL",
)
_PERMISSION: _Meaning = (
    KeyRejected,
    "ELEVENLABS_API_KEY is valid but lacks the permission {permission}: give the key '{in_dashboard}'",
)
_IN_DASHBOARD: Final = {"convai_write": "ElevenAgents: Write", "convai_read": "ElevenAgents: Read"}
_BLOCKED: _Meaning = (KeyRejected, "ElevenLabs blocks this account or network as unusual; a paid plan lifts that")
_AGENT: _Meaning = (
    AgentUnknown,
    "ElevenLabs knows no such agent there: check its id (ELEVENLABS_AGENT_ID or policy file) and the base URL",
)
_QUOTA: _Meaning = (QuotaExhausted, "the workspace's quota at ElevenLabs is used up: raise it or wait for its reset")
_AT_LIMIT: _Meaning = (Busy, "ElevenLabs is at a limit; if it stays, raise the plan's concurrency")
_OUT_OF_ORDER: _Meaning = (Unavailable, "ElevenLabs is out of order; see its status page")
_UNEXPECTED: _Meaning = (BadAnswer, "ElevenLabs answered unexpectedly; is the base URL right?")

_BY_CODE: Final[dict[str, _Meaning]] = {
    "missing_permissions": _PERMISSION,
    "insufficient_permissions": _PERMISSION,
    "forbidden": _PERMISSION,
    "detected_unusual_activity": _BLOCKED,
    "document_not_found": _AGENT,
    "agent_not_found": _AGENT,
    "quota_exceeded": _QUOTA,
    "insufficient_credits": _QUOTA,
    "too_many_concurrent_requests": _AT_LIMIT,
    "concurrent_limit_exceeded": _AT_LIMIT,
    "rate_limit_exceeded": _AT_LIMIT,
    "system_busy": _AT_LIMIT,
}
_BY_STATUS: Final[dict[int, _Meaning]] = {
    400: _AGENT,
    401: _KEY,
    402: _QUOTA,
    403: _KEY,
    404: _AGENT,
    408: _OUT_OF_ORDER,
    422: _AGENT,
    429: _AT_LIMIT,
}

_log = structlog.get_logger("voicepass.elevenlabs")


def http_client(*, deadline_seconds: float) -> httpx.AsyncClient:
    """Return the one shared client. Every wait is shorter than the deadline, which bounds their sum.

    No redirect is followed, because httpx would carry `xi-api-key` to the other origin; no proxy is taken from the
    environment; compression is not asked for, because a bomb inflates inside httpx before any cap can see it.
    """
    return httpx.AsyncClient(
        timeout=httpx.Timeout(
            connect=deadline_seconds / 4, write=deadline_seconds / 4, pool=deadline_seconds / 8, read=deadline_seconds
        ),
        limits=httpx.Limits(max_connections=100, max_keepalive_connections=100, keepalive_expiry=5),
        follow_redirects=False,
        trust_env=False,
        verify=True,
        headers={"accept": "application/json", "accept-encoding": "identity", "user-agent": "voicepass"},
    )


class Workspace:
    """One ElevenLabs host and the API keys of the workspace there: one, or two while they are rotated."""

    def __init__(self, *, base_url: str, api_keys: Sequence[str]) -> None:
        self.base_url = base_url.rstrip("/")
        self.base = urlsplit(base_url)
        self.keys = tuple(api_keys)
        self.preferred = 0

    def positions(self) -> list[int]:
        """Return the positions of the keys, the one that was accepted last in front."""
        return sorted(range(len(self.keys)), key=lambda position: position != self.preferred)

    def prefer(self, position: int) -> None:
        """Remember that the key at `position` was accepted; it is named by position, never by value."""
        if position != self.preferred:
            self.preferred = position
            _log.warning("api_key.switched", host=self.base.hostname, position=position + 1, of=len(self.keys))


class ElevenLabs:
    """Asks ElevenLabs for the credential of one conversation with the server-held key."""

    def __init__(
        self, *, client: httpx.AsyncClient, workspaces: Sequence[Workspace], deadline_seconds: float, clock: Clock
    ) -> None:
        self._client = client
        self._workspaces = {workspace.base_url: workspace for workspace in workspaces}
        self._deadline_seconds = deadline_seconds
        self._clock = clock
        self._calls: set[asyncio.Task[Any]] = set()

    async def credential(self, agent: Agent, transport: Transport) -> Credential:
        """Return a fresh credential for one conversation with `agent`.

        A signed URL is asked for with `include_conversation_id=true`, which makes it single-use and names the
        conversation before it begins. Raises an ElevenLabsRefusal, within the deadline.
        """
        return await self._within_deadline(self._ask(agent, transport, self._workspaces[agent.base_url]))

    async def conversation(self, agent_base_url: str, conversation_id: str) -> dict[str, object]:
        """Return ElevenLabs' own account of a conversation; the key needs the permission convai_read.

        Raises ConversationUnknown for one that was never opened, or an ElevenLabsRefusal, within the deadline.
        """
        return await self._within_deadline(self._account(self._workspaces[agent_base_url], conversation_id))

    async def aclose(self) -> None:
        """Give up the calls that outlived their deadline."""
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    async def _within_deadline(self, call: Coroutine[Any, Any, _Answered]) -> _Answered:
        # In a task of its own, never cancelled on time-out: cancelling httpx amid a call can lose the connection's
        # place in the pool for good (httpcore issue 1093). It ends by its own timeouts; nobody waits for it.
        task = asyncio.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._forget)
        done, _ = await asyncio.wait({task}, timeout=self._deadline_seconds)
        if not done:
            raise Timeout(operator_note=f"no complete answer within {self._deadline_seconds:g} s")
        return task.result()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, or asyncio would report it as lost when the caller is gone

    async def _ask(self, agent: Agent, transport: Transport, workspace: Workspace) -> Credential:
        asked_at = self._clock()
        query = {"agent_id": agent.agent_id}
        if transport is Transport.WEBSOCKET:
            query["include_conversation_id"] = "true"
        answer = _json_object(await self._answer(workspace, _PATHS[transport], query))
        if transport is Transport.WEBRTC:
            return _conversation_token(answer)
        return _signed_url(answer, agent, workspace.base, expires_at=asked_at + SIGNED_URL_SECONDS)

    async def _account(self, workspace: Workspace, conversation_id: str) -> dict[str, object]:
        path = _ACCOUNT_PATH + quote(conversation_id, safe="")
        try:
            body = await self._answer(workspace, path, {}, permission="convai_read", most_bytes=MAX_ACCOUNT_BYTES)
        except AgentUnknown as refusal:  # of no agent was asked: this is some proxy's 404, or the path has changed
            raise BadAnswer(operator_note="ElevenLabs did not understand the call; is the base URL right?") from refusal
        return _json_object(body)

    async def _answer(
        self,
        workspace: Workspace,
        path: str,
        query: dict[str, str],
        *,
        permission: str = "convai_write",
        most_bytes: int = MAX_ANSWER_BYTES,
    ) -> bytes:
        """Return the body of a good answer, by the key accepted last or else by the other."""
        rejected: KeyRejected | None = None
        for position in workspace.positions():
            url = workspace.base_url + path
            try:
                status, headers, body = await self._get(url, query, workspace.keys[position], most_bytes=most_bytes)
            except httpx.TimeoutException as error:
                raise Timeout(operator_note=f"{type(error).__name__} while asking {workspace.base.hostname}") from error
            except httpx.TransportError as error:
                raise Unavailable(
                    operator_note=f"{type(error).__name__} while asking {workspace.base.hostname}; "
                    "check the base URL, DNS and the way out of this network"
                ) from error
            if status == httpx.codes.OK:
                if permission == "convai_write":  # a key that may only read must not be tried first for passes
                    workspace.prefer(position)
                return body
            if permission == "convai_read" and status == httpx.codes.NOT_FOUND and _vendor_error(body)[0]:
                raise ConversationUnknown(operator_note="ElevenLabs knows no such conversation")
            retry_after = headers.get("retry-after")
            refusal = refusal_for(status, body, retry_after=retry_after, now=self._clock(), permission=permission)
            if not isinstance(refusal, KeyRejected):
                raise refusal
            rejected = rejected or refusal
        raise rejected or KeyRejected(operator_note="no API key is configured")

    async def _get(
        self, url: str, query: dict[str, str], api_key: str, *, most_bytes: int
    ) -> tuple[int, httpx.Headers, bytes]:
        give_up_at = asyncio.get_running_loop().time() + self._deadline_seconds
        request = self._client.build_request("GET", url, params=query, headers={"xi-api-key": api_key})
        response = await self._client.send(request, stream=True)
        try:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise BadAnswer(operator_note="the answer is compressed, though compression was not asked for")
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > most_bytes:
                    raise BadAnswer(operator_note=f"the answer is longer than {most_bytes} bytes")
                if asyncio.get_running_loop().time() > give_up_at:
                    raise Timeout(operator_note="the answer trickled in more slowly than the deadline allows")
        finally:
            await response.aclose()
        return response.status_code, response.headers, bytes(body)


def _signed_url(answer: dict[str, object], agent: Agent, base: SplitResult, *, expires_at: float) -> Credential:
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


def _check_destination(url: SplitResult, base: SplitResult) -> None:
    plain = url.scheme == "ws" and base.scheme == "http"  # settings admit http:// to loopback only
    if url.scheme != "wss" and not plain:
        raise BadAnswer(operator_note=f"the signed_url's scheme is {url.scheme!r}, not wss")
    if url.username is not None or url.password is not None or url.fragment:
        raise BadAnswer(operator_note="the signed_url holds a user name or a fragment")
    if (url.hostname, _port(url)) == (base.hostname, _port(base)):
        return
    if _port(url) == _port(base) and _is_vendor(url.hostname) and _is_vendor(base.hostname):
        _log.warning("signed_url.host_differed", configured=base.hostname, answered=url.hostname)
        return
    raise BadAnswer(operator_note=f"the signed_url leads to {url.hostname}, not to {base.hostname}")


def _port(url: SplitResult) -> int | None:
    return url.port or _DEFAULT_PORTS.get(url.scheme)


def _is_vendor(host: str | None) -> bool:
    return host is not None and (host == VENDOR_DOMAIN or host.endswith("." + VENDOR_DOMAIN))


def _conversation_token(answer: dict[str, object]) -> Credential:
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


def _unverified_claims(token: str) -> dict[str, object]:
    # Not ours to verify: the claims only tell the reader of the pass what to expect.
    try:
        payload = token.split(".")[1]
        return _json_object(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (IndexError, ValueError, BadAnswer):
        return {}


def _conversation_id(*candidates: object) -> str | None:
    for candidate in candidates:
        if isinstance(candidate, str) and _CONVERSATION_ID.fullmatch(candidate):
            return candidate
    return None


def _json_object(body: bytes) -> dict[str, object]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(operator_note="the answer is not JSON; is the base URL right?") from error
    if not isinstance(answer, dict):
        raise BadAnswer(operator_note="the answer is not a JSON object")
    return answer


def refusal_for(
    status: int, body: bytes, *, retry_after: str | None, now: float, permission: str = "convai_write"
) -> ElevenLabsRefusal:
    """Turn an error answer into the refusal it means, with a note that tells the operator what to do.

    `permission` is the one that the call needs.

    The vendor's own code decides before the HTTP status: a key without the permission is 401 in the field and 403 in
    the documentation, and so is an exhausted quota 401 or 402. Both error envelopes are understood.
    """
    code, message = _vendor_error(body)
    refusal, note = _BY_CODE.get(code) or _BY_STATUS.get(status) or (_OUT_OF_ORDER if status >= 500 else _UNEXPECTED)  # noqa: PLR2004
    wait = _retry_after_seconds(retry_after, now=now) if refusal in {Busy, Unavailable} else None
    note = note.format(permission=permission, in_dashboard=_IN_DASHBOARD[permission])
    said = f"ElevenLabs said HTTP {status}, {code or 'no code'}: {message}"
    return refusal(operator_note=f"{note} ({said})", retry_after_seconds=wait)


def _vendor_error(body: bytes) -> tuple[str, str]:
    """Return (code, message) of either envelope, or of none. The message is the vendor's text: for the log alone."""
    try:
        detail = _json_object(body).get("detail")
    except BadAnswer:
        return "", _quoted(body.decode("utf-8", "replace"))
    match detail:
        case {"code": str(code), **rest} | {"status": str(code), **rest}:
            return code, _quoted(str(rest.get("message", "")))
        case str():
            return "", _quoted(detail)
        case _:
            return "", _quoted(json.dumps(detail))


def _quoted(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:_QUOTED_CHARACTERS])


def _retry_after_seconds(value: str | None, *, now: float) -> int | None:
    """Read a Retry-After header (seconds or a date, RFC 9110 section 10.2.3); None for anything else."""
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        seconds = float(value[:10])
    else:
        try:
            until = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (until if until.tzinfo else until.replace(tzinfo=UTC)).timestamp() - now
    return max(1, min(round(seconds), _MAX_RETRY_AFTER_SECONDS))
