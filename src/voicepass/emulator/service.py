"""The pretend service's memory and rules: its agents, its keys, the signatures it has issued, and its clock."""

import hmac
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from urllib.parse import urlsplit

from voicepass.emulator.closings import CLOSINGS, Refused
from voicepass.emulator.faults import Fault, Faults
from voicepass.emulator.records import KeySeen, Records

# The vendor's documentation: a signed URL is good for 15 minutes; only the start must fall inside.
SIGNATURE_SECONDS = 15 * 60

# The alphabet of the ids and signatures seen in the wild (Crockford's base32, as in a ULID).
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


@dataclass(frozen=True, kw_only=True)
class EmulatedAgent:
    """An agent as its owner configured it.

    `tool_variables` are the dynamic variables that its attached tools need. `allowed_overrides` are dotted paths inside
    `conversation_config_override`. `allowed_hosts`, when not empty, are the `host[:port]` an `Origin` may have; a
    client without `Origin` is let in, as with the real default.
    """

    agent_id: str
    requires_auth: bool = True
    first_message: str = "Hello {{user_name}}! What would you like to sell today?"
    tool_variables: frozenset[str] = frozenset()
    allowed_overrides: frozenset[str] = frozenset({"conversation.text_only"})
    allowed_hosts: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Someone may talk to this agent, in this conversation, which `forced` ends at its start."""

    agent: EmulatedAgent
    conversation_id: str
    forced: str | None


@dataclass(frozen=True, kw_only=True)
class _Issued:
    agent_id: str
    expires_at: float
    conversation_id: str | None


@dataclass(kw_only=True)
class Emulator:
    """A pretend ElevenLabs: what it knows and how it behaves. `create_emulator` puts it on the wire.

    `api_keys` maps each key to its permissions. `clock` gives Unix seconds; only expiry uses it. `public_ws_base`, such
    as `ws://127.0.0.1:8000/_elevenlabs`, is how signed URLs begin; without it they lead where the call came in. A voice
    is "heard" after `speech_seconds` of sound or `any_audio_seconds` of anything; the next of `spoken_lines` is taken
    for what it said, and `pause_seconds` of audio go unheard: all three count audio received, not time. `faults` are
    in force from the start.
    """

    agents: InitVar[Iterable[EmulatedAgent]]
    api_keys: Mapping[str, frozenset[str]] = field(
        default_factory=lambda: {"sk_emulator": frozenset({"convai_write"})}, repr=False
    )
    clock: Callable[[], float] = time.time
    public_ws_base: str | None = None
    ping_interval_seconds: float = 2.0
    first_frame_timeout_seconds: float = 10.0
    max_frame_characters: int = 1024 * 1024
    speech_seconds: float = 1.0
    any_audio_seconds: float = 4.0
    pause_seconds: float = 6.0
    spoken_lines: tuple[str, ...] = (
        "I want to sell eggs for two dollars each",
        "And honey for 7.50 a jar",
        "That is all, thank you, goodbye",
    )
    faults: InitVar[Iterable[Fault]] = ()

    def __post_init__(self, agents: Iterable[EmulatedAgent], faults: Iterable[Fault]) -> None:
        self._agents = {agent.agent_id: agent for agent in agents}
        self._issued: dict[str, _Issued] = {}
        self._advanced_seconds = 0.0
        self.records = Records()
        self.trouble = Faults()
        for fault in faults:
            self.trouble.put(fault)

    def agent(self, agent_id: str) -> EmulatedAgent | None:
        """Look an agent up; None if there is none of that id."""
        return self._agents.get(agent_id)

    def put_agent(self, agent: EmulatedAgent) -> None:
        """Add an agent, or replace the one of the same id; open conversations keep the old one."""
        self._agents[agent.agent_id] = agent

    def now(self) -> float:
        """Unix seconds by the injected clock, plus what it was advanced by."""
        return self.clock() + self._advanced_seconds

    def advance(self, seconds: float) -> None:
        """Let that many seconds pass at once, for expiry only."""
        self._advanced_seconds += seconds

    def permissions(self, key: str | None) -> frozenset[str] | None:
        """Tell what this API key may do; None if it is no key of ours."""
        offered = (key or "").encode()
        for known, permissions in self.api_keys.items():
            if hmac.compare_digest(known.encode(), offered):
                return permissions
        return None

    def key_seen(self, key: str | None) -> KeySeen:
        """Judge a key without keeping it."""
        if key is None:
            return "absent"
        return "wrong" if self.permissions(key) is None else "right"

    def issue(self, agent_id: str, *, bound: bool) -> tuple[str, str | None]:
        """Make a signature for this agent; returns it with the conversation it is bound to, if `bound`.

        A bound signature starts one conversation. An unbound one starts any number within its 15 minutes: that is the
        real service's rule, and why one should ask for `include_conversation_id`.
        """
        now = self.now()
        self._issued = {signature: issued for signature, issued in self._issued.items() if now < issued.expires_at}
        signature = f"cvtkn_{_random()}"
        conversation_id = new_conversation_id() if bound else None
        self._issued[signature] = _Issued(
            agent_id=agent_id, expires_at=now + SIGNATURE_SECONDS, conversation_id=conversation_id
        )
        return signature, conversation_id

    def admit(self, query: Mapping[str, str], *, origin: str | None) -> Admission:
        """Decide at the door, spending a bound signature.

        Raises `Refused` for an unknown agent, a foreign origin, and a signature that is absent where one is needed, or
        wrong, expired, spent, or meant for another agent or conversation.
        """
        fault = self.trouble.take("conversation")
        forced = fault.closing if fault else None
        if forced and CLOSINGS[forced].moment == "door":
            raise Refused(forced)
        agent = self._agents.get(query.get("agent_id", ""))
        if agent is None:
            raise Refused("unknown_agent")
        host = urlsplit(origin).netloc if origin else None
        if agent.allowed_hosts and host is not None and host not in agent.allowed_hosts:
            raise Refused("host_not_allowed", host=host)
        conversation_id = None
        if agent.requires_auth or "conversation_signature" in query:
            conversation_id = self._spend(query, agent)
        return Admission(agent=agent, conversation_id=conversation_id or new_conversation_id(), forced=forced)

    def _spend(self, query: Mapping[str, str], agent: EmulatedAgent) -> str | None:
        signature = query.get("conversation_signature", "")
        issued = self._issued.get(signature)
        if (
            issued is None
            or issued.agent_id != agent.agent_id
            or self.now() >= issued.expires_at
            or query.get("conversation_id", issued.conversation_id) != issued.conversation_id
        ):
            raise Refused("unauthorized")
        if issued.conversation_id:
            del self._issued[signature]
        return issued.conversation_id


def new_conversation_id() -> str:
    """Make an id that the SDKs' pattern `conv_[a-zA-Z0-9]+` finds."""
    return f"conv_{_random()}"


def _random() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(28))
