"""Every environment variable, typed, with its unit; refuses combinations that would start the service open."""

import os
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import Field, IPvAnyNetwork, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from voicepass.config.checks import (
    checked_agent_id,
    checked_algorithm,
    checked_base_url,
    checked_token_issuer,
    checked_variable_name,
    is_header_value,
)
from voicepass.config.policyfile import secret_names
from voicepass.identity.credentials import ServiceToken
from voicepass.identity.keys import (
    HMAC_ALGORITHMS,
    MIN_SECRET_BYTES,
    KeyUnusableError,
    VerificationKey,
    key_from_pem,
    key_from_secret,
)
from voicepass.outbound import is_safe_url
from voicepass.telemetry.logs import LogFormat, LogLevel

_PREFIXES: Final = ("VOICEPASS_", "ELEVENLABS_")
_FILE_SUFFIX: Final = "_FILE"
ENV_FILE: Final = "VOICEPASS_ENV_FILE"  # in the environment only: it names the file with the other settings
_SECRET_SUFFIXES: Final = ("_SECRET", "_KEY", "_TOKENS", "_DATABASE_URL")  # that one may hold a password
_OF_SPEECH_PROGRAMS: Final = frozenset({"ELEVENLABS_VOICE_ID", "ELEVENLABS_MODEL_ID"})  # they often share our .env
# Kubernetes sets these for a service called voicepass or voicepass-postgres; VOICEPASS_PORT is then tcp://10.0.0.1:8000.
_KUBERNETES_NAME: Final = re.compile(
    r"\b\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)", re.ASCII
)
_KUBERNETES_PORT: Final = re.compile(r"(tcp|udp|sctp)://.+", re.ASCII)
_TOKEN_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_MIN_DEADLINE_SECONDS: Final = 0.1
_MAX_DEADLINE_SECONDS: Final = 30.0
_MAX_CALLS: Final = 10_000
_MAX_WARM_PASSES: Final = 1000
_MAX_DRAIN_SECONDS: Final = 300.0
_MAX_RECONCILE_SECONDS: Final = 86_400
_MAX_TOKEN_AGE_SECONDS: Final = 366 * 86_400
_MIN_WEBHOOK_SECRET_CHARACTERS: Final = 16  # ElevenLabs makes them, and longer; this keeps out what could be guessed


