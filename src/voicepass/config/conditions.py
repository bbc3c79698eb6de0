"""Conditions on a token's claims, as `allow`, `required_claims` and `when` of the policy file name them."""

from typing import Annotated, Final, get_args

from pydantic import BeforeValidator

from voicepass.model import Scalar

EVERYONE: Final = "everyone"


def _parse_scalars(value: object) -> object:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(entry, get_args(Scalar)) for entry in values):
        raise ValueError("must be text, a number, true or false, or a list of these")
    return tuple(values)


def _parse_allow(value: object) -> object:
    if value == EVERYONE:
        return [{}]
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) and entry for entry in value):
        raise ValueError(f'must be "{EVERYONE}", or tables of conditions: [{{ role = ["seller", "admin"] }}]')
    return value


def _parse_when(value: object) -> object:
    return _parse_allow([value] if isinstance(value, dict) else value)


Conditions = dict[str, Annotated[tuple[Scalar, ...], BeforeValidator(_parse_scalars)]]
Allow = Annotated[list[Conditions], BeforeValidator(_parse_allow)]
When = Annotated[list[Conditions], BeforeValidator(_parse_when)]
"""The same as `allow`. One table may also stand alone."""
