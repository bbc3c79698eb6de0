"""What the log says if PostgreSQL cannot be used: its own message, its SQLSTATE, and what the operator can do."""

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final, Self

import psycopg
from psycopg.rows import DictRow

from voicepass.errors import LedgerUnavailable

Connection = psycopg.AsyncConnection[DictRow]

MAX_MESSAGE_CHARACTERS: Final = 400
_TEXT: Final = files(__package__).joinpath("postgres_causes.toml").read_text(encoding="utf-8")
CAUSES: Final[list[dict[str, Any]]] = tomllib.loads(_TEXT)["causes"]
"""Why PostgreSQL or a pooler refuses: sqlstate, the words of its message, and what the operator can do."""


def explain_failure(error: Exception) -> str:
    """Return a note for the log. It has neither the URL nor a row's values, which an error's DETAIL may hold."""
    sqlstate = error.sqlstate if isinstance(error, psycopg.Error) else None
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    message = " ".join((primary or str(error) or type(error).__name__).split())[:MAX_MESSAGE_CHARACTERS]
    note, advice = f"PostgreSQL cannot be used: {message}", ""
    for cause in CAUSES:
        has_words = any(words.lower() in message.lower() for words in cause["words"])
        if sqlstate == cause["sqlstate"] or (sqlstate is None and has_words):
            sqlstate, advice = sqlstate or cause["sqlstate"], f". {cause['advice']}"
            break
    return note + (f" (SQLSTATE {sqlstate})" if sqlstate else "") + advice


@dataclass(slots=True)
class LastFailure:
    """Why the last attempt to connect failed. The pool itself only says that there is no connection."""

    error: Exception | None = None

    def explain(self, note: str) -> LedgerUnavailable:
        """Return the refusal of a call that got no connection, or no answer."""
        return LedgerUnavailable(operator_note=note if self.error is None else f"{note}; {explain_failure(self.error)}")


class RecordingConnection(Connection):
    """A connection that records in `last_failure`, a required option, why the last attempt to connect failed."""

    @classmethod
    async def connect(cls, conninfo: str = "", **options: Any) -> Self:  # noqa: ANN401
        """Connect, and record the outcome."""
        last_failure: LastFailure = options.pop("last_failure")
        try:
            connection = await super().connect(conninfo, **options)
        except (psycopg.Error, OSError) as error:
            last_failure.error = error
            raise
        last_failure.error = None
        return connection
