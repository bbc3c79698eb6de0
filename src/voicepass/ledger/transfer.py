"""The move from SQLite to PostgreSQL: all rows in one transaction, compared before it is committed."""

import sqlite3
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any, Final

import psycopg

from voicepass.errors import LedgerUnavailable
from voicepass.ledger.postgres_failures import explain_failure
from voicepass.ledger.postgres_url import parse_url

_TRANSIENT: Final = ("leases", "lookups")
"""Tables about processes that run now. Nobody needs these rows after a move."""


def copy_rows(source: sqlite3.Connection, url: str) -> dict[str, int]:
    """Copy every row into the tables at `url`, which exist and are empty. Returns the number of rows of each table.

    If the same rows are there already, this changes nothing. If it is interrupted, PostgreSQL has no row of it.
    Raises LedgerUnavailable if other rows are there, or if PostgreSQL cannot be used.
    """
    names = source.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%' ORDER BY name"
    )
    tables = [name for (name,) in names if name not in _TRANSIENT]
    try:
        with psycopg.connect(**parse_url(url) | {"connect_timeout": 5}) as target:
            target.execute("SET LOCAL statement_timeout = 0")
            target.execute(f"LOCK TABLE {', '.join(tables)} IN EXCLUSIVE MODE".encode())
            return {table: _copy_table(source, target, table) for table in tables}
    except (psycopg.Error, OSError) as error:
        raise LedgerUnavailable(operator_note=explain_failure(error)) from error


def _copy_table(source: sqlite3.Connection, target: psycopg.Connection[Any], table: str) -> int:
    select = f"SELECT * FROM {table}"  # noqa: S608 - our schema has the names of tables and columns
    columns = ", ".join(column[0] for column in source.execute(select).description)
    expected, found = _digest(source.execute(select)), _digest_target(target, table, columns)
    if found not in (expected, (0, 0)):
        raise LedgerUnavailable(operator_note="PostgreSQL has other rows already: name an empty database")
    if found != expected:
        with target.cursor() as cursor, cursor.copy(f"COPY {table} ({columns}) FROM STDIN".encode()) as copy:
            for row in source.execute(select):
                copy.write_row(row)
        if _digest_target(target, table, columns) != expected:
            raise LedgerUnavailable(operator_note=f"PostgreSQL changed rows of {table}, so none is copied")
    return expected[0]


def _digest_target(target: psycopg.Connection[Any], table: str, columns: str) -> tuple[int, int]:
    with target.cursor(name="rows") as cursor:  # a cursor of the server: memory holds few rows at once
        cursor.itersize = 2000
        cursor.execute(f"SELECT {columns} FROM {table}".encode())  # noqa: S608
        return _digest(cursor)


def _digest(rows: Iterable[Sequence[Any]]) -> tuple[int, int]:
    """Return the number of rows and the sum of their hashes, which does not depend on their order."""
    count = total = 0
    for row in rows:
        count += 1
        total += int.from_bytes(sha256(repr(tuple(row)).encode()).digest())
    return count, total
