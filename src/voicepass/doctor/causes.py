"""What the doctor knows, as tables: what is checked, what can be wrong with it, and the remedy. No rule stands here.

Sources: the vendor's documentation and help centre, the official SDKs, and what users reported in public.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

CHECKS: Final[Mapping[str, str]] = {
    "settings": "the settings are complete, safe, and contradict nothing",
    "access": "a rule opens the agent to somebody",
    "ledger": "the ledger answers",
    "keys": "the keys that verify tokens can be had",
    "api_key": "ElevenLabs answers, and accepts the API key",
    "permission": "the key may make signed URLs (`convai_write`)",
    "region": "the host is one of ElevenLabs', and the key's own",
    "agent": "the agent exists in that workspace",
    "archived": "the agent is not archived",
    "authentication": "nobody gets in without a signed URL",
    "allowlist": "pages that get a pass may connect",
    "shareable_link": "no link leads past voicepass",
    "overrides": "the agent allows what the frontend overrides",
    "variables": "every variable that the agent needs is sent",
    "duration": "conversations may last long enough, and no longer than is set aside for them",
    "concurrency": "the agent takes as many conversations at once as voicepass lets through",
    "daily_limit": "the agent takes as many conversations a day as voicepass lets through",
    "bursting": "the agent's own limit is a ceiling",
    "webhook": "the post-call webhook is there, leads here, is signed and switched on",
    "conversation": "a conversation opens and stays open",
}
"""The checks in the order they are made: what each makes sure of."""


class Outcome(StrEnum):
    """How a check ended. FAILED: conversations fail, or are open to anyone."""

    FAILED = "failed"
    WARNING = "warning"
    SKIPPED = "skipped"
    OK = "ok"


FAILED, WARNING, SKIPPED, OK = Outcome.FAILED, Outcome.WARNING, Outcome.SKIPPED, Outcome.OK


@dataclass(frozen=True, slots=True)
class Cause:
    """One thing that can be wrong. `says` and `remedy` are filled in with the facts of the case."""

    name: str
    check: str
    outcome: Outcome
    says: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check found: `cause` names the row of CAUSES, empty where all is well."""

    check: str
    outcome: Outcome = Outcome.OK
    says: str
    remedy: str = ""
    cause: str = ""


