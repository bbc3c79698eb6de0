"""The emulator's state and rules: its agents, its keys, the signatures that it issued, and its clock."""

import asyncio
import hashlib
import hmac
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

import httpx
from fastapi import Depends
from pydantic import BaseModel
from starlette.requests import HTTPConnection

from elevenlabs_emulator.accounts import Account, AuthorizationMethod
from elevenlabs_emulator.agents import EmulatedAgent
from elevenlabs_emulator.failures import CloseConversation, Fault, Target, vendor_error
from elevenlabs_emulator.records import RecordedConversation, Records

DEFAULT_KEY = "sk_emulator"
# voicepass and other receivers refuse a short secret.
DEFAULT_WEBHOOK_SECRET = "wsec_emulator_0123456789abcdef0123456789abcdef"  # noqa: S105 - as public as the key

# How often a wait looks at the clock: `advance` and an injected clock can move it at any moment.
CLOCK_POLL_SECONDS = 0.05

# The vendor's documentation: a signed URL is valid for 15 minutes; only the start must fall inside.
SIGNATURE_SECONDS = 15 * 60
_DAY_SECONDS = 24 * 3600
# The alphabet of the ids and signatures that users have shown (Crockford's base32, as in a ULID).
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_DEFAULT_KEYS = {DEFAULT_KEY: frozenset({"convai_write", "convai_read"})}
_KEPT_ACCOUNTS = 10_000
WEBHOOK_ID = "wh_emulated"
_DELIVERY_SECONDS = 10

Unopened = Literal["unknown", "initiated"]


@dataclass(frozen=True)
class Issued:
    """A signature, and what it opens."""

    signature: str
    agent_id: str
    expires_at: float
    conversation_id: str | None
    query: Mapping[str, str]


class Webhooks(BaseModel, extra="forbid"):
    """The workspace's post-call webhook. Without `url`, or while it `is_disabled`, it is not sent."""

    url: str | None = None
    secret: str = DEFAULT_WEBHOOK_SECRET
    auth_type: Literal["hmac", "oauth2", "mtls"] = "hmac"
    is_disabled: bool = False

    def as_json(self) -> list[dict[str, object]]:
        """Return the workspace's webhooks in the shape of the vendor's model: this one, or none."""
        if self.url is None:
            return []
        flags = {"is_disabled": self.is_disabled, "is_auto_disabled": False, "auth_type": self.auth_type}
        return [{"name": "post-call", "webhook_id": WEBHOOK_ID, "webhook_url": self.url, "created_at_unix": 0, **flags}]

    @property
    def target(self) -> str | None:
        """Return where the end of a conversation is reported now, if anywhere."""
        return None if self.is_disabled else self.url


