"""Where a setting's text comes from: the environment, the env file, or a file that NAME_FILE names."""

import os
import re
import string
from base64 import b64encode
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Collection, Mapping
from contextlib import suppress
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Final

from dotenv import dotenv_values

ENV_FILE: Final = "VOICEPASS_ENV_FILE"  # in the environment only: it names the file with the other settings
SECRET_SUFFIXES: Final = ("_SECRET", "_KEY", "_TOKENS", "_DATABASE_URL")  # a database URL may hold a password
_MAY_BE_BYTES: Final = frozenset({"voicepass_jwt_secret", "voicepass_jwt_public_key"})
_AROUND: Final = string.whitespace + "\xa0\u200b\ufeff"
_QUOTES: Final = frozenset({'""', "''", "\u201c\u201d", "\u2018\u2019"})
_ANY_QUOTE: Final = tuple("".join(sorted(_QUOTES)))
_FILE_SUFFIX: Final = "_FILE"
PREFIXES: Final = ("VOICEPASS_", "ELEVENLABS_")
_OF_SPEECH_PROGRAMS: Final = frozenset({"ELEVENLABS_VOICE_ID", "ELEVENLABS_MODEL_ID"})  # they often share our .env
_NAMED_SECRET: Final = re.compile(r"""\b(?:secret_env|api_key_env)["']?\s*=\s*["']+([A-Z0-9_]+)["']""", re.ASCII)
# Kubernetes sets these for a service called voicepass or voicepass-postgres; VOICEPASS_PORT is then tcp://10.0.0.1:8000.
_OF_KUBERNETES: Final = re.compile(r"\b\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_\w+)", re.ASCII)


class SettingsRefusedError(Exception):
    """The configuration cannot be used. `problems` has a line for each: the place and the remedy, never a value."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def read_values(names: Collection[str]) -> dict[str, str]:
    """Return the text of each of these settings that is set."""
    variables = read_variables()
    values = {name: _read_value(name.upper(), variables, may_be_bytes=name in _MAY_BE_BYTES) for name in names}
    return {name: value for name, value in values.items() if value}


def read_variables() -> Mapping[str, str]:
    """Return every variable that is set, by its name in capitals.

    The environment wins over the env file. There, an empty variable unsets the line in the file.
    """
    path = os.environ.get(ENV_FILE)
    subject = f"{ENV_FILE} names a file that" if path else ".env"
    text = read_file(path or ".env", subject) if path or Path(".env").is_file() else ""
    lines = {name.upper(): value for name, value in dotenv_values(stream=StringIO(text)).items()}
    variables = lines | {name.upper(): value for name, value in os.environ.items()}
    return {name: value for name, text in variables.items() if (value := clean_value(text or ""))}


def read_secret(name: str) -> str:
    """Return the secret of a variable that the policy file names, NAME or NAME_FILE, or an empty text."""
    return _read_value(name, read_variables(), may_be_bytes=True)


def clean_value(value: str) -> str:
    """Remove spaces, line breaks and one pair of quotes around a value: `docker --env-file` keeps them."""
    value = value.strip(_AROUND)
    if value[:1] + value[1:][-1:] in _QUOTES:
        value = value[1:-1].strip(_AROUND)
    return value


def _read_value(name: str, variables: Mapping[str, str], *, may_be_bytes: bool) -> str:
    path = variables.get(name + _FILE_SUFFIX)
    value = variables.get(name, "")
    if path and value:
        raise SettingsRefusedError([f"{name} and {name}{_FILE_SUFFIX} are both set: unset one of them"])
    if path:
        value = clean_value(read_file(path, f"{name}{_FILE_SUFFIX} names a file that", may_be_bytes=may_be_bytes))
    if value.startswith(_ANY_QUOTE) or value.endswith(_ANY_QUOTE):
        raise SettingsRefusedError([f"{name} begins or ends with a quote that is not part of a pair: remove it"])
    return value


def read_file(path: str, subject: str, *, may_be_bytes: bool = False) -> str:
    """Return a file's text, or its bytes as `base64:…`. Raises SettingsRefusedError; its sentence begins `subject`."""
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise SettingsRefusedError([f"{subject} cannot be read ({type(error).__name__})"]) from None
    with suppress(UnicodeDecodeError):
        text = data.decode("utf-8-sig")
        if "\0" not in text:
            return text
    is_utf16 = data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or not any(data[::2]) or not any(data[1::2])
    if may_be_bytes and not is_utf16:
        return f"base64:{b64encode(data).decode()}"
    raise SettingsRefusedError([f"{subject} is not UTF-8 text: save it as UTF-8"])


def find_unknown_names(settings: frozenset[str]) -> list[str]:
    """Report variables that have a prefix of the settings but are none: a misspelt name leaves a protection off."""
    variables = read_variables()
    secrets = _list_secret_names(variables.get("VOICEPASS_POLICY_FILE", ""))
    in_files = {name for name in settings if name.endswith(SECRET_SUFFIXES)} | secrets
    known = settings | secrets | {name + _FILE_SUFFIX for name in in_files} | {ENV_FILE} | _OF_SPEECH_PROGRAMS
    return [
        f"{name} is not a setting: did you mean {get_close_matches(name, settings, n=1, cutoff=0)[0]}? If not, unset it"
        for name in sorted(variables)
        if name.startswith(PREFIXES) and name not in known and not _is_of_kubernetes(name, variables[name])
    ]


def _list_secret_names(policy_file: str) -> frozenset[str]:
    """Return the variables that the policy file names as secrets; none if it cannot be read.

    This searches the text, because a file with another mistake still names its secrets.
    """
    try:
        return frozenset(_NAMED_SECRET.findall(Path(policy_file).read_text(encoding="utf-8")))
    except (OSError, ValueError):  # `configure` reports it
        return frozenset()


def _is_of_kubernetes(name: str, value: str) -> bool:
    return bool(_OF_KUBERNETES.fullmatch(name)) or (name.endswith("_PORT") and "://" in value)
