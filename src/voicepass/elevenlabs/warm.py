"""The warm store: fetches single-use signed URLs ahead of demand, and hands out each of them once.

A user gets a stored URL without waiting for ElevenLabs. For each agent, the store holds twice as many URLs as users
asked for in the last ten seconds. It fetches none while nobody asks. During a short outage it hands out those that it
holds.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from voicepass.elevenlabs import ElevenLabs
from voicepass.errors import AgentUnknown, KeyRejected, LimitReached, Refusal, UserBlocked
from voicepass.model import Agent, Clock, Credential, Transport
from voicepass.telemetry.logger import Logger

DEMAND_SECONDS: Final = 10.0
SPARED_SECONDS: Final = 120.0
"""The store hands out no URL that expires within this time. A user needs the time to open the conversation."""
PAUSE_SECONDS: Final = 1.0
"""After a refusal, the store fetches nothing for this time, or for the refusal's Retry-After if that is longer."""

_log = Logger("voicepass.elevenlabs.warm")


@dataclass(slots=True)
class _Shelf:
    """The URLs of one agent, made with one key. `held` is oldest first, each with the monotonic time of its end."""

    key_position: int
    held: deque[tuple[float, Credential]] = field(default_factory=deque)
    taken_at: deque[float] = field(default_factory=deque)
    expected: int = 0
    """How many may be added: those in flight, and those that were taken and may be given back."""
    paused_until: float = 0.0


@dataclass(kw_only=True, eq=False)
class WarmStore:
    """Holds at most `most` URLs for each agent. `clock`: wall time. `ticks`: monotonic seconds."""

    source: ElevenLabs
    most: int
    clock: Clock
    ticks: Callable[[], float]
    _shelves: dict[Agent, _Shelf] = field(default_factory=dict, init=False)
    _fetches: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    @property
    def held(self) -> dict[str, int]:
        """The number of URLs in the store, by the agent's alias."""
        return {agent.alias: len(shelf.held) for agent, shelf in self._shelves.items()}

    @contextmanager
    def take(self, agent: Agent, transport: Transport) -> Iterator[Credential | None]:
        """Yield a credential that nobody else gets, or None if the store holds none.

        If the block raises LimitReached or UserBlocked, nobody got it, and the store keeps it.
        """
        shelf = self._find_shelf(agent)
        # A conversation token may be usable more than once.
        oldest = self._pop_usable(shelf) if transport is Transport.WEBSOCKET else None
        if oldest is None:
            yield None
            return
        shelf.expected += 1
        held = shelf.held  # If the key is rejected in the meantime, the agent gets another shelf.
        try:
            yield oldest[1]
        except (LimitReached, UserBlocked):
            held.appendleft(oldest)
            raise
        finally:
            shelf.expected -= 1
        self._refill(agent, self._find_shelf(agent))

    async def fetch_credential(self, agent: Agent, transport: Transport) -> Credential:
        """Ask ElevenLabs for a credential, because the store holds none. Raises what the source raises."""
        if transport is Transport.WEBSOCKET:
            self._refill(agent, self._find_shelf(agent))
        return await self.source.fetch_credential(agent, transport)

    async def aclose(self) -> None:
        """Stop fetching."""
        for fetch in self._fetches:
            fetch.cancel()
        await asyncio.gather(*self._fetches, return_exceptions=True)

    def _find_shelf(self, agent: Agent) -> _Shelf:
        """Return the agent's shelf. It is a new, empty one if the workspace's key has changed."""
        key_position = self.source.get_key_position(agent)
        shelf = self._shelves.get(agent)
        if shelf is None or shelf.key_position != key_position:
            shelf = self._shelves[agent] = _Shelf(key_position)
        return shelf

    def _pop_usable(self, shelf: _Shelf) -> tuple[float, Credential] | None:
        while shelf.held:
            usable_until, credential = oldest = shelf.held.popleft()
            # Compare both clocks: the wall clock jumps when it is set, the monotonic one stops while a machine sleeps.
            expires_at = credential.expires_at or 0.0
            if self.ticks() < usable_until and self.clock() < expires_at - SPARED_SECONDS:
                return oldest
        return None

    def _refill(self, agent: Agent, shelf: _Shelf) -> None:
        """Count one more user, and fetch as many URLs as the demand calls for."""
        now = self.ticks()
        shelf.taken_at.append(now)
        while shelf.taken_at[0] < now - DEMAND_SECONDS or len(shelf.taken_at) > self.most:
            shelf.taken_at.popleft()
        if now < shelf.paused_until:
            return
        # Twice the demand, so that a demand that has just begun does not use up the URLs in flight.
        target = min(self.most, 2 * len(shelf.taken_at))
        for _ in range(target - len(shelf.held) - shelf.expected):
            fetch = asyncio.create_task(self._fetch_ahead(agent, shelf))
            shelf.expected += 1
            self._fetches.add(fetch)
            fetch.add_done_callback(self._fetches.discard)

    async def _fetch_ahead(self, agent: Agent, shelf: _Shelf) -> None:
        began_at = self.ticks()
        try:
            credential = await self.source.fetch_credential(agent, Transport.WEBSOCKET, only_if_idle=True)
        except Refusal as refusal:
            pause_seconds = max(PAUSE_SECONDS, refusal.retry_after_seconds or 0)
            if began_at >= shelf.paused_until:  # Write one line for all fetches in flight.
                _log.warning("warm.paused", agent=agent.alias, code=refusal.code, seconds=pause_seconds)
            shelf.paused_until = self.ticks() + pause_seconds
            if isinstance(refusal, (KeyRejected, AgentUnknown)):
                shelf.held = deque()
            return
        finally:
            shelf.expected -= 1
        if credential.expires_at is None or credential.conversation_id is None:
            return  # It may open more than one conversation, or expire at any time.
        usable_seconds = credential.expires_at - self.clock() - SPARED_SECONDS
        shelf.held.append((began_at + usable_seconds, replace(credential, is_warm=True)))
