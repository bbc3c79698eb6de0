"""The warm store: single-use signed URLs fetched ahead of demand, each handed out once.

It stands before ElevenLabs and answers as ElevenLabs does, without the wait: from what it holds, else by asking. It
holds, for each agent, twice as many as the last ten seconds took and no more than it may; where nobody comes, nothing
is fetched. What it holds also carries users over a short outage.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import structlog

from voicepass.errors import AgentUnknown, KeyRejected, Refusal
from voicepass.model import Agent, Clock, Credential, Transport

DEMAND_SECONDS: Final = 10.0
SPARED_SECONDS: Final = 120.0
"""A user needs time to open the conversation: a URL is not handed out within two minutes of its expiry."""
PAUSE_SECONDS: Final = 1.0
"""After a refusal nothing is fetched ahead for so long, or for as long as the refusal asks."""

_log = structlog.get_logger("voicepass.elevenlabs.warm")


class Source(Protocol):
    """Where credentials come from. `only_if_idle`: refuse at once rather than be in a waiting user's way.

    `key_in_use` names the API key by anything that differs from another's, but by its value.
    """

    async def credential(  # noqa: D102
        self, agent: Agent, transport: Transport, *, only_if_idle: bool = False
    ) -> Credential: ...

    def key_in_use(self, agent: Agent) -> int: ...  # noqa: D102


@dataclass(slots=True)
class _Shelf:
    """What is held for one agent, made with one key: oldest first, each with the monotonic time it is good until."""

    key_in_use: int
    held: deque[tuple[float, Credential]] = field(default_factory=deque)
    taken_at: deque[float] = field(default_factory=deque)
    on_their_way: int = 0
    paused_until: float = 0.0


class WarmStore:
    """Holds at most `most` URLs for each agent. `clock` is wall time, `ticks` monotonic seconds."""

    def __init__(self, *, source: Source, most: int, clock: Clock, ticks: Callable[[], float]) -> None:
        self._source = source
        self._most = most
        self._clock = clock
        self._ticks = ticks
        self._shelves: dict[Agent, _Shelf] = {}
        self._refills: set[asyncio.Task[None]] = set()

    @property
    def held(self) -> dict[str, int]:
        """How many are held now, by the agent's alias."""
        return {agent.alias: len(shelf.held) for agent, shelf in self._shelves.items()}

    async def credential(self, agent: Agent, transport: Transport) -> Credential:
        """Return a credential that nobody else is given. Raises what the source raises."""
        if transport is not Transport.WEBSOCKET:  # nothing says that a conversation token may be used only once
            return await self._source.credential(agent, transport)
        shelf = self._shelf(agent)
        shelf.taken_at.append(self._ticks())
        credential = self._take(shelf)
        self._refill(agent, shelf)
        if credential is not None:
            return credential
        try:
            return await self._source.credential(agent, transport)
        except (KeyRejected, AgentUnknown):
            shelf.held.clear()
            raise

    async def aclose(self) -> None:
        """Fetch no more."""
        for refill in self._refills:
            refill.cancel()
        await asyncio.gather(*self._refills, return_exceptions=True)

    def _shelf(self, agent: Agent) -> _Shelf:
        """Return the agent's shelf: an empty one where there was none, or where the key has changed."""
        key_in_use = self._source.key_in_use(agent)
        shelf = self._shelves.get(agent)
        if shelf is None or shelf.key_in_use != key_in_use:
            shelf = self._shelves[agent] = _Shelf(key_in_use)
        return shelf

    def _take(self, shelf: _Shelf) -> Credential | None:
        while shelf.held:
            good_until, credential = shelf.held.popleft()
            # By both clocks: one of them jumps when it is set, the other stands still while a machine sleeps.
            expires_at = credential.expires_at or 0.0
            if self._ticks() < good_until and self._clock() < expires_at - SPARED_SECONDS:
                return credential
        return None

    def _refill(self, agent: Agent, shelf: _Shelf) -> None:
        now = self._ticks()
        while shelf.taken_at[0] < now - DEMAND_SECONDS or len(shelf.taken_at) > self._most:
            shelf.taken_at.popleft()
        if now < shelf.paused_until:
            return
        # Twice, so that a demand that has just begun does not outrun what is on its way.
        wanted = min(self._most, 2 * len(shelf.taken_at))
        for _ in range(wanted - len(shelf.held) - shelf.on_their_way):
            refill = asyncio.create_task(self._fetch(agent, shelf))
            shelf.on_their_way += 1
            self._refills.add(refill)
            refill.add_done_callback(self._refills.discard)

    async def _fetch(self, agent: Agent, shelf: _Shelf) -> None:
        begun = self._ticks()
        try:
            credential = await self._source.credential(agent, Transport.WEBSOCKET, only_if_idle=True)
        except Refusal as refusal:
            pause = max(PAUSE_SECONDS, refusal.retry_after_seconds or 0)
            if begun >= shelf.paused_until:  # one line for all that were on their way
                _log.warning("warm.paused", agent=agent.alias, code=refusal.code, seconds=pause)
            shelf.paused_until = self._ticks() + pause
            if isinstance(refusal, (KeyRejected, AgentUnknown)):
                shelf.held.clear()
            return
        finally:
            shelf.on_their_way -= 1
        if credential.expires_at is None or credential.conversation_id is None:
            return  # it may be good for more than one conversation, or for how long nobody knows
        good_for = credential.expires_at - self._clock() - SPARED_SECONDS
        shelf.held.append((begun + good_for, replace(credential, is_warm=True)))
