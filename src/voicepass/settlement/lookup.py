"""Finds out, before a user is refused, what they really have open and which unopened pass they can have again."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final, Protocol

import structlog

from voicepass.elevenlabs.sealing import SealBrokenError
from voicepass.errors import ConversationUnknown, KeyRejected, LimitReached, Refusal
from voicepass.model import Agent, Clock, Credential, IssuedPass, Limit, LookupTurn, Reservation, SealedPass, Turn
from voicepass.settlement import Account, Outcome, Settlements, Status, read_account

DEADLINE_SHARE: Final = 1 / 3
"""Of a request's deadline: the longest that a lookup may take."""
REISSUED_SECONDS: Final = 120.0
"""A user needs time to open the conversation: a pass is returned again only if it is valid for so long."""
WARNING_SECONDS: Final = 3600.0
REJECTED_SECONDS: Final = 60.0
"""A host that rejected the key is not asked again for so long."""
_POLL_SECONDS: Final = 0.1
_WRITES_AT_ONCE: Final = 5  # into the ledger: half of the connections that an instance has

_log = structlog.get_logger("voicepass.settlement")


class Ledger(Protocol):
    """The part of the ledger that a lookup needs. Every method raises LedgerUnavailable."""

    async def begin_lookup(self, reservation: Reservation, limit: Limit, /, *, seconds: float) -> LookupTurn:
        """Take the turn to look up what `limit` counts for this reservation's user."""

    async def end_lookup(self, reservation: Reservation, limit: Limit, /, *, has_freed: bool) -> None:
        """Give the turn back."""

    async def is_lookup_running(self, reservation: Reservation, limit: Limit, /) -> bool:
        """Tell whether another caller looks this up at the moment."""

    async def is_in_flight(self, reservation: Reservation, /) -> bool:
        """Tell whether a pass of this user is about to be granted."""

    async def unopened(self, reservation: Reservation, /) -> Sequence[SealedPass]:
        """Return the user's unopened passes for this agent and transport, newest first."""


class Provider(Protocol):
    """Raises an ElevenLabsRefusal or Overloaded when it does not answer."""

    async def conversation(
        self, agent_base_url: str, conversation_id: str, /, *, is_lookup: bool
    ) -> Mapping[str, object]:
        """Return ElevenLabs' account of a conversation, or raise ConversationUnknown."""


class Seals(Protocol):
    """Opens what was sealed."""

    def unseal(self, agent: Agent, pass_id: str, sealed: bytes, /) -> Credential:
        """Return the credential, or raise SealBrokenError."""


