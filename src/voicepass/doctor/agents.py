"""What the settings of an agent at ElevenLabs say about its conversations. Pure: no rule here asks anybody.

Paths are those of the vendor's agent model (`GET /v1/convai/agents/{id}`, official SDKs); a missing setting has the
vendor's default.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final
from urllib.parse import urlsplit

from voicepass.config.checks import OWN_VARIABLES
from voicepass.config.limits import DAY_SECONDS
from voicepass.doctor.causes import Finding, found
from voicepass.model import Counted, Scalar, Scope, claim_at
from voicepass.policy import AgentRules, Policy

TEXT_ONLY: Final = "conversation.text_only"
SHORT_SECONDS: Final = 180
"""A maximum duration up to this is worth a word: users took it for broken calls."""

_PLACEHOLDER: Final = re.compile(r"\{\{\s*+([^{}\s]++)\s*+\}\}")
_PERMISSIONS: Final = "platform_settings.overrides.conversation_config_override"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An agent's settings and its tools, our rules for it, and what the frontend sends (`overrides`) from where."""

    settings: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]]
    rules: AgentRules
    policy: Policy
    overrides: Mapping[str, Scalar]
    origins: Sequence[str]

    def at(self, path: str, default: Any = None) -> Any:  # noqa: ANN401 - JSON of the vendor's
        """Return the setting at this path."""
        value = claim_at(self.settings, path)
        return default if value is None else value

    def most(self, counted: Counted, window_seconds: int) -> int | None:
        """Return how much voicepass lets through to this agent, None where it sets no limit."""
        scopes = {Scope.AGENT, Scope.ALL}
        return min(
            (
                limit.most
                for limit in self.policy.limits
                if limit.scope in scopes and limit.counted is counted and limit.window_seconds == window_seconds
            ),
            default=None,
        )


def _archived(subject: Subject) -> Iterator[Finding]:
    if subject.at("platform_settings.archived", default=False):
        yield found("archived")


def _authentication(subject: Subject) -> Iterator[Finding]:
    if not subject.at("platform_settings.auth.enable_auth", default=False):
        yield found("authentication_off")


def _allowlist(subject: Subject) -> Iterator[Finding]:
    hosts = {entry.get("hostname") for entry in subject.at("platform_settings.auth.allowlist", [])}
    if not hosts:
        return
    for origin in subject.origins:
        if urlsplit(origin).netloc not in hosts:
            yield found("host_not_allowed", host=urlsplit(origin).netloc)
    if subject.at("platform_settings.auth.enable_auth", default=False):
        yield found("allowlist_beside_signed_urls")
    if subject.at("platform_settings.auth.require_origin_header", default=False):
        yield found("origin_required")


def _shareable_link(subject: Subject) -> Iterator[Finding]:
    if subject.at("platform_settings.auth.shareable_token"):
        yield found("shareable_link")


def _overrides(subject: Subject) -> Iterator[Finding]:
    for path in subject.overrides:
        if not subject.at(f"{_PERMISSIONS}.{path}", default=False):
            yield found("override_not_allowed", field=path)
    if TEXT_ONLY not in subject.overrides and not subject.at(f"{_PERMISSIONS}.{TEXT_ONLY}", default=False):
        yield found("text_only_not_allowed")
    own = subject.at("conversation_config.agent.language", "en")
    language = subject.overrides.get("agent.language", own)
    if language not in {own, *subject.at("conversation_config.language_presets", {})}:
        yield found("language_unsupported", language=language)


def _variables(subject: Subject) -> Iterator[Finding]:
    supplied = OWN_VARIABLES | subject.rules.variables.keys()
    needed: set[str] = set()
    for place, names in _needed(subject).items():
        needed |= names
        missing = {name for name in names - supplied if not name.startswith("system__")}
        secret = {name for name in missing if name.startswith("secret__")}
        if secret:
            yield found("variables_secret", place=place, names=", ".join(sorted(secret)))
        if missing - secret:
            listed = sorted(missing - secret)
            meant = [f"{{{{{close[0]}}}}}" for name in listed if (close := get_close_matches(name, supplied, n=1))]
            hint = f"Did you mean {' and '.join(meant)}? " if meant else ""
            yield found("variables_missing", place=place, names=", ".join(listed), hint=hint)
    for name, variable in subject.rules.variables.items():
        if name in needed and variable.default is None:
            yield found("variables_optional", names=name, claim=variable.claim)


