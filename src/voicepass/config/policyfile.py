"""The policy: which agents there are, who may use them, and which issuers' tokens voicepass accepts.

`PolicyFile` is the TOML file's model, and the environment becomes one too. It holds no secret: `secret_env` and
`api_key_env` name the variables, so that the file can be read, reviewed and committed.
"""

import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Self, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from voicepass.config import checks, issuerchecks
from voicepass.config.checks import Surroundings
from voicepass.config.limits import Conditions, Entry, LimitsEntry, LimitTables, PlanEntry
from voicepass.model import Agent, Scalar
from voicepass.policy import Rule, Variable, VariableType, clean, is_of

NAMED_SECRET: Final = re.compile(r"""\b(?:secret_env|api_key_env)["']?\s*=\s*["']+([A-Z0-9_]+)["']""", re.ASCII)

Location = tuple[int | str, ...]
"""The place of a value in a model, such as `("issuers", 0, "audience")`."""


class PolicyFileError(Exception):
    """The policy cannot be used. `problems` has a line for each mistake: its place, and what is allowed there."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def _parse_default(value: object) -> object:
    if not isinstance(value, get_args(Scalar)) or clean(value) != value:
        raise ValueError("must be text of at most 200 visible characters, a finite number, true or false")
    return value


def _parse_variable(value: object) -> object:
    return {"claim": value} if isinstance(value, str) else value


class VariableEntry(Entry):
    """`shop = "app_metadata.shop"`, or `shop = { claim = "app_metadata.shop", type = "string", default = "none" }`."""

    claim: str = Field(min_length=1)
    type: VariableType | None = None
    default: Annotated[Scalar | None, BeforeValidator(_parse_default)] = None

    @model_validator(mode="after")
    def _check_type_of_default(self) -> Self:
        if self.default is not None and not is_of(self.type, self.default):
            raise ValueError(f"has a default that is no {self.type}")
        return self

    def variable(self) -> Variable:
        """Return the rule that this entry states."""
        return Variable(claim=self.claim, type=self.type, default=self.default)


EnvironmentName = Annotated[str, AfterValidator(checks.check_environment_name)]
Selection = Annotated[str, AfterValidator(checks.check_selection)]
VariableName = Annotated[str, AfterValidator(checks.check_variable_name)]
Variables = dict[VariableName, Annotated[VariableEntry, BeforeValidator(_parse_variable)]]


class AgentEntry(Entry):
    """`[agents.<alias>]`. Nobody may use an agent until `allow` says who."""

    id: Annotated[str, AfterValidator(checks.check_agent_id)] = Field("", validate_default=True)
    allow: Annotated[list[Conditions], BeforeValidator(checks.parse_allow)] = Field([])
    variables: Variables = Field({})
    base_url: Annotated[str, AfterValidator(checks.check_base_url)] | None = None
    api_key_env: Annotated[EnvironmentName, AfterValidator(checks.check_api_keys)] | None = None
    branch_id: Selection | None = None
    version_id: Selection | None = None
    environment: Selection | None = None

    def build_agent(self, alias: str) -> Agent:
        """Return the agent that this entry describes."""
        selection = self.model_dump(include={"branch_id", "version_id", "environment"})
        return Agent(alias=alias, agent_id=self.id, base_url=self.base_url or "", **selection)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the users that `allow` names, as rules."""
        return tuple(Rule(conditions) for conditions in self.allow)

    @model_validator(mode="after")
    def _check_workspace_has_key(self) -> Self:
        if (self.base_url is None) != (self.api_key_env is None):
            raise ValueError("needs base_url and api_key_env together: a residency region has keys of its own")
        return self


Content = TypeVar("Content")
Key = Annotated[Content | None, AfterValidator(issuerchecks.check_key), Field(validate_default=True)]


