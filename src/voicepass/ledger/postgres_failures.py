"""What the log says if PostgreSQL cannot be used: its own message, its SQLSTATE, and what the operator can do."""

from dataclasses import dataclass
from typing import Any, Final, Self

import psycopg
from psycopg.rows import DictRow

from voicepass.errors import LedgerUnavailable

Connection = psycopg.AsyncConnection[DictRow]

MAX_MESSAGE_CHARACTERS: Final = 400


@dataclass(frozen=True, slots=True)
class Cause:
    """A reason why PostgreSQL or a pooler refuses, and how its message tells it apart from the others.

    libpq gives no SQLSTATE for a connection that failed. Then the words of the message identify the cause: the first
    in the list whose words the message has.
    """

    sqlstate: str
    words: tuple[str, ...]
    advice: str


CAUSES: Final = (
    Cause("", ("no encryption",), "Add sslmode=require to VOICEPASS_DATABASE_URL: the server accepts TLS only."),
    Cause("", ("does not support SSL",), "Switch TLS on in the server, or remove sslmode from VOICEPASS_DATABASE_URL."),
    Cause("", ("certificate",), "Name the server's CA in sslrootcert, and the host as its certificate has it."),
    Cause(
        "08P01",
        ("unsupported startup parameter",),
        "A pooler is in between: remove options from VOICEPASS_DATABASE_URL. "
        "To choose a schema, run ALTER ROLE … SET search_path.",
    ),
    Cause(
        "28P01",
        ("password authentication failed", "no password supplied"),
        "Compare the password in VOICEPASS_DATABASE_URL with the role's password.",
    ),
    Cause(
        "53300",
        ("too many clients", "connection slots", "too many connections", "no more connections", "max client"),
        "Raise the limit of the server or of the role, or run fewer instances: each holds up to 10 connections.",
    ),
    Cause("28000", ("no pg_hba.conf entry",), "Allow this role, database and address in the server's pg_hba.conf."),
    Cause(
        "28000",
        ('role "', "no such user", "Tenant or user not found", "authentication failed"),
        "Compare the role in VOICEPASS_DATABASE_URL with the roles of the server.",
    ),
    Cause(
        "3D000",
        ('database "', "no such database"),
        "Create the database, or correct its name at the end of VOICEPASS_DATABASE_URL.",
    ),
    Cause("57P03", ("the database system is",), "voicepass tries again by itself."),
    Cause("25006", (), "Is it a replica? voicepass uses it again once it can be written."),
    Cause("42501", (), "Give the role the rights on voicepass' tables; the first start must create them."),
    Cause("57014", (), "The server is overloaded, or another session holds a lock."),
    Cause("55P03", (), "Another session holds a lock."),
    Cause("", ("resolve host", "translate host name"), "Compare the host in VOICEPASS_DATABASE_URL."),
    Cause("", ("refused", "timeout", "No such file"), "Does the server run, and is its host and port correct?"),
)


def explain_failure(error: Exception) -> str:
    """Return a note for the log. It has neither the URL nor a row's values, which an error's DETAIL may hold."""
    sqlstate = error.sqlstate if isinstance(error, psycopg.Error) else None
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    message = " ".join((primary or str(error) or type(error).__name__).split())[:MAX_MESSAGE_CHARACTERS]
    cause = _find_cause(sqlstate, message)
    if cause is None:
        return f"PostgreSQL cannot be used: {message}{_name_state(sqlstate)}"
    return f"PostgreSQL cannot be used: {message}{_name_state(sqlstate or cause.sqlstate)}. {cause.advice}"


def _find_cause(sqlstate: str | None, message: str) -> Cause | None:
    for cause in CAUSES:
        if sqlstate == cause.sqlstate or (
            sqlstate is None and any(words.lower() in message.lower() for words in cause.words)
        ):
            return cause
    return None


def _name_state(sqlstate: str | None) -> str:
    return f" (SQLSTATE {sqlstate})" if sqlstate else ""


@dataclass(slots=True)
class LastFailure:
    """Why the last attempt to connect failed. The pool itself only says that there is no connection."""

    error: Exception | None = None

    def explain(self, note: str) -> LedgerUnavailable:
        """Return the refusal of a call that got no connection, or no answer."""
        return LedgerUnavailable(operator_note=note if self.error is None else f"{note}; {explain_failure(self.error)}")


def record_failures(last_failure: LastFailure) -> type[Connection]:
    """Return a class of connections whose failures `last_failure` holds."""

    class RecordingConnection(Connection):
        @classmethod
        async def connect(cls, conninfo: str = "", **options: Any) -> Self:  # noqa: ANN401
            try:
                connection = await super().connect(conninfo, **options)
            except (psycopg.Error, OSError) as error:
                last_failure.error = error
                raise
            last_failure.error = None
            return connection

    return RecordingConnection
