"""The rules for single values, each in one place: the models' validators. Each returns its value, or raises ValueError.

A message says what is wrong and what to do. It begins with a verb: the place of the value comes first.
"""

import ipaddress
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, get_args
from urllib.parse import urlsplit

import idna
from pydantic import SecretStr, ValidationInfo
from pydantic_core import PydanticCustomError

from voicepass.identity.credentials import ServiceToken
from voicepass.identity.keys import MIN_SECRET_BYTES
from voicepass.model import Scalar
from voicepass.outbound import is_safe_url
from voicepass.policy import RESERVED_PREFIXES

MIN_WEBHOOK_SECRET_CHARACTERS: Final = 16  # ElevenLabs makes longer ones; a shorter text could be guessed
ORIGIN: Final = re.compile(
    r"[a-z][a-z0-9+.-]{0,31}://([a-z0-9_.-]{1,253}|\[[0-9a-f:.]{2,45}\])(:[1-9][0-9]{0,4})?", re.ASCII
)
TENANT: Final = "{tid}"
DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}
# Browsers send `null` as the origin of their pages, or none at all.
SCHEMES_WITHOUT_ORIGIN: Final = frozenset({"file", "ftp", "data", "blob", "about", "javascript", "ws", "wss"})
SAFE_URL: Final = "must be https://, or http:// to a loopback address or a host of VOICEPASS_PLAIN_HTTP_HOSTS"
OWN_VARIABLES: Final = frozenset({"user_id", "user_name"})
EVERYONE: Final = "everyone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a policy file is checked against (pydantic's context). `read_secret` is None if no secret is to be read."""

    read_secret: Callable[[str], str | None] | None = None
    plain_http_hosts: Collection[str] = ()


def parse_scalars(value: object) -> object:
    """Return the values that a claim may have."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(entry, get_args(Scalar)) for entry in values):
        raise ValueError("must be text, a number, true or false, or a list of these")
    return tuple(values)


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
    return re.fullmatch(r"[\x21-\x7e]+", secret, re.ASCII) is not None and secret == secret.strip("\"'")


def check_alias(alias: str) -> str:
    """Accept the name by which frontends ask for an agent."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", alias, re.ASCII):
        raise ValueError("must have aliases of lower-case letters, digits, - and _")
    return alias


def check_agent_id(agent_id: str) -> str:
    """Accept a bare agent id: people often paste a whole query string in its place."""
    if not agent_id:
        raise ValueError("is not set: copy your agent's id (agent_…) from the dashboard")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", agent_id, re.ASCII):
        raise ValueError("must be the bare agent id, such as agent_…: letters, digits, - and _ alone")
    if agent_id.startswith("conv_"):
        raise ValueError("is a conversation's id; an agent's looks like agent_…")
    return agent_id


def check_selection(name: str) -> str:
    """Accept the id of a branch or version, or the name of an environment: people often paste a query string."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", name, re.ASCII):
        raise ValueError("must be the bare id (agtbrch_…, agtvrsn_…) or name: letters, digits, - and _ alone")
    return name


def check_variable_name(name: str) -> str:
    """Accept the name of a dynamic variable that a claim may fill."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name, re.ASCII):
        raise ValueError("must be named with letters, digits and _")
    if name.startswith(RESERVED_PREFIXES):
        raise ValueError("may not define system__ or secret__ variables: the browser would see or forge them")
    if name in OWN_VARIABLES:
        raise ValueError("may not define user_id or user_name: the user's id and name claims do")
    return name


def check_environment_name(name: str) -> str:
    """Accept the name of a variable. People paste the secret here, and other messages repeat the name."""
    if not re.fullmatch(r"[A-Z][A-Z0-9_]{0,127}", name, re.ASCII):
        raise ValueError(
            "must be the name of an environment variable, in capitals; put the secret into that variable, not here"
        )
    return name


