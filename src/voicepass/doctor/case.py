"""What the doctor is asked, and in which order it answers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from voicepass.config.build import Configuration
from voicepass.config.settings import Settings
from voicepass.doctor.causes import CHECKS, Finding, Outcome, found
from voicepass.elevenlabs import REGIONS
from voicepass.model import Agent, Scalar
from voicepass.policy import AgentRules

WATCH_SECONDS = 5.0
"""A conversation that ends because the quota is used up was seen to last 3 to 5 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One agent of a configured service. `overrides`: what the frontend sends, by path; `origin`: of its page.

    `regions` are the hosts that a refused key is tried on: the vendor's own, if the base URL is one of them, or none.
    """

    settings: Settings
    configuration: Configuration
    alias: str
    overrides: Mapping[str, Scalar] = field(default_factory=dict)
    origin: str | None = None
    with_conversation: bool = True
    regions: Mapping[str, str] = field(default_factory=lambda: REGIONS)
    watch_seconds: float = WATCH_SECONDS

    @property
    def rules(self) -> AgentRules:
        """Return what the policy says of the agent."""
        return self.configuration.policy.agents[self.alias]

    @property
    def agent(self) -> Agent:
        """Return the agent."""
        return self.rules.agent

    @property
    def origins(self) -> list[str]:
        """Return the origins of the pages that will open its conversations, as far as they are known."""
        return [self.origin] if self.origin is not None else self.settings.voicepass_allowed_origins


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Sort by check; a check that found nothing to say was not reached, and says what came before it."""
    findings = list(dict.fromkeys(findings))
    first_failed = next((finding.check for finding in findings if finding.outcome is Outcome.FAILED), "")
    return [
        finding
        for check in CHECKS
        for finding in [finding for finding in findings if finding.check == check]
        or [found("not_reached", check=check, first=first_failed)]
    ]
