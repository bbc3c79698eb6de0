"""Copies of the SQLite ledger's file: one for a backup, and a locked one whose rows nobody changes."""

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from voicepass.errors import LedgerUnavailable


def back_up(file: Path, copy: Path) -> None:
    """Write the ledger in `file` to the new file `copy`, durably and for its owner only. voicepass may run.

    Raises OSError if `copy` exists or cannot be written, and sqlite3.Error if SQLite fails.
    """
    # Under another name first: then a backup that was interrupted does not look like a complete one.
    with tempfile.NamedTemporaryFile(dir=copy.parent, prefix=f".{copy.name}.") as unfinished:
        with closing(_open(file)) as connection:
            connection.execute("VACUUM INTO ?", (unfinished.name,))
        os.fsync(unfinished.fileno())
        os.link(unfinished.name, copy)  # unlike a renaming, this never overwrites
    os.sync()  # the file's name, too


@contextmanager
def lock_file(file: Path) -> Iterator[sqlite3.Connection]:
    """Keep every other process away from a ledger. Raises LedgerUnavailable if one has it open."""
    try:
        with closing(_open(file)) as connection:
            # In WAL mode, this mode needs a lock that conflicts with each open connection, also with an idle one.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("BEGIN EXCLUSIVE")
            yield connection
    except sqlite3.Error as error:
        note = f"{file} cannot be locked ({error}): stop every voicepass that uses it, then run this again"
        raise LedgerUnavailable(operator_note=note) from error


def _open(file: Path) -> sqlite3.Connection:
    # mode=rw: SQLite must not create a file that is missing.
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=1, isolation_level=None)
