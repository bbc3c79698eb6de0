"""Writes the documents' texts about the settings from Settings. To update them, run this in the project's folder:

.venv/bin/python -m tests.config.settings_reference
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

from annotated_types import Ge, Le
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from voicepass.config.environment import SECRET_SUFFIXES
from voicepass.config.settings import Settings

ROOT = Path(__file__).parents[2]
TO_FILL_IN = (
    "ELEVENLABS_API_KEY",
    "ELEVENLABS_AGENT_ID",
    "VOICEPASS_JWT_SECRET",
    "VOICEPASS_JWT_ISSUER",
    "VOICEPASS_JWT_AUDIENCE",
)
# Each section begins with this variable and holds the variables that follow it in Settings.
SECTIONS = {
    "elevenlabs_api_key": "ElevenLabs",
    "voicepass_jwt_algorithm": "Tokens",
    "voicepass_user_id_claim": "Variables for the agent",
    "voicepass_allowed_origins": "Access",
    "voicepass_database_url": "Ledger and calls to ElevenLabs",
    "voicepass_docs": "Operation",
}
GENERATED = re.compile(r"(?<=<!-- made from Settings -->\n).*(?=<!-- by hand again -->)", re.DOTALL)


def write_example(text: str) -> str:
    """Return `.env.example` with the first paragraph of `text`."""
    head = text.partition("\n\n")[0]
    entries = (
        f"# {field.description}\n{'' if name in TO_FILL_IN else '# '}{name}={_default(field)}"
        for name, field in _fields()
    )
    return "\n\n".join([head, *entries]) + "\n"


def write_reference(text: str) -> str:
    """Return `docs/configuration.md` with the parts of `text` outside the marks."""
    return GENERATED.sub(lambda _: "".join(_sections()), text)


WRITERS = {".env.example": write_example, "docs/configuration.md": write_reference}


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    return ((name.upper(), field) for name, field in Settings.model_fields.items())


def _default(field: FieldInfo) -> str:
    value = field.default
    return "" if value in (None, {}, []) else str(value).lower() if isinstance(value, bool) else str(value)


def _sections() -> Iterator[str]:
    for name, field in _fields():
        if name.lower() in SECTIONS:
            yield f"\n## {SECTIONS[name.lower()]}\n\n| variable | default | must be | meaning |\n|---|---|---|---|\n"
        file = f" or `{name}_FILE`" if name.endswith(SECRET_SUFFIXES) else ""
        default = _default(field) and f"`{_default(field)}`"
        yield f"| `{name}`{file} | {default} | {_must_be(field)} | {field.description} |\n"
    yield "\n"


def _must_be(field: FieldInfo) -> str:
    kinds = [field.annotation, *get_args(field.annotation)]
    least = next((bound.ge for bound in field.metadata if isinstance(bound, Ge)), None)
    most = next((bound.le for bound in field.metadata if isinstance(bound, Le)), None)
    if get_origin(field.annotation) is Literal:
        return " or ".join(f"`{word}`" for word in get_args(field.annotation))
    if bool in kinds:
        return "`true` or `false`"
    if least is not None or most is not None:
        return f"{least:.10g} to {most:.10g}"
    if get_origin(field.annotation) is list:
        return "comma-separated"
    if get_origin(field.annotation) is dict:
        return "comma-separated pairs"
    secret = "public key" if field is Settings.model_fields["voicepass_jwt_public_key"] else "secret"
    return secret if SecretStr.__name__ in str(field.annotation) else ""


if __name__ == "__main__":
    for name, write in WRITERS.items():
        path = ROOT / name
        path.write_text(write(path.read_text()))
