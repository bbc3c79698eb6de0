"""Every environment variable, typed, with its unit; refuses combinations that would start the service open."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from voicepass.keys import (
    ALGORITHMS,
    HMAC_ALGORITHMS,
    KeyUnusableError,
    VerificationKey,
    key_from_pem,
    key_from_secret,
)
from voicepass.observe import LogFormat, LogLevel
from voicepass.policy import RESERVED_PREFIXES

_FILE_SUFFIX: Final = "_FILE"
_SECRET_SUFFIXES: Final = ("_SECRET", "_KEY", "_TOKENS")
_AGENT_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
_VARIABLE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)
_MIN_DEADLINE_SECONDS: Final = 0.1
_MAX_DEADLINE_SECONDS: Final = 30.0


class SettingsRefusedError(Exception):
    """The service does not start. `problems` has a line for each: the variable's name and the remedy, never a value."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class Settings(BaseSettings):
    """What the environment (or `.env`) says. An empty variable counts as unset."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        populate_by_name=False,
    )

    elevenlabs_api_key: SecretStr | None = Field(
        None, description="Server-held key; needs the permission convai_write (in the dashboard: ElevenAgents: Write)."
    )
    elevenlabs_agent_id: str | None = Field(None, description="The agent behind the alias `default`, such as agent_….")
    elevenlabs_base_url: str = Field(
        "https://api.elevenlabs.io",
        description="Or a residency host, such as https://api.eu.residency.elevenlabs.io; http:// only to loopback.",
    )
    voicepass_jwt_algorithm: str = Field(
        "HS256", description="Exactly one of HS256/384/512, RS256/384/512, ES256/384/512."
    )
    voicepass_jwt_secret: SecretStr | None = Field(None, description="For HS*: at least 32 bytes.")
    voicepass_jwt_public_key: SecretStr | None = Field(None, description="For RS* and ES*: a PEM key or certificate.")
    voicepass_jwt_issuer: str | None = Field(None, description="The exact `iss` of your tokens.")
    voicepass_jwt_audience: str | None = Field(None, description="The `aud` that your tokens must name.")
    voicepass_jwt_leeway_seconds: Annotated[int, Field(ge=0, le=300)] = Field(
        60, description="Clock skew forgiven on exp, nbf and iat."
    )
    voicepass_user_id_claim: str = Field("sub", description="The claim that becomes user_id; dots lead into objects.")
    voicepass_user_name_claim: str = Field("name", description="The claim that becomes user_name.")
    voicepass_variables: Annotated[dict[str, str], NoDecode] = Field(
        {}, description="Further dynamic variables, variable=claim: plan=plan,shop=app_metadata.shop."
    )
    voicepass_allowed_origins: Annotated[list[str], NoDecode] = Field(
        [], description="Exact origins of browser frontends, comma-separated: https://app.example."
    )
    voicepass_database_url: str = Field(
        "sqlite:///voicepass.db", description="sqlite:///file, sqlite:////absolute/file, or sqlite:// for memory."
    )
    voicepass_deadline_seconds: Annotated[float, Field(ge=_MIN_DEADLINE_SECONDS, le=_MAX_DEADLINE_SECONDS)] = Field(
        4.0, description="How long one request may wait for ElevenLabs, in all."
    )
    voicepass_docs: bool = Field(default=False, description="Serve /docs and /openapi.json.")
    voicepass_log_format: LogFormat = Field("json", description="json, or console for people.")
    voicepass_log_level: LogLevel = Field("info", description="debug, info, warning or error.")

    @field_validator("voicepass_variables", mode="before")
    @classmethod
    def _parse_variables(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [entry.partition("=") for entry in _listed(value)]
        variables = {variable.strip(): claim.strip() for variable, _, claim in pairs}
        for variable, claim in variables.items():
            if not _VARIABLE_NAME.fullmatch(variable) or not claim:
                raise ValueError("must read variable=claim, separated by commas")
            if variable.startswith(RESERVED_PREFIXES):
                raise ValueError("may not define system__ or secret__ variables: the browser would see or forge them")
            if variable in {"user_id", "user_name"}:
                raise ValueError("may not define user_id or user_name; VOICEPASS_USER_*_CLAIM does")
        if len(variables) != len(pairs):
            raise ValueError("names a variable twice")
        return variables

    @field_validator("voicepass_allowed_origins", mode="before")
    @classmethod
    def _parse_origins(cls, value: object) -> object:
        return _listed(value) if isinstance(value, str) else value

    @field_validator("voicepass_allowed_origins")
    @classmethod
    def _exact_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            parts = urlsplit(origin)
            bare = f"{parts.scheme}://{parts.netloc}"
            if origin == "*" or parts.scheme not in {"http", "https"} or not parts.hostname or bare != origin.lower():
                raise ValueError("must list exact origins such as https://app.example, without a path; * is refused")
        return origins

    @field_validator("elevenlabs_api_key", "voicepass_jwt_secret", "voicepass_jwt_public_key", mode="before")
    @classmethod
    def _without_line_break(cls, secret: object) -> object:
        # Editors and `echo` end a file with one; in a header it would be fatal, in an HS secret another secret.
        return secret.removesuffix("\n").removesuffix("\r") if isinstance(secret, str) else secret

    @field_validator("voicepass_jwt_public_key", mode="before")
    @classmethod
    def _unescaped_pem(cls, pem: object) -> object:
        # Where a variable can hold one line only, people write the PEM with \\n in it.
        return pem.replace("\\n", "\n") if isinstance(pem, str) else pem

    @field_validator("elevenlabs_api_key")
    @classmethod
    def _key_fits_a_header(cls, key: SecretStr | None) -> SecretStr | None:
        # Checked here, because httpx and h11 print the whole key in the error they raise for it.
        if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key.get_secret_value(), re.ASCII):
            raise ValueError("holds a space, a line break or a character that no HTTP header can carry")
        return key

    @field_validator("elevenlabs_agent_id")
    @classmethod
    def _agent_id_is_bare(cls, agent_id: str | None) -> str | None:
        if agent_id is None or _AGENT_ID.fullmatch(agent_id):
            if agent_id is not None and agent_id.startswith("conv_"):
                raise ValueError("is a conversation's id; an agent's looks like agent_…")
            return agent_id
        raise ValueError("must be the bare agent id, such as agent_…, without '&' or '='")

    @field_validator("elevenlabs_base_url")
    @classmethod
    def _base_url_is_safe(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.query or parts.fragment or parts.username is not None or not parts.hostname:
            raise ValueError("must be a plain URL such as https://api.elevenlabs.io")
        if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname)):
            raise ValueError("must be https://, or http:// to a loopback address")
        return url.rstrip("/")

    @field_validator("voicepass_jwt_algorithm")
    @classmethod
    def _algorithm_is_known(cls, algorithm: str) -> str:
        if algorithm not in ALGORITHMS:
            raise ValueError(
                f"must be one of {', '.join(sorted(ALGORITHMS))} (python-jose implements no PS*, EdDSA or ES256K)"
            )
        return algorithm

    @field_validator("voicepass_database_url")
    @classmethod
    def _database_is_sqlite(cls, url: str) -> str:
        if not url.startswith("sqlite://") or (url != "sqlite://" and not url.startswith("sqlite:///")):
            raise ValueError("must be sqlite:///file, sqlite:////absolute/file, or sqlite:// for memory")
        return url

    @classmethod
    def settings_customise_sources(  # noqa: D102 - pydantic-settings' own hook
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings' own mechanism: unused
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _SecretFiles(settings_cls), env_settings, dotenv_settings

    @property
    def sqlite_path(self) -> str:
        """The file behind `voicepass_database_url`."""
        return self.voicepass_database_url.removeprefix("sqlite://").removeprefix("/") or ":memory:"

    def verification_key(self) -> VerificationKey:
        """Build the one key that tokens are verified with. Raises SettingsRefusedError."""
        key, problems = self._key_or_problems()
        if key is None:
            raise SettingsRefusedError(problems)
        return key

    def _key_or_problems(self) -> tuple[VerificationKey | None, list[str]]:
        algorithm, secret, pem = self.voicepass_jwt_algorithm, self.voicepass_jwt_secret, self.voicepass_jwt_public_key
        symmetric = algorithm in HMAC_ALGORITHMS
        given, other = (secret, pem) if symmetric else (pem, secret)
        name, other_name = "VOICEPASS_JWT_SECRET", "VOICEPASS_JWT_PUBLIC_KEY"
        if not symmetric:
            name, other_name = other_name, name
        if other is not None:
            return None, [f"{other_name} is set, but VOICEPASS_JWT_ALGORITHM is {algorithm}: unset one of the two"]
        if given is None:
            remedy = "make one with: openssl rand -base64 48" if symmetric else "give the PEM of your identity provider"
            return None, [f"{name} is not set, so no token could be verified: {remedy}"]
        try:
            build = key_from_secret if symmetric else key_from_pem
            return build(given.get_secret_value(), algorithm), []
        except KeyUnusableError as error:
            return None, [f"{name} {error}"]

    def problems(self) -> list[str]:
        """Name what keeps the service from starting: a line each, the variable and the remedy, never a value."""
        problems = self.identity_problems()
        if self.elevenlabs_api_key is None:
            problems.append("ELEVENLABS_API_KEY is not set: create a key with the permission 'ElevenAgents: Write'")
        if self.elevenlabs_agent_id is None:
            problems.append("ELEVENLABS_AGENT_ID is not set: copy your agent's id (agent_…) from the dashboard")
        return problems

    def identity_problems(self) -> list[str]:
        """Name what keeps tokens from being verified, or test tokens from being made."""
        problems = self._key_or_problems()[1]
        if self.voicepass_jwt_issuer is None:
            problems.append("VOICEPASS_JWT_ISSUER is not set: give the exact 'iss' of your tokens")
        if self.voicepass_jwt_audience is None:
            problems.append("VOICEPASS_JWT_AUDIENCE is not set: give the 'aud' that your tokens name for this service")
        return problems


class _SecretFiles(PydanticBaseSettingsSource):
    """Reads NAME_FILE for every secret NAME, from the environment or `.env`."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # noqa: ANN401, ARG002
        """Unused: __call__ reads all fields at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        surroundings = {
            **DotEnvSettingsSource(self.settings_cls).env_vars,
            **EnvSettingsSource(self.settings_cls).env_vars,
        }
        secrets = {}
        for name in self.settings_cls.model_fields:
            path = surroundings.get(name + _FILE_SUFFIX.lower())
            if not path or not name.upper().endswith(_SECRET_SUFFIXES):
                continue
            if surroundings.get(name):
                raise SettingsRefusedError([f"{name.upper()} and {name.upper()}_FILE are both set: unset one of them"])
            try:
                text = Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                problem = f"{name.upper()}_FILE names a file that cannot be read ({type(error).__name__})"
                raise SettingsRefusedError([problem]) from None
            secrets[name] = text
        return secrets


def load_settings() -> Settings:
    """Read the environment and `.env`. Raises SettingsRefusedError, with a line for each variable that is malformed."""
    try:
        return Settings()
    except ValidationError as error:
        problems = [
            f"{str(problem['loc'][0]).upper()} {_worded(problem['msg'])}"
            for problem in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise SettingsRefusedError(problems) from None  # the original would print the values


def settings_to_serve() -> Settings:
    """Read settings that are fit to start the service with, or raise SettingsRefusedError."""
    settings = load_settings()
    if problems := settings.problems():
        raise SettingsRefusedError(problems)
    return settings


def is_loopback(host: str | None) -> bool:
    """Whether `host` is this machine by its own name or address."""
    if host == "localhost":
        return True
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listed(value: str) -> list[str]:
    return [entry.strip() for entry in value.split(",") if entry.strip()]


def _worded(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should", "should").replace("Field", "field")
