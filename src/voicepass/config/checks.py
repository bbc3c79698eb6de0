"""The rules for single values, each in one place: the models' validators. Each returns its value, or raises ValueError.

A message says what is wrong and what to do. It begins with a verb, because the place of the value stands before it.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from pydantic import SecretStr, ValidationInfo
from pydantic_core import PydanticCustomError

from voicepass.identity.credentials import ServiceToken
from voicepass.identity.keys import (
    ALGORITHMS,
    HMAC_ALGORITHMS,
    MIN_SECRET_BYTES,
    KeyUnusableError,
    key_from_pem,
    key_from_secret,
)
from voicepass.outbound import is_safe_url
from voicepass.policy import RESERVED_PREFIXES

ALIAS: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.ASCII)
AGENT_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
VARIABLE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)
ENVIRONMENT_NAME: Final = re.compile(r"[A-Z][A-Z0-9_]{0,127}", re.ASCII)
HEADER_VALUE: Final = re.compile(r"[\x21-\x7e]+", re.ASCII)
TOKEN_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
COOKIE_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}", re.ASCII)
POSTGRES_URL: Final = re.compile(r"postgres(ql)?://[!-~]+")
BROKEN_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
MIN_WEBHOOK_SECRET_CHARACTERS: Final = 16  # ElevenLabs makes longer ones; a shorter text could be guessed
KEYS: Final = ("secret_env", "jwks_url", "public_key")
KEY_REMEDIES: Final = {
    True: "make one with: openssl rand -base64 48",
    False: "give your provider's key as PEM, or the URL of its JWKS",
}
OWN_VARIABLES: Final = frozenset({"user_id", "user_name"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a policy file is checked against (pydantic's context). `read_secret` is None if no secret is to be read."""

    read_secret: Callable[[str], str | None] | None = None
    plain_http_hosts: Collection[str] = ()


def split_list(value: str) -> list[str]:
    """Split a list at its commas."""
    return [entry.strip() for entry in value.split(",") if entry.strip()]


def is_header_value(secret: str) -> bool:
    """Whether an HTTP header can carry this secret: printable ASCII without spaces."""
    return HEADER_VALUE.fullmatch(secret) is not None


def check_alias(alias: str) -> str:
    """Accept the name by which frontends ask for an agent."""
    if not ALIAS.fullmatch(alias):
        raise ValueError("must have aliases of lower-case letters, digits, - and _")
    return alias


def check_agent_id(agent_id: str) -> str:
    """Accept a bare agent id: people often paste a whole query string in its place."""
    if not agent_id:
        raise ValueError("is not set: copy your agent's id (agent_…) from the dashboard")
    if not AGENT_ID.fullmatch(agent_id):
        raise ValueError("must be the bare agent id, such as agent_…: letters, digits, - and _ alone")
    if agent_id.startswith("conv_"):
        raise ValueError("is a conversation's id; an agent's looks like agent_…")
    return agent_id


def check_variable_name(name: str) -> str:
    """Accept the name of a dynamic variable that a claim may fill."""
    if not VARIABLE_NAME.fullmatch(name):
        raise ValueError("must be named with letters, digits and _")
    if name.startswith(RESERVED_PREFIXES):
        raise ValueError("may not define system__ or secret__ variables: the browser would see or forge them")
    if name in OWN_VARIABLES:
        raise ValueError("may not define user_id or user_name: the user's id and name claims do")
    return name


def check_environment_name(name: str) -> str:
    """Accept the name of a variable. People paste the secret here, and other messages repeat the name."""
    if not ENVIRONMENT_NAME.fullmatch(name):
        raise ValueError("must be the name of an environment variable, in capitals; the secret stands there, not here")
    return name


def check_base_url(url: str) -> str:
    """Return a base URL without its last slash, if the API key may be sent there."""
    # On loopback a path may lead to an emulator; at ElevenLabs it would lead to a 404 that looks like a wrong agent.
    has_path = urlsplit(url).path not in {"", "/"} and not url.startswith("http:")
    if not is_safe_url(url) or "?" in url or has_path:
        raise ValueError("must be https://, or http:// to a loopback address, without path, query or user")
    return url.rstrip("/")


def check_token_issuer(token_issuer: str) -> str:
    """Accept an issuer's name. Over plain http:// anyone on the network could publish keys in its name."""
    if not token_issuer.strip():
        raise ValueError("is not set: give the exact 'iss' of your tokens")
    if token_issuer.lower().startswith("http:") and not is_safe_url(token_issuer):
        raise ValueError("must not be an http:// address: anyone on the way could publish keys in its name")
    return token_issuer


def check_algorithm(algorithm: str) -> str:
    """Accept one of the algorithms that may sign tokens."""
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"must be one of {', '.join(sorted(ALGORITHMS))} (python-jose implements no PS*, EdDSA or ES256K)"
        )
    return algorithm


