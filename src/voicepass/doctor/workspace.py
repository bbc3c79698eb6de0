"""The workspace at ElevenLabs: whether its key gets a signed URL for the agent, and what its settings say."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import urlsplit

from voicepass.api.middleware import WEBHOOK_PATH
from voicepass.doctor.agents import AGENT_CHECKS, Subject, UnreadableError, check_agent, list_by_settings, read_setting
from voicepass.doctor.case import Case
from voicepass.doctor.explain import describe_refusal
from voicepass.doctor.findings import Finding, report, report_ok
from voicepass.elevenlabs import ElevenLabs, Workspace
from voicepass.errors import AgentUnknown, BadAnswer, ElevenLabsRefusal
from voicepass.model import Agent, Credential, Transport
from voicepass.outbound import http_transport
from voicepass.policy import claim_at

_IMPLIED_OK: Final = {
    "permission_missing": ("api_key",),
    "agent_unknown": ("api_key", "permission"),
    "selection_unknown": ("api_key", "permission"),
    "quota_exhausted": ("api_key", "permission"),
}
"""The checks that a refusal shows to be in order, because ElevenLabs makes them first."""

_AGENTS_WEBHOOKS: Final = "platform_settings.workspace_overrides.webhooks"
_BROKEN_SHAPE: Final = (UnreadableError, AttributeError, KeyError, TypeError, ValueError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """The outcome of asking for a signed URL. `reader` can ask more, and is None if no key is of any use."""

    findings: Sequence[Finding]
    reader: ElevenLabs | None
    credential: Credential | None


@asynccontextmanager
async def open_adapters(case: Case) -> AsyncIterator[list[ElevenLabs]]:
    """Yield one adapter for each API key: during a rotation there are two, and each must work.

    An adapter may ask the configured host and, only if that is one of the vendor's, the vendor's other hosts.
    """
    here, seconds = case.agent.base_url, case.settings.voicepass_deadline_seconds
    (keys,) = [workspace.keys for workspace in case.configuration.workspaces if workspace.base_url == here]
    hosts = [here, *(case.regions.values() if here in case.regions.values() else ())]
    async with http_transport(connect_seconds=seconds / 4) as transport:
        adapters = [
            ElevenLabs(
                transport=transport,
                workspaces=[Workspace(base_url=url, api_keys=[key]) for url in hosts],
                deadline_seconds=seconds,
                max_calls=case.settings.voicepass_max_calls,
                clock=time.time,
            )
            for key in keys
        ]
        try:
            yield adapters
        finally:
            await asyncio.gather(*(adapter.aclose() for adapter in adapters))


async def sign_url(case: Case, adapters: Sequence[ElevenLabs]) -> Signed:
    """Ask for a signed URL with each key. That costs nothing, and tests key, permission, region and agent."""
    answers = [await _ask(adapter, case.agent) for adapter in adapters]
    host, is_official = urlsplit(case.agent.base_url).hostname, case.agent.base_url in case.regions.values()
    region = report_ok("region") if is_official else report("host_unofficial", host=host)
    for adapter, credential in zip(adapters, answers, strict=True):
        if isinstance(credential, Credential):
            spares = [
                report("api_key_spare", number=number, total=len(answers), says=describe_refusal(answer).says)
                for number, answer in enumerate(answers, 1)
                if isinstance(answer, ElevenLabsRefusal)
            ]
            good = [*(spares or [report_ok("api_key")]), report_ok("permission"), region, report_ok("agent")]
            return Signed(findings=good, reader=adapter, credential=credential)
    refusal = answers[0]
    assert isinstance(refusal, ElevenLabsRefusal)  # noqa: S101 - the loop returned every Credential
    finding = describe_refusal(refusal)
    if finding.cause == "agent_unknown" and case.agent.selection:
        bare = replace(case.agent, branch_id=None, version_id=None, environment=None)
        if isinstance(await _ask(adapters[0], bare), Credential):
            finding = report("selection_unknown", agent=case.agent)
    findings = [finding, *map(report_ok, _IMPLIED_OK.get(finding.cause, ()))]
    if finding.cause == "api_key_refused":
        findings += await _find_region(case, adapters[0])
    elif finding.cause in _IMPLIED_OK:
        findings.append(region)
    is_readable = finding.cause in {"permission_missing", "quota_exhausted"}
    return Signed(findings=findings, reader=adapters[0] if is_readable else None, credential=None)


async def _ask(adapter: ElevenLabs, agent: Agent) -> Credential | ElevenLabsRefusal:
    try:
        return await adapter.fetch_credential(agent, Transport.WEBSOCKET)
    except ElevenLabsRefusal as refusal:
        return refusal


async def _find_region(case: Case, adapter: ElevenLabs) -> list[Finding]:
    """Ask the vendor's other regions whether the refused key is theirs."""
    here = case.agent.base_url
    for region, url in case.regions.items() if here in case.regions.values() else ():
        answer = await _ask(adapter, replace(case.agent, base_url=url))
        if isinstance(answer, Credential) or describe_refusal(answer).cause in _IMPLIED_OK:
            return [report("region_wrong", region=region, host=urlsplit(here).hostname, url=url)]
    return []


