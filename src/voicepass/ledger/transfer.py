"""The move from SQLite to PostgreSQL: all rows in one transaction, compared before it is committed."""

import sqlite3
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any, Final

import psycopg
from psycopg import sql

from voicepass.errors import LedgerUnavailable
from voicepass.ledger.postgres_failures import explain_failure
from voicepass.ledger.postgres_url import parse_url

Digests = dict[str, tuple[int, int]]
"""For each table, the number of its rows and the sum of their hashes, which does not depend on their order."""

_TRANSIENT: Final = ("leases", "lookups")
"""Tables about processes that run now. Nobody needs these rows after a move."""


def copy_rows(source: sqlite3.Connection, url: str) -> dict[str, int]:
    """Copy every row into the tables at `url`, which exist and are empty. Returns the number of rows of each table.

    If the same rows are there already, this changes nothing. If it is interrupted, PostgreSQL has no row of it.
    Raises LedgerUnavailable if other rows are there, or if PostgreSQL cannot be used.
    """
    names = source.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
    tables = [name for (name,) in names if name not in _TRANSIENT]
    columns = {table: [column[0] for column in _read(source, table).description] for table in tables}
    expected = {table: _digest(_read(source, table)) for table in tables}
    try:
        with psycopg.connect(**parse_url(url) | {"connect_timeout": 5}) as target:
            target.execute("SET LOCAL statement_timeout = 0")
            locked = sql.SQL(", ").join(map(sql.Identifier, tables))
            target.execute(sql.SQL("LOCK TABLE {} IN EXCLUSIVE MODE").format(locked))
            found = _digest_target(target, columns)
            if found != expected and any(count for count, _ in found.values()):
                raise LedgerUnavailable(operator_note="PostgreSQL has other rows already: name an empty database")
            if found != expected:
                _copy(source, target, columns)
                if _digest_target(target, columns) != expected:
                    raise LedgerUnavailable(operator_note="PostgreSQL changed some rows, so none is copied")
    except (psycopg.Error, OSError) as error:
        raise LedgerUnavailable(operator_note=explain_failure(error)) from error
    return {table: count for table, (count, _) in expected.items()}


def _read(source: sqlite3.Connection, table: str) -> sqlite3.Cursor:
    return source.execute(f'SELECT * FROM "{table}"')  # noqa: S608 - a name from our schema


def _copy(source: sqlite3.Connection, target: psycopg.Connection[Any], columns: dict[str, list[str]]) -> None:
    for table, names in columns.items():
        into = sql.SQL("COPY {} ({}) FROM STDIN").format(sql.Identifier(table), _list_names(names))
        with target.cursor() as cursor, cursor.copy(into) as copy:
            for row in _read(source, table):
                copy.write_row(row)


def _digest_target(target: psycopg.Connection[Any], columns: dict[str, list[str]]) -> Digests:
    digests: Digests = {}
    for table, names in columns.items():
        with target.cursor(name="rows") as cursor:  # a cursor of the server: memory holds few rows at once
            cursor.itersize = 2000
            cursor.execute(sql.SQL("SELECT {} FROM {}").format(_list_names(names), sql.Identifier(table)))
            digests[table] = _digest(cursor)
    return digests


def _list_names(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))


def _digest(rows: Iterable[Sequence[Any]]) -> tuple[int, int]:
    count = total = 0
    for row in rows:
        count += 1
        total += int.from_bytes(sha256(repr(tuple(row)).encode()).digest())
    return count, total
