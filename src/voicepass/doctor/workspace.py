"""The workspace at ElevenLabs: whether its key gets a signed URL for the agent, and what its settings say."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from voicepass.api.middleware import WEBHOOK_PATH
from voicepass.app import open_provider
from voicepass.doctor.agents import BROKEN_SHAPE, Document, WrongShapeError, check_agent, list_by_settings, read_setting
from voicepass.doctor.explain import describe_refusal
from voicepass.doctor.findings import AGENT_CHECKS, CHECKS, Case, Finding, report, report_ok
from voicepass.elevenlabs import ElevenLabs, Workspace
from voicepass.errors import AgentUnknown, BadAnswer, ElevenLabsRefusal
from voicepass.model import Agent, Credential, Transport
from voicepass.policy import claim_at


class Signed(NamedTuple):
    """What asking for a signed URL shows, an adapter that can ask more, and the signed URL."""

    findings: list[Finding]
    reader: ElevenLabs | None
    credential: Credential | None


@asynccontextmanager
async def open_adapters(case: Case) -> AsyncIterator[list[ElevenLabs]]:
    """Yield one adapter for each API key: during a rotation there are two, and each must work.

    An adapter may ask the configured host and, only if that is one of the vendor's, the vendor's other hosts.
    """
    here = case.agent.base_url
    (keys,) = [workspace.keys for workspace in case.configuration.workspaces if workspace.base_url == here]
    hosts = [here, *(case.regions.values() if here in case.regions.values() else ())]
    async with AsyncExitStack() as stack:
        workspaces = [[Workspace(base_url=url, api_keys=[key]) for url in hosts] for key in keys]
        configurations = [replace(case.configuration, workspaces=of_key) for of_key in workspaces]
        yield [await open_provider(stack, case.settings, configuration) for configuration in configurations]


async def sign_url(case: Case, adapters: Sequence[ElevenLabs]) -> Signed:
    """Ask for a signed URL with each key. That costs nothing, and tests key, permission, region and agent."""
    answers = [await _ask(adapter, case.agent) for adapter in adapters]
    refused = {number: answer for number, answer in enumerate(answers, 1) if isinstance(answer, Finding)}
    host, is_official = urlsplit(case.agent.base_url).hostname, case.agent.base_url in case.regions.values()
    region = report_ok("region") if is_official else report("host_unofficial", host=host)
    for adapter, credential in zip(adapters, answers, strict=True):
        if isinstance(credential, Credential):
            spares = [
                report("api_key_spare", number=number, total=len(answers), says=finding.says)
                for number, finding in refused.items()
            ]
            findings = [*map(report_ok, ("api_key", "permission", "agent")), region, *spares]
            return Signed(findings, reader=adapter, credential=credential)
    finding = refused[1]
    if finding.cause == "agent_unknown" and case.agent.selection:
        bare = replace(case.agent, branch_id=None, version_id=None, environment=None)
        if isinstance(await _ask(adapters[0], bare), Credential):
            finding = report("selection_unknown", agent=case.agent)
    # ElevenLabs checks the key first, then its permission, then the agent.
    passed = list(CHECKS)[: list(CHECKS).index(finding.check)]
    findings = [finding, *(report_ok(check) for check in ("api_key", "permission") if check in passed)]
    if finding.check != "api_key":
        findings.append(region)
    elif finding.cause == "api_key_refused" and is_official:
        findings += await _find_region(case, adapters[0])
    is_readable = finding.cause in {"permission_missing", "quota_exhausted"}
    return Signed(findings, reader=adapters[0] if is_readable else None, credential=None)


async def _ask(adapter: ElevenLabs, agent: Agent) -> Credential | Finding:
    try:
        return await adapter.fetch_credential(agent, Transport.WEBSOCKET)
    except ElevenLabsRefusal as refusal:
        return describe_refusal(refusal)


async def _find_region(case: Case, adapter: ElevenLabs) -> list[Finding]:
    """Ask the vendor's other regions whether the refused key is theirs."""
    host = urlsplit(case.agent.base_url).hostname
    for region, url in case.regions.items():
        answer = await _ask(adapter, replace(case.agent, base_url=url))
        if isinstance(answer, Credential) or answer.check != "api_key":
            return [report("region_wrong", region=region, host=host, url=url)]
    return []


async def check_workspace(case: Case, reader: ElevenLabs) -> list[Finding]:
    """Read the settings of the agent, its tools and the webhook; report what is wrong with them."""
    try:
        agent = await reader.fetch_agent(case.agent)
    except ElevenLabsRefusal as refusal:
        if isinstance(refusal, AgentUnknown) and case.agent.selection:
            return [report("selection_unknown", agent=case.agent)]
        return [_report_unread(case, refusal, check) for check in (*AGENT_CHECKS, "webhook")]
    findings, tools = [report_ok("agent")], []
    tool_ids = claim_at(agent, "conversation_config.agent.prompt.tool_ids")
    for tool_id in tool_ids if isinstance(tool_ids, list) else ():  # check_agent reports another shape
        try:
            tools.append(await reader.fetch_document(case.agent.base_url, "tool", str(tool_id)))
        except AgentUnknown:
            findings.append(report("tool_unknown", tool=tool_id))
        except ElevenLabsRefusal as refusal:
            findings.append(_report_unread(case, refusal, "variables"))
    findings += check_agent(case, agent, tools)
    try:
        return findings + await _check_webhook(case, reader, agent)
    except WrongShapeError as error:
        return [*findings, report("answer_unreadable", check="webhook", note=error)]
    except BROKEN_SHAPE:
        return [*findings, report("answer_unreadable", check="webhook")]


async def _check_webhook(case: Case, reader: ElevenLabs, agent: Document) -> list[Finding]:
    """Check the agent's own webhook, or else the workspace's. Raises WrongShapeError or one of BROKEN_SHAPE."""
    here, findings = case.agent.base_url, list[Finding]()
    try:
        webhook = read_setting(agent, "platform_settings.workspace_overrides.webhooks", default={})
        if not webhook.get("post_call_webhook_id"):
            webhook = (await reader.fetch_document(here, "settings"))["webhooks"]  # null, but never missing
        webhook_id = None if webhook is None else webhook.get("post_call_webhook_id")
        if not webhook_id:
            return [report("webhook_missing")]
        findings += list_by_settings("webhook", webhook, case.configuration.policy)
        registered: Any = (await reader.fetch_document(here, "webhooks"))["webhooks"]
    except ElevenLabsRefusal as refusal:
        if describe_refusal(refusal).cause == "permission_missing":
            return [*findings, report("webhooks_unreadable")]
        return [_report_unread(case, refusal, "webhook")]
    found = [entry for entry in registered if entry.get("webhook_id") == webhook_id]
    return [_judge_address(found[0], case) if found else report("webhook_missing"), *findings]


def _judge_address(hook: Document, case: Case) -> Finding:
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


def _report_unread(case: Case, refusal: ElevenLabsRefusal, check: str) -> Finding:
    if describe_refusal(refusal).cause == "permission_missing":
        has_other_source = check != "webhook" or case.settings.webhook_secrets
        return report("settings_unreadable", check=check) if has_other_source else report("endings_unknown")
    if isinstance(refusal, BadAnswer):
        return report("answer_unreadable", check=check, note=refusal.operator_note)
    return report("settings_unanswered", check=check, note=type(refusal).__name__)
