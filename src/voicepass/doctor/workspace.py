"""The workspace at ElevenLabs: whether its key opens the agent's door, and what is read of its settings."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from voicepass.api.middleware import WEBHOOK_PATH
from voicepass.doctor.agents import AGENT_CHECKS, Subject
from voicepass.doctor.case import Case
from voicepass.doctor.causes import Finding, fine, found
from voicepass.doctor.closings import of_refusal
from voicepass.elevenlabs import ElevenLabs, Workspace
from voicepass.errors import ElevenLabsRefusal
from voicepass.model import Agent, Credential, Transport, claim_at
from voicepass.outbound import http_transport

_Member = TypeVar("_Member")

_IMPLIED = {
    "permission_missing": ("api_key",),
    "agent_unknown": ("api_key", "permission"),
    "quota_exhausted": ("api_key", "permission"),
}
"""What a refusal says to be in order, because ElevenLabs looks at that first."""

_OWN_WEBHOOK = "platform_settings.workspace_overrides.webhooks.post_call_webhook_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Minted:
    """What asking for a signed URL told; `reader` may go on asking, None where no key is of any use."""

    findings: Sequence[Finding]
    reader: ElevenLabs | None
    credential: Credential | None


@asynccontextmanager
async def adapters(case: Case) -> AsyncIterator[list[ElevenLabs]]:
    """Yield one adapter for each API key: two overlap while they are rotated, and each must be good.

    An adapter may ask the host in use and, where that is the vendor's, the vendor's others; no key goes anywhere else.
    """
    here, seconds = case.agent.base_url, case.settings.voicepass_deadline_seconds
    (keys,) = [workspace.keys for workspace in case.configuration.workspaces if workspace.base_url == here]
    hosts = [here, *(case.regions.values() if here in case.regions.values() else ())]
    async with http_transport(connect_seconds=seconds / 4) as transport:
        one_each = [
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
            yield one_each
        finally:
            await asyncio.gather(*(adapter.aclose() for adapter in one_each))


async def mint(case: Case, one_each: Sequence[ElevenLabs]) -> Minted:
    """Ask for a signed URL with each key: it costs nothing, and tells key, permission, region and agent apart."""
    answers = [await _asked(adapter, case.agent) for adapter in one_each]
    host = urlsplit(case.agent.base_url).hostname
    region = fine("region") if case.agent.base_url in case.regions.values() else found("host_unofficial", host=host)
    for adapter, credential in zip(one_each, answers, strict=True):
        if isinstance(credential, Credential):
            spares = [
                found("api_key_spare", number=number, total=len(answers), says=of_refusal(answer).says)
                for number, answer in enumerate(answers, 1)
                if isinstance(answer, ElevenLabsRefusal)
            ]
            good = [*(spares or [fine("api_key")]), fine("permission"), region, fine("agent")]
            return Minted(findings=good, reader=adapter, credential=credential)
    refusal = answers[0]
    assert isinstance(refusal, ElevenLabsRefusal)  # noqa: S101 - else it was returned above
    finding = of_refusal(refusal)
    findings = [finding, *map(fine, _IMPLIED.get(finding.cause, ()))]
    if finding.cause == "api_key_refused":
        findings += await _other_region(case, one_each[0])
    elif finding.cause in _IMPLIED:
        findings.append(region)
    is_readable = finding.cause in {"permission_missing", "quota_exhausted"}
    return Minted(findings=findings, reader=one_each[0] if is_readable else None, credential=None)


async def _asked(adapter: ElevenLabs, agent: Agent) -> Credential | ElevenLabsRefusal:
    try:
        return await adapter.fetch_credential(agent, Transport.WEBSOCKET)
    except ElevenLabsRefusal as refusal:
        return refusal


async def _other_region(case: Case, adapter: ElevenLabs) -> list[Finding]:
    here = case.agent.base_url
    for region, url in case.regions.items() if here in case.regions.values() else ():
        answer = await _asked(adapter, Agent(alias=case.alias, agent_id=case.agent.agent_id, base_url=url))
        if isinstance(answer, Credential) or of_refusal(answer).cause in _IMPLIED:
            return [found("region_wrong", region=region, host=urlsplit(here).hostname, url=url)]
    return []


async def look(case: Case, reader: ElevenLabs) -> list[Finding]:
    """Read how the agent and its tools are set up, and where the webhook leads; return what is wrong with it."""
    here = case.agent.base_url
    try:
        settings = await reader.fetch_document(here, "agent", case.agent.agent_id)
    except ElevenLabsRefusal as refusal:
        return [*(_unreadable(refusal, check) for check in AGENT_CHECKS), _webhook_unseen(case, refusal)]
    findings = [fine("agent")]
    tools: list[Mapping[str, Any]] = []
    for tool_id in _members(claim_at(settings, "conversation_config.agent.prompt.tool_ids"), str):
        try:
            tools.append(await reader.fetch_document(here, "tool", tool_id))
        except ElevenLabsRefusal as refusal:  # one that is gone needs no variables; the conversation tells of the rest
            findings.append(_unreadable(refusal, "variables"))
    subject = Subject(
        settings=settings,
        tools=tools,
        rules=case.rules,
        policy=case.configuration.policy,
        overrides=case.overrides,
        origins=case.origins,
    )
    for name, check in AGENT_CHECKS.items():
        try:
            findings += [*check(subject)] or [fine(name)]
        except (AttributeError, TypeError, ValueError):  # the vendor changed the model: say so, and go on
            findings.append(found("settings_unanswered", check=name, note="their shape is new"))
    return [*findings, await _webhook(case, reader, subject)]


async def _webhook(case: Case, reader: ElevenLabs, subject: Subject) -> Finding:
    try:
        of_workspace = await reader.fetch_document(case.agent.base_url, "settings")
        webhook_id = subject.at(_OWN_WEBHOOK) or claim_at(of_workspace, "webhooks.post_call_webhook_id")
        if not webhook_id:
            return found("webhook_missing")
        listed = (await reader.fetch_document(case.agent.base_url, "webhooks")).get("webhooks")
    except ElevenLabsRefusal as refusal:
        missing = of_refusal(refusal).cause == "permission_missing"
        return found("webhooks_unreadable") if missing else _unreadable(refusal, "webhook")
    hook = next((entry for entry in _members(listed, dict) if entry.get("webhook_id") == webhook_id), None)
    return found("webhook_missing") if hook is None else _judged(hook, is_verified=bool(case.settings.webhook_secrets))


def _webhook_unseen(case: Case, refusal: ElevenLabsRefusal) -> Finding:
    """Fail if nothing can tell voicepass that a conversation has ended: no lookup and no webhook."""
    if of_refusal(refusal).cause == "permission_missing" and not case.settings.webhook_secrets:
        return found("endings_unknown")
    return _unreadable(refusal, "webhook")


def _judged(hook: Mapping[str, Any], *, is_verified: bool) -> Finding:
    if hook.get("is_disabled") or hook.get("is_auto_disabled"):
        failed_with = hook.get("most_recent_failure_error_code")
        return found("webhook_disabled", note=f"; its last call was answered {failed_with}" if failed_with else "")
    address = urlsplit(str(hook.get("webhook_url")))
    if address.path != WEBHOOK_PATH:
        return found("webhook_elsewhere", host=address.hostname)
    if hook.get("auth_type") != "hmac":
        return found("webhook_unsigned")
    return fine("webhook") if is_verified else found("webhook_secret_unset")


def _members(value: object, kind: type[_Member]) -> list[_Member]:
    return [member for member in value if isinstance(member, kind)] if isinstance(value, list) else []


def _unreadable(refusal: ElevenLabsRefusal, check: str) -> Finding:
    if of_refusal(refusal).cause == "permission_missing":
        return found("settings_unreadable", check=check)
    return found("settings_unanswered", check=check, note=type(refusal).__name__)
