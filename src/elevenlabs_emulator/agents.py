"""An agent as its owner configured it, and how the vendor's API shows it."""

from pydantic import BaseModel, ConfigDict

# Every permission that the vendor's agent settings know by these paths, as in `conversation_config_override`.
_OVERRIDES = (
    "agent.first_message",
    "agent.language",
    "agent.prompt.prompt",
    "agent.prompt.llm",
    "tts.voice_id",
    "tts.speed",
    "tts.stability",
    "tts.similarity_boost",
    "asr.keywords",
    "conversation.text_only",
)


class EmulatedAgent(BaseModel):
    """What its owner set. The limits, `is_archived`, `is_shareable` and `webhook_id` are only shown.

    `tool_variables` are the dynamic variables that its attached tool needs. `allowed_overrides` are dotted paths inside
    `conversation_config_override`. `allowed_hosts`, when not empty, are the `host[:port]` an `Origin` may have; a
    client without `Origin` is let in unless `requires_origin`, as with the real default. `languages` are those it
    speaks beside its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

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
    is_archived: bool = False
    is_shareable: bool = False
    max_duration_seconds: int = 600
    concurrency_limit: int = -1
    daily_limit: int = 100_000
    bursting: bool = True
    webhook_id: str | None = None

    @property
    def tool_id(self) -> str:
        """Return the id of its one tool."""
        return f"tool_{self.agent_id}"

    def shown(self) -> dict[str, object]:
        """Return it in the shape of the vendor's agent model, without what nobody reads here."""
        permissions: dict[str, object] = {}
        for path in _OVERRIDES:
            *sections, name = path.split(".")
            node = permissions
            for section in sections:
                node = node.setdefault(section, {})  # type: ignore[assignment]
            node[name] = path in self.allowed_overrides
        return {
            "agent_id": self.agent_id,
            "name": self.agent_id,
            "conversation_config": {
                "agent": {
                    "first_message": self.first_message,
                    "language": self.language,
                    "prompt": {"prompt": self.prompt, "tool_ids": [self.tool_id] if self.tool_variables else []},
                    "dynamic_variables": {"dynamic_variable_placeholders": {}},
                },
                "conversation": {"text_only": False, "max_duration_seconds": self.max_duration_seconds},
                "language_presets": {language: {"overrides": {}} for language in sorted(self.languages)},
            },
            "platform_settings": {
                "auth": {
                    "enable_auth": self.requires_auth,
                    "allowlist": [{"hostname": host} for host in sorted(self.allowed_hosts)],
                    "require_origin_header": self.requires_origin,
                    "shareable_token": "shareable" if self.is_shareable else None,
                },
                "overrides": {"conversation_config_override": permissions},
                "call_limits": {
                    "agent_concurrency_limit": self.concurrency_limit,
                    "daily_limit": self.daily_limit,
                    "bursting_enabled": self.bursting,
                },
                "workspace_overrides": {"webhooks": self.webhook_id and {"post_call_webhook_id": self.webhook_id}},
                "archived": self.is_archived,
            },
        }

    def tool(self) -> dict[str, object]:
        """Return its tool in the shape of the vendor's tool model: one variable in the URL, the others in the body."""
        first, *others = sorted(self.tool_variables)
        body = {name: {"type": "string", "dynamic_variable": name} for name in others}
        schema = {"url": f"https://shop.example/{{{{{first}}}}}", "request_body_schema": {"properties": body}}
        learnt = [{"source": "response", "dynamic_variable": "order_id", "value_path": "id"}]
        config = {"type": "webhook", "name": "create_product", "api_schema": schema, "assignments": learnt}
        return {"id": self.tool_id, "tool_config": config}
