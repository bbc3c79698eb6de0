"""Everything voicepass knows of ElevenLabs' HTTP: how a credential is asked for, checked, and refused.

Sources of the vendor's facts: the API reference ("Get signed URL", "Get conversation token", "Errors"), the official
SDKs' source, and error bodies that users published. Paths are here, fields in `answers`, codes in `codes.toml`, and
nowhere else, except for the account of a conversation, which its webhook carries too (`settlement`).
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Final
from urllib.parse import quote, urlencode, urlsplit

import httpx
import structlog

from voicepass.elevenlabs.answers import (
    ConversationsPage,
    json_object,
    origin_of,
    read_conversation_token,
    read_conversations_page,
    read_signed_url,
)
from voicepass.elevenlabs.guards import make_guard, refusing
from voicepass.elevenlabs.refusals import SYSTEM_BUSY, read_retry_after, refusal_for, vendor_error
from voicepass.elevenlabs.resilience import Bulkhead, FailedError, Pause
from voicepass.errors import (
    AgentUnknown,
    BadAnswer,
    Busy,
    ConversationUnknown,
    KeyRejected,
    Refusal,
    Timeout,
    Unavailable,
)
from voicepass.model import Agent, Clock, Credential, Transport
from voicepass.outbound import HEADERS, Answer, AnswerUnusableError, CertificateRefusedError, get

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

LOOKUPS_SHARE: Final = 8
"""Of the calls that may be made at once, one in so many may be a lookup; they have slots of their own."""
LIST_PAGE: Final = 100
"""Conversations on a page of the list, at most (the SDK's `conversations.list`)."""

MAX_ANSWER_BYTES: Final = 64 * 1024
MAX_ACCOUNT_BYTES: Final = 4 * 1024 * 1024  # it holds the whole transcript

_PATHS: Final = {
    Transport.WEBSOCKET: "/v1/convai/conversation/get-signed-url",
    Transport.WEBRTC: "/v1/convai/conversation/token",
}
_LIST_PATH: Final = "/v1/convai/conversations"
_ACCOUNT_PATH: Final = f"{_LIST_PATH}/"
_DOCUMENT_PATHS: Final = {
    "agent": "/v1/convai/agents/{}",
    "tool": "/v1/convai/tools/{}",
    "settings": "/v1/convai/settings",
    "webhooks": "/v1/workspace/webhooks",
}

_PASSING: Final = {502, 503, 504}

_log = structlog.get_logger("voicepass.elevenlabs")


class Workspace:
    """One ElevenLabs host and the API keys of the workspace there: one, or two while they are rotated."""

    def __init__(self, *, base_url: str, api_keys: Sequence[str]) -> None:
        self.base_url = base_url.rstrip("/")
        self.base = origin_of(urlsplit(base_url))
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
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._workspaces = {workspace.base_url: workspace for workspace in workspaces}
        self._clock = clock
        self._request = lru_cache(maxsize=1024)(_request)
        self.bulkhead = Bulkhead(most=max_calls)
        self.guards = {url: make_guard(url, "passes", deadline_seconds, ticks) for url in self._workspaces}
        self._busy = {url: Pause(clock=ticks) for url in self._workspaces}
        self._rejected: defaultdict[tuple[Agent, Transport], Pause] = defaultdict(lambda: Pause(clock=ticks))
        # Apart, so that questions about conversations never take a slot from a user who asks for a pass.
        self._accounts_bulkhead = Bulkhead(most=1)
        self._lookups_bulkhead = Bulkhead(most=max(1, max_calls // LOOKUPS_SHARE))
        self._accounts_guards = {url: make_guard(url, "accounts", deadline_seconds, ticks) for url in self._workspaces}

    async def credential(self, agent: Agent, transport: Transport, *, only_if_idle: bool = False) -> Credential:
        """Return a fresh credential for one conversation with `agent`.

        A signed URL is asked for with `include_conversation_id=true`, which makes it single-use and names the
        conversation before it begins. Raises an ElevenLabsRefusal or Overloaded, within the deadline; with
        `only_if_idle` Overloaded at once, where users may be waiting.

        After a 429 with Retry-After nobody of that workspace asks for a while, and after a rejected key nobody asks for
        this agent: each gets the same refusal at once.
        """
        ask = partial(self._ask, agent, transport, self._workspaces[agent.base_url])
        guard, busy, rejected = (
            self.guards[agent.base_url],
            self._busy[agent.base_url],
            self._rejected[agent, transport],
        )
        try:
            with refusing():
                busy.check()
                rejected.check()
                credential = await guard.call(ask, bulkhead=self.bulkhead, only_if_idle=only_if_idle)
        except (Busy, KeyRejected) as refusal:
            if refusal.has_reached_elevenlabs and isinstance(refusal, KeyRejected):
                rejected.begin(refusal, seconds=0)
            elif refusal.has_reached_elevenlabs and refusal.pause_seconds:
                busy.begin(refusal, seconds=refusal.pause_seconds)
            raise
        busy.end()
        rejected.end()
        return credential

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

    async def conversation(
        self, agent_base_url: str, conversation_id: str, *, is_lookup: bool = False
    ) -> dict[str, object]:
        """Return ElevenLabs' own account of a conversation; the key needs the permission convai_read.

        One at a time, but lookups have slots of their own. Raises ConversationUnknown for one that was never opened, or
        an ElevenLabsRefusal or Overloaded, within the deadline.
        """
        ask = partial(self._account, self._workspaces[agent_base_url], conversation_id)
        bulkhead = self._lookups_bulkhead if is_lookup else self._accounts_bulkhead
        with refusing():
            return await self._accounts_guards[agent_base_url].call(ask, bulkhead=bulkhead)

    async def conversations(
        self, agent_base_url: str, agent_id: str, *, since: float, until: float, cursor: str = ""
    ) -> ConversationsPage:
        """Return a page of the agent's conversations that began from `since` to `until` (seconds since the epoch).

        Conversations that nobody opened are left out. The key needs convai_read. One at a time. Raises an
        ElevenLabsRefusal or Overloaded, within the deadline.
        """
        query = {
            "agent_id": agent_id,
            "page_size": str(LIST_PAGE),
            "call_start_after_unix": str(math.floor(since) - 1),  # nobody says whether the bounds belong to it
            "call_start_before_unix": str(math.ceil(until) + 1),
            "exclude_statuses": "initiated",
        } | ({"cursor": cursor} if cursor else {})
        ask = partial(self._page, self._workspaces[agent_base_url], f"{_LIST_PATH}?{urlencode(query)}")
        with refusing():
            return await self._accounts_guards[agent_base_url].call(ask, bulkhead=self._accounts_bulkhead)

    async def document(self, base_url: str, kind: str, document_id: str = "") -> dict[str, object]:
        """Return how an `agent` or a `tool` is set up there, or the workspace's `settings` or `webhooks`.

        The key needs the permission convai_read, for `webhooks` webhooks_write. Raises AgentUnknown where there is
        nothing of this id, or another ElevenLabsRefusal, within the deadline. One at a time, as `conversation`.
        """
        ask = partial(self._document, self._workspaces[base_url], kind, document_id)
        with refusing():
            return await self._accounts_guards[base_url].call(ask, bulkhead=self._accounts_bulkhead)

    async def rest(self) -> str | None:
        """Return a word where a host is not asked for passes at the moment, else None. Nobody is asked."""
        if any(guard.breaker.is_open for guard in self.guards.values()):
            return "out of order, and left alone for now"
        return (
            "refuses, and is left alone for now"
            if any(pause.is_on for pause in (*self._busy.values(), *self._rejected.values()))
            else None
        )

    async def aclose(self) -> None:
        """Wait for the calls that are still under way: until the deadline at most."""
        for guard in (*self.guards.values(), *self._accounts_guards.values()):
            await guard.aclose()

    async def _ask(self, agent: Agent, transport: Transport, workspace: Workspace) -> Credential:
        asked_at = self._clock()
        answer = json_object(await self._answer(workspace, _asking_for(agent.agent_id, transport)))
        if transport is Transport.WEBRTC:
            return read_conversation_token(answer)
        return read_signed_url(answer, agent, workspace.base, expires_at=asked_at + SIGNED_URL_SECONDS)

    async def _account(self, workspace: Workspace, conversation_id: str) -> dict[str, object]:
        path = _ACCOUNT_PATH + quote(conversation_id, safe="")
        try:
            body = await self._read(workspace, path, absent=ConversationUnknown)
        except AgentUnknown as refusal:  # the call names no agent: this is a proxy's 404, or the path has changed
            raise BadAnswer(operator_note="ElevenLabs did not understand the call; is the base URL right?") from refusal
        account = json_object(body)
        if account.get("conversation_id", conversation_id) != conversation_id:
            raise BadAnswer(operator_note="ElevenLabs answered with another conversation than it was asked about")
        return account

    async def _page(self, workspace: Workspace, path: str) -> ConversationsPage:
        try:
            body = await self._read(workspace, path)
        except AgentUnknown as refusal:
            raise BadAnswer(operator_note="ElevenLabs did not understand the call; is the base URL right?") from refusal
        return read_conversations_page(json_object(body))

    async def _document(self, workspace: Workspace, kind: str, document_id: str) -> dict[str, object]:
        path = _DOCUMENT_PATHS[kind].format(quote(document_id, safe=""))
        return json_object(await self._read(workspace, path))

    async def _read(self, workspace: Workspace, path: str, *, absent: type[Refusal] | None = None) -> bytes:
        return await self._answer(
            workspace, path, permission="convai_read", most_bytes=MAX_ACCOUNT_BYTES, absent=absent
        )

    async def _answer(
        self,
        workspace: Workspace,
        path: str,
        *,
        permission: str = "convai_write",
        most_bytes: int = MAX_ANSWER_BYTES,
        absent: type[Refusal] | None = None,
    ) -> bytes:
        """Return the body of a good answer, by the key accepted last or else by the other.

        A 404 with a code of ElevenLabs' means that the thing in the path does not exist: `absent`, or AgentUnknown.
        """
        rejected: KeyRejected | None = None
        for position in workspace.positions():
            request = self._request(workspace.base_url + path, workspace.keys[position])
            status, headers, body = await self._get(request, most_bytes=most_bytes)
            if status == httpx.codes.OK:
                if permission == "convai_write":  # a key that may only read must not be tried first for passes
                    workspace.prefer(position)
                return body
            code = vendor_error(body)[0]
            if absent is not None and status == httpx.codes.NOT_FOUND and code:
                raise absent(operator_note="ElevenLabs knows no such conversation")
            retry_after, now = headers.get("retry-after"), self._clock()
            refusal = refusal_for(status, body, retry_after=retry_after, now=now, permission=permission)
            if isinstance(refusal, Unavailable) or code == SYSTEM_BUSY:
                raise FailedError(
                    refusal,
                    is_outage=isinstance(refusal, Unavailable),
                    may_retry=status in _PASSING or code == SYSTEM_BUSY,
                    retry_after_seconds=read_retry_after(retry_after, now=now),
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
        except CertificateRefusedError as error:
            raise FailedError(Unavailable(operator_note=str(error)), is_outage=True, may_retry=False) from error
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
