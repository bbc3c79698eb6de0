"""What keeps an `iss` or `aud` from matching: operators often write it with one slash, capital or quote too many."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from voicepass.identity.keys import base64url_decode

_FORMS: Final[Mapping[str, Callable[[str], str]]] = {
    "a final slash": lambda text: text.rstrip("/"),
    "upper and lower case": str.casefold,
    "quotes or spaces": lambda text: text.strip(" \t\r\n\"'\u201c\u201d\u2018\u2019"),
}


def explain_difference(found: object, expected: Collection[str | None]) -> str:
    """Return the end of a note that says how `found` differs from an expected value, or "". It repeats no value."""
    entries = found if isinstance(found, list) else [found]
    pairs = [(entry, name) for entry in entries if isinstance(entry, str) for name in expected if name is not None]
    for text, name in pairs:
        for difference, simplify in _FORMS.items():
            if simplify(text) == simplify(name):
                return f"; the only difference is {difference}"
    for text, name in pairs:
        for simplify in _FORMS.values():
            text, name = simplify(text), simplify(name)  # noqa: PLW2901
        if text.rstrip("/") == name.rstrip("/"):
            return f"; the only differences are {', '.join(_FORMS)}"
    return ""


def list_differences(unverified_token: str, blocks: Sequence[tuple[str, str | None]]) -> list[str]:
    """Write the `iss` and `aud` of a token beside the configured ones, `blocks`, if they differ: for its operator."""
    try:
        claims = json.loads(base64url_decode(unverified_token.split(".")[1]))
    except (IndexError, ValueError, RecursionError):
        return []
    if not isinstance(claims, dict):
        return []
    issuers = sorted({issuer for issuer, _ in blocks})
    if claims.get("iss") not in issuers:
        return [f"iss in the token: {claims.get('iss')!r}", f"iss configured: {', '.join(map(repr, issuers))}"]
    audiences = sorted({audience for issuer, audience in blocks if issuer == claims["iss"] and audience})
    found = claims.get("aud")
    if not audiences or any(audience in (found if isinstance(found, list) else [found]) for audience in audiences):
        return []
    return [f"aud in the token: {found!r}", f"aud configured: {', '.join(map(repr, audiences))}"]
