"""Everything voicepass knows of ElevenLabs' HTTP: how a credential is asked for, checked, and refused.

Sources of the vendor's facts: the API reference ("Get signed URL", "Get conversation token", "Errors"), the official
SDKs' source, and error bodies that users published. Paths, field names and error codes stand in this file alone, but
for the account of a conversation, which its webhook carries too (`settlement`).
"""

import asyncio
import base64
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import cache, lru_cache, partial
from typing import Final, NamedTuple
from urllib.parse import SplitResult, parse_qsl, quote, urlencode, urlsplit

import httpx
import structlog

from voicepass.errors import (
    AgentUnknown,
    BadAnswer,
    Busy,
    ConversationUnknown,
    ElevenLabsRefusal,
    KeyRejected,
    Overloaded,
    QuotaExhausted,
    Timeout,
    Unavailable,
)
from voicepass.model import Agent, Clock, Credential, Transport
from voicepass.outbound import HEADERS, Answer, AnswerUnusableError, get
from voicepass.resilience import BreakerOpenError, Bulkhead, DeadlinePassedError, FailedError, FullError, Guard

SIGNED_URL_SECONDS: Final = 900
"""A signed URL opens a conversation for 15 minutes after it was made (documentation, "Signed URLs")."""

REGIONS: Final = {
    "the default region": "https://api.elevenlabs.io",
    "the US region": "https://api.us.elevenlabs.io",
    "EU residency": "https://api.eu.residency.elevenlabs.io",
    "India residency": "https://api.in.residency.elevenlabs.io",
    "Singapore residency": "https://api.sg.residency.elevenlabs.io",
}
"""Every host that the vendor answers on (the official SDKs' environments). Each residency has keys of its own."""

MAX_ANSWER_BYTES: Final = 64 * 1024
MAX_ACCOUNT_BYTES: Final = 4 * 1024 * 1024  # it holds the whole transcript
VENDOR_DOMAIN: Final = "elevenlabs.io"

_PATHS: Final = {
    Transport.WEBSOCKET: "/v1/convai/conversation/get-signed-url",
    Transport.WEBRTC: "/v1/convai/conversation/token",
}
_ACCOUNT_PATH: Final = "/v1/convai/conversations/"
_DOCUMENT_PATHS: Final = {
    "agent": "/v1/convai/agents/{}",
    "tool": "/v1/convai/tools/{}",
    "settings": "/v1/convai/settings",
    "webhooks": "/v1/workspace/webhooks",
}
_CONVERSATION_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
_ROOM_CONVERSATION_ID: Final = re.compile(r"conv_[A-Za-z0-9]+", re.ASCII)  # as the official JavaScript SDK reads it
_HEADER_SAFE: Final = re.compile(r"[\x21-\x7e]+", re.ASCII)
_DEFAULT_PORTS: Final = {"ws": 80, "http": 80, "wss": 443, "https": 443}
_MAX_RETRY_AFTER_SECONDS: Final = 3600
_QUOTED_CHARACTERS: Final = 300  # of the vendor's text, in the operator's log

_SYSTEM_BUSY: Final = "system_busy"
"""Of this the documentation ("Errors") says that to ask again will generally succeed."""
_PASSING: Final = {502, 503, 504}

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
    _SYSTEM_BUSY: _AT_LIMIT,
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


class Origin(NamedTuple):
    """Where a URL leads; `port` is None where the scheme has no usual one."""

    scheme: str
    host: str
    port: int | None


class Workspace:
    """One ElevenLabs host and the API keys of the workspace there: one, or two while they are rotated."""

    def __init__(self, *, base_url: str, api_keys: Sequence[str]) -> None:
        self.base_url = base_url.rstrip("/")
        self.base = _origin(urlsplit(base_url))
        self.keys = tuple(api_keys)
        self.preferred = 0

    def positions(self) -> list[int]:
        """Return the positions of the keys, the one that was accepted last in front."""
        return sorted(range(len(self.keys)), key=lambda position: position != self.preferred)

    def prefer(self, position: int) -> None:
        """Remember that the key at `position` was accepted; it is named by position, never by value."""
        if position != self.preferred:
            self.preferred = position
            _log.warning("api_key.switched", host=self.base.host, position=position + 1, of=len(self.keys))


