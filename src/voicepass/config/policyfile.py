"""The policy: which agents there are, who may use them, and which issuers' tokens voicepass accepts.

`PolicyFile` is the TOML file's model, and the environment becomes one too. It holds no secret: `secret_env` and
`api_key_env` name the variables, so that the file can be read, reviewed and committed.
"""

import tomllib
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Final, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo, model_validator

from voicepass.config import checks
from voicepass.config.checks import Conditions, Entry
from voicepass.config.environment import SettingsRefusedError, read_file
from voicepass.config.issuers import IssuerEntry
from voicepass.config.limits import LimitsEntry, LimitTables, PlanEntry
from voicepass.model import Agent, Scalar
from voicepass.policy import AgentRules, Rule, Variable, VariableType, clean, is_of

Location = tuple[int | str, ...]
"""The place of a value in a model, such as `("issuers", 0, "audience")`."""


def _parse_default(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, get_args(Scalar)) or clean(value) != value:
        raise ValueError("must be text of at most 200 visible characters, a finite number, true or false")
    if not is_of(info.data.get("type"), value):
        raise ValueError(f"must be a {info.data['type']}, as its type says")
    return value


def _parse_variable(value: object) -> object:
    return {"claim": value} if isinstance(value, str) else value


class VariableEntry(Entry):
    """`shop = "app_metadata.shop"`, or `shop = { claim = "app_metadata.shop", type = "string", default = "none" }`."""

    claim: str = Field(min_length=1)
    type: VariableType | None = None
    default: Annotated[Scalar | None, BeforeValidator(_parse_default)] = None


Selection = Annotated[str, checks.SELECTION]
VariableName = Annotated[str, AfterValidator(checks.check_variable_name)]
Variables = dict[VariableName, Annotated[VariableEntry, BeforeValidator(_parse_variable)]]


class AgentEntry(Entry):
    """`[agents.<alias>]`. Nobody may use an agent until `allow` says who."""

    id: Annotated[str, AfterValidator(checks.check_agent_id)] = Field("", validate_default=True)
    allow: Annotated[list[Conditions], BeforeValidator(checks.parse_allow)] = Field([])
    variables: Variables = Field({})
    base_url: Annotated[str, AfterValidator(checks.check_base_url)] = ""
    api_key_env: Annotated[str, checks.ENVIRONMENT_NAME] = ""
    branch_id: Selection | None = None
    version_id: Selection | None = None
    environment: Selection | None = None

    @model_validator(mode="after")
    def _check_workspace_has_key(self) -> Self:
        if bool(self.base_url) != bool(self.api_key_env):
            raise ValueError("needs base_url and api_key_env together: a residency region has keys of its own")
        return self

    def build(self, alias: str) -> AgentRules:
        """Return the agent with its rules."""
        selection = self.model_dump(include={"branch_id", "version_id", "environment"})
        return AgentRules(
            agent=Agent(alias=alias, agent_id=self.id, base_url=self.base_url, **selection),
            allow=tuple(map(Rule, self.allow)),
            variables={name: Variable(**entry.model_dump()) for name, entry in self.variables.items()},
        )


class PolicyFile(Entry):
    """The whole policy."""

    agents: dict[Annotated[str, checks.ALIAS], AgentEntry] = Field({})
    issuers: list[IssuerEntry] = Field([])
    limits: LimitTables = LimitTables()


def read_policy_file(path: str, *, plain_http_hosts: Collection[str] = ()) -> PolicyFile:
    """Read and check the file, but no secret that it names. Raises SettingsRefusedError."""
    subject = f"{path}:"
    return parse_policy(load_document(path, subject), subject=subject, places={}, plain_http_hosts=plain_http_hosts)


def load_document(path: str, subject: str) -> dict[str, Any]:
    """Load the file's tables. Raises SettingsRefusedError; its lines begin with `subject`."""
    try:
        return tomllib.loads(read_file(path, subject))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError; an endless number; brackets nested a thousand deep
        raise SettingsRefusedError([f"{subject} is not TOML: {error}"]) from None


def parse_policy(
    document: Mapping[str, Any], *, subject: str, places: Mapping[Location, str], plain_http_hosts: Collection[str]
) -> PolicyFile:
    """Parse and check a whole policy. Raises SettingsRefusedError; its lines repeat no value.

    A line begins with the variable that `places` has for the wrong value or its table, or else with `subject`.
    """

    def write_place(location: Location) -> str:
        variable = places.get(location[:3]) or places.get(location[:2])
        return variable or f"{subject} {'.'.join(map(str, location))}:"

    try:
        return PolicyFile.model_validate(document, context=plain_http_hosts)
    except ValidationError as error:
        raise SettingsRefusedError(list_problems(error, write_place)) from None


_WORDS: Final = {
    "missing": "is missing",
    "string_pattern_mismatch": "must be 1 to 64 lower-case letters, digits, - and _",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "list_type": "must be an array of tables, each [[so]]",
}
# The table that has its keys at this depth below the first word of its place. All others are of the whole file.
_TABLES: Final[Mapping[tuple[int | str, int], type[Entry]]] = {
    ("agents", 2): AgentEntry,
    ("agents", 4): VariableEntry,
    ("issuers", 2): IssuerEntry,
    ("limits", 1): LimitTables,
    ("limits", 2): LimitsEntry,
    ("limits", 3): PlanEntry,
}


def list_problems(error: ValidationError, write_place: Callable[[Location], str]) -> list[str]:
    """Write pydantic's errors as lines for the operator. `write_place` says where the person wrote a value."""
    problems = []
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        # Drop pydantic's mark for a wrong key, and the key itself: it may hold a line break.
        location = problem["loc"][:-2] if problem["loc"][-1:] == ("[key]",) else problem["loc"]
        message = _WORDS.get(problem["type"]) or problem["msg"].removeprefix("Value error, ").replace("Input ", "")
        if problem["type"] == "extra_forbidden":
            table = _TABLES.get((location[0], len(location) - 1), PolicyFile)
            message = f"there is no such key; allowed here: {', '.join(table.model_fields)}"
        problems.append(f"{write_place(location)} {message}")
    return list(dict.fromkeys(problems))
