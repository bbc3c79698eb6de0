"""The policy file: TOML that says which agents there are, who may use them, and whose tokens are believed.

Its errors name the key and what is allowed there. Values that are secret stand in the environment; the file names the
variable (`secret_env`, `api_key_env`), so that it can be read, reviewed and committed.
"""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Final, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from voicepass.config.checks import (
    checked_agent_id,
    checked_algorithm,
    checked_base_url,
    checked_token_issuer,
    checked_variable_name,
)
from voicepass.identity.keys import HMAC_ALGORITHMS
from voicepass.model import Counted, Limit, Scalar, Scope
from voicepass.outbound import is_safe_url
from voicepass.policy import Rule, Variable, VariableType, clean

ALIAS: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.ASCII)
ENVIRONMENT_NAME: Final = re.compile(r"[A-Z][A-Z0-9_]{0,127}", re.ASCII)
NAMED_SECRET: Final = re.compile(r"""\b(?:secret_env|api_key_env)["']?\s*=\s*["']+([A-Z0-9_]+)["']""", re.ASCII)

EVERYONE: Final = "everyone"
OFF: Final = "off"
DAY_SECONDS: Final = 24 * 60 * 60
MAX_AMOUNT: Final = 10**9


class PolicyFileError(Exception):
    """The file cannot be used. `problems` has a line for each mistake: the key, and what is allowed there."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def _environment_name(name: str) -> str:
    # The secret itself is easily pasted here; the messages that repeat the name would then repeat the secret.
    if not ENVIRONMENT_NAME.fullmatch(name):
        raise ValueError("must be the name of an environment variable, in capitals; the secret stands there, not here")
    return name


def _default(value: object) -> object:
    if not isinstance(value, get_args(Scalar)) or clean(value) != value:
        raise ValueError("must be text of at most 200 visible characters, a finite number, true or false")
    return value


def _scalars(value: object) -> object:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(entry, get_args(Scalar)) for entry in values):
        raise ValueError("must be text, a number, true or false, or a list of these")
    return tuple(values)


def _allow(value: object) -> object:
    if value == EVERYONE:
        return [{}]
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) and entry for entry in value):
        raise ValueError(f'must be "{EVERYONE}", or tables of conditions: [{{ role = ["seller", "admin"] }}]')
    return value


def _variable(value: object) -> object:
    return {"claim": value} if isinstance(value, str) else value


EnvironmentName = Annotated[str, AfterValidator(_environment_name)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class VariableEntry(_Entry):
    """`shop = "app_metadata.shop"`, or `shop = { claim = "app_metadata.shop", type = "string", default = "none" }`."""

    claim: str = Field(min_length=1)
    type: VariableType | None = None
    default: Annotated[Scalar | None, BeforeValidator(_default)] = None

    @model_validator(mode="after")
    def _default_has_the_type(self) -> Self:
        kinds = {bool: "boolean", str: "string", int: "number", float: "number"}
        if self.type and self.default is not None and kinds[type(self.default)] != self.type:
            raise ValueError(f"has a default that is no {self.type}")
        return self

    def variable(self) -> Variable:
        """Return the rule that this entry states."""
        return Variable(claim=self.claim, type=self.type, default=self.default)


Conditions = dict[str, Annotated[tuple[Scalar, ...], BeforeValidator(_scalars)]]


class AgentEntry(_Entry):
    """`[agents.<alias>]`. Nobody may use an agent until `allow` says who."""

    id: str
    allow: Annotated[list[Conditions], BeforeValidator(_allow)] = []
    variables: dict[str, Annotated[VariableEntry, BeforeValidator(_variable)]] = {}
    base_url: str | None = None
    api_key_env: EnvironmentName | None = None

    _bare_id = field_validator("id")(checked_agent_id)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return whom `allow` names, as rules."""
        return tuple(Rule(conditions) for conditions in self.allow)

    @field_validator("base_url")
    @classmethod
    def _safe_base_url(cls, url: str | None) -> str | None:
        return url if url is None else checked_base_url(url)

    @field_validator("variables")
    @classmethod
    def _named_well(cls, variables: dict[str, VariableEntry]) -> dict[str, VariableEntry]:
        for name in variables:
            checked_variable_name(name)
        return variables

    @model_validator(mode="after")
    def _own_workspace_has_own_key(self) -> Self:
        if (self.base_url is None) != (self.api_key_env is None):
            raise ValueError("needs base_url and api_key_env together: a residency region has keys of its own")
        return self


class IssuerEntry(_Entry):
    """`[[issuers]]`: whose tokens are believed, with the one algorithm and the keys of that issuer alone."""

    issuer: str
    algorithm: str
    secret_env: EnvironmentName | None = None
    public_key: str | None = None
    jwks_url: str | None = None
    audience: str | None = None
    required_claims: Conditions = {}
    user_id_claim: str = "sub"
    user_name_claim: str = "name"

    _known_issuer = field_validator("issuer")(checked_token_issuer)
    _known_algorithm = field_validator("algorithm")(checked_algorithm)

    @field_validator("jwks_url")
    @classmethod
    def _safe_jwks_url(cls, url: str | None) -> str | None:
        if url is not None and not is_safe_url(url):
            raise ValueError("must be https://, or http:// to a loopback address")
        return url

    @model_validator(mode="after")
    def _one_kind_of_key_and_one_kind_of_addressee(self) -> Self:
        given = [name for name in ("secret_env", "public_key", "jwks_url") if getattr(self, name) is not None]
        if self.algorithm in HMAC_ALGORITHMS and given != ["secret_env"]:
            raise ValueError(f"needs secret_env, and no other key, for {self.algorithm}")
        if self.algorithm not in HMAC_ALGORITHMS and given not in (["public_key"], ["jwks_url"]):
            raise ValueError(f"needs either jwks_url or public_key for {self.algorithm}")
        if self.audience is None and not self.required_claims:
            raise ValueError('needs audience, or required_claims such as { azp = ["https://app.example"] }')
        return self


