"""What the settings of an agent at ElevenLabs mean for its conversations. Nothing here does any I/O.

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
from voicepass.doctor.case import Case
from voicepass.doctor.findings import CAUSES, Finding, report, report_ok
from voicepass.model import Counted, Scope

TEXT_ONLY: Final = "conversation.text_only"
SHORT_SECONDS: Final = 180
"""The doctor warns of a maximum duration up to this, because users took it for broken calls."""

_PLACEHOLDER: Final = re.compile(r"\{\{\s*+([^{}\s]++)\s*+\}\}")
_PERMISSIONS: Final = "platform_settings.overrides.conversation_config_override"
_CONCURRENCY: Final = "platform_settings.call_limits.agent_concurrency_limit"
_DAILY: Final = "platform_settings.call_limits.daily_limit"


class UnreadableError(Exception):
    """ElevenLabs' answer has another shape than its API describes; the text names the place."""


def read_setting(document: Mapping[str, Any], path: str, default: Any) -> Any:  # noqa: ANN401 - JSON of the vendor's
    """Return the setting at this path, or its default. Raises UnreadableError if it is of another type."""
    value: Any = document
    section, *deeper = path.split(".")
    if deeper and document.get(section) is None:
        raise UnreadableError(f"there is no {section}")
    for name in (section, *deeper):
        if value is not None and not isinstance(value, Mapping):
            raise UnreadableError(f"{path} is not where it should be")
        value = None if value is None else value.get(name)
    if value is None or default is None:
        return default if value is None else value
    kind = (int, float) if isinstance(default, int) and not isinstance(default, bool) else type(default)
    if not isinstance(value, kind):
        raise UnreadableError(f"{path} is of another type")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An agent's settings and tools at ElevenLabs, and what the case says of it."""

    case: Case
    settings: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]]

    def at(self, path: str, default: Any = None) -> Any:  # noqa: ANN401 - JSON of the vendor's
        """Return the setting at this path."""
        return read_setting(self.settings, path, default)

    def find_limit(self, counted: Counted) -> int | None:
        """Return how much voicepass allows this agent a day, or None if it sets no limit."""
        limits = [
            limit.most
            for limit in self.case.configuration.policy.limits
            if limit.scope in {Scope.AGENT, Scope.ALL} and limit.counted is counted
            if limit.window_seconds == DAY_SECONDS
        ]
        return min(limits, default=None)

    def allows_more_at_once(self, limit: int) -> bool:
        """Whether voicepass allows more open conversations than this limit of the agent's; -1 is no limit."""
        most = self.find_limit(Counted.CONVERSATIONS)
        return limit > 0 and (most is None or most > limit)


def check_agent(subject: Subject) -> Iterator[Finding]:
    """Make every check of the agent's settings; report one finding at least for each."""
    for check in AGENT_CHECKS:
        try:
            findings = [
                *list_by_settings(check, subject.settings),
                *(_RULES[check](subject) if check in _RULES else ()),
            ]
        except UnreadableError as error:
            findings = [report("answer_unreadable", check=check, note=error)]
        except (AttributeError, KeyError, TypeError):
            findings = [report("answer_unreadable", check=check, note="a part is missing, or of another type")]
        yield from findings or [report_ok(check)]


def list_by_settings(check: str, document: Mapping[str, Any], *, of: str = "agent") -> Iterator[Finding]:
    """Report each finding that the table ties to the value of one setting."""
    for cause in CAUSES.values():
        if cause.check != check or not cause.setting or cause.setting.get("of", "agent") != of:
            continue
        value = read_setting(document, cause.setting["path"], cause.setting["default"])
        match cause.setting:
            case {"has": member}:
                is_shown = member in value
            case {"lacks": member}:
                is_shown = member not in value
            case {"is_not": usual}:
                is_shown = value != usual
            case _:
                is_shown = value in cause.setting["is"]
        if is_shown:
            yield report(cause.name)


def _check_allowlist(subject: Subject) -> Iterator[Finding]:
    hosts = {entry.get("hostname") for entry in subject.at("platform_settings.auth.allowlist", [])}
    if not hosts:
        return
    for origin in subject.case.origins:
        if urlsplit(origin).netloc not in hosts:
            yield report("host_not_allowed", host=urlsplit(origin).netloc)
    if subject.at("platform_settings.auth.enable_auth", default=False):
        yield report("allowlist_beside_signed_urls")
    if subject.at("platform_settings.auth.require_origin_header", default=False):
        yield report("origin_required")


