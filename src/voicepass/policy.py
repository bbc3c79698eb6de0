"""Pure rules: who may use which agent, and which claims become the agent's dynamic variables."""

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from voicepass.errors import AgentNotAllowed
from voicepass.model import Agent, Limit, Scalar, User

MAX_VARIABLE_CHARACTERS = 200
MAX_SAFE_INTEGER = 2**53 - 1  # what a browser's JSON.parse keeps exact

RESERVED_PREFIXES = ("system__", "secret__")
"""`system__` belongs to ElevenLabs; `secret__` values must never pass through a browser."""

SCOPE_CLAIMS = frozenset({"scope", "scp"})
"""Claims whose text is a list of words (RFC 8693, section 4.2)."""

_REMOVED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
# Joiners are format characters, yet many scripts and emoji cannot be written without them.
_KEPT_CHARACTERS = frozenset("\u200c\u200d")

VariableType = Literal["string", "number", "boolean"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Opens an agent to users whose claims hold, each, one of the listed values. Without conditions: to every user."""

    conditions: Mapping[str, tuple[Scalar, ...]]

    def admits(self, claims: Mapping[str, object]) -> bool:
        """Whether every condition holds for a user with these claims."""
        return all(
            any(_same(held, wanted) for held in _values_of(claim, claims) for wanted in values)
            for claim, values in self.conditions.items()
        )

    def covers(self, other: "Rule") -> bool:
        """Whether this rule admits every user whom `other` admits."""
        return all(
            claim in other.conditions
            and all(any(_same(named, value) for value in values) for named in other.conditions[claim])
            for claim, values in self.conditions.items()
        )

    def list_impossible(self) -> list[str]:
        """Return the claims of which no token can hold a listed value."""
        return [
            claim
            for claim, values in self.conditions.items()
            # NaN is not equal to itself; a list of words holds no word with a space.
            if not any(_same(value, value) and not (claim in SCOPE_CLAIMS and " " in str(value)) for value in values)
        ]

    def __str__(self) -> str:
        return " and ".join(
            f"{claim} is {' or '.join(map(_shown, values))}" for claim, values in self.conditions.items()
        )

    @property
    def whom(self) -> str:
        """Whom the rule admits, in words."""
        return f"users whose {self}" if self.conditions else "every signed-in user"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """Where a dynamic variable comes from, and what it is when the claim is missing or of another type."""

    claim: str
    type: VariableType | None = None
    default: Scalar | None = None

    def value_for(self, user: User) -> Scalar | None:
        """Return the variable's value, or None where it has none."""
        value = clean(claim_at(user.claims, self.claim))
        return self.default if value is None or not is_of(self.type, value) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRules:
    """An agent, whom it is open to (nobody, until a rule says so), and which variables it is given."""

    agent: Agent
    allow: tuple[Rule, ...]
    variables: Mapping[str, Variable] = field(default_factory=dict)

    def admitting(self, user: User) -> Rule | None:
        """Return the first rule that opens the agent to this user."""
        return next((rule for rule in self.allow if rule.admits(user.claims)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitPlan:
    """Limits by a name, and the users to whom they apply: those whom one of the rules admits."""

    name: str | None
    when: tuple[Rule, ...]
    limits: tuple[Limit, ...]

    def covers(self, other: "LimitPlan") -> bool:
        """Whether this plan applies to every user to whom `other` applies."""
        return all(any(rule.covers(covered) for rule in self.when) for covered in other.when)


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator allows, by the alias of the agent, and how much. `conversation_seconds`: set aside per pass.

    `limits` are those of users to whom no plan applies.
    """

    agents: Mapping[str, AgentRules]
    limits: tuple[Limit, ...] = ()
    conversation_seconds: int = 600
    plans: tuple[LimitPlan, ...] = ()

    def agent_for(self, user: User, alias: str) -> Agent:
        """Return the agent behind `alias`, or raise AgentNotAllowed: the same for one that does not exist."""
        rules = self.agents.get(alias)
        if rules is None:
            raise AgentNotAllowed(operator_note="no agent has this alias: frontends send the alias, not the agent's id")
        if rules.admitting(user) is None:
            raise AgentNotAllowed(operator_note=f"no rule opens the agent {alias!r} to this user")
        return rules.agent

    def plan_for(self, user: User) -> LimitPlan:
        """Return the first plan that applies to this user, or else one without a name."""
        plans = (plan for plan in self.plans if any(rule.admits(user.claims) for rule in plan.when))
        return next(plans, LimitPlan(name=None, when=(), limits=self.limits))

    def limits_of(self, plan: str | None) -> tuple[Limit, ...]:
        """Return the limits of a plan that the ledger names. A plan that is gone has the limits without a plan."""
        return next((known.limits for known in self.plans if known.name == plan), self.limits)

    def variables_for(self, user: User, agent: Agent) -> dict[str, Scalar]:
        """Return the dynamic variables for `agent`: always `user_id` and `user_name`, then what is configured.

        A user without a name gets their id as `user_name`: an agent that refers to a variable it was not given
        closes the conversation with 1008.
        """
        mapped = {name: variable.value_for(user) for name, variable in self.agents[agent.alias].variables.items()}
        return {variable: value for variable, value in mapped.items() if value is not None} | {
            "user_id": user.id,
            "user_name": clean_text(user.name or "") or user.id,
        }


def clean(claim: object) -> Scalar | None:
    """Return a claim as a dynamic variable's value, or None where its type or range cannot be one."""
    if isinstance(claim, str):
        return clean_text(claim)
    if isinstance(claim, float):
        return claim if math.isfinite(claim) else None
    return claim if isinstance(claim, int) and abs(claim) <= MAX_SAFE_INTEGER else None


def clean_text(text: str, *, most_characters: int = MAX_VARIABLE_CHARACTERS) -> str:
    """Return `text` without what could steer a terminal, a reader or the agent's template, and not longer.

    Control, bidirectional, surrogate and unassigned characters go; `{{` and `}}` are broken up with a space, so that
    no value can name another variable. (Breaking up can lengthen, so the cut comes last.)
    """
    kept = text if text.isprintable() else "".join(filter(is_visible, text))
    kept = kept.strip()
    while "{{" in kept or "}}" in kept:
        kept = kept.replace("{{", "{ {").replace("}}", "} }")
    return kept[:most_characters].rstrip()


def is_visible(character: str) -> bool:
    """Whether a character may stay in a text that a person reads: it steers neither a terminal nor a reader."""
    return unicodedata.category(character) not in _REMOVED_CATEGORIES or character in _KEPT_CHARACTERS


def claim_at(claims: Mapping[str, object], path: str) -> object:
    """Return the claim called `path`, or the nested one that its dots lead to, or None.

    The exact name goes first, because namespaced claims such as `https://example.com/plan` hold dots themselves.
    """
    if path in claims:
        return claims[path]
    value: object = claims
    for step in path.split("."):
        if not isinstance(value, Mapping) or step not in value:
            return None
        value = value[step]
    return value


def _values_of(claim: str, claims: Mapping[str, object]) -> list[object]:
    value = claim_at(claims, claim)
    if claim in SCOPE_CLAIMS and isinstance(value, str):
        return list(value.split(" "))
    return value if isinstance(value, list) else [value]


def _same(held: object, wanted: Scalar) -> bool:
    return isinstance(held, bool) == isinstance(wanted, bool) and held == wanted  # to Python, True is 1


def is_of(wanted: VariableType | None, value: Scalar) -> bool:
    """Whether a variable of the type `wanted` can have this value; without a type, it can have any."""
    kind = "boolean" if isinstance(value, bool) else "string" if isinstance(value, str) else "number"
    return wanted is None or wanted == kind


def _shown(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
