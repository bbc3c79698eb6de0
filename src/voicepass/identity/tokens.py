"""Split a token into its parts and parse their JSON, so strictly that no token has a second spelling.

For operators, who often write one slash, capital or quote too many, it also explains why an `iss` or `aud` differs.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NoReturn

from voicepass.errors import TokenInvalid
from voicepass.identity.credentials import MAX_TOKEN_CHARACTERS
from voicepass.identity.keys import base64url_decode

_MAX_INTEGER_DIGITS: Final = 20


@dataclass(frozen=True, slots=True)
class UnverifiedToken:
    """A well-formed compact JWS. Nothing in it is trusted."""

    header: Mapping[str, object]
    payload: bytes
    signing_input: bytes
    signature: bytes


def parse(unverified_token: str) -> UnverifiedToken:
    """Split a compact JWS into its parts (RFC 7515, section 7.1). Raises TokenInvalid for any other form."""
    if len(unverified_token) > MAX_TOKEN_CHARACTERS:
        refuse("longer than 8 kB")
    segments = unverified_token.split(".")
    if len(segments) != 3:  # noqa: PLR2004 - header, payload, signature
        refuse("not three segments")
    try:
        payload, signature = base64url_decode(segments[1]), base64url_decode(segments[2])
        header = _parse_header(segments[0])
    except ValueError:
        refuse("not strict base64url")
    signing_input = unverified_token.rpartition(".")[0].encode("ascii")
    return UnverifiedToken(header, payload, signing_input, signature)


@lru_cache(maxsize=64)  # most tokens of an issuer have the same header
def _parse_header(segment: str) -> Mapping[str, object]:
    return parse_object(base64url_decode(segment), "header")


def parse_object(data: bytes, part: str) -> dict[str, object]:
    """Parse strict JSON: no duplicate member, no huge or infinite number, no NaN. Raises TokenInvalid."""
    try:
        value = _STRICT_JSON.decode(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested a thousand deep
        refuse(f"the {part} is not strict JSON", error)
    if not isinstance(value, dict):
        refuse(f"the {part} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate member")
    return members


def _bounded_integer(digits: str) -> int:
    if len(digits) > _MAX_INTEGER_DIGITS:
        raise ValueError("huge number")
    return int(digits)


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("infinite number")
    return value


_STRICT_JSON: Final = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_int=_bounded_integer,
    parse_float=_finite_float,
    parse_constant=_finite_float,  # it gets NaN, Infinity and -Infinity, which are not JSON
)


def refuse(failed_check: str, cause: BaseException | None = None) -> NoReturn:
    """Raise TokenInvalid. `failed_check` is for the log: the caller never learns which check failed."""
    raise TokenInvalid(operator_note=f"token refused: {failed_check}") from cause


_FORMS: Final[Mapping[str, Callable[[str], str]]] = {
    "a final slash": lambda text: text.rstrip("/"),
    "upper and lower case": str.casefold,
    "quotes or spaces": lambda text: text.strip(" \t\r\n\"'\u201c\u201d\u2018\u2019"),
}


def explain_difference(found: object, expected: Collection[str]) -> str:
    """Return the end of a note that says how `found` differs from an expected value, or "". It repeats no value."""
    entries = found if isinstance(found, list) else [found]
    pairs = [(entry, name) for entry in entries if isinstance(entry, str) for name in expected if entry != name]
    for text, name in pairs:
        for difference, simplify in _FORMS.items():
            if simplify(text) == simplify(name):
                return f"; the only difference is {difference}"
    if any(_simplify(text) == _simplify(name) for text, name in pairs):
        return f"; it differs only in such things as {', '.join(_FORMS)}"
    return ""


def _simplify(text: str) -> str:
    for simplify in _FORMS.values():
        text = simplify(text)
    return text.rstrip("/")


def list_differences(unverified_token: str, blocks: Sequence[tuple[str, str | None]]) -> list[str]:
    """Write the `iss` and `aud` of a token beside the configured ones, `blocks`, if they differ: for its operator."""
    try:
        claims = parse_object(parse(unverified_token).payload, "payload")
    except TokenInvalid:
        return []
    issuers = {issuer for issuer, _ in blocks}
    token_issuer = claims.get("iss")
    if not isinstance(token_issuer, str) or token_issuer not in issuers:
        return [_compare("iss", token_issuer, issuers)]
    audiences = {audience for issuer, audience in blocks if issuer == token_issuer and audience}
    found = claims.get("aud")
    named = {each for each in (found if isinstance(found, list) else [found]) if isinstance(each, str)}
    return [_compare("aud", found, audiences)] if audiences and audiences.isdisjoint(named) else []


def _compare(claim: str, found: object, configured: Collection[str]) -> str:
    return f"{claim} in the token: {found!r}; configured: {', '.join(map(repr, sorted(configured)))}"