def check_host(host: str) -> str:
    """Accept one named host, by which plain HTTP is allowed."""
    host = host.lower()
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not re.fullmatch(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?", host, re.ASCII):
            raise ValueError("must name each host alone, such as keycloak: no http://, no port, no *") from None
    return host


def check_base_url(url: str, info: ValidationInfo) -> str:
    """Return a base URL without its last slash, if the API key may be sent there."""
    # On loopback a path may lead to an emulator; at ElevenLabs it would lead to a 404 that looks like a wrong agent.
    has_path = urlsplit(url).path not in {"", "/"} and not url.startswith("http:")
    if not is_safe(url, info) or "?" in url or has_path:
        raise ValueError(f"{SAFE_URL}, without path, query or user")
    return url.rstrip("/")


def is_safe(url: str, info: ValidationInfo) -> bool:
    """Whether a secret may travel to this URL, or trust may come from there."""
    surroundings: Surroundings = info.context or Surroundings()
    return is_safe_url(url, plain_http_hosts=surroundings.plain_http_hosts)


def check_api_keys(name: str, info: ValidationInfo) -> str:
    """Accept the variable of an API key, and the one or two keys in it."""
    remedy = f": create a key for {info.data.get('base_url')} with the permissions 'ElevenAgents: Write' and 'Read'"
    keys = read_named_secret(name, info, remedy)
    # Checked here, because httpx and h11 print the whole key in the error they raise for it.
    if keys is not None and (keys.startswith("base64:") or not all(map(is_header_value, split_list(keys)))):
        raise refuse_secret(name, "holds a space, a line break or a character that no HTTP header can carry")
    return name


def read_named_secret(name: str, info: ValidationInfo, remedy: str) -> str | None:
    """Return the secret in the variable `name`, or None if this check is to read no secret."""
    surroundings: Surroundings = info.context or Surroundings()
    if surroundings.read_secret is None:
        return None
    secret = surroundings.read_secret(name)
    if not secret or not secret.strip(" ,"):
        raise refuse_secret(name, f"is not set{remedy}")
    return secret


def refuse_secret(name: str, problem: str) -> PydanticCustomError:
    """Return an error whose place is the variable `name`, and not the key that names it."""
    return PydanticCustomError("secret", "{problem}", {"problem": f"{name} {problem}"})


def check_origin(origin: str) -> str:
    """Accept the exact origin of a page or of an app's shell, as browsers send it."""
    if not origin.isascii():
        raise ValueError(f"has letters that browsers send in another form{_write_punycode(origin)}")
    scheme = origin.partition(":")[0]
    is_usual_port = origin.endswith(DEFAULT_PORTS.get(scheme, " "))
    if not ORIGIN.fullmatch(origin) or scheme in SCHEMES_WITHOUT_ORIGIN or is_usual_port:
        raise ValueError(
            "must list exact origins such as https://app.example or capacitor://localhost, in lower case and without"
            " a path; * and null are refused"
        )
    return origin


def _write_punycode(origin: str) -> str:
    scheme, _, rest = origin.partition("://")
    host, colon, port = rest.partition(":")
    try:
        return f": write {scheme}://{idna.encode(host, uts46=True).decode()}{colon}{port}"
    except idna.IDNAError:
        return ": write the one that the browser's console shows"


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
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", entry.name, re.ASCII):
        raise ValueError("must read name:token; the name has letters, digits, - _ . and at most 64 of them")
    return text


def check_cookie_name(name: str) -> str:
    """Accept the name of a cookie."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", name, re.ASCII):
        raise ValueError("must be a cookie's name: letters, digits, - _ .")
    return name


def check_database_url(url: str) -> str:
    """Accept the address of a ledger."""
    is_sqlite = url == "sqlite://" or url.startswith("sqlite:///")
    if not is_sqlite and (not re.fullmatch(r"postgres(ql)?://[!-~]+", url) or re.search(r"%(?![0-9A-Fa-f]{2})", url)):
        raise ValueError("must be sqlite:///file, sqlite:// for memory, or postgresql://… with %-escapes for the rest")
    return url