class OpenPasses:
    """Finds out what is really open. `base_urls`: the ElevenLabs host of each agent's id.

    `clock` is wall time, `ticks` monotonic seconds. Callers who ask for the same user at once share one lookup.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        provider: Provider,
        settlements: Settlements,
        seals: Seals,
        base_urls: Mapping[str, str],
        deadline_seconds: float,
        clock: Clock,
        ticks: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._ledger = ledger
        self._provider = provider
        self._settlements = settlements
        self._seals = seals
        self._base_urls = base_urls
        self._most_seconds = deadline_seconds * DEADLINE_SHARE
        self._clock = clock
        self._ticks = ticks
        self._sleep = sleep
        self._lookups: dict[tuple[str, ...], asyncio.Task[bool]] = {}
        self._rejected_until: dict[str, float] = {}
        self._warned_until: dict[str, float] = {}
        self._writing = asyncio.Semaphore(_WRITES_AT_ONCE)

    async def look_up(self, reservation: Reservation, limit: Limit) -> bool:
        """Ask ElevenLabs about the passes that `limit` counts, and write what it says into the ledger.

        Returns whether anything may have changed. Takes a third of the deadline at most. Raises LedgerUnavailable;
        where ElevenLabs does not answer, nothing changes. It goes on when its caller is gone.
        """
        key = (limit.name, reservation.token_issuer, reservation.user_id, reservation.agent_alias)
        lookup = self._lookups.get(key)
        if lookup is None:
            lookup = self._lookups[key] = asyncio.create_task(self._look_up(reservation, limit))
            lookup.add_done_callback(partial(self._end, key))
        return await asyncio.shield(lookup)

    async def reissue(self, reservation: Reservation, agent: Agent, refusal: LimitReached) -> Credential:
        """Return the credential of an unopened pass that the user holds already, or raise `refusal`.

        It is for the same agent and transport, and valid for two more minutes.
        """
        for sealed_pass in await self._ledger.unopened(reservation):
            try:
                credential = self._seals.unseal(agent, sealed_pass.pass_id, sealed_pass.sealed)
            except SealBrokenError:
                _log.error(
                    "pass.seal_broken",
                    pass_id=sealed_pass.pass_id,
                    note="the ledger's sealed value was changed, or the API key was replaced; the pass still counts",
                )
                continue
            if credential.expires_at is not None and credential.expires_at >= self._clock() + REISSUED_SECONDS:
                return credential
        raise refusal

    async def aclose(self) -> None:
        """Wait for the lookups that are in flight."""
        await asyncio.gather(*self._lookups.values(), return_exceptions=True)

    def _end(self, key: tuple[str, ...], lookup: asyncio.Task[bool]) -> None:
        del self._lookups[key]
        if not lookup.cancelled():
            lookup.exception()  # retrieved, or asyncio would report it as lost when the caller is gone

    async def _look_up(self, reservation: Reservation, limit: Limit) -> bool:
        began = self._ticks()
        # A pass that is about to be granted may be the one to return again, so it has to be asked about too.
        await self._wait_while(partial(self._ledger.is_in_flight, reservation), until=began + self._most_seconds / 2)
        turn = await self._ledger.begin_lookup(reservation, limit, seconds=self._most_seconds)
        left_seconds = self._most_seconds - (self._ticks() - began)
        match turn.turn:
            case Turn.PAUSED:
                return False
            case Turn.RUNNING:
                is_running = partial(self._ledger.is_lookup_running, reservation, limit)
                await self._wait_while(is_running, until=began + self._most_seconds)
            case Turn.OURS:
                has_freed = False
                try:
                    has_freed = await self._ask_about(turn.passes, most_seconds=left_seconds)
                finally:
                    await self._ledger.end_lookup(reservation, limit, has_freed=has_freed)
        return True

    async def _wait_while(self, condition: Callable[[], Awaitable[bool]], *, until: float) -> None:
        while self._ticks() < until and await condition():
            await self._sleep(_POLL_SECONDS)

    async def _ask_about(self, passes: Sequence[IssuedPass], *, most_seconds: float) -> bool:
        """Ask about all of them at once, and return whether any is open no longer."""
        if not passes:
            return False
        questions = [asyncio.create_task(self._ask(issued)) for issued in passes]
        _, late = await asyncio.wait(questions, timeout=most_seconds)
        for question in late:
            question.cancel()
        outcomes = await asyncio.gather(*questions, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):  # not the cancellation of those that came too late
                raise outcome
        return any(isinstance(outcome, Outcome) and outcome is not Outcome.LEFT for outcome in outcomes)

    async def _ask(self, issued: IssuedPass) -> Outcome:
        base_url = self._base_urls.get(issued.agent_id)
        if base_url is None or self._ticks() < self._rejected_until.get(base_url, 0.0):
            return Outcome.LEFT
        conversation_id = issued.conversation_id or ""
        try:
            answer = await self._provider.conversation(base_url, conversation_id, is_lookup=True)
            account = read_account(conversation_id, answer, source="lookup")
        except ConversationUnknown:
            account = Account(conversation_id=conversation_id, status=Status.UNOPENED)
        except KeyRejected as refusal:
            self._rejected_until[base_url] = self._ticks() + REJECTED_SECONDS
            self._warn(base_url, refusal)
            return Outcome.LEFT
        except Refusal as refusal:
            _log.info("lookup.failed", conversation_id=conversation_id, code=refusal.code, note=refusal.operator_note)
            return Outcome.LEFT
        async with self._writing:
            return await self._settlements.record(issued, account)

    def _warn(self, base_url: str, refusal: KeyRejected) -> None:
        if self._ticks() < self._warned_until.get(base_url, 0.0):
            return
        self._warned_until[base_url] = self._ticks() + WARNING_SECONDS
        _log.warning(
            "lookup.not_possible",
            host=base_url,
            note="voicepass cannot ask ElevenLabs which conversations are open, so limits may refuse honest users: "
            "give the API key the permission convai_read ('ElevenAgents: Read'), or set up the post-call webhook with "
            f"ELEVENLABS_WEBHOOK_SECRET ({refusal.operator_note})",
        )
