"""Every environment variable, with its type, unit and default."""

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, IPvAnyNetwork, SecretStr, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from voicepass.config import checks
from voicepass.config.checks import split_list
from voicepass.config.environment import SettingsRefusedError, find_unknown_names, read_secret, read_values
from voicepass.config.policyfile import list_problems
from voicepass.telemetry.logs import LogFormat, LogLevel


def parse_list(value: object) -> object:
    """Split the text of a variable at its commas."""
    return split_list(value) if isinstance(value, str) else value


def parse_variables(value: object) -> object:
    """Parse `variable=claim,variable=claim`."""
    if not isinstance(value, str):
        return value
    pairs = [entry.partition("=") for entry in split_list(value)]
    variables = {variable.strip(): claim.strip() for variable, _, claim in pairs}
    if not all(variables.values()) or len(variables) != len(pairs):
        raise ValueError("must read variable=claim, separated by commas, and name each variable once")
    return variables


DatabaseUrl = Annotated[str, AfterValidator(checks.check_database_url), Field(repr=False)]  # it may hold a password
Item = TypeVar("Item")
Listed = Annotated[list[Item], BeforeValidator(parse_list)]


class Settings(BaseSettings):
    """What the environment (or the env file) says. An empty variable counts as unset."""

    model_config = SettingsConfigDict(frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True)

    elevenlabs_api_key: SecretStr | None = None
    """For the server only; needs the permissions ElevenAgents: Write and Read. Separate two keys with a comma."""
    elevenlabs_agent_id: str | None = None
    """The agent behind the alias `default`, such as agent_…."""
    elevenlabs_branch_id: str | None = None
    """Its branch, such as agtbrch_…."""
    elevenlabs_environment: str | None = None
    """Its environment at ElevenLabs: production, staging."""
    elevenlabs_base_url: str = "https://api.elevenlabs.io"
    """ElevenLabs' API, or its host in a residency region, such as https://api.eu.residency.elevenlabs.io."""
    elevenlabs_webhook_secret: Annotated[SecretStr, AfterValidator(checks.check_webhook_secrets)] | None = None
    """The secret of the post-call webhook to /v1/webhooks/elevenlabs. During a rotation, separate two with a comma."""
    voicepass_jwt_algorithm: str = "HS256"
    """Exactly one of HS256/384/512, RS256/384/512, ES256/384/512, EdDSA."""
    voicepass_jwt_secret: SecretStr | None = None
    """For HS*: at least 32 bytes; base64:… or base64url:… for a key that is bytes."""
    voicepass_jwt_public_key: SecretStr | None = None
    """For RS*, ES* and EdDSA: a PEM key or certificate, or its bare base64 as Keycloak shows it."""
    voicepass_jwks_url: str | None = None
    """For RS*, ES* and EdDSA: your provider's JWKS, or its …/.well-known/openid-configuration."""
    voicepass_jwt_issuer: str | None = None
    """The exact `iss` of your tokens."""
    voicepass_jwt_audience: str | None = None
    """The `aud` that your tokens must name."""
    voicepass_jwt_leeway_seconds: Annotated[int, Field(ge=0, le=300)] = 60
    """Clock skew in seconds that voicepass allows on exp, nbf and iat."""
    voicepass_jwt_max_age_seconds: Annotated[int, Field(ge=0, le=366 * 86_400)] = 0
    """Seconds after iat for which a token is accepted, even if exp is later; iat is then required. 0: no limit."""
    voicepass_user_id_claim: str = "sub"
    """The claim that becomes user_id; dots name nested claims."""
    voicepass_user_name_claim: str = "name"
    """The claim that becomes user_name."""
    voicepass_variables: Annotated[dict[str, str], BeforeValidator(parse_variables)] = Field({})
    """Further dynamic variables, variable=claim: plan=plan,shop=app_metadata.shop."""
    voicepass_tell_seconds_left: bool = False
    """Add the dynamic variable seconds_left: how long the user may still talk when the pass is issued."""
    voicepass_allowed_origins: Listed[Annotated[str, AfterValidator(checks.check_origin)]] = Field([])
    """Exact origins of frontends, comma-separated: https://app.example, or of an app's shell: capacitor://localhost."""
    voicepass_session_cookie: Annotated[str, checks.COOKIE_NAME] | None = None
    """The name of the cookie with the JWT, best __Host-…; for POST from its own or allowed https pages."""
    voicepass_policy_file: str | None = None
    """TOML: agents by alias, who may use them, their variables, limits, further issuers."""
    voicepass_service_tokens: Listed[Annotated[SecretStr, AfterValidator(checks.check_service_token)]] = Field([])
    """Bearer tokens of your backends, separated by commas: token or name:token, each of 32 characters or more."""
    voicepass_trusted_proxies: Listed[IPvAnyNetwork] = Field([])
    """Proxies whose X-Forwarded-For and X-Request-ID voicepass trusts: addresses or networks, separated by commas."""
    voicepass_plain_http_hosts: Listed[Annotated[str, AfterValidator(checks.check_host)]] = Field([])
    """Hosts in your private network that voicepass may call over http://: keycloak,emulator. Never *."""
    voicepass_database_url: DatabaseUrl = "sqlite:///voicepass.db"
    """sqlite:///file, sqlite:////absolute/file, sqlite:// for memory, or postgresql://user:password@host/name."""
    voicepass_deadline_seconds: Annotated[float, Field(ge=0.1, le=30)] = 4.0
    """Seconds that one request may wait for ElevenLabs in total."""
    voicepass_max_calls: Annotated[int, Field(ge=1, le=10_000)] = 512
    """Calls to ElevenLabs at once, at most. The same number of users may wait; others are refused."""
    voicepass_warm_passes: Annotated[int, Field(ge=0, le=1000)] = 0
    """Signed URLs held ready for each agent, so that users need not wait; 0: none."""
    voicepass_drain_seconds: Annotated[float, Field(ge=0, le=300)] = 0.0
    """Seconds after SIGTERM in which voicepass still serves while /readyz answers 503; behind a balancer, set 10."""
    voicepass_reconcile_seconds: Annotated[int, Field(ge=0, le=86_400)] = 60
    """Seconds between lookups of conversations that no webhook settled; needs convai_read; 0: no lookups."""
    voicepass_retention_days: Annotated[int, Field(ge=31, le=3660)] = 400
    """Days that the ledger keeps a row, 31 at least."""
    voicepass_docs: bool = False
    """Serve /docs and /openapi.json."""
    voicepass_log_format: LogFormat = "json"
    """json, or console for people."""
    voicepass_log_level: LogLevel = "info"
    """debug, info, warning or error."""

    @classmethod
    def settings_customise_sources(cls, *_: Any, **sources: Any) -> tuple[PydanticBaseSettingsSource, ...]:  # noqa: ANN401
        """Put the values of `read_environment` in the place of what pydantic-settings would read."""
        return sources["init_settings"], InitSettingsSource(cls, cls.read_environment())

    @classmethod
    def read_environment(cls) -> dict[str, str]:
        """Return the text of each setting that is set."""
        return read_values(cls.model_fields)

    @property
    def webhook_secrets(self) -> list[str]:
        """The webhook's secret, or both during a rotation; none if no webhook is set up."""
        return split_list(self.read_secret("ELEVENLABS_WEBHOOK_SECRET"))

    def read_secret(self, name: str) -> str:
        """Return the secret of a setting, or of a variable that the policy file names; empty if it is not set."""
        if name.lower() not in type(self).model_fields:
            return read_secret(name)
        own = getattr(self, name.lower())
        return own.get_secret_value() if isinstance(own, SecretStr) else ""


def load_settings() -> Settings:
    """Read the environment and the env file. Raises SettingsRefusedError: a line per unknown or malformed variable."""
    problems = find_unknown_names(frozenset(name.upper() for name in Settings.model_fields))
    if not problems:
        try:
            return Settings()
        except ValidationError as error:
            problems = list_problems(error, lambda location: str(location[0]).upper())
    raise SettingsRefusedError(problems)  # outside of `except`, because pydantic's error may hold values
