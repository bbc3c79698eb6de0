"""What keeps an `iss` or `aud` from matching: operators often write it with one slash, capital or quote too many."""

from collections.abc import Collection, Sequence

from voicepass.errors import TokenInvalid
from voicepass.identity.tokens import parse, parse_object


def explain_difference(found: object, expected: Collection[str]) -> str:
    """Return the end of a note if `found` is an expected value in another spelling, else "". It repeats no value."""
    entries = found if isinstance(found, list) else [found]
    simplified = {_simplify(entry) for entry in entries if isinstance(entry, str)}
    is_near = not simplified.isdisjoint(map(_simplify, expected))
    return "; the only difference is a final slash, upper and lower case, quotes or spaces" if is_near else ""


def _simplify(name: str) -> str:
    return name.casefold().strip(" \t\r\n\"'\u201c\u201d\u2018\u2019").rstrip("/")


def list_differences(unverified_token: str, blocks: Sequence[tuple[str, str | None]]) -> list[str]:
    """Write the `iss` and `aud` of a token beside the configured ones, `blocks`: for its operator."""
    try:
        claims = parse_object(parse(unverified_token).payload, "payload")
    except TokenInvalid:
        return []
    issuers, audiences = {issuer for issuer, _ in blocks}, {audience for _, audience in blocks if audience}
    return [
        f"{claim} in the token: {claims.get(claim)!r}; configured: {', '.join(map(repr, sorted(configured)))}"
        for claim, configured in (("iss", issuers), ("aud", audiences))
    ]
