"""The rules for single values, each in one place: the models' validators. Each returns its value, or raises ValueError.

A message says what is wrong and what to do. It begins with a verb: the place of the value comes first.
"""

import re
from ipaddress import ip_address
from typing import Annotated, Final, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, SecretStr, ValidationInfo
from yarl import URL

from voicepass.identity.credentials import ServiceToken
from voicepass.identity.keys import MIN_SECRET_BYTES
from voicepass.model import Scalar
from voicepass.outbound import is_safe_url
from voicepass.policy import RESERVED_PREFIXES

MIN_WEBHOOK_SECRET_CHARACTERS: Final = 16  # ElevenLabs makes longer ones; a shorter text could be guessed
# Browsers send `null` as the origin of their pages, or none at all.
SCHEMES_WITHOUT_ORIGIN: Final = frozenset({"file", "ftp", "data", "blob", "about", "javascript", "ws", "wss"})
EXACT_ORIGIN: Final = (
    "must list exact origins such as https://app.example or capacitor://localhost, in lower case and without a path;"
    " * and null are refused"
)
SAFE_URL: Final = "must be https://, or http:// to a loopback address or a host of VOICEPASS_PLAIN_HTTP_HOSTS"
OWN_VARIABLES: Final = frozenset({"user_id", "user_name"})
EVERYONE: Final = "everyone"


class Entry(BaseModel):
    """A table of the policy file."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def parse_scalars(value: object) -> object:
    """Return the values that a claim may have."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(entry, get_args(Scalar)) for entry in values):
        raise ValueError("must be text, a number, true or false, or a list of these")
    return tuple(values)


Conditions = dict[str, Annotated[tuple[Scalar, ...], BeforeValidator(parse_scalars)]]


def parse_allow(value: object) -> object:
    """Return the tables of conditions, of which one is enough."""
    if value == EVERYONE:
        return [{}]
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) and entry for entry in value):
        raise ValueError(f'must be "{EVERYONE}", or tables of conditions: [{{ role = ["seller", "admin"] }}]')
    return value


def parse_when(value: object) -> object:
    """Return the tables of conditions. A single table needs no list."""
    return parse_allow([value] if isinstance(value, dict) else value)


def split_list(value: str) -> list[str]:
    """Split a list at its commas."""
    return [entry.strip() for entry in value.split(",") if entry.strip()]


def is_header_value(secret: str) -> bool:
    """Whether an HTTP header can carry this secret: printable ASCII without spaces, and no quote around it."""
    return re.fullmatch(r"[\x21-\x7e]+", secret) is not None and secret == secret.strip("\"'")


def matching(pattern: re.Pattern[str], problem: str) -> AfterValidator:
    """Accept a text if the whole of it matches."""

    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(problem)
        return text

    return AfterValidator(check)


ALIAS = matching(re.compile(r"[a-z0-9][a-z0-9_-]{0,63}"), "must have aliases of lower-case letters, digits, - and _")
COOKIE_NAME = matching(re.compile(r"[A-Za-z0-9_.-]{1,128}"), "must be a cookie's name: letters, digits, - _ .")
# People paste the secret here, and other messages repeat the name.
ENVIRONMENT_NAME = matching(
    re.compile(r"[A-Z][A-Z0-9_]{0,127}"), "must be a variable's name in capitals; put the secret into that variable"
)
# People often paste a whole query string here.
SELECTION = matching(re.compile(r"[A-Za-z0-9_-]{1,128}"), "must be the bare id or name: letters, digits, - and _ alone")


def check_agent_id(agent_id: str) -> str:
    """Accept a bare agent id: people often paste a whole query string in its place."""
    if not agent_id:
        raise ValueError("is not set: copy your agent's id (agent_…) from the dashboard")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", agent_id):
        raise ValueError("must be the bare agent id, such as agent_…: letters, digits, - and _ alone")
    if agent_id.startswith("conv_"):
        raise ValueError("is a conversation's id; an agent's looks like agent_…")
    return agent_id


def check_variable_name(name: str) -> str:
    """Accept the name of a dynamic variable that a claim may fill."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
        raise ValueError("must be named with letters, digits and _")
    if name.startswith(RESERVED_PREFIXES) or name in OWN_VARIABLES:
        raise ValueError("may not define user_id, user_name, system__ or secret__ variables: claims must not set them")
    return name


def check_host(host: str) -> str:
    """Accept one named host, by which plain HTTP is allowed."""
    host = host.lower()
    try:
        ip_address(host)
    except ValueError:
        if not re.fullmatch(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?", host):
            raise ValueError("must name each host alone, such as keycloak: no http://, no port, no *") from None
    return host


def check_base_url(url: str, info: ValidationInfo) -> str:
    """Return a base URL without its last slash, if the API key may be sent there."""
    # On loopback a path may lead to an emulator; at ElevenLabs it would lead to a 404 that looks like a wrong agent.
    has_path = urlsplit(url).path not in {"", "/"} and not url.startswith("http:")
    if not is_safe_url(url, plain_http_hosts=info.context or ()) or "?" in url or has_path:
        raise ValueError(f"{SAFE_URL}, without path, query or user")
    return url.rstrip("/")


def check_origin(origin: str) -> str:
    """Accept the exact origin of a page or of an app's shell, as browsers send it."""
    try:
        sent = str(URL(origin).origin())
    except ValueError:
        sent = ""
    is_origin = re.fullmatch(r"[a-z][a-z0-9+.-]{0,31}://[a-z0-9_.:\[\]-]{1,261}", sent)
    if not is_origin or sent.partition(":")[0] in SCHEMES_WITHOUT_ORIGIN:
        raise ValueError(EXACT_ORIGIN)
    if origin != sent:
        raise ValueError(f"{EXACT_ORIGIN}; write {sent}")
    return origin


def check_webhook_secrets(secrets: SecretStr) -> SecretStr:
    """Accept the secret that ElevenLabs made for the webhook, or the old and the new one."""
    values = split_list(secrets.get_secret_value())
    is_good = all(len(value) >= MIN_WEBHOOK_SECRET_CHARACTERS and is_header_value(value) for value in values)
    if not is_good or len(values) not in {1, 2}:
        raise ValueError("must be the secret that ElevenLabs shows for the webhook, or two, separated by a comma")
    return secrets


def check_service_token(text: SecretStr) -> SecretStr:
    """Accept the token of a backend, alone or as `name:token`."""
    entry = ServiceToken.parse(text.get_secret_value())
    if len(entry.token) < MIN_SECRET_BYTES or not is_header_value(entry.token):
        raise ValueError(f"must be {MIN_SECRET_BYTES} plain characters or more; make one: openssl rand -base64 48")
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", entry.name):
        raise ValueError("must read name:token; the name has letters, digits, - _ . and at most 64 of them")
    return text


def check_database_url(url: str) -> str:
    """Accept the address of a ledger."""
    is_sqlite = url == "sqlite://" or url.startswith("sqlite:///")
    if not is_sqlite and (not re.fullmatch(r"postgres(ql)?://[!-~]+", url) or re.search(r"%(?![0-9A-Fa-f]{2})", url)):
        raise ValueError("must be sqlite:///file, sqlite:// for memory, or postgresql://… with %-escapes for the rest")
    return url