class ElevenLabs:
    """Asks ElevenLabs for the credential of one conversation with the server-held key."""

    def __init__(
        self,
        *,
        transport: httpx.AsyncBaseTransport,
        workspaces: Sequence[Workspace],
        deadline_seconds: float,
        max_calls: int,
        clock: Clock,
    ) -> None:
        self._transport = transport
        self._workspaces = {workspace.base_url: workspace for workspace in workspaces}
        self._clock = clock
        self._request = lru_cache(maxsize=1024)(_request)
        self.bulkhead = Bulkhead(most=max_calls)
        self.guards = {url: _guard(url, "passes", deadline_seconds) for url in self._workspaces}
        # Apart, so that to ask what conversations used can neither crowd out nor shut out those who want one.
        self._accounts_bulkhead = Bulkhead(most=1)
        self._accounts_guards = {url: _guard(url, "accounts", deadline_seconds) for url in self._workspaces}

    async def credential(self, agent: Agent, transport: Transport, *, only_if_idle: bool = False) -> Credential:
        """Return a fresh credential for one conversation with `agent`.

        A signed URL is asked for with `include_conversation_id=true`, which makes it single-use and names the
        conversation before it begins. Raises an ElevenLabsRefusal or Overloaded, within the deadline; with
        `only_if_idle` Overloaded at once, where users may be waiting.
        """
        ask = partial(self._ask, agent, transport, self._workspaces[agent.base_url])
        with _refusals():
            return await self.guards[agent.base_url].call(ask, bulkhead=self.bulkhead, only_if_idle=only_if_idle)

    @property
    def breakers(self) -> dict[tuple[str, str], bool]:
        """Whether each breaker is open now, by its host and what is asked of it: passes or accounts."""
        kinds = (("passes", self.guards), ("accounts", self._accounts_guards))
        return {
            (self._workspaces[url].base.host, calls): guard.breaker.is_open
            for calls, guards in kinds
            for url, guard in guards.items()
        }

    def key_in_use(self, agent: Agent) -> int:
        """Tell which of its workspace's keys was accepted last, by its position."""
        return self._workspaces[agent.base_url].preferred

    async def conversation(self, agent_base_url: str, conversation_id: str) -> dict[str, object]:
        """Return ElevenLabs' own account of a conversation; the key needs the permission convai_read.

        One at a time. Raises ConversationUnknown for one that was never opened, or an ElevenLabsRefusal or Overloaded,
        within the deadline.
        """
        ask = partial(self._account, self._workspaces[agent_base_url], conversation_id)
        with _refusals():
            return await self._accounts_guards[agent_base_url].call(ask, bulkhead=self._accounts_bulkhead)

    async def document(self, base_url: str, kind: str, document_id: str = "") -> dict[str, object]:
        """Return how an `agent` or a `tool` is set up there, or the workspace's `settings` or `webhooks`.

        The key needs the permission convai_read, for `webhooks` webhooks_write. Raises AgentUnknown where there is
        nothing of this id, or another ElevenLabsRefusal, within the deadline. One at a time, as `conversation`.
        """
        ask = partial(self._document, self._workspaces[base_url], kind, document_id)
        with _refusals():
            return await self._accounts_guards[base_url].call(ask, bulkhead=self._accounts_bulkhead)

    async def rest(self) -> str | None:
        """Return a word where a host is left alone for being out of order, else None. Nobody is asked."""
        is_resting = any(guard.breaker.is_open for guard in self.guards.values())
        return "out of order, and left alone for now" if is_resting else None

    async def aclose(self) -> None:
        """Wait for the calls that are still under way: until the deadline at most."""
        for guard in (*self.guards.values(), *self._accounts_guards.values()):
            await guard.aclose()

    async def _ask(self, agent: Agent, transport: Transport, workspace: Workspace) -> Credential:
        asked_at = self._clock()
        answer = _json_object(await self._answer(workspace, _asking_for(agent.agent_id, transport)))
        if transport is Transport.WEBRTC:
            return _conversation_token(answer)
        return _signed_url(answer, agent, workspace.base, expires_at=asked_at + SIGNED_URL_SECONDS)

    async def _account(self, workspace: Workspace, conversation_id: str) -> dict[str, object]:
        path = _ACCOUNT_PATH + quote(conversation_id, safe="")
        try:
            body = await self._answer(workspace, path, permission="convai_read", most_bytes=MAX_ACCOUNT_BYTES)
        except AgentUnknown as refusal:  # of no agent was asked: this is some proxy's 404, or the path has changed
            raise BadAnswer(operator_note="ElevenLabs did not understand the call; is the base URL right?") from refusal
        return _json_object(body)

    async def _document(self, workspace: Workspace, kind: str, document_id: str) -> dict[str, object]:
        path = _DOCUMENT_PATHS[kind].format(quote(document_id, safe=""))
        try:
            body = await self._answer(workspace, path, permission="convai_read", most_bytes=MAX_ACCOUNT_BYTES)
        except ConversationUnknown as refusal:  # so every 404 to a reader is taken; here it is no conversation
            raise AgentUnknown(operator_note=f"ElevenLabs has no such {kind}") from refusal
        return _json_object(body)

    async def _answer(
        self,
        workspace: Workspace,
        path: str,
        *,
        permission: str = "convai_write",
        most_bytes: int = MAX_ANSWER_BYTES,
    ) -> bytes:
        """Return the body of a good answer, by the key accepted last or else by the other."""
        rejected: KeyRejected | None = None
        for position in workspace.positions():
            request = self._request(workspace.base_url + path, workspace.keys[position])
            status, headers, body = await self._get(request, most_bytes=most_bytes)
            if status == httpx.codes.OK:
                if permission == "convai_write":  # a key that may only read must not be tried first for passes
                    workspace.prefer(position)
                return body
            code = _vendor_error(body)[0]
            if permission == "convai_read" and status == httpx.codes.NOT_FOUND and code:
                raise ConversationUnknown(operator_note="ElevenLabs knows no such conversation")
            retry_after, now = headers.get("retry-after"), self._clock()
            refusal = refusal_for(status, body, retry_after=retry_after, now=now, permission=permission)
            if isinstance(refusal, Unavailable) or code == _SYSTEM_BUSY:
                raise FailedError(
                    refusal,
                    is_outage=isinstance(refusal, Unavailable),
                    may_retry=status in _PASSING or code == _SYSTEM_BUSY,
                    retry_after_seconds=_retry_after_seconds(retry_after, now=now),
                )
            if not isinstance(refusal, KeyRejected):
                raise refusal
            rejected = rejected or refusal
        raise rejected or KeyRejected(operator_note="no API key is configured")

    async def _get(self, request: httpx.Request, *, most_bytes: int) -> Answer:
        """Return the answer, or raise what became of the line."""
        try:
            return await get(self._transport, request, most_bytes=most_bytes)
        except AnswerUnusableError as error:
            raise BadAnswer(operator_note=str(error)) from error
        except httpx.DecodingError as error:
            raise BadAnswer(operator_note="the answer is no whole HTTP answer; is the base URL right?") from error
        except httpx.TimeoutException as error:
            note = (
                f"{type(error).__name__} while asking {request.url.host}: it cannot be reached, or answers too slowly"
            )
            raise FailedError(Timeout(operator_note=note), is_outage=True, may_retry=False) from error
        except httpx.TransportError as error:
            note = (
                f"{type(error).__name__} while asking {request.url.host}; "
                "check the base URL, DNS and the way out of this network"
            )
            # Before any answer, as on a connection that was kept for too long, the call may be made again.
            may_retry = isinstance(error, httpx.ConnectError)
            raise FailedError(Unavailable(operator_note=note), is_outage=True, may_retry=may_retry) from error