def _check_overrides(subject: Subject) -> Iterator[Finding]:
    for path in subject.case.overrides:
        if not subject.at(f"{_PERMISSIONS}.{path}", default=False):
            yield report("override_not_allowed", field=path)
    if TEXT_ONLY not in subject.case.overrides and not subject.at(f"{_PERMISSIONS}.{TEXT_ONLY}", default=False):
        yield report("text_only_not_allowed")
    own = subject.at("conversation_config.agent.language", "en")
    language = subject.case.overrides.get("agent.language", own)
    if language not in {own, *subject.at("conversation_config.language_presets", {})}:
        yield report("language_unsupported", language=language)


def _check_variables(subject: Subject) -> Iterator[Finding]:
    sent = OWN_VARIABLES | subject.case.rules.variables.keys()
    needed = _list_needed(subject)
    for place, names in needed.items():
        missing = {name for name in names - sent if not name.startswith("system__")}
        secret = {name for name in missing if name.startswith("secret__")}
        if secret:
            yield report("variables_secret", place=place, names=", ".join(sorted(secret)))
        if missing - secret:
            listed = sorted(missing - secret)
            alike = [f"{{{{{close[0]}}}}}" for name in listed if (close := get_close_matches(name, sent, n=1))]
            hint = f"Did you mean {' and '.join(alike)}? " if alike else ""
            yield report("variables_missing", place=place, names=", ".join(listed), hint=hint)
    for name, variable in subject.case.rules.variables.items():
        if variable.default is None and any(name in names for names in needed.values()):
            yield report("variables_optional", names=name, claim=variable.claim)


def _list_needed(subject: Subject) -> dict[str, set[str]]:
    """Return the variables that the agent refers to, by place; the places have the names of ElevenLabs' refusals."""
    presets = subject.at("conversation_config.language_presets", {})
    places: dict[str, object] = {
        "first message": [subject.at("conversation_config.agent.first_message", ""), presets],
        "prompt": subject.at("conversation_config.agent.prompt.prompt", ""),
        "workflow": subject.at("workflow", {}),
        "tools": [
            subject.at("conversation_config.agent.prompt.tools", []),
            subject.at("conversation_config.agent.prompt.built_in_tools", {}),
            *(tool["tool_config"] for tool in subject.tools),
        ],
    }
    return {place: set(_list_names(value)) for place, value in places.items()}


def _list_names(value: object) -> Iterator[str]:
    """List the variables in a template, or in a tool's schema, which can also name one in a field of its own."""
    if isinstance(value, str):
        yield from _PLACEHOLDER.findall(value)
    elif isinstance(value, list):
        for member in value:
            yield from _list_names(member)
    elif isinstance(value, dict):
        for name, member in value.items():
            if name in {"dynamic_variable", "allowed_values_dynamic_variable", "variable_name"} and member:
                yield str(member)
            elif name != "assignments":  # the tool's answer sets these, so nobody sends them
                yield from _list_names(member)


def _check_duration(subject: Subject) -> Iterator[Finding]:
    seconds = subject.at("conversation_config.conversation.max_duration_seconds", 600)
    reserved = subject.case.configuration.policy.conversation_seconds
    if seconds <= SHORT_SECONDS:
        yield report("duration_short", seconds=seconds)
    if seconds > reserved:
        yield report("duration_beyond", seconds=seconds, reserved=reserved, minutes=-(-seconds // 60))


def _check_concurrency(subject: Subject) -> Iterator[Finding]:
    limit = subject.at(_CONCURRENCY, -1)
    if subject.allows_more_at_once(limit):
        yield report("concurrency_tighter", limit=limit)


def _check_daily_limit(subject: Subject) -> Iterator[Finding]:
    limit = subject.at(_DAILY, 100_000)
    most = subject.find_limit(Counted.PASSES)
    if most is not None and most > limit > 0:
        yield report("daily_limit_tighter", limit=limit)


def _check_bursting(subject: Subject) -> Iterator[Finding]:
    limit = subject.at(_CONCURRENCY, -1)
    if subject.at("platform_settings.call_limits.bursting_enabled", default=True) and subject.allows_more_at_once(
        limit
    ):
        yield report("bursting_exceeds", limit=limit)


AGENT_CHECKS: Final = (
    *("archived", "authentication", "allowlist", "shareable_link", "overrides", "variables", "duration"),
    *("silence", "audio", "retention", "queue", "concurrency", "daily_limit", "bursting"),
)
_RULES: Final[Mapping[str, Callable[[Subject], Iterable[Finding]]]] = {
    "allowlist": _check_allowlist,
    "overrides": _check_overrides,
    "variables": _check_variables,
    "duration": _check_duration,
    "concurrency": _check_concurrency,
    "daily_limit": _check_daily_limit,
    "bursting": _check_bursting,
}
"""The checks that compare several facts; the table of findings has the others."""
