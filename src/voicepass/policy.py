"""Pure rules: who may use which agent, and which claims become the agent's dynamic variables."""

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from voicepass.errors import AgentNotAllowed, TokenInvalid
from voicepass.model import Agent, Scalar, User, claim_at

MAX_VARIABLE_CHARACTERS = 200
MAX_SAFE_INTEGER = 2**53 - 1  # what a browser's JSON.parse keeps exact

RESERVED_PREFIXES = ("system__", "secret__")
"""`system__` belongs to ElevenLabs; `secret__` values must never pass through a browser."""

_REMOVED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
# Joiners are format characters, yet many scripts and emoji cannot be written without them.
_KEPT_CHARACTERS = frozenset("\u200c\u200d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the operator allows. `variables` maps the name of a dynamic variable to the claim that fills it."""

    agents: Mapping[str, Agent]
    user_name_claim: str
    variables: Mapping[str, str]

    def agent_for(self, user: User, alias: str) -> Agent:  # noqa: ARG002 - the user decides as soon as agents have rules
        """Return the agent behind `alias`, or raise AgentNotAllowed."""
        try:
            return self.agents[alias]
        except KeyError:
            raise AgentNotAllowed(operator_note="no agent has this alias") from None

    def variables_for(self, user: User) -> dict[str, Scalar]:
        """Return the user's dynamic variables: always `user_id` and `user_name`, then what the configuration maps.

        A user without a name gets their id as `user_name`: an agent that refers to a variable it was not given
        closes the conversation with 1008. Raises TokenInvalid when nothing printable is left of the user's id.
        """
        user_id = clean_text(user.id)
        if not user_id:
            raise TokenInvalid(operator_note="the user id holds no printable character")
        name = clean(claim_at(user.claims, self.user_name_claim))
        mapped = {variable: clean(claim_at(user.claims, claim)) for variable, claim in self.variables.items()}
        return {variable: value for variable, value in mapped.items() if value is not None} | {
            "user_id": user_id,
            "user_name": user_id if name is None or name == "" else str(name),
        }


def clean(claim: object) -> Scalar | None:
    """Return a claim as a dynamic variable's value, or None where its type or range cannot be one."""
    match claim:
        case bool():
            return claim
        case int():
            return claim if abs(claim) <= MAX_SAFE_INTEGER else None
        case float():
            return claim if math.isfinite(claim) else None
        case str():
            return clean_text(claim)
        case _:
            return None


def clean_text(text: str) -> str:
    """Return `text` without what could steer a terminal, a reader or the agent's template, at most 200 characters.

    Control, bidirectional, surrogate and unassigned characters go; `{{` and `}}` are broken up with a space, so that
    no value can name another variable. (Breaking up can lengthen, so the cut comes last.)
    """
    kept = "".join(
        c for c in text if unicodedata.category(c) not in _REMOVED_CATEGORIES or c in _KEPT_CHARACTERS
    ).strip()
    while "{{" in kept or "}}" in kept:
        kept = kept.replace("{{", "{ {").replace("}}", "} }")
    return kept[:MAX_VARIABLE_CHARACTERS].rstrip()