class SettingsRefusedError(Exception):
    """The service does not start. `problems` has a line for each: the variable's name and the remedy, never a value."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def _unless_none(check: Callable[[str], str]) -> Callable[[str | None], str | None]:
    return lambda value: value if value is None else check(value)


class Settings(BaseSettings):
    """What the environment (or the env file) says. An empty variable counts as unset."""

    model_config = SettingsConfigDict(
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        populate_by_name=False,
    )

    elevenlabs_api_key: SecretStr | None = Field(
        None,
        description="Server-held; needs the permissions ElevenAgents: Write and Read. Separate two keys with a comma.",
    )
    elevenlabs_agent_id: str | None = Field(None, description="The agent behind the alias `default`, such as agent_….")
    elevenlabs_base_url: str = Field(
        "https://api.elevenlabs.io",
        description="Or a residency host, such as https://api.eu.residency.elevenlabs.io; http:// only to loopback.",
    )
    elevenlabs_webhook_secret: SecretStr | None = Field(
        None,
        description="Of the post-call webhook to /v1/webhooks/elevenlabs; while you rotate it, both, by a comma.",
    )
    voicepass_jwt_algorithm: str = Field(
        "HS256", description="Exactly one of HS256/384/512, RS256/384/512, ES256/384/512."
    )
    voicepass_jwt_secret: SecretStr | None = Field(None, description="For HS*: at least 32 bytes.")
    voicepass_jwt_public_key: SecretStr | None = Field(None, description="For RS* and ES*: a PEM key or certificate.")
    voicepass_jwks_url: str | None = Field(
        None, description="For RS* and ES*: your provider's JWKS, or its …/.well-known/openid-configuration."
    )
    voicepass_jwt_issuer: str | None = Field(None, description="The exact `iss` of your tokens.")
    voicepass_jwt_audience: str | None = Field(None, description="The `aud` that your tokens must name.")
    voicepass_jwt_leeway_seconds: Annotated[int, Field(ge=0, le=300)] = Field(
        60, description="Clock skew forgiven on exp, nbf and iat."
    )
    voicepass_jwt_max_age_seconds: Annotated[int, Field(ge=0, le=_MAX_TOKEN_AGE_SECONDS)] = Field(
        0, description="How long after its iat a token counts, whatever its exp; iat is then required. 0: no limit."
    )
    voicepass_user_id_claim: str = Field("sub", description="The claim that becomes user_id; dots lead into objects.")
    voicepass_user_name_claim: str = Field("name", description="The claim that becomes user_name.")
    voicepass_variables: Annotated[dict[str, str], NoDecode] = Field(
        {}, description="Further dynamic variables, variable=claim: plan=plan,shop=app_metadata.shop."
    )
    voicepass_allowed_origins: Annotated[list[str], NoDecode] = Field(
        [], description="Exact origins of browser frontends, comma-separated: https://app.example."
    )
    voicepass_session_cookie: str | None = Field(
        None,
        description="Cookie with the JWT, best named __Host-…; counts on POST from own or allowed https pages.",
    )
    voicepass_policy_file: str | None = Field(
        None, description="TOML: agents by alias, who may use them, their variables, limits, further issuers."
    )
    voicepass_service_tokens: Annotated[list[SecretStr], NoDecode] = Field(
        [],
        description="Bearer tokens of your backends, by comma: token or name:token; a token has 32 characters or more.",
    )
    voicepass_trusted_proxies: Annotated[list[IPvAnyNetwork], NoDecode] = Field(
        [],
        description="Addresses or networks of proxies whose X-Forwarded-For and X-Request-ID are believed, by comma.",
    )
    voicepass_database_url: str = Field(
        "sqlite:///voicepass.db",
        description="sqlite:///file, sqlite:////absolute/file, sqlite:// for memory, or postgresql://user:password@host/name.",
        repr=False,  # it may hold a password
    )
    voicepass_deadline_seconds: Annotated[float, Field(ge=_MIN_DEADLINE_SECONDS, le=_MAX_DEADLINE_SECONDS)] = Field(
        4.0, description="How long one request may wait for ElevenLabs, in all."
    )
    voicepass_max_calls: Annotated[int, Field(ge=1, le=_MAX_CALLS)] = Field(
        512, description="Calls to ElevenLabs at once; as many more wait their turn, and what is beyond is refused."
    )
    voicepass_warm_passes: Annotated[int, Field(ge=0, le=_MAX_WARM_PASSES)] = Field(
        0, description="Signed URLs held ready for each agent, so that users need not wait; 0: none."
    )
    voicepass_drain_seconds: Annotated[float, Field(ge=0, le=_MAX_DRAIN_SECONDS)] = Field(
        0.0, description="How long SIGTERM lets it serve on while /readyz says 503; behind a balancer, give 10."
    )
    voicepass_reconcile_seconds: Annotated[int, Field(ge=0, le=_MAX_RECONCILE_SECONDS)] = Field(
        60, description="Seconds between rounds that settle what no webhook told; needs convai_read; 0: no rounds."
    )
    voicepass_retention_days: Annotated[int, Field(ge=31, le=3660)] = Field(
        400, description="Days that the ledger keeps a row, 31 at least."
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
            if not claim:
                raise ValueError("must read variable=claim, separated by commas")
            checked_variable_name(variable)
        if len(variables) != len(pairs):
            raise ValueError("names a variable twice")
        return variables

    @field_validator(
        "voicepass_allowed_origins", "voicepass_service_tokens", "voicepass_trusted_proxies", mode="before"
    )
    @classmethod
    def _parse_list(cls, value: object) -> object:
        return _listed(value) if isinstance(value, str) else value

    @field_validator("voicepass_allowed_origins")
    @classmethod
    def _exact_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            parts = urlsplit(origin)
            bare = f"{parts.scheme}://{parts.netloc}".lower()
            plain = parts.scheme in {"http", "https"} and parts.hostname and not {"*", "@"} & set(origin)
            if not plain or bare != origin or parts.port == {"http": 80, "https": 443}[parts.scheme]:
                raise ValueError("must list exact origins such as https://app.example, without a path; * is refused")
        return origins

    @field_validator(
        "elevenlabs_api_key",
        "elevenlabs_webhook_secret",
        "voicepass_jwt_secret",
        "voicepass_jwt_public_key",
        "voicepass_database_url",
        mode="before",
    )
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
        if key is not None and not all(map(is_header_value, _listed(key.get_secret_value()))):
            raise ValueError("holds a space, a line break or a character that no HTTP header can carry")
        return key

    @field_validator("elevenlabs_webhook_secret")
    @classmethod
    def _webhook_secrets_cannot_be_guessed(cls, secrets: SecretStr | None) -> SecretStr | None:
        if secrets is None:
            return None
        values = _listed(secrets.get_secret_value())
        if not 1 <= len(values) <= 2 or any(  # noqa: PLR2004 - the new one and the old one
            len(value) < _MIN_WEBHOOK_SECRET_CHARACTERS or not is_header_value(value) for value in values
        ):
            raise ValueError("must be the secret that ElevenLabs shows for the webhook, or two, by a comma")
        return secrets

    @field_validator("voicepass_service_tokens")
    @classmethod
    def _tokens_cannot_be_guessed(cls, tokens: list[SecretStr]) -> list[SecretStr]:
        parsed = [ServiceToken.parse(token.get_secret_value()) for token in tokens]
        if any(len(entry.token) < MIN_SECRET_BYTES or not is_header_value(entry.token) for entry in parsed):
            raise ValueError(f"must be {MIN_SECRET_BYTES} plain characters or more; make one: openssl rand -base64 48")
        if not all(_TOKEN_NAME.fullmatch(entry.name) for entry in parsed):
            raise ValueError("must read name:token; the name has letters, digits, - _ . and at most 64 of them")
        return tokens

    @field_validator("voicepass_session_cookie")
    @classmethod
    def _cookie_has_a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", name, re.ASCII):
            raise ValueError("must be a cookie's name: letters, digits, - _ .")
        return name

    @field_validator("voicepass_jwks_url")
    @classmethod
    def _jwks_url_is_safe(cls, url: str | None) -> str | None:
        if url is not None and not is_safe_url(url):
            raise ValueError("must be https://, or http:// to a loopback address")
        return url

    _bare_agent_id = field_validator("elevenlabs_agent_id")(_unless_none(checked_agent_id))
    _safe_base_url = field_validator("elevenlabs_base_url")(checked_base_url)
    _known_algorithm = field_validator("voicepass_jwt_algorithm")(checked_algorithm)
    _known_issuer = field_validator("voicepass_jwt_issuer")(_unless_none(checked_token_issuer))

    @field_validator("voicepass_database_url")
    @classmethod
    def _database_is_known(cls, url: str) -> str:
        if url == "sqlite://" or url.startswith("sqlite:///"):
            return url
        if not re.fullmatch(r"postgres(ql)?://[!-~]+", url) or re.search(r"%(?![0-9A-Fa-f]{2})", url):
            raise ValueError(
                "must be sqlite:///file, sqlite:// for memory, or postgresql://… with %-escapes for the rest"
            )
        return url

    @classmethod
    def settings_customise_sources(  # noqa: D102 - pydantic-settings' own hook
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - `_env_file` reads it
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings' own mechanism: unused
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _SecretFiles(settings_cls), env_settings, _env_file(settings_cls)

    @property
    def api_keys(self) -> list[str]:
        """The API key, or both while they are rotated."""
        key = self.elevenlabs_api_key
        return _listed(key.get_secret_value()) if key is not None else []

    @property
    def webhook_secrets(self) -> list[str]:
        """The webhook's secret, or both while they are rotated; none where no webhook is set up."""
        secrets = self.elevenlabs_webhook_secret
        return _listed(secrets.get_secret_value()) if secrets is not None else []

    @property
    def service_tokens(self) -> list[ServiceToken]:
        """The tokens of the operator's backends, with their names."""
        return [ServiceToken.parse(token.get_secret_value()) for token in self.voicepass_service_tokens]

    def issuer_problems(self) -> list[str]:
        """Name what keeps the issuer of this environment from being trusted, or test tokens from being made."""
        problems = self._key_problems()
        if self.voicepass_jwt_issuer is None:
            problems.append("VOICEPASS_JWT_ISSUER is not set: give the exact 'iss' of your tokens")
        if self.voicepass_jwt_audience is None:
            problems.append("VOICEPASS_JWT_AUDIENCE is not set: give the 'aud' that your tokens name for this service")
        return problems

    def _key_problems(self) -> list[str]:
        algorithm = self.voicepass_jwt_algorithm
        keys = {
            "VOICEPASS_JWT_SECRET": self.voicepass_jwt_secret,
            "VOICEPASS_JWT_PUBLIC_KEY": self.voicepass_jwt_public_key,
            "VOICEPASS_JWKS_URL": self.voicepass_jwks_url,
        }
        fitting = {"VOICEPASS_JWT_SECRET"} if algorithm in HMAC_ALGORITHMS else keys.keys() - {"VOICEPASS_JWT_SECRET"}
        given = [name for name, value in keys.items() if value is not None]
        if unfit := [name for name in given if name not in fitting]:
            return [f"{unfit[0]} is set, but VOICEPASS_JWT_ALGORITHM is {algorithm}: unset one of the two"]
        if len(given) > 1:
            return [f"{given[0]} and {given[1]} are both set: unset one of them"]
        if not given:
            remedy = "make one with: openssl rand -base64 48"
            if algorithm not in HMAC_ALGORITHMS:
                remedy = "give your provider's key as PEM, or VOICEPASS_JWKS_URL"
            name = "VOICEPASS_JWT_SECRET" if algorithm in HMAC_ALGORITHMS else "VOICEPASS_JWT_PUBLIC_KEY"
            return [f"{name} is not set, so no token could be verified: {remedy}"]
        try:
            self.fixed_key()
        except KeyUnusableError as error:
            return [f"{given[0]} {error}"]
        return []

    def fixed_key(self) -> VerificationKey | None:
        """Build the key that stands in the environment, or None where keys are fetched. Raises KeyUnusableError."""
        if self.voicepass_jwt_secret is not None:
            return key_from_secret(self.voicepass_jwt_secret.get_secret_value(), self.voicepass_jwt_algorithm)
        if self.voicepass_jwt_public_key is not None:
            return key_from_pem(self.voicepass_jwt_public_key.get_secret_value(), self.voicepass_jwt_algorithm)
        return None


