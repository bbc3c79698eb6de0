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

from voicepass.addresses import is_safe_url
from voicepass.keys import ALGORITHMS, HMAC_ALGORITHMS
from voicepass.model import Scalar
from voicepass.policy import RESERVED_PREFIXES, Rule, Variable, VariableType, clean

ALIAS: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.ASCII)
AGENT_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
VARIABLE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)
ENVIRONMENT_NAME: Final = re.compile(r"[A-Z][A-Z0-9_]{0,127}", re.ASCII)
HEADER_VALUE: Final = re.compile(r"[\x21-\x7e]+", re.ASCII)
OWN_VARIABLES: Final = frozenset({"user_id", "user_name"})

EVERYONE: Final = "everyone"


class PolicyFileError(Exception):
    """The file cannot be used. `problems` has a line for each mistake: the key, and what is allowed there."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def is_header_value(secret: str) -> bool:
    """Whether an HTTP header can carry this secret: printable ASCII without spaces."""
    return HEADER_VALUE.fullmatch(secret) is not None


def checked_agent_id(agent_id: str) -> str:
    """Return a bare agent id, or raise ValueError: a whole query string is often pasted in its place."""
    if not AGENT_ID.fullmatch(agent_id):
        raise ValueError("must be the bare agent id, such as agent_…, without '&' or '='")
    if agent_id.startswith("conv_"):
        raise ValueError("is a conversation's id; an agent's looks like agent_…")
    return agent_id


def checked_variable_name(name: str) -> str:
    """Return the name of a dynamic variable that may be filled from claims, or raise ValueError."""
    if not VARIABLE_NAME.fullmatch(name):
        raise ValueError("must be named with letters, digits and _")
    if name.startswith(RESERVED_PREFIXES):
        raise ValueError("may not define system__ or secret__ variables: the browser would see or forge them")
    if name in OWN_VARIABLES:
        raise ValueError("may not define user_id or user_name: the user's id and name claims do")
    return name


def checked_base_url(url: str) -> str:
    """Return a base URL without its last slash, or raise ValueError where the API key may not travel there."""
    if not is_safe_url(url) or "?" in url:
        raise ValueError("must be https://, or http:// to a loopback address, without query or user")
    return url.rstrip("/")


def checked_token_issuer(token_issuer: str) -> str:
    """Return an issuer's name, or raise ValueError: over plain http:// anyone could answer in its name."""
    if not token_issuer.strip():
        raise ValueError("must be the exact 'iss' of the tokens")
    if token_issuer.lower().startswith("http:") and not is_safe_url(token_issuer):
        raise ValueError("must not be an http:// address: anyone on the way could publish keys in its name")
    return token_issuer


def checked_algorithm(algorithm: str) -> str:
    """Return one of the algorithms that tokens may be signed with, or raise ValueError."""
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"must be one of {', '.join(sorted(ALGORITHMS))} (python-jose implements no PS*, EdDSA or ES256K)"
        )
    return algorithm


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


class PolicyFile(_Entry):
    """The whole file."""

    agents: dict[str, AgentEntry] = {}
    issuers: list[IssuerEntry] = []

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
        case _:
            return VariableEntry
