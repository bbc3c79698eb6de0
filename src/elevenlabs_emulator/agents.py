"""An agent as its owner configured it, and how the vendor's API shows it."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel

from elevenlabs_emulator.failures import CloseConversation, read_table
from elevenlabs_emulator.script import SPOKEN_LINES

_FACTS = read_table("agents.toml")


class EmulatedAgent(BaseModel, extra="forbid", frozen=True):
    """What the agent's owner set. `bursting`, `is_shareable` and `webhook_id` are only shown by the API.

    `tool_variables` are the dynamic variables that its tool needs. `allowed_overrides` are dotted paths inside
    `conversation_config_override`. `allowed_hosts` are the `host[:port]` that an `Origin` may have; a client without
    `Origin` is admitted unless `requires_origin`, as the real default is. `languages` are those it speaks besides its
    own. `client_events` are the frames that it sends; `vad_score` and `agent_tool_response` are off by default.
    `branches` maps the id of each branch to the agent as it is there. `spoken_lines` are what the emulator takes
    the user to have said into the microphone, one line after the other.
    """

    agent_id: str
    requires_auth: bool = True
    first_message: str = "Hello {{user_name}}! What would you like to sell today?"
    prompt: str = "You take orders."
    tool_variables: frozenset[str] = frozenset()
    allowed_overrides: frozenset[str] = frozenset({"conversation.text_only"})
    allowed_hosts: frozenset[str] = frozenset()
    requires_origin: bool = False
    language: str = "en"
    languages: frozenset[str] = frozenset()
    text_only: bool = False
    client_events: frozenset[str] = frozenset(_FACTS["client_events"])
    is_archived: bool = False
    is_shareable: bool = False
    max_duration_seconds: int = 600
    concurrency_limit: int = -1
    queueing: bool = True
    queue_timeout_seconds: int = 60
    daily_limit: int = 100_000
    bursting: bool = True
    webhook_id: str | None = None
    branches: Mapping[str, "EmulatedAgent"] = {}
    versions: frozenset[str] = frozenset()
    environments: frozenset[str] = frozenset({"production"})
    spoken_lines: tuple[str, ...] = SPOKEN_LINES

    @property
    def tool_id(self) -> str:
        """Return the id of its one tool."""
        return f"tool_{self.agent_id}"

    def select(self, query: Mapping[str, str]) -> "EmulatedAgent":
        """Return the agent, on the branch that a query names. Raises `CloseConversation` for what it does not have."""
        known = {"branch_id": self.branches, "version_id": self.versions, "environment": self.environments}
        if any(query[name] not in names for name, names in known.items() if name in query):
            raise CloseConversation("request_error")
        return self.branches.get(query.get("branch_id", ""), self)

    def override(self, values: Mapping[str, object]) -> Self:
        """Return the agent with these values of a client, by dotted path. Raises pydantic's `ValidationError`."""
        changes = {field: values[path] for path, field in _FACTS["overrides"].items() if field and path in values}
        return self.model_validate(self.model_dump() | changes)

    def as_json(self) -> dict[str, Any]:
        """Return the agent in the shape of the vendor's model, without what no caller reads."""
        permissions = "platform_settings.overrides.conversation_config_override"
        own_webhook = {"post_call_webhook_id": self.webhook_id} if self.webhook_id else None
        values = {path: getattr(self, field) for path, field in _FACTS["settings"].items()}
        values |= {f"{permissions}.{path}": path in self.allowed_overrides for path in _FACTS["overrides"]}
        values |= {
            "metadata": {"created_at_unix_secs": 0, "updated_at_unix_secs": 0},
            "conversation_config.agent.prompt.tool_ids": [self.tool_id] if self.tool_variables else [],
            "conversation_config.agent.dynamic_variables.dynamic_variable_placeholders": {},
            "conversation_config.conversation.client_events": sorted(self.client_events),
            "conversation_config.language_presets": {each: {"overrides": {}} for each in sorted(self.languages)},
            "platform_settings.auth.allowlist": [{"hostname": host} for host in sorted(self.allowed_hosts)],
            "platform_settings.auth.shareable_token": "shareable" if self.is_shareable else None,
            "platform_settings.workspace_overrides.webhooks": own_webhook,
        }
        nested: dict[str, Any] = {}
        for path, value in values.items():
            *sections, name = path.split(".")
            node = nested
            for section in sections:
                node = node.setdefault(section, {})
            node[name] = value
        return nested

    def widget_as_json(self) -> dict[str, object]:
        """Return the settings of the vendor's widget."""
        widget = _FACTS["widget"] | {
            "language": self.language,
            "supported_language_overrides": sorted(self.languages),
            "first_message": self.first_message,
            "text_only": self.text_only,
            "supports_text_only": "conversation.text_only" in self.allowed_overrides,
        }
        return {"agent_id": self.agent_id, "widget_config": widget}

    def tool_as_json(self) -> dict[str, Any]:
        """Return its tool in the shape of the vendor's model: one variable in the URL, the others in the body."""
        first, *others = sorted(self.tool_variables)
        properties = {name: {"type": "string", "dynamic_variable": name} for name in others}
        body = {"type": "object", "properties": properties}
        schema = {"url": f"https://shop.example/{{{{{first}}}}}", "request_body_schema": body}
        tool: dict[str, Any] = _FACTS["tool"]
        return tool | {"id": self.tool_id, "tool_config": tool["tool_config"] | {"api_schema": schema}}
