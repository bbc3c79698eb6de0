"""`[limits]` of the policy file: how much users may do, and the limits that the ledger checks."""

from itertools import combinations
from typing import Annotated, Final, Self

from pydantic import BeforeValidator, Field, model_validator

from voicepass.config.checks import Conditions, Entry, parse_when
from voicepass.model import Counted, Limit, Scope
from voicepass.policy import LimitPlan, Rule

OFF: Final = "off"
DAY_SECONDS: Final = 24 * 60 * 60
MAX_AMOUNT: Final = 10**9


def _parse_amount(value: object) -> object:
    if value == OFF:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_AMOUNT:
        raise ValueError(f'must be a whole number, or "{OFF}"')
    return value


Amount = Annotated[int | None, BeforeValidator(_parse_amount)]

# What each key counts, in which window of seconds, and the ledger's units in one unit of the key.
_KEYS: Final = {
    "passes_per_minute": (Counted.REQUESTS, 60, 1),
    "passes_per_day": (Counted.PASSES, DAY_SECONDS, 1),
    "open_conversations": (Counted.CONVERSATIONS, DAY_SECONDS, 1),
    "minutes_per_day": (Counted.SECONDS, DAY_SECONDS, 60),
    "minutes_per_month": (Counted.SECONDS, 30 * DAY_SECONDS, 60),
}


class LimitsEntry(Entry):
    """`[limits.agent]` or `[limits.all]`: how much of what; off until it is set. Windows roll; a month is 30 days."""

    passes_per_minute: Amount = None
    passes_per_day: Amount = None
    open_conversations: Amount = None
    minutes_per_day: Amount = None
    minutes_per_month: Amount = None

    def limits(self, scope: Scope, plan: str | None = None) -> tuple[Limit, ...]:
        """Return the limits that are on."""
        return tuple(
            Limit(name=f"{scope}_{key}", scope=scope, counted=counted, most=most * unit, window_seconds=span, plan=plan)
            for key, (counted, span, unit) in _KEYS.items()
            if (most := getattr(self, key)) is not None
        )


class UserLimitsEntry(LimitsEntry):
    """`[limits.user]`: on from the start, because a stolen token or a loop in a frontend costs money."""

    passes_per_minute: Amount = 10
    passes_per_day: Amount = 200
    open_conversations: Amount = 3
    minutes_per_day: Amount = 60
    minutes_per_month: Amount = 600


class PlanEntry(LimitsEntry):
    """`[[limits.plan]]`: the limits of users for whom `when` holds. Missing keys come from `[limits.user]`."""

    name: str = Field(pattern="^[a-z0-9][a-z0-9_-]{0,63}$")
    when: Annotated[list[Conditions], BeforeValidator(parse_when)]

    def complete(self, user: UserLimitsEntry) -> UserLimitsEntry:
        """Return the limits of `[limits.user]`, changed as this plan says."""
        return user.model_copy(update=self.model_dump(exclude={"name", "when"}, exclude_unset=True))


class LimitTables(Entry):
    """`[limits]`. `conversation_minutes` is reserved for each pass until voicepass knows what it used."""

    conversation_minutes: int = Field(default=10, ge=1, le=24 * 60)
    user: UserLimitsEntry = UserLimitsEntry()
    agent: LimitsEntry = LimitsEntry()
    all: LimitsEntry = LimitsEntry()
    plan: list[PlanEntry] = Field([])

    @model_validator(mode="after")
    def _check_plans_differ(self) -> Self:
        for (first, one), (second, other) in combinations(enumerate(self.plans()), 2):
            if one.name == other.name:
                raise ValueError(f"has two plans of the same name: plan.{first} and plan.{second}")
            if one.covers(other) and other.covers(one):
                raise ValueError(f"has two plans for the same users: plan.{first} and plan.{second}")
        return self

    def limits(self, plan: PlanEntry | None = None) -> tuple[Limit, ...]:
        """Return every limit that is on for users to whom this plan applies, or none."""
        of_user = plan.complete(self.user).limits(Scope.USER, plan.name) if plan else self.user.limits(Scope.USER)
        return (*of_user, *self.agent.limits(Scope.AGENT), *self.all.limits(Scope.ALL))

    def plans(self) -> tuple[LimitPlan, ...]:
        """Return the plans, each with every limit that is on."""
        return tuple(
            LimitPlan(name=plan.name, when=tuple(map(Rule, plan.when)), limits=self.limits(plan)) for plan in self.plan
        )
