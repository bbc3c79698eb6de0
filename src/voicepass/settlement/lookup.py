"""Asks ElevenLabs what a user really has open before voicepass refuses them, and finds a pass to return again."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from voicepass.elevenlabs import ElevenLabs
from voicepass.elevenlabs.sealing import SealBrokenError, Seals
from voicepass.errors import KeyRejected, LimitReached, Refusal
from voicepass.ledger import Ledger
from voicepass.model import Agent, Clock, Credential, IssuedPass, Limit, Reservation, Turn
from voicepass.settlement import Outcome, Settlements
from voicepass.settlement.reports import fetch_report
from voicepass.telemetry.logger import Logger

DEADLINE_SHARE: Final = 1 / 3
"""The share of a request's deadline in which a lookup asks ElevenLabs."""
REISSUE_SECONDS: Final = 30.0
"""A pass is returned again only if it is valid for this time. A user needs the time to open the conversation."""
WARNING_SECONDS: Final = 3600.0
REJECTED_SECONDS: Final = 60.0
"""After a host has rejected the key, no lookup asks it for this time."""
_POLL_SECONDS: Final = 0.1

_log = Logger("voicepass.settlement")


@dataclass(kw_only=True, eq=False)
class OpenPasses:
    """Finds out which passes are really open. Callers who ask for the same user at once share one lookup.

    `base_urls`: the ElevenLabs host of each agent's id. `clock`: wall time. `ticks`: monotonic seconds.
    """

    ledger: Ledger
    provider: ElevenLabs
    settlements: Settlements
    seals: Seals
    base_urls: Mapping[str, str]
    deadline_seconds: float
    clock: Clock
    ticks: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _lookups: dict[tuple[str, ...], asyncio.Task[bool]] = field(default_factory=dict, init=False)
    _rejected_until: dict[str, float] = field(default_factory=dict, init=False)
    _warned_until: dict[str, float] = field(default_factory=dict, init=False)

    async def refresh(self, reservation: Reservation, limit: Limit) -> bool:
        """Ask ElevenLabs about the passes that `limit` counts, and write its reports into the ledger.

        Returns whether the ledger may have changed. A pass for which ElevenLabs does not answer stays as it is. The
        lookup goes on if the caller is cancelled. Raises LedgerUnavailable.
        """
        key = (limit.name, reservation.token_issuer, reservation.user_id, reservation.agent_alias)
        lookup = self._lookups.get(key)
        if lookup is None:
            lookup = self._lookups[key] = asyncio.create_task(self._look_up(reservation, limit))
            lookup.add_done_callback(partial(self._forget_lookup, key))
        # Not `shield`: if the caller is gone and the task then fails, Python 3.14 logs an error.
        await asyncio.wait([lookup])
        return lookup.result()

    async def reissue(self, reservation: Reservation, agent: Agent, refusal: LimitReached) -> Credential:
        """Return the credential of an unopened pass that the user holds for this agent and transport.

        Raises `refusal` if there is none that is valid for 30 more seconds.
        """
        for sealed_pass in await self.ledger.list_unopened(reservation):
            try:
                credential = self.seals.unseal(agent, sealed_pass.pass_id, sealed_pass.sealed)
            except SealBrokenError:
                _log.error(
                    "pass.seal_broken",
                    pass_id=sealed_pass.pass_id,
                    note="the ledger's sealed value was changed, or the API key was replaced; the pass still counts",
                )
                continue
            if (credential.expires_at or 0.0) >= self.clock() + REISSUE_SECONDS:
                return credential
        raise refusal

    async def aclose(self) -> None:
        """Wait for the lookups that are in flight."""
        await asyncio.gather(*self._lookups.values(), return_exceptions=True)

    def _forget_lookup(self, key: tuple[str, ...], lookup: asyncio.Task[bool]) -> None:
        del self._lookups[key]
        if not lookup.cancelled():
            lookup.exception()  # Without this, asyncio reports the exception as lost if the caller is gone.

    async def _look_up(self, reservation: Reservation, limit: Limit) -> bool:
        max_seconds = self.deadline_seconds * DEADLINE_SHARE
        ends_at = self.ticks() + max_seconds
        # A pass that is about to be granted may be the one to return again, so wait for it.
        await self._wait_while(partial(self.ledger.is_in_flight, reservation), until=ends_at - max_seconds / 2)
        lookup = await self.ledger.begin_lookup(reservation, limit, seconds=max_seconds)
        if lookup.turn is Turn.OURS:
            has_freed = False
            try:
                has_freed = await self._ask_about(lookup.passes, max_seconds=ends_at - self.ticks())
            finally:
                await self.ledger.end_lookup(reservation, limit, has_freed=has_freed)
        elif lookup.turn is Turn.RUNNING:
            await self._wait_while(partial(self.ledger.is_lookup_running, reservation, limit), until=ends_at)
        return lookup.turn is not Turn.PAUSED

    async def _wait_while(self, condition: Callable[[], Awaitable[bool]], *, until: float) -> None:
        while self.ticks() < until and await condition():
            await self.sleep(_POLL_SECONDS)

    async def _ask_about(self, passes: Sequence[IssuedPass], *, max_seconds: float) -> bool:
        """Ask about all passes at once. Returns whether an answer has freed any of them."""
        ask = partial(self._ask, max_seconds=max_seconds)
        outcomes = await asyncio.gather(*map(ask, passes), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return any(outcome is not Outcome.LEFT for outcome in outcomes)

    async def _ask(self, issued: IssuedPass, *, max_seconds: float) -> Outcome:
        base_url = self.base_urls.get(issued.agent_id)
        if base_url is None or self.ticks() < self._rejected_until.get(base_url, 0.0):
            return Outcome.LEFT
        try:
            async with asyncio.timeout(max_seconds):
                report = await fetch_report(self.provider, base_url, issued, source="lookup")
        except TimeoutError:
            return Outcome.LEFT
        except KeyRejected as refusal:
            self._note_rejection(base_url, refusal)
            return Outcome.LEFT
        except Refusal as refusal:
            failed = {"conversation_id": issued.conversation_id, "code": refusal.code, "note": refusal.operator_note}
            _log.info("lookup.failed", **failed)
            return Outcome.LEFT
        # No timeout here: a cancelled write may have freed the pass, and nobody would learn that.
        return await self.settlements.apply(issued, report)

    def _note_rejection(self, base_url: str, refusal: KeyRejected) -> None:
        """Ask this host no more for a while. Log that once an hour."""
        now = self.ticks()
        self._rejected_until[base_url] = now + REJECTED_SECONDS
        if now >= self._warned_until.get(base_url, 0.0):
            self._warned_until[base_url] = now + WARNING_SECONDS
            note = (
                "voicepass cannot ask ElevenLabs which conversations are open, so limits may refuse honest users: give "
                "the API key the permission convai_read ('ElevenAgents: Read'), or set up the post-call webhook with "
                f"ELEVENLABS_WEBHOOK_SECRET ({refusal.operator_note})"
            )
            _log.warning("lookup.not_possible", host=base_url, note=note)