# fmt: off
_TABLE = (
    Cause("settings_refused", "settings", FAILED, "{problem}",
          "Mend that variable, or that line of the policy file; the service does not start before."),
    Cause("nobody_allowed", "access", FAILED,
          "No rule opens the agent '{alias}' to anybody: everyone is answered 403 agent_not_allowed.",
          'Say in the policy file who may use it: under [agents.{alias}], allow = "everyone" or conditions.'),
    Cause("ledger_unavailable", "ledger", FAILED, "The ledger does not answer, so nothing is handed out: {note}.",
          "Check VOICEPASS_DATABASE_URL, that the database runs, and that its disk has room."),
    Cause("ledger_missing", "ledger", WARNING, "There is no ledger here yet; the service makes it when it starts.",
          "Does the service run? Then ask the doctor in its folder, with its environment."),
    Cause("ledger_in_memory", "ledger", WARNING,
          "The ledger is in memory: a restart forgets every limit, and whose the conversations were.",
          "Set VOICEPASS_DATABASE_URL to a file or to PostgreSQL."),
    Cause("sums_corrected", "ledger", WARNING,
          "{count} sums of the ledger differed from its passes, so limits of agents or of all were wrong. Now they are"
          " corrected.",
          "Run the doctor once more. If this warning comes back, report it as a bug of voicepass."),
    Cause("keys_unavailable", "keys", FAILED, "The keys of {issuer} cannot be had, so nobody can sign in: {note}.",
          "Check VOICEPASS_JWKS_URL (jwks_url in the policy file), DNS, and the way out of this network."),

    Cause("api_key_refused", "api_key", FAILED,
          "ElevenLabs does not accept the API key: it is mistyped, revoked, or of another region.",
          "Copy it anew from ElevenLabs (API keys) into ELEVENLABS_API_KEY, and restart the service."),
    Cause("api_key_spare", "api_key", WARNING,
          "Of {total} API keys, number {number} is refused; another one serves. {says}",
          "End the rotation: take it out of ELEVENLABS_API_KEY."),
    Cause("account_blocked", "api_key", FAILED, "ElevenLabs blocks this account or network for unusual activity.",
          "Leave VPNs and shared addresses, or take a paid plan."),
    Cause("elevenlabs_unavailable", "api_key", FAILED, "ElevenLabs cannot be reached, or is out of order{note}.",
          "Check ELEVENLABS_BASE_URL, DNS and the way out of this network; then ElevenLabs' status page."),
    Cause("elevenlabs_busy", "api_key", FAILED, "ElevenLabs takes no more requests at the moment.",
          "Wait a minute and ask again; if it stays, raise the plan."),
    Cause("answer_unusable", "api_key", FAILED, "What ElevenLabs answered holds no usable signed URL{note}.",
          "Check ELEVENLABS_BASE_URL: a proxy, another service or an old path may be answering."),
    Cause("api_key_absent", "api_key", FAILED, "ElevenLabs received no API key.",
          "Send the key in the header xi-api-key. If voicepass sent the request, a proxy removed that header."),
    Cause("permission_missing", "permission", FAILED, "The API key is right, but lacks the permission {permission}.",
          "Give that same key '{access}' (ElevenLabs, API keys, edit); a new key is not needed."),
    Cause("permission_not_needed", "permission", OK,
          "The API key is right, but lacks the permission {permission}. voicepass does not need it.",
          "Do not test the key with that request. Run voicepass doctor: it tests what voicepass needs."),
    Cause("region_wrong", "region", FAILED, "The key belongs to {region}, not to {host}.",
          "Set ELEVENLABS_BASE_URL={url} (or base_url in the policy file)."),
    Cause("host_unofficial", "region", WARNING, "{host} is no host of ElevenLabs.",
          "Right for the emulator or a proxy of yours; else take ELEVENLABS_BASE_URL out."),
    Cause("agent_unknown", "agent", FAILED, "ElevenLabs knows no such agent in this workspace and region.",
          "Copy the id (agent_…) anew from the agent's page; agent and API key must be of one workspace."),

    Cause("settings_unreadable", "agent", SKIPPED, "not looked at, the key lacks convai_read",
          "Give it 'ElevenAgents: Read' too; counting minutes needs it as well."),
    Cause("settings_unanswered", "agent", SKIPPED, "not looked at, ElevenLabs did not show it ({note})",
          "Ask the doctor again in a minute."),
    Cause("not_reached", "agent", SKIPPED, "not looked at, {first} comes first", ""),
    Cause("not_asked", "conversation", SKIPPED, "not tried, because of --no-conversation", ""),

    Cause("archived", "archived", FAILED, "The agent is archived.",
          "Restore it in the dashboard, or put the id of the agent that replaced it in its place."),
    Cause("authentication_off", "authentication", FAILED,
          "The agent lets in whoever knows its id: signed URLs protect nothing, or are refused.",
          "Switch 'Enable authentication' on (the agent's page, Security)."),
    Cause("host_not_allowed", "allowlist", FAILED,
          "Pages of {host} are cut off: the agent's allowlist lacks that host.",
          "Add it, or empty the list (the agent's page, Security): with signed URLs none is needed."),
    Cause("allowlist_beside_signed_urls", "allowlist", WARNING,
          "The agent has an allowlist beside authentication; ElevenLabs advises against using both.",
          "Empty the allowlist (the agent's page, Security): the signed URL decides who gets in."),
    Cause("origin_required", "allowlist", WARNING,
          "Clients that send no Origin, such as apps and servers, are cut off.",
          "Switch 'require origin header' off, unless every client is a browser."),
    Cause("shareable_link", "shareable_link", WARNING,
          "A shareable link opens the agent to whoever has it, past voicepass and its limits.",
          "Take the link back on the agent's page."),

    Cause("override_not_allowed", "overrides", FAILED,
          "The frontend overrides '{field}', which the agent does not allow: it is closed right after the start.",
          "Allow it (the agent's page, Security, Overrides), or send a dynamic variable in its place."),
    Cause("text_only_not_allowed", "overrides", WARNING,
          "A frontend that starts with textOnly is cut off (1008): the agent does not allow that override.",
          "Allow 'text only' (the agent's page, Security, Overrides), unless you only speak."),
    Cause("language_unsupported", "overrides", FAILED,
          "The frontend asks for the language '{language}', which the agent does not have.",
          "Add the language on the agent's page, or leave the override out."),
    Cause("variables_missing", "variables", FAILED,
          "The agent needs {names} (in its {place}), and nobody sends it.",
          "{hint}Supply it from a claim (VOICEPASS_VARIABLES, or variables in the policy file), or take it out of the "
          "agent. The frontend must hand pass.dynamic_variables to startSession."),
    Cause("variables_secret", "variables", FAILED,
          "The agent needs {names} (in its {place}), which voicepass never sends: the browser would see it.",
          "Keep the value in a workspace secret at ElevenLabs, and let the tool use that."),
    Cause("variables_optional", "variables", WARNING,
          "A user whose token lacks the claim '{claim}' is cut off (1008): {names} then has no value.",
          'Give it a default in the policy file: variables.{names} = {{ claim = "{claim}", default = "…" }}.'),

    Cause("duration_short", "duration", WARNING, "ElevenLabs ends every conversation after {seconds} s.",
          "Raise the agent's maximum duration, if calls seem to break off (a free plan may have a limit of its own)."),
    Cause("duration_beyond", "duration", WARNING,
          "A conversation may last {seconds} s, but only {reserved} s are set aside for it: limits may be passed.",
          "Set [limits] conversation_minutes = {minutes}, or shorten the agent's maximum duration."),
    Cause("concurrency_zero", "concurrency", FAILED, "The agent's concurrency limit is 0: it takes no conversation.",
          "Raise it on the agent's page, or set it to -1 for the plan's own limit."),
    Cause("concurrency_tighter", "concurrency", WARNING,
          "The agent takes {limit} conversations at once, and voicepass lets more through: the rest is cut off.",
          "Set open_conversations = {limit} under [limits.agent]: then users are told to wait."),
    Cause("concurrency_reached", "concurrency", FAILED,
          "Too many conversations are open at once, for the agent's limit or for the plan.",
          "Raise the limit or the plan, or set open_conversations under [limits.all]: then users are told to wait."),
    Cause("daily_limit_zero", "daily_limit", FAILED, "The agent's daily limit is 0: it takes no conversation.",
          "Raise it on the agent's page."),
    Cause("daily_limit_tighter", "daily_limit", WARNING,
          "The agent takes {limit} conversations a day, and voicepass lets more through: the rest is cut off.",
          "Set passes_per_day = {limit} under [limits.agent]: then users are told to wait."),
    Cause("daily_limit_reached", "daily_limit", FAILED, "The agent's daily limit is reached.",
          "Raise it on the agent's page, or set passes_per_day under [limits.agent] below it."),
    Cause("bursting_exceeds", "bursting", WARNING,
          "Bursting lets up to three times the agent's limit of {limit} in, at double price.",
          "Switch bursting off on the agent's page, or set open_conversations = {limit} under [limits.agent]."),

    Cause("webhook_missing", "webhook", WARNING,
          "No post-call webhook: minutes are known late, or, with VOICEPASS_RECONCILE_SECONDS=0, never.",
          "Add one at ElevenLabs to https://<your voicepass>/v1/webhooks/elevenlabs."),
    Cause("webhook_elsewhere", "webhook", WARNING, "The post-call webhook leads to {host}, not to voicepass.",
          "Let it lead to https://<your voicepass>/v1/webhooks/elevenlabs, or pass its calls on there, unchanged."),
    Cause("webhook_unsigned", "webhook", WARNING,
          "The post-call webhook is not signed with HMAC, so it is refused here.",
          "Choose HMAC for it at ElevenLabs, and put its secret into ELEVENLABS_WEBHOOK_SECRET."),
    Cause("webhook_secret_unset", "webhook", WARNING,
          "The post-call webhook leads here, but ELEVENLABS_WEBHOOK_SECRET is not set: it is refused.",
          "Put the secret that ElevenLabs showed for it there."),
    Cause("webhook_disabled", "webhook", WARNING, "The post-call webhook is switched off{note}.",
          "Mend what refused it, then switch it on again at ElevenLabs."),
    Cause("endings_unknown", "webhook", FAILED,
          "voicepass cannot see that a conversation has ended: the key lacks convai_read, and "
          "ELEVENLABS_WEBHOOK_SECRET is not set. With the default limits, and without either, users are locked out "
          "for 25 minutes after three conversations.",
          "Give the key 'ElevenAgents: Read' (convai_read), or set up the post-call webhook to "
          "https://<your voicepass>/v1/webhooks/elevenlabs and put its secret into ELEVENLABS_WEBHOOK_SECRET."),
    Cause("webhooks_unreadable", "webhook", SKIPPED, "not looked at, the key lacks webhooks_write",
          "Look yourself (ElevenLabs, Webhooks); for this look alone the key should not get so much power."),

    Cause("not_authorized", "conversation", FAILED,
          "ElevenLabs did not accept the signature: absent, older than 15 minutes, used before, or of another agent.",
          "Get a fresh pass for each conversation, and pass signed_url on unchanged; an agent id alone will not do."),
    Cause("request_refused", "conversation", FAILED,
          "ElevenLabs did not understand the URL: put together by hand, or naming a branch that is gone.",
          "Hand signed_url on as it came, and add nothing (branch_id above all)."),
    Cause("quota_exhausted", "conversation", FAILED,
          "The workspace's quota at ElevenLabs is used up: conversations end after seconds, or do not start.",
          "Raise the quota or wait for its reset (ElevenLabs, Subscription)."),
    Cause("agent_misconfigured", "conversation", FAILED,
          "The agent itself is set up wrongly: nearly always the credentials of its custom LLM.",
          "Try the agent in the dashboard, and mend the address and key of its LLM."),
    Cause("contract_broken", "conversation", FAILED,
          "ElevenLabs refused what the frontend sent first: a variable, an override or a language{note}.",
          "Compare what startSession is given with the checks overrides and variables."),
    Cause("operation_failed", "conversation", FAILED, "ElevenLabs gave up: quota, its provider, or a time-out{note}.",
          "Look at the quota and the agent's LLM first; then at ElevenLabs' status page."),
    Cause("internal_error", "conversation", FAILED, "Something failed inside ElevenLabs; it gave no reason.",
          "Try again; if it stays, try the agent in the dashboard, and ask their support with the conversation's id."),
    Cause("no_goodbye", "conversation", FAILED,
          "The connection broke without a close frame: network, proxy, firewall or page policy{note}.",
          "Let WebSockets to ElevenLabs' host through; in the page, list it under connect-src."),
    Cause("no_code", "conversation", FAILED,
          "The conversation was closed without any code: most often by the page's own socket.close(), else by a proxy.",
          "Look for what closes it in the page; if nothing does, let WebSockets to ElevenLabs' host through."),
    Cause("no_beginning", "conversation", FAILED, "The socket opened, but no conversation began within {seconds} s.",
          "Look at ElevenLabs' status page, and at the agent's queue."),
    Cause("unknown_closing", "conversation", FAILED,
          "The conversation was closed with {code}, a code not known here{note}.",
          "Look at the conversation in the dashboard (its metadata.error), then ask ElevenLabs' support."),
    Cause("went_away", "conversation", OK, "The page was left, or a server was restarted.", "Nothing is wrong."),
    Cause("ended", "conversation", OK,
          "An ordinary end: the agent or the user hung up, or the longest duration was reached.",
          "Too early? Look at the agent's maximum duration, and at the quota: older SDKs show its end as this."),
    Cause("socket_was_closed", "conversation", FAILED,
          "Only the echo: the page sent into a socket that ElevenLabs had closed before. The cause came earlier.",
          "Read closeCode and closeReason in onDisconnect, and explain those. Usual: 3000, no valid signature; "
          "1008, a variable or an override."),
    Cause("wrong_credential", "conversation", FAILED,
          "A signed URL was used for WebRTC, or a conversation token for the WebSocket.",
          "signed_url goes with the WebSocket (signedUrl); for WebRTC get /v1/conversation-token (conversationToken)."),
    Cause("error_taken_for_answer", "api_key", FAILED,
          "A backend took ElevenLabs' error for an answer: there is no signed URL in it, the reason is lost.",
          "Ask voicepass in its place, and run voicepass doctor: it says why ElevenLabs refuses."),
    Cause("validate_404", "conversation", OK, "A harmless try of the WebRTC library; it goes on without that path.",
          "Look further: this is not why a conversation fails."),
    Cause("conversation_unknown", "conversation", WARNING, "ElevenLabs has no conversation with this id.",
          "Nobody opened it, it was deleted, or it is in another workspace: compare the id, the key and the host."),
    Cause("voicepass_refused", "conversation", FAILED, "voicepass itself refused: {title}. {detail}",
          "Look into the service's log: its line with this request_id has the cause. Or run voicepass doctor."),
    Cause("worklet_blocked", "conversation", FAILED,
          "The page's Content-Security-Policy keeps the SDK's audio worklets out.",
          "Allow script-src blob:, or serve the worklets yourself and name them in workletPaths."),
)
# fmt: on

CAUSES: Final[Mapping[str, Cause]] = {cause.name: cause for cause in _TABLE}


def found(name: str, *, check: str | None = None, **facts: object) -> Finding:
    """Return the finding that this cause makes of these facts; `check` where another than its own found it."""
    cause = CAUSES[name]
    return Finding(
        check=check or cause.check,
        outcome=cause.outcome,
        says=cause.says.format(**facts),
        remedy=cause.remedy.format(**facts),
        cause=name,
    )


def fine(check: str) -> Finding:
    """Return that all is well with it."""
    return Finding(check=check, says=CHECKS[check])
