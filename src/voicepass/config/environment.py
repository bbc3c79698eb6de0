"""Where a setting's text comes from: the environment, the env file, or a file that NAME_FILE names."""

import os
import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Final

from dotenv import dotenv_values

from voicepass.config.policyfile import list_secret_names

ENV_FILE: Final = "VOICEPASS_ENV_FILE"  # in the environment only: it names the file with the other settings
SECRET_SUFFIXES: Final = ("_SECRET", "_KEY", "_TOKENS", "_DATABASE_URL")  # a database URL may hold a password
_FILE_SUFFIX: Final = "_FILE"
_PREFIXES: Final = ("VOICEPASS_", "ELEVENLABS_")
_OF_SPEECH_PROGRAMS: Final = frozenset({"ELEVENLABS_VOICE_ID", "ELEVENLABS_MODEL_ID"})  # they often share our .env
# Kubernetes sets these for a service called voicepass or voicepass-postgres; VOICEPASS_PORT is then tcp://10.0.0.1:8000.
_KUBERNETES_NAME: Final = re.compile(
    r"\b\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)", re.ASCII
)
_KUBERNETES_PORT: Final = re.compile(r"(tcp|udp|sctp)://.+", re.ASCII)


class SettingsRefusedError(Exception):
    """The service does not start. `problems` has a line for each: the variable's name and the remedy, never a value."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def read_values(names: Collection[str]) -> dict[str, str]:
    """Return the text of each of these settings that is set."""
    variables = read_variables()
    values = {name: _read_value(name.upper(), variables) for name in names}
    return {name: value for name, value in values.items() if value}


def read_variables() -> Mapping[str, str]:
    """Return every variable by its name in capitals. The environment wins over the env file."""
    every = {**_load_env_file(), **os.environ}
    return {name.upper(): value for name, value in every.items() if value}


def _load_env_file() -> Mapping[str, str | None]:
    """Read the file that VOICEPASS_ENV_FILE names, else `.env` in the working directory if it exists."""
    named = os.environ.get(ENV_FILE)
    if not named and not Path(".env").is_file():
        return {}
    try:
        text = Path(named or ".env").read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsRefusedError(
            [f"{ENV_FILE if named else '.env'} names a file that cannot be read ({type(error).__name__})"]
        ) from None
    return dotenv_values(stream=StringIO(text))


def read_secret(name: str) -> str | None:
    """Return the secret of a variable that the policy file names: NAME or NAME_FILE."""
    return _read_value(name, read_variables())


def _read_value(name: str, variables: Mapping[str, str]) -> str:
    path = variables.get(name + _FILE_SUFFIX)
    if not path:
        return _strip_line_break(variables.get(name, ""))
    if variables.get(name):
        raise SettingsRefusedError([f"{name} and {name}{_FILE_SUFFIX} are both set: unset one of them"])
    try:
        return _strip_line_break(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{name}{_FILE_SUFFIX} names a file that cannot be read ({type(error).__name__})"
        raise SettingsRefusedError([problem]) from None


def _strip_line_break(value: str) -> str:
    # Editors and `echo` end a file with one; in a header it would be fatal, in an HS secret another secret.
    return value.removesuffix("\n").removesuffix("\r")


def find_unknown_names(settings: frozenset[str]) -> list[str]:
    """Report the variables with a prefix of ours that are no settings: a misspelt name leaves a protection off."""
    variables = read_variables()
    policy_file = variables.get("VOICEPASS_POLICY_FILE")
    secrets = list_secret_names(policy_file) if policy_file else frozenset()
    in_files = {name for name in settings if name.endswith(SECRET_SUFFIXES)} | secrets
    known = settings | secrets | {name + _FILE_SUFFIX for name in in_files} | {ENV_FILE} | _OF_SPEECH_PROGRAMS
    candidates = settings | {name + _FILE_SUFFIX for name in in_files - secrets}
    return [
        f"{name} is not a setting: did you mean {get_close_matches(name, candidates, n=1, cutoff=0)[0]}?"
        " If not, unset it"
        for name in sorted(variables)
        if name.startswith(_PREFIXES) and name not in known and not _is_of_kubernetes(name, variables[name])
    ]


def _is_of_kubernetes(name: str, value: str) -> bool:
    return bool(_KUBERNETES_NAME.fullmatch(name) or (name.endswith("_PORT") and _KUBERNETES_PORT.fullmatch(value)))