class Emulator:
    """An emulated ElevenLabs workspace. `create_emulator` serves it.

    `api_keys` maps each key to its permissions. `clock` gives Unix seconds, for expiry and for how long a conversation
    lasts, unless `conversation_seconds` fixes that. Signed URLs begin with `public_ws_base`, such as
    `ws://127.0.0.1:8000/_elevenlabs`, or else lead to the address of the call. After a conversation a webhook goes to
    `webhook_url`, signed with `webhook_secret`.

    A conversation that ends is `processing` for `processing_seconds` of the clock, then `done` or `failed`; its webhook
    is sent then. A conversation that nobody has opened is unknown to the API, or `initiated`, as `unopened` says.
    Nobody has verified which of the two the live service does.
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
        webhook_secret: str = DEFAULT_WEBHOOK_SECRET,
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
        self.webhooks = Webhooks(url=webhook_url, secret=webhook_secret)
        # The HTTP answers to the webhooks so far, 0 for no answer.
        self.webhook_statuses: list[int] = []
        self._held_back: list[bytes] = []
        self.conversation_seconds = conversation_seconds
        self.processing_seconds = processing_seconds
        self.unopened: Unopened = unopened
        self.open_conversations: Counter[str] = Counter()
        self._started_today: Counter[tuple[str, int]] = Counter()
        self._clock = clock
        self._advanced_seconds = 0.0
        self._issued: dict[str, Issued] = {}

    def now(self) -> float:
        """Return the Unix seconds of the injected clock, plus what it was advanced by."""
        return self._clock() + self._advanced_seconds

    def advance(self, seconds: float) -> None:
        """Move the emulator's clock forward."""
        self._advanced_seconds += seconds

    def take_fault(self, target: Target) -> Fault:
        """Return the fault of this call, and count it; a harmless fault if none is set."""
        fault = self.faults.get(target, Fault())
        if fault.times == 1:
            del self.faults[target]
        elif fault.times:
            self.faults[target] = fault.model_copy(update={"times": fault.times - 1})
        return fault

    def check_key(self, key: str | None, permission: str) -> None:
        """Raise the vendor's error unless this key is accepted and has the permission."""
        if key is None:
            raise vendor_error("needs_authorization")
        if key not in self.api_keys:
            raise vendor_error("invalid_api_key")
        if permission not in self.api_keys[key]:
            raise vendor_error("missing_permissions", permission=permission)

    def find_agent(self, agent_id: str, query: Mapping[str, str] | None = None) -> EmulatedAgent:
        """Return the agent, on the branch that the query names, or raise the vendor's error."""
        try:
            return self.agents[agent_id].select(query or {})
        except (KeyError, CloseConversation):
            raise vendor_error("document_not_found", id=agent_id) from None

    def find_account(self, conversation_id: str) -> Account:
        """Return the account of a conversation, or raise the vendor's error."""
        if conversation_id not in self.accounts:
            raise vendor_error("conversation_not_found", id=conversation_id)
        return self.accounts[conversation_id]

    def issue(self, agent_id: str, *, bound: bool, query: Mapping[str, str] | None = None) -> tuple[str, str | None]:
        """Make a signature for this agent; returns it with the conversation it is bound to, if `bound`.

        `query` of the call may name a branch, a version and an environment: the signature is for these.
        A bound signature starts one conversation. An unbound one starts any number within its 15 minutes: that is the
        live service's rule, and the reason to ask for `include_conversation_id`.
        """
        conversation_id, expires_at = make_id("conv") if bound else None, self.now() + SIGNATURE_SECONDS
        issued = Issued(make_id("cvtkn"), agent_id, expires_at, conversation_id, query or {})
        self._issued[issued.signature] = issued
        if conversation_id:
            self.show_minted(agent_id, conversation_id, "signed_url")
        return issued.signature, conversation_id

    def find_issued(self, signature: str | None, agent_id: str) -> Issued | None:
        """Return what this signature opens now, if anything of this agent."""
        issued = self._issued.get(signature or "")
        is_valid = issued and issued.agent_id == agent_id and self.now() < issued.expires_at
        return issued if is_valid else None

    def admit(self, query: Mapping[str, str], *, origin: str | None) -> tuple[EmulatedAgent, str]:
        """Decide who may open a conversation, using up a bound signature; returns the agent and the conversation's id.

        Raises `CloseConversation` for an unknown agent, a foreign origin, a signature that is absent but needed, or
        wrong, expired, used, or of another agent or conversation, and for a branch that the agent does not have.
        """
        agent = self.agents.get(query.get("agent_id", ""))
        if agent is None or agent.is_archived:
            raise CloseConversation("unknown_agent")
        host = urlsplit(origin or "").netloc
        if agent.allowed_hosts and host not in agent.allowed_hosts and (origin is not None or agent.requires_origin):
            raise CloseConversation("host_not_allowed", host=host)
        signature = query.get("conversation_signature")
        if signature is None and not agent.requires_auth:
            return agent.select(query), make_id("conv")
        issued = self.find_issued(signature, agent.agent_id)
        if issued is None or query.get("conversation_id", issued.conversation_id) != issued.conversation_id:
            raise CloseConversation("unauthorized")
        agent = agent.select({**query, **issued.query})
        if issued.conversation_id is None:
            return agent, make_id("conv")
        del self._issued[issued.signature]
        return agent, issued.conversation_id

    def expire(self, conversation_id: str) -> None:
        """Refuse from now on the signature that is bound to this conversation, and no other."""
        self._issued = {
            signature: issued for signature, issued in self._issued.items() if issued.conversation_id != conversation_id
        }

    def show_minted(self, agent_id: str, conversation_id: str, method: AuthorizationMethod) -> None:
        """Add the account of a conversation that can be opened, if `unopened` says that the API shows it."""
        if self.unopened == "initiated":
            record = RecordedConversation(query={}, signed=True, conversation_id=conversation_id)
            self.open_account(self.agents[agent_id], record, method)

    def open_account(self, agent: EmulatedAgent, record: RecordedConversation, method: AuthorizationMethod) -> Account:
        """Add the account of a conversation."""
        now = self.now()
        account = Account(agent=agent, record=record, clock=self.now, authorization_method=method, started_at=now)
        self.accounts[record.conversation_id or ""] = account
        if len(self.accounts) > _KEPT_ACCOUNTS:
            del self.accounts[next(iter(self.accounts))]
        return account

    def count_start(self, agent: EmulatedAgent) -> None:
        """Count a conversation towards the agent's daily limit, or raise `CloseConversation`."""
        day = (agent.agent_id, int(self.now() // _DAY_SECONDS))
        if self._started_today[day] >= agent.daily_limit:
            raise CloseConversation("daily_limit", limit=agent.daily_limit)
        self._started_today[day] += 1

    def is_at_limit(self, agent: EmulatedAgent) -> bool:
        """Whether the agent has as many open conversations as it may have; -1 is no limit."""
        return 0 <= agent.concurrency_limit <= self.open_conversations[agent.agent_id]

    async def close_account(self, account: Account) -> None:
        """End the account of a conversation. Send its webhook when it is done, unless webhooks are off now."""
        now, fixed = self.now(), self.conversation_seconds
        seconds = round(now - account.started_at) if fixed is None else fixed
        account.end(seconds=seconds, done_at=now + self.processing_seconds)
        if self.webhooks.target is None:
            return
        while self.now() < account.done_at:  # noqa: ASYNC110 - an injected clock fires no event
            await asyncio.sleep(CLOCK_POLL_SECONDS)
        event = {"type": "post_call_transcription", "event_timestamp": int(self.now()), "data": account.as_json()}
        await self._send_webhook(json.dumps(event).encode())

    async def _send_webhook(self, body: bytes) -> None:
        """Send it once, which is the vendor's default, or as the fault says."""
        fault = self.take_fault("webhook")
        await asyncio.sleep(fault.latency_seconds)
        if fault.delivery == "held_back":
            self._held_back.append(body)
        url = self.webhooks.target
        if url is None or fault.delivery in {"held_back", "lost"}:
            return
        bodies, self._held_back = [body] * (2 if fault.delivery == "twice" else 1) + self._held_back, []
        async with httpx.AsyncClient(timeout=_DELIVERY_SECONDS, trust_env=False) as client:
            for each in bodies:
                try:
                    answer = await client.post(url, content=each, headers=self._sign_webhook(each))
                    self.webhook_statuses.append(answer.status_code)
                except httpx.HTTPError:
                    self.webhook_statuses.append(0)

    def _sign_webhook(self, body: bytes) -> dict[str, str]:
        # It uses the machine's time, even after the emulator was advanced, because receivers refuse any other.
        signed_at = str(int(self._clock()))
        mac = hmac.new(self.webhooks.secret.encode(), f"{signed_at}.".encode() + body, hashlib.sha256).hexdigest()
        return {"ElevenLabs-Signature": f"t={signed_at},v0={mac}", "Content-Type": "application/json"}


def make_id(prefix: str) -> str:
    """Make an id such as `conv_…`, which the SDKs' pattern `conv_[a-zA-Z0-9]+` finds."""
    return f"{prefix}_{''.join(secrets.choice(_ALPHABET) for _ in range(28))}"


def _find_emulator(connection: HTTPConnection) -> Emulator:
    emulator: Emulator = connection.app.state.emulator
    return emulator


# The emulator of a request, for a parameter of a route.
Running = Annotated[Emulator, Depends(_find_emulator)]