@cache
def _asking_for(agent_id: str, transport: Transport) -> str:
    query = {"agent_id": agent_id}
    if transport is Transport.WEBSOCKET:
        query["include_conversation_id"] = "true"
    return f"{_PATHS[transport]}?{urlencode(query)}"


def _request(url: str, api_key: str) -> httpx.Request:
    return httpx.Request("GET", url, headers={**HEADERS, "xi-api-key": api_key})


def _guard(base_url: str, calls: str, deadline_seconds: float) -> Guard:
    host = urlsplit(base_url).hostname

    def log_change(is_open: bool) -> None:  # noqa: FBT001 - the breaker's own signature
        if is_open:
            _log.error("breaker.opened", host=host, calls=calls, note="ElevenLabs is out of order: not called for now")
        else:
            _log.info("breaker.closed", host=host, calls=calls)

    return Guard(
        deadline_seconds=deadline_seconds,
        clock=time.monotonic,
        sleep=asyncio.sleep,
        jitter=random.random,
        on_change=log_change,
    )


@contextmanager
def _refusals() -> Iterator[None]:
    """Word what kept a call from being made, or from being answered."""
    try:
        yield
    except FullError:
        raise Overloaded(operator_note="too many calls to ElevenLabs at once: see VOICEPASS_MAX_CALLS") from None
    except BreakerOpenError as error:
        note = "not asked: ElevenLabs has been failing; see breaker.opened"
        raise Unavailable(operator_note=note, retry_after_seconds=error.retry_after_seconds) from None
    except DeadlinePassedError:
        raise Timeout(operator_note="no complete answer within VOICEPASS_DEADLINE_SECONDS") from None


def _signed_url(answer: dict[str, object], agent: Agent, base: Origin, *, expires_at: float) -> Credential:
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
    leads_to = _origin(url)
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


def _origin(url: SplitResult) -> Origin:
    return Origin(url.scheme, url.hostname or "", url.port or _DEFAULT_PORTS.get(url.scheme))


def _is_vendor(host: str) -> bool:
    return host == VENDOR_DOMAIN or host.endswith("." + VENDOR_DOMAIN)


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
    return refusal(operator_note=f"{note} ({said})", retry_after_seconds=wait, vendor_code=code)


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
