"""Everything that voicepass knows of ElevenLabs' HTTP API: how it asks for a credential, and how it reads the answer.

Read in this order: `ElevenLabs` below decides what to ask. `calls` makes one call. `answers` parses good answers, and
`refusals` error answers, by the table in `codes.toml`. `resilience` limits the calls. `warm` fetches signed URLs ahead,
and `sealing` encrypts them for the ledger.

Sources of the vendor's facts: the API reference ("Get signed URL", "Get conversation token", "Errors"), the source of
the official SDKs, and error bodies that users published.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Final
from urllib.parse import quote, urlencode, urlsplit

import httpx

from voicepass.elevenlabs.answers import (
    ConversationsPage,
    parse_conversation_token,
    parse_conversations_page,
    parse_json_object,
    parse_signed_url,
)
from voicepass.elevenlabs.calls import NOT_UNDERSTOOD, Host, Workspace
from voicepass.elevenlabs.codes import load_table
from voicepass.elevenlabs.resilience import Breaker, Bulkhead, Guard, Pause
from voicepass.errors import AgentUnknown, BadAnswer, Busy, ConversationUnknown, KeyRejected, Refusal
from voicepass.model import Agent, Clock, Credential, Transport

__all__ = ["REGIONS", "ElevenLabs", "Workspace", "find_livekit_url"]

SIGNED_URL_SECONDS: Final = 900
"""A signed URL opens a conversation for 15 minutes (documentation, "Signed URLs")."""

_REGIONS: Final = load_table("voicepass.elevenlabs", "regions.toml")
REGIONS: Final[Mapping[str, str]] = {name: region["base_url"] for name, region in _REGIONS.items()}
_LIVEKIT_URLS: Final = {
    urlsplit(region["base_url"]).hostname: region.get("livekit_url") for region in _REGIONS.values()
}

LOOKUPS_SHARE: Final = 8
"""Lookups have their own slots: one for this many slots of passes."""
LIST_PAGE: Final = 100
"""The largest page of the list of conversations (the SDK's `conversations.list`)."""

_CREDENTIAL_PATHS: Final = {
    Transport.WEBSOCKET: "/v1/convai/conversation/get-signed-url",
    Transport.WEBRTC: "/v1/convai/conversation/token",
}
_LIST_PATH: Final = "/v1/convai/conversations"
_DOCUMENT_PATHS: Final = {
    "agent": "/v1/convai/agents/{}",
    "tool": "/v1/convai/tools/{}",
    "settings": "/v1/convai/settings",
    "webhooks": "/v1/workspace/webhooks",
}


class ElevenLabs:
    """Asks ElevenLabs for credentials and records, with the API key that never leaves the server.

    Every call raises an ElevenLabsRefusal or Overloaded, within the deadline, if it gets no usable answer.
    """

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
        self._clock = clock
        self._hosts = {each.base_url: Host(workspace=each, transport=transport, clock=clock) for each in workspaces}
        self._guards = {
            (each.base_url, calls): Guard(
                breaker=Breaker(host=each.base.host, calls=calls, clock=ticks), deadline_seconds=deadline_seconds
            )
            for each in workspaces
            for calls in ("passes", "accounts")
        }
        # After a 429 with Retry-After, by the base URL; and after a rejected key.
        self._busy: defaultdict[str, Pause] = defaultdict(lambda: Pause(Busy, clock=ticks))
        self._rejected: defaultdict[tuple[Agent, Transport], Pause] = defaultdict(
            lambda: Pause(KeyRejected, clock=ticks)
        )
        self.bulkhead = Bulkhead(most=max_calls)
        # Separate slots, so that questions about conversations never take a slot from a user who asks for a pass.
        self._records_bulkhead = Bulkhead(most=1)
        self._lookups_bulkhead = Bulkhead(most=max(1, max_calls // LOOKUPS_SHARE))

    async def fetch_credential(self, agent: Agent, transport: Transport, *, only_if_idle: bool = False) -> Credential:
        """Return a fresh credential for one conversation with `agent`.

        `include_conversation_id=true` makes a signed URL single-use, and names the conversation before it begins.
        With `only_if_idle`, raises Overloaded at once if users may be waiting.

        After a 429 with Retry-After, nobody asks this workspace for a while. After a rejected key, nobody asks for this
        agent for a while. Each caller gets the same refusal at once.
        """
        ask, guard = partial(self._ask_for_credential, agent, transport), self._guards[agent.base_url, "passes"]
        with self._busy[agent.base_url], self._rejected[agent, transport]:
            return await guard.call(ask, bulkhead=self.bulkhead, only_if_idle=only_if_idle)

    async def fetch_conversation(
        self, agent_base_url: str, conversation_id: str, *, is_lookup: bool = False
    ) -> dict[str, object]:
        """Return ElevenLabs' record of a conversation. Raises ConversationUnknown if nobody has opened it.

        The key needs the permission convai_read. One call at a time, but lookups have their own slots.
        """
        unknown = ConversationUnknown(operator_note="ElevenLabs knows no such conversation")
        bulkhead = self._lookups_bulkhead if is_lookup else self._records_bulkhead
        body = await self._call(agent_base_url, _build_record_path(conversation_id), unknown=unknown, bulkhead=bulkhead)
        record = parse_json_object(body)
        if record.get("conversation_id", conversation_id) != conversation_id:
            raise BadAnswer(operator_note="ElevenLabs answered with another conversation than it was asked about")
        return record

    async def delete_conversation(self, agent_base_url: str, conversation_id: str) -> None:
        """Delete ElevenLabs' record of a conversation. Nothing happens if there is none. One call at a time."""
        path = _build_record_path(conversation_id)
        with suppress(ConversationUnknown):
            await self._call(agent_base_url, path, unknown=ConversationUnknown(), method="DELETE")

    async def list_conversations(
        self, agent_base_url: str, agent_id: str, *, since: float, until: float, cursor: str = ""
    ) -> ConversationsPage:
        """Return a page of the agent's conversations that began from `since` to `until` (seconds since the epoch).

        The page has no conversations that nobody opened. The key needs convai_read. One call at a time.
        """
        query = {
            "agent_id": agent_id,
            "page_size": str(LIST_PAGE),
            # The documentation does not say whether the bounds are included.
            "call_start_after_unix": str(math.floor(since) - 1),
            "call_start_before_unix": str(math.ceil(until) + 1),
            "exclude_statuses": "initiated",
        } | ({"cursor": cursor} if cursor else {})
        unknown = BadAnswer(operator_note=NOT_UNDERSTOOD)
        return parse_conversations_page(
            parse_json_object(await self._call(agent_base_url, f"{_LIST_PATH}?{urlencode(query)}", unknown=unknown))
        )

    async def fetch_agent(self, agent: Agent) -> dict[str, object]:
        """Return the agent's configuration on its branch and in its version. Raises what `fetch_document` raises."""
        query = {name: value for name, value in agent.selection.items() if name != "environment"}
        return await self.fetch_document(agent.base_url, "agent", agent.agent_id, **query)

    async def fetch_document(self, base_url: str, kind: str, document_id: str = "", **query: str) -> dict[str, object]:
        """Return the configuration of an `agent` or a `tool`, or the workspace's `settings` or `webhooks`.

        Raises AgentUnknown if ElevenLabs has nothing with this id. The key needs convai_read, for `webhooks`
        webhooks_write. One call at a time.
        """
        path = _DOCUMENT_PATHS[kind].format(quote(document_id, safe="")) + (f"?{urlencode(query)}" if query else "")
        unknown = AgentUnknown(operator_note=f"ElevenLabs has no such {kind}")
        return parse_json_object(await self._call(base_url, path, unknown=unknown))

    @property
    def breakers(self) -> dict[tuple[str, str], bool]:
        """Whether each breaker is open, by its host and its kind of calls: passes or accounts."""
        breakers = [guard.breaker for guard in self._guards.values()]
        return {(breaker.host, breaker.calls): breaker.is_open for breaker in breakers}

    def get_key_position(self, agent: Agent) -> int:
        """Return the position of the key that the agent's workspace accepted last."""
        return self._hosts[agent.base_url].workspace.preferred

    async def explain_pause(self) -> str | None:
        """Return why voicepass does not ask a host for passes at the moment, or None if it asks all. Asks nobody."""
        if any(guard.breaker.is_open for (_, calls), guard in self._guards.items() if calls == "passes"):
            return "out of order, and left alone for now"
        is_paused = any(pause.is_on for pause in (*self._busy.values(), *self._rejected.values()))
        return "refuses, and is left alone for now" if is_paused else None

    async def aclose(self) -> None:
        """Wait for the calls that are in flight: until the deadline at most."""
        for guard in self._guards.values():
            await guard.aclose()

    async def _ask_for_credential(self, agent: Agent, transport: Transport) -> Credential:
        host, asked_at = self._hosts[agent.base_url], self._clock()
        answer = parse_json_object(await host.fetch(_build_credential_path(agent, transport)))
        if transport is Transport.WEBRTC:
            return parse_conversation_token(answer)
        return parse_signed_url(answer, agent, host.workspace.base, expires_at=asked_at + SIGNED_URL_SECONDS)

    async def _call(
        self, base_url: str, path: str, *, unknown: Refusal, method: str = "GET", bulkhead: Bulkhead | None = None
    ) -> bytes:
        """Return what `Host.fetch` returns, at the first or second try."""
        fetch = partial(self._hosts[base_url].fetch, path, unknown=unknown, method=method)
        return await self._guards[base_url, "accounts"].call(fetch, bulkhead=bulkhead or self._records_bulkhead)


def find_livekit_url(base_url: str) -> str | None:
    """Return where the SDK opens a conversation token of this ElevenLabs host, or None if voicepass does not know."""
    return _LIVEKIT_URLS.get(urlsplit(base_url).hostname)


def _build_record_path(conversation_id: str) -> str:
    return f"{_LIST_PATH}/{quote(conversation_id, safe='')}"


@cache
def _build_credential_path(agent: Agent, transport: Transport) -> str:
    query = {"agent_id": agent.agent_id, **agent.selection}
    if transport is Transport.WEBSOCKET:
        query["include_conversation_id"] = "true"
    return f"{_CREDENTIAL_PATHS[transport]}?{urlencode(query)}"
