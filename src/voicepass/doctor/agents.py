"""What the settings of an agent at ElevenLabs mean for its conversations. Nothing here does any I/O.

findings.toml says which values of a setting are a finding. The functions here compare several facts.

Paths are those of the vendor's agent model (`GET /v1/convai/agents/{id}`, official SDKs); a missing setting has the
vendor's default.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final
from urllib.parse import urlsplit

from voicepass.config.checks import OWN_VARIABLES
from voicepass.doctor.findings import AGENT_CHECKS, CAUSES, Case, Finding, report, report_ok
from voicepass.policy import Policy


class WrongShapeError(Exception):
    """A setting in ElevenLabs' answer is missing, or of another type. The text names its path alone."""


BROKEN_SHAPE: Final = (AttributeError, KeyError, TypeError, ValueError)
"""What reading raises if ElevenLabs' answer has another shape than its API describes."""

_SECTIONS: Final = ("conversation_config", "platform_settings")  # ElevenLabs always sends both
_WRONG: Final = object()  # of no type that a setting has
_TEXT_ONLY: Final = "conversation.text_only"
_PLACEHOLDER: Final = re.compile(r"\{\{\s*+([^{}\s]++)\s*+\}\}")
_PERMISSIONS: Final = "platform_settings.overrides.conversation_config_override"

Document = Mapping[str, Any]


def read_setting(document: Document, path: str, *, default: Any) -> Any:  # noqa: ANN401 - JSON of the vendor's
    """Return the setting at this path, or its default. Raises WrongShapeError if it has another shape."""
    value: Any = document
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else _WRONG
        if value is None and name not in _SECTIONS:
            return default
    is_number = isinstance(default, int) and not isinstance(default, bool)
    if not isinstance(value, (int, float) if is_number else type(default)):
        raise WrongShapeError(f"{path} is missing, or of another type")
    return value


def check_agent(case: Case, agent: Document, tools: Sequence[Document]) -> Iterator[Finding]:
    """Make every check of the agent's settings and its tools; report one finding at least for each."""
    compared = {
        "allowlist": _check_allowlist(case, agent),
        "overrides": _check_overrides(case, agent),
        "variables": _check_variables(case, agent, tools),
        "duration": _check_duration(case, agent),
    }
    for check in AGENT_CHECKS:
        try:
            findings = [*list_by_settings(check, agent, case.configuration.policy), *compared.get(check, ())]
        except WrongShapeError as error:
            findings = [report("answer_unreadable", check=check, note=error)]
        except BROKEN_SHAPE:
            findings = [report("answer_unreadable", check=check)]
        yield from findings or [report_ok(check)]


def list_by_settings(check: str, document: Document, policy: Policy) -> Iterator[Finding]:
    """Report each finding of this check that the table ties to the values of settings."""
    for cause in CAUSES.values():
        if cause.check == check and cause.settings:
            pairs = [(read_setting(document, each["path"], default=each["default"]), each) for each in cause.settings]
            if all(_applies(value, condition, policy) for value, condition in pairs):
                yield report(cause.name, value=pairs[0][0])


def _applies(value: Any, condition: Mapping[str, Any], policy: Policy) -> bool:  # noqa: ANN401 - as above
    match condition:
        case {"is": expected}:
            return bool(value == expected)
        case {"is_not": usual}:
            return bool(value != usual)
        case {"at_most": most}:
            return bool(value <= most)
        case {"has": member}:
            return member in value
        case {"lacks": member}:
            return member not in value
        case {"tighter_than": name}:
            limits = [limit.most for limit in policy.limits if limit.name in {f"agent_{name}", f"all_{name}"}]
            # Without a limit of ours, any number may be open at once. The agent's limit per day is usually high.
            most = min(limits, default=math.inf if name == "open_conversations" else 0)
            return bool(0 < value < most)
    raise AssertionError(f"findings.toml has an unknown condition: {condition}")


def _check_allowlist(case: Case, agent: Document) -> Iterator[Finding]:
    allowlist = read_setting(agent, "platform_settings.auth.allowlist", default=[])
    allowed = {entry.get("hostname") for entry in allowlist}
    for host in (urlsplit(origin).netloc for origin in case.origins):
        if allowed and host not in allowed:
            yield report("host_not_allowed", host=host)


def _check_overrides(case: Case, agent: Document) -> Iterator[Finding]:
    for path in (*case.overrides, _TEXT_ONLY):
        if not read_setting(agent, f"{_PERMISSIONS}.{path}", default=False):
            yield report("override_not_allowed" if path in case.overrides else "text_only_not_allowed", field=path)
    own = read_setting(agent, "conversation_config.agent.language", default="en")
    language = case.overrides.get("agent.language", own)
    if language not in {own, *read_setting(agent, "conversation_config.language_presets", default={})}:
        yield report("language_unsupported", language=language)


def _check_variables(case: Case, agent: Document, tools: Sequence[Document]) -> Iterator[Finding]:
    sent = OWN_VARIABLES | case.rules.variables.keys()
    needed = _list_needed(agent, tools)
    for place, names in needed.items():
        missing = {name for name in names - sent if not name.startswith("system__")}
        secret = {name for name in missing if name.startswith("secret__")}
        if secret:
            yield report("variables_secret", place=place, names=", ".join(sorted(secret)))
        if listed := sorted(missing - secret):
            alike = [f"{{{{{close[0]}}}}}" for name in listed if (close := get_close_matches(name, sent, n=1))]
            hint = f"Did you mean {' and '.join(alike)}? " if alike else ""
            yield report("variables_missing", place=place, names=", ".join(listed), hint=hint)
    for name, variable in case.rules.variables.items():
        if variable.default is None and any(name in names for names in needed.values()):
            yield report("variables_optional", names=name, claim=variable.claim)


def _list_needed(agent: Document, tools: Sequence[Document]) -> dict[str, set[str]]:
    """Return the variables that the agent refers to, by place; the places have the names of ElevenLabs' refusals."""
    settings = read_setting(agent, "conversation_config.agent", default={})
    presets = read_setting(agent, "conversation_config.language_presets", default={})
    prompt = read_setting(settings, "prompt", default={})
    own_tools = [read_setting(prompt, "tools", default=[]), read_setting(prompt, "built_in_tools", default={})]
    places: dict[str, object] = {
        "first message": [read_setting(settings, "first_message", default=""), presets],
        "prompt": read_setting(prompt, "prompt", default=""),
        "workflow": read_setting(agent, "workflow", default={}),
        "tools": [*own_tools, *(tool["tool_config"] for tool in tools)],
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


def _check_duration(case: Case, agent: Document) -> Iterator[Finding]:
    seconds = read_setting(agent, "conversation_config.conversation.max_duration_seconds", default=600)
    reserved = case.configuration.policy.conversation_seconds
    if seconds > reserved:
        yield report("duration_beyond", seconds=seconds, reserved=reserved, minutes=-(-seconds // 60))