async def check_workspace(case: Case, reader: ElevenLabs) -> list[Finding]:
    """Read the settings of the agent, its tools and the webhook; report what is wrong with them."""
    here = case.agent.base_url
    try:
        settings = await reader.fetch_agent(case.agent)
    except ElevenLabsRefusal as refusal:
        if isinstance(refusal, AgentUnknown) and case.agent.selection:
            return [report("selection_unknown", agent=case.agent)]
        return [*(_report_unread(refusal, check) for check in AGENT_CHECKS), _report_unread_webhook(case, refusal)]
    findings = [report_ok("agent")]
    tools: list[Mapping[str, Any]] = []
    tool_ids = claim_at(settings, "conversation_config.agent.prompt.tool_ids")
    for tool_id in tool_ids if isinstance(tool_ids, list) else ():  # check_agent reports another shape
        try:
            tools.append(await reader.fetch_document(here, "tool", str(tool_id)))
        except AgentUnknown:
            findings.append(report("tool_unknown", tool=tool_id))
        except ElevenLabsRefusal as refusal:
            findings.append(_report_unread(refusal, "variables"))
    subject = Subject(case=case, settings=settings, tools=tools)
    try:
        webhook = await _check_webhook(case, reader, settings)
    except _BROKEN_SHAPE:
        webhook = [report("answer_unreadable", check="webhook", note="the webhook's settings are of another shape")]
    return [*findings, *check_agent(subject), *webhook]


async def _check_webhook(case: Case, reader: ElevenLabs, settings: Mapping[str, Any]) -> list[Finding]:
    """Check the agent's own post-call webhook or else the workspace's. Raises an error for another shape."""
    here = case.agent.base_url
    try:
        webhook = read_setting(settings, _AGENTS_WEBHOOKS, {})
        if not webhook.get("post_call_webhook_id"):
            workspace = await reader.fetch_document(here, "settings")
            webhook = read_setting({"webhooks": workspace["webhooks"]}, "webhooks", {})  # null, but never missing
        webhook_id = webhook.get("post_call_webhook_id")
        if not webhook_id:
            return [report("webhook_missing")]
        registered: Any = (await reader.fetch_document(here, "webhooks")).get("webhooks")
    except ElevenLabsRefusal as refusal:
        if describe_refusal(refusal).cause == "permission_missing":
            return [*list_by_settings("webhook", webhook, of="webhook"), report("webhooks_unreadable")]
        return [_report_unread(refusal, "webhook")]
    found = [entry for entry in registered if entry.get("webhook_id") == webhook_id]
    judged = [_judge_address(found[0], case)] if found else [report("webhook_missing")]
    return [*judged, *list_by_settings("webhook", webhook, of="webhook")]


def _judge_address(hook: Mapping[str, Any], case: Case) -> Finding:
    """Report the first thing that keeps the webhook's calls from being accepted here."""
    if hook.get("is_disabled") or hook.get("is_auto_disabled"):
        answer = hook.get("most_recent_failure_error_code")
        return report("webhook_disabled", note=f"; the answer to its last call was {answer}" if answer else "")
    address = urlsplit(str(hook.get("webhook_url")))
    if address.path != WEBHOOK_PATH:
        return report("webhook_elsewhere", host=address.hostname)
    if hook.get("auth_type") != "hmac":
        return report("webhook_unsigned")
    return report_ok("webhook") if case.settings.webhook_secrets else report("webhook_secret_unset")


def _report_unread_webhook(case: Case, refusal: ElevenLabsRefusal) -> Finding:
    """Fail if nothing can tell voicepass that a conversation has ended: no lookup and no webhook."""
    if describe_refusal(refusal).cause == "permission_missing" and not case.settings.webhook_secrets:
        return report("endings_unknown")
    return _report_unread(refusal, "webhook")


def _report_unread(refusal: ElevenLabsRefusal, check: str) -> Finding:
    if describe_refusal(refusal).cause == "permission_missing":
        return report("settings_unreadable", check=check)
    if isinstance(refusal, BadAnswer):
        return report("answer_unreadable", check=check, note=refusal.operator_note)
    return report("settings_unanswered", check=check, note=type(refusal).__name__)