def check_key(value: str | None, info: ValidationInfo) -> str | None:
    """Accept the one key of an issuer: a secret for HS*, else a public key or the URL of a JWKS."""
    earlier = KEYS[: KEYS.index(info.field_name or "")]
    if not info.data.keys() >= {"algorithm", *earlier}:
        return value  # one of those was refused, and the same problem would be printed twice
    algorithm, has_url = info.data["algorithm"], info.data.get("jwks_url") is not None
    is_needed = (info.field_name == "secret_env") == (algorithm in HMAC_ALGORITHMS)
    if value is None and is_needed and not has_url and info.field_name != "jwks_url":
        remedy = KEY_REMEDIES[info.field_name == "secret_env"]
        raise ValueError(f"is not set, and {algorithm} needs it: {remedy}")
    if value is not None and not is_needed:
        raise ValueError(f"does not go with the algorithm {algorithm}: change one of the two")
    if value is not None and has_url:
        raise ValueError("is set, and so is the URL of a JWKS: remove one of the two")
    return value


def check_secret(name: str, info: ValidationInfo) -> str:
    """Accept the variable of an HS secret, and the secret in it."""
    algorithm = info.data.get("algorithm", "")
    if algorithm in HMAC_ALGORITHMS:
        secret = _read_secret(name, info, f", though the policy file names it: {KEY_REMEDIES[True]}")
        try:
            if secret is not None:
                key_from_secret(secret, algorithm)
        except KeyUnusableError as error:
            raise _secret_error(name, str(error)) from None
    return name


def check_jwks_url(url: str) -> str:
    """Accept the address of an issuer's published keys."""
    if not is_safe_url(url):
        raise ValueError("must be https://, or http:// to a loopback address")
    return url


def check_public_key(pem: str, info: ValidationInfo) -> str:
    """Return a public key as PEM."""
    pem = pem.replace("\\n", "\n")  # where a variable can hold one line only, people write \\n
    algorithm = info.data.get("algorithm", "")
    if algorithm and algorithm not in HMAC_ALGORITHMS and info.data.get("jwks_url") is None:
        key_from_pem(pem, algorithm)
    return pem


def check_audience(audience: str | None, info: ValidationInfo) -> str | None:
    """Accept the audience. Without one, other claims must separate these tokens from those for other services."""
    if audience is None and info.data.get("required_claims") == {}:
        raise ValueError(
            "is not set: give the 'aud' that your tokens name for this service, or in the policy file required_claims"
            ' such as { azp = ["https://app.example"] }'
        )
    return audience


def check_api_keys(name: str, info: ValidationInfo) -> str:
    """Accept the variable of an API key, and the one or two keys in it."""
    remedy = f": create a key for {info.data.get('base_url')} with the permission 'ElevenAgents: Write'"
    keys = _read_secret(name, info, remedy)
    # Checked here, because httpx and h11 print the whole key in the error they raise for it.
    if keys is not None and not all(map(is_header_value, split_list(keys))):
        raise _secret_error(name, "holds a space, a line break or a character that no HTTP header can carry")
    return name


def _read_secret(name: str, info: ValidationInfo, remedy: str) -> str | None:
    surroundings: Surroundings = info.context or Surroundings()
    if surroundings.read_secret is None:
        return None
    secret = surroundings.read_secret(name)
    if not secret or not secret.strip(" ,"):
        raise _secret_error(name, f"is not set{remedy}")
    return secret


def _secret_error(name: str, problem: str) -> PydanticCustomError:
    """Return an error whose place is the variable `name`, and not the key that names it."""
    return PydanticCustomError("secret", "{problem}", {"problem": f"{name} {problem}"})


def check_origin(origin: str) -> str:
    """Accept the exact origin of a page, as browsers send it."""
    parts = urlsplit(origin)
    bare = f"{parts.scheme}://{parts.netloc}".lower()
    is_plain = parts.scheme in {"http", "https"} and parts.hostname and not {"*", "@"} & set(origin)
    if not is_plain or bare != origin or parts.port == {"http": 80, "https": 443}[parts.scheme]:
        raise ValueError("must list exact origins such as https://app.example, without a path; * is refused")
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
    if not TOKEN_NAME.fullmatch(entry.name):
        raise ValueError("must read name:token; the name has letters, digits, - _ . and at most 64 of them")
    return text


def check_cookie_name(name: str) -> str:
    """Accept the name of a cookie."""
    if not COOKIE_NAME.fullmatch(name):
        raise ValueError("must be a cookie's name: letters, digits, - _ .")
    return name


def check_database_url(url: str) -> str:
    """Accept the address of a ledger."""
    is_sqlite = url == "sqlite://" or url.startswith("sqlite:///")
    if not is_sqlite and (not POSTGRES_URL.fullmatch(url) or BROKEN_ESCAPE.search(url)):
        raise ValueError("must be sqlite:///file, sqlite:// for memory, or postgresql://… with %-escapes for the rest")
    return url