class _SecretFiles(PydanticBaseSettingsSource):
    """Reads NAME_FILE for every secret NAME, from the environment or the env file."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # noqa: ANN401, ARG002
        """Unused: __call__ reads all fields at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        surroundings = _surroundings()
        names = [name for name in self.settings_cls.model_fields if name.upper().endswith(_SECRET_SUFFIXES)]
        values = {name: _from_file(name.upper(), surroundings) for name in names}
        return {name: value for name, value in values.items() if value is not None}


def _surroundings() -> Mapping[str, str | None]:
    """Return the environment over the env file, names in lower case."""
    return {**_env_file(Settings).env_vars, **EnvSettingsSource(Settings).env_vars}


def _env_file(settings_cls: type[BaseSettings]) -> DotEnvSettingsSource:
    """Read the file that VOICEPASS_ENV_FILE names, else `.env` in the working directory if it exists."""
    path = os.environ.get(ENV_FILE)
    if path:
        try:
            Path(path).open("rb").close()
        except OSError as error:
            problem = f"{ENV_FILE} names a file that cannot be read ({type(error).__name__})"
            raise SettingsRefusedError([problem]) from None
    return DotEnvSettingsSource(settings_cls, env_file=path or ".env")


def _from_file(name: str, surroundings: Mapping[str, str | None]) -> str | None:
    path = surroundings.get((name + _FILE_SUFFIX).lower())
    if not path:
        return None
    if surroundings.get(name.lower()):
        raise SettingsRefusedError([f"{name} and {name}{_FILE_SUFFIX} are both set: unset one of them"])
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{name}{_FILE_SUFFIX} names a file that cannot be read ({type(error).__name__})"
        raise SettingsRefusedError([problem]) from None