def _needed(subject: Subject) -> dict[str, set[str]]:
    """Return the variables that the agent refers to, by place; the places are named as its refusals name them."""
    presets = subject.at("conversation_config.language_presets", {})
    places: dict[str, object] = {
        "first message": [subject.at("conversation_config.agent.first_message", ""), presets],
        "prompt": subject.at("conversation_config.agent.prompt.prompt", ""),
        "workflow": subject.at("workflow", {}),
        "tools": [
            subject.at("conversation_config.agent.prompt.tools", []),
            subject.at("conversation_config.agent.prompt.built_in_tools", {}),
            *(tool.get("tool_config") for tool in subject.tools),
        ],
    }
    return {place: set(_names_in(value)) for place, value in places.items()}


def _names_in(value: object) -> Iterator[str]:
    """List the variables in a template, or in a tool's schema, which can name one outright."""
    if isinstance(value, str):
        yield from _PLACEHOLDER.findall(value)
    elif isinstance(value, list):
        for member in value:
            yield from _names_in(member)
    elif isinstance(value, dict):
        for name, member in value.items():
            if name in {"dynamic_variable", "allowed_values_dynamic_variable", "variable_name"} and member:
                yield str(member)
            elif name != "assignments":  # what the tool's answer fills in, nobody need send
                yield from _names_in(member)


def _duration(subject: Subject) -> Iterator[Finding]:
    seconds = subject.at("conversation_config.conversation.max_duration_seconds", 600)
    reserved = subject.policy.conversation_seconds
    if seconds <= SHORT_SECONDS:
        yield found("duration_short", seconds=seconds)
    if seconds > reserved:
        yield found("duration_beyond", seconds=seconds, reserved=reserved, minutes=-(-seconds // 60))


def _concurrency(subject: Subject) -> Iterator[Finding]:
    limit, most = _at_once(subject)
    if limit == 0:
        yield found("concurrency_zero")
    elif limit > 0 and (most is None or most > limit):
        yield found("concurrency_tighter", limit=limit)


def _at_once(subject: Subject) -> tuple[int, int | None]:
    """Return how many conversations the agent takes at once, -1 where it sets no limit, and how many we let through."""
    limit = subject.at("platform_settings.call_limits.agent_concurrency_limit", -1)
    return limit, subject.most(Counted.CONVERSATIONS, DAY_SECONDS)


def _daily_limit(subject: Subject) -> Iterator[Finding]:
    limit = subject.at("platform_settings.call_limits.daily_limit", 100_000)
    most = subject.most(Counted.PASSES, DAY_SECONDS)
    if limit == 0:
        yield found("daily_limit_zero")
    elif limit > 0 and most is not None and most > limit:
        yield found("daily_limit_tighter", limit=limit)


def _bursting(subject: Subject) -> Iterator[Finding]:
    limit, most = _at_once(subject)
    bursting = subject.at("platform_settings.call_limits.bursting_enabled", default=True)
    if limit > 0 and bursting and (most is None or most > limit):
        yield found("bursting_exceeds", limit=limit)


AGENT_CHECKS: Final[Mapping[str, Callable[[Subject], Iterable[Finding]]]] = {
    "archived": _archived,
    "authentication": _authentication,
    "allowlist": _allowlist,
    "shareable_link": _shareable_link,
    "overrides": _overrides,
    "variables": _variables,
    "duration": _duration,
    "concurrency": _concurrency,
    "daily_limit": _daily_limit,
    "bursting": _bursting,
}
"""Each yields what is wrong, and nothing where all is well."""