class IssuerEntry(Entry):
    """`[[issuers]]`: an issuer whose tokens voicepass accepts, with one algorithm and the keys for it."""

    issuer: Annotated[str, AfterValidator(issuerchecks.check_token_issuer)] = Field("", validate_default=True)
    tenants: Annotated[tuple[str, ...], AfterValidator(issuerchecks.check_tenants)] = Field((), validate_default=True)
    algorithm: Annotated[str, AfterValidator(issuerchecks.check_algorithm)] = Field("", validate_default=True)
    # Each of these is checked with those above it, also if it is absent.
    secret_env: Key[Annotated[EnvironmentName, AfterValidator(issuerchecks.check_secret)]] = None
    jwks_url: Key[Annotated[str, AfterValidator(issuerchecks.check_jwks_url)]] = None
    public_key: Key[Annotated[str, AfterValidator(issuerchecks.check_public_key)]] = None
    required_claims: Conditions = Field({})
    audience: Annotated[str | None, AfterValidator(issuerchecks.check_audience)] = Field(None, validate_default=True)
    user_id_claim: str = "sub"
    user_name_claim: str = "name"

    @property
    def token_issuers(self) -> dict[str, Conditions]:
        """Return every exact `iss`, with the claims that its tokens must hold."""
        if not self.tenants:
            return {self.issuer: self.required_claims}
        return {
            self.issuer.replace(checks.TENANT, tenant): {**self.required_claims, "tid": (tenant,)}
            for tenant in self.tenants
        }


class PolicyFile(Entry):
    """The whole policy."""

    agents: dict[Annotated[str, AfterValidator(checks.check_alias)], AgentEntry] = Field({})
    issuers: list[IssuerEntry] = Field([])
    limits: LimitTables = LimitTables()


def write_dotted(location: Location) -> str:
    """Write a place in the file with dots, as messages show it."""
    return f"{'.'.join(map(str, location))}:"


def read_policy_file(path: str, *, plain_http_hosts: Collection[str] = ()) -> PolicyFile:
    """Read and check the file, but no secret that it names. Raises PolicyFileError."""
    return parse_policy(load_document(path), surroundings=Surroundings(plain_http_hosts=plain_http_hosts))


def load_document(path: str) -> dict[str, Any]:
    """Load the file's tables. Raises PolicyFileError."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise PolicyFileError([f"cannot be read ({type(error).__name__})"]) from None
    except UnicodeDecodeError:
        raise PolicyFileError(["is not TOML: it must be UTF-8"]) from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError; an endless number; brackets nested a thousand deep
        raise PolicyFileError([f"is not TOML: {error}"]) from None


def parse_policy(
    document: Mapping[str, Any],
    *,
    surroundings: Surroundings | None = None,
    write_place: Callable[[Location], str] = write_dotted,
) -> PolicyFile:
    """Parse and check a whole policy. Raises PolicyFileError; its lines repeat no value, and no secret.

    `write_place` says where the person wrote the value at a location of the model.
    """
    try:
        return PolicyFile.model_validate(document, context=surroundings)
    except ValidationError as error:
        raise PolicyFileError(list_problems(error, write_place)) from None


def list_secret_names(path: str) -> frozenset[str]:
    """Return the variables that the file names as secrets; none if it cannot be read.

    This searches the text, because a file with another mistake still names its secrets.
    """
    try:
        return frozenset(NAMED_SECRET.findall(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError):  # `read_policy_file` reports it
        return frozenset()


_WORDS: Final = {
    "missing": "is missing",
    "string_pattern_mismatch": "must be 1 to 64 lower-case letters, digits, - and _",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "list_type": "must be an array of tables, each [[so]]",
}


def list_problems(error: ValidationError, write_place: Callable[[Location], str]) -> list[str]:
    """Write pydantic's errors as lines for the operator. `write_place` says where the person wrote a value."""
    problems = []
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        # Drop pydantic's mark for a wrong key, and the key itself: it may hold a line break.
        location = problem["loc"][:-2] if problem["loc"][-1:] == ("[key]",) else problem["loc"]
        message = _WORDS.get(problem["type"]) or problem["msg"].removeprefix("Value error, ").replace("Input ", "")
        if problem["type"] == "extra_forbidden":
            message = f"there is no such key; allowed here: {', '.join(_find_table(location[:-1]).model_fields)}"
        problems.append(message if problem["type"] == "secret" else f"{write_place(location)} {message}")
    return list(dict.fromkeys(problems))


def _find_table(location: Location) -> type[BaseModel]:
    match location:
        case ():
            return PolicyFile
        case ("issuers", _):
            return IssuerEntry
        case ("agents", _):
            return AgentEntry
        case ("limits", "plan", *_):
            return PlanEntry
        case ("limits", *rest):
            return LimitsEntry if rest else LimitTables
        case _:
            return VariableEntry
