"""VOICEPASS_DATABASE_URL of PostgreSQL. No refusal repeats the URL, because it may hold a password."""

from contextlib import suppress
from typing import Any
from urllib.parse import parse_qsl

import psycopg
from psycopg.conninfo import conninfo_to_dict

from voicepass.errors import LedgerUnavailable


def parse_url(url: str) -> dict[str, Any]:
    """Return libpq's parameters. Raises LedgerUnavailable if the URL cannot be read, and names unknown parameters."""
    server, _, path = url.partition("://")[2].partition("/")
    path, _, query = path.partition("?")
    with suppress(psycopg.Error):
        parameters = conninfo_to_dict(url)
        are_ports = all(port == "" or port.isdecimal() for port in str(parameters.get("port", "")).split(","))
        # Otherwise a piece of the password would become a host, a port or a database, which messages repeat.
        if server.count("@") <= 1 and "@" not in path and are_ports:
            return parameters
    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()} | {"ssl"}
    unknown = [name for name, _ in parse_qsl(query, keep_blank_values=True) if name not in known]
    if unknown and "@" not in query:  # with an @, it may be the end of a password that has a question mark
        note = (
            f"the database's URL has parameters that PostgreSQL's driver does not know: {', '.join(unknown)}. "
            "Remove them: a pooler needs none. For a schema, run ALTER ROLE … SET search_path"
        )
    else:
        note = (
            "the database's URL cannot be read: postgresql://user:password@host:5432/name. "
            "In the password, write @ as %40, / as %2F and % as %25"
        )
    raise LedgerUnavailable(operator_note=note)