def _amount(value: object) -> object:
    if value == OFF:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_AMOUNT:
        raise ValueError(f'must be a whole number, or "{OFF}"')
    return value


Amount = Annotated[int | None, BeforeValidator(_amount)]


class LimitsEntry(_Entry):
    """`[limits.agent]` or `[limits.all]`: how much of what; off until it is set. Windows roll; a month is 30 days."""

    passes_per_minute: Amount = None
    passes_per_day: Amount = None
    open_conversations: Amount = None
    minutes_per_day: Amount = None
    minutes_per_month: Amount = None

    def limits(self, scope: Scope) -> tuple[Limit, ...]:
        """Return the questions to ask the ledger."""
        questions = (
            ("passes_per_minute", Counted.REQUESTS, 60, 1),
            ("passes_per_day", Counted.PASSES, DAY_SECONDS, 1),
            ("open_conversations", Counted.CONVERSATIONS, DAY_SECONDS, 1),
            ("minutes_per_day", Counted.SECONDS, DAY_SECONDS, 60),
            ("minutes_per_month", Counted.SECONDS, 30 * DAY_SECONDS, 60),
        )
        return tuple(
            Limit(
                name=f"{scope.value}_{name}",
                scope=scope,
                counted=counted,
                most=getattr(self, name) * unit,
                window_seconds=seconds,
            )
            for name, counted, seconds, unit in questions
            if getattr(self, name) is not None
        )


class UserLimitsEntry(LimitsEntry):
    """`[limits.user]`: on from the start, for a stolen token or a loop in a frontend costs money."""

    passes_per_minute: Amount = 10
    passes_per_day: Amount = 200
    open_conversations: Amount = 3
    minutes_per_day: Amount = 60
    minutes_per_month: Amount = 600


class LimitTables(_Entry):
    """`[limits]`. `conversation_minutes` is set aside for each pass until it is known what it used."""

    conversation_minutes: int = Field(default=10, ge=1, le=24 * 60)
    user: UserLimitsEntry = UserLimitsEntry()
    agent: LimitsEntry = LimitsEntry()
    all: LimitsEntry = LimitsEntry()

    def limits(self) -> tuple[Limit, ...]:
        """Return every limit that is on."""
        return (*self.user.limits(Scope.USER), *self.agent.limits(Scope.AGENT), *self.all.limits(Scope.ALL))


class PolicyFile(_Entry):
    """The whole file."""

    agents: dict[str, AgentEntry] = {}
    issuers: list[IssuerEntry] = []
    limits: LimitTables = LimitTables()

    @field_validator("agents")
    @classmethod
    def _aliases(cls, agents: dict[str, AgentEntry]) -> dict[str, AgentEntry]:
        for alias in agents:
            if not ALIAS.fullmatch(alias):
                raise ValueError("must have aliases of lower-case letters, digits, - and _")
        return agents


def read_policy_file(path: str) -> PolicyFile:
    """Read and check the file. Raises PolicyFileError; its lines never repeat a value of the file."""
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyFileError([f"cannot be read ({type(error).__name__})"]) from None
    except UnicodeDecodeError:
        raise PolicyFileError(["is not TOML: it must be UTF-8"]) from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError; an endless number; brackets nested a thousand deep
        raise PolicyFileError([f"is not TOML: {error}"]) from None
    try:
        return PolicyFile.model_validate(document)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        raise PolicyFileError(
            [_worded(problem["loc"], problem["type"], problem["msg"]) for problem in problems]
        ) from None


def secret_names(path: str) -> frozenset[str]:
    """Return the variables that the file names as secrets; none if it cannot be read.

    This searches the text, because a file with another mistake still names its secrets.
    """
    try:
        return frozenset(NAMED_SECRET.findall(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError):  # `read_policy_file` reports it
        return frozenset()


_WORDS: Final = {
    "missing": "is missing",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "list_type": "must be an array of tables, each [[so]]",
}


def _worded(location: tuple[int | str, ...], kind: str, message: str) -> str:
    key = ".".join(str(step) for step in location)
    if kind == "extra_forbidden":
        return f"{key}: there is no such key; allowed here: {', '.join(_table_at(location[:-1]).model_fields)}"
    return f"{key}: {_WORDS.get(kind) or message.removeprefix('Value error, ').replace('Input should', 'should')}"


def _table_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    match location:
        case ():
            return PolicyFile
        case ("issuers", _):
            return IssuerEntry
        case ("agents", _):
            return AgentEntry
        case ("limits",):
            return LimitTables
        case ("limits", _):
            return LimitsEntry
        case _:
            return VariableEntry
