"""The pretend service's memory and rules: its agents, its keys, the signatures it has issued, and its clock."""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal
from urllib.parse import urlsplit

from elevenlabs_emulator.aftermath import Account, Webhooks
from elevenlabs_emulator.agents import EmulatedAgent
from elevenlabs_emulator.closings import Refused
from elevenlabs_emulator.faults import Fault, Target
from elevenlabs_emulator.records import RecordedConversation, Records

# The vendor's documentation: a signed URL is good for 15 minutes; only the start must fall inside.
SIGNATURE_SECONDS = 15 * 60

# The alphabet of the ids and signatures seen in the wild (Crockford's base32, as in a ULID).
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_DEFAULT_KEYS = {"sk_emulator": frozenset({"convai_write", "convai_read"})}
_KEPT_ACCOUNTS = 10_000
# How often a waiting webhook looks at the clock: `advance` and an injected clock can put it forward at any moment.
_LOOK_SECONDS = 0.05

Unopened = Literal["unknown", "initiated"]


@dataclass(frozen=True, kw_only=True)
class _Issued:
    agent_id: str
    expires_at: float
    conversation_id: str | None


class Emulator:
    """A pretend ElevenLabs: what it knows and how it behaves. `create_emulator` puts it on the wire.

    `api_keys` maps each key to its permissions. `clock` gives Unix seconds, for expiry and for how long a conversation
    lasts, unless `conversation_seconds` says how long each did. `public_ws_base`, such as
    `ws://127.0.0.1:8000/_elevenlabs`, is how signed URLs begin; without it they lead where the call came in. After a
    conversation a webhook goes to `webhook_url`, signed with `webhook_secret`.

    A conversation that ends is `processing` for `processing_seconds` of the clock, then `done` or `failed`; its webhook
    is sent then. `unopened` says how a conversation that nobody opened is shown: not at all, or as `initiated`. Nobody
    has verified which of the two the real service does.
    """

    def __init__(
        self,
        *,
        agents: Iterable[EmulatedAgent],
        api_keys: Mapping[str, frozenset[str]] = _DEFAULT_KEYS,
        clock: Callable[[], float] = time.time,
        public_ws_base: str | None = None,
        faults: Iterable[Fault] = (),
        webhook_url: str | None = None,
        webhook_secret: str = "wsec_emulator",  # noqa: S107  as public as the emulator's key
        conversation_seconds: int | None = None,
        processing_seconds: float = 0,
        unopened: Unopened = "unknown",
    ) -> None:
        self.agents = {agent.agent_id: agent for agent in agents}
        self.api_keys = dict(api_keys)
        self.public_ws_base = public_ws_base
        self.faults: dict[Target, Fault] = {fault.target: fault for fault in faults}
        self.records = Records(api_keys=self.api_keys)
        self.accounts: dict[str, Account] = {}
        self.webhooks = Webhooks(url=webhook_url, secret=webhook_secret, clock=clock)
        self.conversation_seconds = conversation_seconds
        self.processing_seconds = processing_seconds
        self.unopened: Unopened = unopened
        self._clock = clock
        self._advanced_seconds = 0.0
        self._issued: dict[str, _Issued] = {}

    def put_agent(self, agent: EmulatedAgent) -> None:
        """Add an agent, or replace the one of the same id; open conversations keep the old one."""
        self.agents[agent.agent_id] = agent

    def now(self) -> float:
        """Unix seconds by the injected clock, plus what it was advanced by."""
        return self._clock() + self._advanced_seconds

    def advance(self, seconds: float) -> None:
        """Let that many seconds pass at once, for expiry, durations and processing only."""
        self._advanced_seconds += seconds

    def take_fault(self, target: Target) -> Fault:
        """Return the fault that this call meets, and count it; a harmless one if nothing is to go wrong."""
        fault = self.faults.get(target, Fault())
        if fault.times == 1:
            del self.faults[target]
        elif fault.times:
            self.faults[target] = fault.model_copy(update={"times": fault.times - 1})
        return fault

    def issue(self, agent_id: str, *, bound: bool) -> tuple[str, str | None]:
        """Make a signature for this agent; returns it with the conversation it is bound to, if `bound`.

        A bound signature starts one conversation. An unbound one starts any number within its 15 minutes: that is the
        real service's rule, and why one should ask for `include_conversation_id`.
        """
        signature, conversation_id = new_id("cvtkn"), new_id("conv") if bound else None
        self._issued[signature] = _Issued(
            agent_id=agent_id, expires_at=self.now() + SIGNATURE_SECONDS, conversation_id=conversation_id
        )
        if conversation_id:
            self.initiate(agent_id, conversation_id, "signed_url")
        return signature, conversation_id

    def admit(self, query: Mapping[str, str], *, origin: str | None) -> tuple[EmulatedAgent, str]:
        """Decide at the door, spending a bound signature; returns the agent and the conversation's id.

        Raises `Refused` for an unknown agent, a foreign origin, and a signature that is absent where one is needed, or
        wrong, expired, spent, or meant for another agent or conversation.
        """
        agent = self.agents.get(query.get("agent_id", ""))
        if agent is None:
            raise Refused("unknown_agent")
        host = urlsplit(origin or "").netloc
        if agent.allowed_hosts and host not in agent.allowed_hosts and (origin is not None or agent.requires_origin):
            raise Refused("host_not_allowed", host=host)
        if not agent.requires_auth and "conversation_signature" not in query:
            return agent, new_id("conv")
        signature = query.get("conversation_signature", "")
        issued = self._issued.get(signature)
        if (
            issued is None
            or issued.agent_id != agent.agent_id
            or self.now() >= issued.expires_at
            or query.get("conversation_id", issued.conversation_id) != issued.conversation_id
        ):
            raise Refused("unauthorized")
        if issued.conversation_id is None:
            return agent, new_id("conv")
        del self._issued[signature]
        return agent, issued.conversation_id

    def expire(self, conversation_id: str) -> None:
        """Let the signature that is bound to this conversation be too old, and no other."""
        for signature, issued in self._issued.items():
            if issued.conversation_id == conversation_id:
                self._issued[signature] = replace(issued, expires_at=self.now())

    def initiate(
        self, agent_id: str, conversation_id: str, authorization_method: Literal["signed_url", "livekit_token"]
    ) -> None:
        """Keep an account of a conversation that is minted, if `unopened` says that it is shown."""
        if self.unopened == "initiated":
            record = RecordedConversation(query={}, signed=True, conversation_id=conversation_id)
            self._keep(
                Account(
                    agent_id=agent_id,
                    record=record,
                    started_at=self.now(),
                    authorization_method=authorization_method,
                )
            )

    def opened(self, agent: EmulatedAgent, record: RecordedConversation) -> Account:
        """Begin to keep account of a conversation that a client has opened."""
        account = Account(
            agent_id=agent.agent_id,
            record=record,
            started_at=self.now(),
            authorization_method="signed_url" if record.signed else "public",
        )
        self._keep(account)
        return account

    def _keep(self, account: Account) -> None:
        self.accounts[account.record.conversation_id or ""] = account
        if len(self.accounts) > _KEPT_ACCOUNTS:
            del self.accounts[next(iter(self.accounts))]

    async def ended(self, account: Account) -> None:
        """Close the account of a conversation. Send its webhook as soon as it is done, unless webhooks are off now."""
        now, lasted = self.now(), self.conversation_seconds
        seconds = round(now - account.started_at) if lasted is None else lasted
        account.end(seconds=seconds, done_at=now + self.processing_seconds)
        if not self.webhooks.are_sent:
            return
        while self.now() < account.done_at:  # noqa: ASYNC110 - an injected clock fires no event
            await asyncio.sleep(_LOOK_SECONDS)
        await self.webhooks.send(account.shown(self.now()), self.take_fault("webhook"))


def new_id(prefix: str) -> str:
    """Make an id such as `conv_…`, which the SDKs' pattern `conv_[a-zA-Z0-9]+` finds."""
    return f"{prefix}_{''.join(secrets.choice(_ALPHABET) for _ in range(28))}"