def secret_named(name: str) -> str | None:
    """Return the secret that the policy file calls by `name`: NAME or NAME_FILE, in the environment or the env file."""
    surroundings = _surroundings()
    secret = _from_file(name, surroundings) or surroundings.get(name.lower())
    return secret and secret.removesuffix("\n").removesuffix("\r")


def load_settings() -> Settings:
    """Read the environment and the env file. Raises SettingsRefusedError: a line per unknown or malformed variable."""
    if problems := _unknown_names():
        raise SettingsRefusedError(problems)
    try:
        return Settings()
    except ValidationError as error:
        problems = [
            f"{str(problem['loc'][0]).upper()} {_worded(problem['msg'])}"
            for problem in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise SettingsRefusedError(problems) from None  # the original would print the values


def _unknown_names() -> list[str]:
    """Report the variables with a prefix of ours that are not settings: a protection would silently be off."""
    surroundings = {name.upper(): value or "" for name, value in _surroundings().items()}
    settings = {name.upper() for name in Settings.model_fields}
    settings |= {name + _FILE_SUFFIX for name in settings if name.endswith(_SECRET_SUFFIXES)}
    policy_file = surroundings.get("VOICEPASS_POLICY_FILE")
    secrets = secret_names(policy_file) if policy_file else frozenset()
    known = {ENV_FILE} | settings | secrets | {name + _FILE_SUFFIX for name in secrets} | _OF_SPEECH_PROGRAMS
    unknown = sorted(name for name in surroundings if name.startswith(_PREFIXES) and name not in known)
    nearest = {
        name: get_close_matches(name, settings, n=1, cutoff=0)[0]
        for name in unknown
        if not _is_of_kubernetes(name, surroundings[name])
    }
    return [f"{name} is not a setting: did you mean {close}? If not, unset it" for name, close in nearest.items()]


def _is_of_kubernetes(name: str, value: str) -> bool:
    return bool(_KUBERNETES_NAME.fullmatch(name) or (name.endswith("_PORT") and _KUBERNETES_PORT.fullmatch(value)))


def _listed(value: str) -> list[str]:
    return [entry.strip() for entry in value.split(",") if entry.strip()]


def _worded(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should", "should").replace("Field", "field")
