"""VOICEPASS_DATABASE_URL of PostgreSQL. No refusal repeats the URL, because it may hold a password."""

from contextlib import suppress
from typing import Any
from urllib.parse import parse_qsl

import psycopg
from psycopg.conninfo import conninfo_to_dict

from voicepass.errors import LedgerUnavailable


def parse_url(url: str) -> dict[str, Any]:
    """Return libpq's parameters. Raises LedgerUnavailable if the URL cannot be read, and names unknown parameters."""
    _, _, address = url.partition("://")
    server, _, path = address.partition("/")
    path, _, query = path.partition("?")
    with suppress(psycopg.Error):
        parameters = conninfo_to_dict(url)
        # Otherwise a piece of the password would become a host, a port or a database, which messages repeat.
        if server.count("@") <= 1 and "@" not in path and _are_ports(str(parameters.get("port", ""))):
            return parameters
    unknown = _list_unknown(query)
    if unknown:
        raise LedgerUnavailable(
            operator_note=f"the database's URL has parameters that PostgreSQL's driver does not know: "
            f"{', '.join(unknown)}. Remove them: a pooler needs none. "
            "For a schema, run ALTER ROLE … SET search_path"
        )
    raise LedgerUnavailable(
        operator_note="the database's URL cannot be read: postgresql://user:password@host:5432/name. "
        "In the password, write @ as %40, / as %2F and % as %25"
    )


def _are_ports(text: str) -> bool:
    return all(port == "" or port.isdecimal() for port in text.split(","))


def _list_unknown(query: str) -> list[str]:
    if "@" in query:  # the password may have a question mark: then this is no query
        return []
    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()} | {"ssl"}
    return [name for name, _ in parse_qsl(query, keep_blank_values=True) if name not in known]
