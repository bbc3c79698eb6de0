"""What a configured value must look like, wherever it is written: each check returns it, or raises ValueError."""

import re
from typing import Final
from urllib.parse import urlsplit

from voicepass.identity.keys import ALGORITHMS
from voicepass.outbound import is_safe_url
from voicepass.policy import RESERVED_PREFIXES

AGENT_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
VARIABLE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)
HEADER_VALUE: Final = re.compile(r"[\x21-\x7e]+", re.ASCII)
OWN_VARIABLES: Final = frozenset({"user_id", "user_name"})


def is_header_value(secret: str) -> bool:
    """Whether an HTTP header can carry this secret: printable ASCII without spaces."""
    return HEADER_VALUE.fullmatch(secret) is not None


def checked_agent_id(agent_id: str) -> str:
    """Return a bare agent id, or raise ValueError: a whole query string is often pasted in its place."""
    if not AGENT_ID.fullmatch(agent_id):
        raise ValueError("must be the bare agent id, such as agent_…: letters, digits, - and _ alone")
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
    # On loopback a path may lead to an emulator; at ElevenLabs it would lead to a 404 that looks like a wrong agent.
    has_path = urlsplit(url).path not in {"", "/"} and not url.startswith("http:")
    if not is_safe_url(url) or "?" in url or has_path:
        raise ValueError("must be https://, or http:// to a loopback address, without path, query or user")
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
        raise ValueError(f"must be one of {', '.join(sorted(ALGORITHMS))} (voicepass verifies no PS* and no ES256K)")
    return algorithm
