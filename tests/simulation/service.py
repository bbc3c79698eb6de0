"""voicepass wired as in production, but in virtual time and with the model of ElevenLabs."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Final

from tests.canaries import API_KEY
from tests.conftest import AGENT_ID, TOKEN_ISSUER
from tests.simulation.elevenlabs_model import Conversation, ElevenLabsModel
from tests.simulation.virtual_time import FreezingLedger, VirtualTime
from voicepass.config.limits import LimitTables
from voicepass.elevenlabs import Workspace
from voicepass.elevenlabs.sealing import Seals
from voicepass.ledger import Ledger
from voicepass.model import (
    DEFAULT_ALIAS,
    Agent,
    Clock,
    Credentials,
    PassRequest,
    Settlement,
    Transport,
    User,
    new_id,
)
from voicepass.passes import Passes
from voicepass.policy import AgentRules, Policy, Rule
from voicepass.settlement import Bypasses, Settlements
from voicepass.settlement.lookup import OpenPasses
from voicepass.settlement.reconciler import Reconciler
from voicepass.settlement.retention import run_retention

START: Final = 1_800_000_000.0
HERE: Final = "https://here"
AGENT: Final = Agent(alias=DEFAULT_ALIAS, agent_id=AGENT_ID, base_url=HERE)
RECONCILE_SECONDS: Final = 60.0

OpenLedger = Callable[[Clock], AbstractAsyncContextManager[Ledger]]


class _NoAuthenticator:
    """Accepts any header as the user's id, because sign-in is no part of the simulation."""

    async def authenticate(self, credentials: Credentials) -> User:
        (user_id,) = credentials.authorization
        return User(issuer=TOKEN_ISSUER, id=user_id, name=None, claims={})


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One process of the service."""

    ledger: Ledger
    passes: Passes
    settlements: Settlements


class Service:
    """Instances on one ledger."""

    def __init__(self, *, time: VirtualTime, chance: random.Random, has_webhook: bool) -> None:
        self.time = time
        self.chance = chance
        self.instances: list[Instance] = []
        self.bypasses: list[str] = []
        self.elevenlabs = ElevenLabsModel(
            clock=self.clock, chance=chance, deliver=self._take_webhook if has_webhook else None
        )

    def clock(self) -> float:
        return START + self.time.now

    async def ask(self, user_id: str, *, instance: int | None = None) -> Conversation:
        """Ask the given instance, or any, for a pass. Raises the Refusal. Checks that no URL goes to a second user."""
        chosen = self.instances[(self.chance.getrandbits(8) if instance is None else instance) % len(self.instances)]
        request = PassRequest(
            request_id=new_id(),
            credentials=Credentials(authorization=(user_id,)),
            alias=DEFAULT_ALIAS,
            transport=Transport.WEBSOCKET,
        )
        given = await chosen.passes.issue(request)
        assert given.credential.conversation_id is not None
        conversation = self.elevenlabs.conversations_by_id[given.credential.conversation_id]
        assert conversation.url == given.credential.secret
        assert conversation.user_id in {None, user_id}, "a URL was given to another user"
        conversation.user_id = user_id
        return conversation

    @asynccontextmanager
    async def run_instances(self, open_ledger: OpenLedger, *, instances: int) -> AsyncIterator[None]:
        """Run this number of instances on one ledger."""
        async with AsyncExitStack() as stack:
            for _ in range(instances):
                ledger = await stack.enter_async_context(self._open_ledger(open_ledger))
                await stack.enter_async_context(self._run_instance(ledger))
            yield

    @asynccontextmanager
    async def _open_ledger(self, open_ledger: OpenLedger) -> AsyncIterator[Ledger]:
        async with AsyncExitStack() as stack:
            with self.time.freeze():
                ledger = await stack.enter_async_context(open_ledger(self.clock))
            try:
                yield FreezingLedger(ledger, self.time)
            finally:
                with self.time.freeze():
                    await stack.aclose()

    @asynccontextmanager
    async def _run_instance(self, ledger: Ledger) -> AsyncIterator[None]:
        bypasses = Bypasses(agent_ids=[AGENT_ID], count=self.bypasses.append)
        settlements = Settlements(ledger=ledger, observe=lambda _settled: None, bypasses=bypasses, clock=self.clock)
        seals = Seals([Workspace(base_url=HERE, api_keys=[API_KEY])])
        open_passes = OpenPasses(
            ledger=ledger,
            provider=self.elevenlabs,
            settlements=settlements,
            seals=seals,
            base_urls={AGENT_ID: HERE},
            deadline_seconds=4.0,
            clock=self.clock,
            ticks=lambda: self.time.now,
        )
        limits = LimitTables()
        passes = Passes(
            authenticator=_NoAuthenticator(),
            policy=Policy(
                {DEFAULT_ALIAS: AgentRules(agent=AGENT, allow=(Rule({}),))},
                limits.limits(),
                limits.conversation_minutes * 60,
            ),
            provider=self.elevenlabs,
            take_ready=lambda _agent, _transport: nullcontext(),
            ledger=ledger,
            open_passes=open_passes,
            seal=seals.seal,
            observe=lambda _attempt: None,
        )
        reconciler = Reconciler(
            ledger=ledger,
            provider=self.elevenlabs,
            settlements=settlements,
            base_urls={AGENT_ID: HERE},
            every_seconds=RECONCILE_SECONDS,
            conversation_seconds=600,
            clock=self.clock,
        )
        self.instances.append(Instance(ledger=ledger, passes=passes, settlements=settlements))
        await asyncio.sleep(self.chance.uniform(0, RECONCILE_SECONDS))  # instances do not start at the same moment
        async with reconciler.run(), run_retention(ledger, keep_seconds=400 * 86_400):
            yield
            await open_passes.aclose()
            await passes.aclose()

    async def _take_webhook(self, settlement: Settlement) -> None:
        await self.chance.choice(self.instances).settlements.settle(settlement)
