"""What a rule and an engine say to each other: statements there, rows back."""

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Final, TypeVar

Result = TypeVar("Result")
Row = Mapping[str, Any]
Dialogue = Generator[tuple[str, Mapping[str, Any]], Sequence[Row], Result]

SHARE: Final = "share"
"""Not a statement: from here on, transactions that hold one of the `locks` alone come before this one or after it."""
