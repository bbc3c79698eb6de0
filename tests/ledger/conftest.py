"""Both engines; each test gets an empty ledger. PostgreSQL is started once, from the wheel that contains it."""

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.ledger.given import Engine, Postgres, TurnedClock
from voicepass.ledger import Ledger


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    # The path is short because it contains the server's socket. The server gets its own user if the tests run as root.
    with tempfile.TemporaryDirectory(prefix="vp") as directory:
        server = Postgres(Path(directory) / "data")
        yield server
        server.cleanup()


@pytest.fixture
def clock() -> TurnedClock:
    return TurnedClock()


@pytest.fixture
def pooler(postgres: Postgres) -> Iterator[str]:
    """The URL of a pgbouncer, which stands for the poolers of hosted PostgreSQL services."""
    if shutil.which("pgbouncer") is None:
        if "REQUIRE_PGBOUNCER" in os.environ:
            pytest.fail("pgbouncer is not installed")
        pytest.skip("pgbouncer is not installed (Debian: apt-get install pgbouncer)")
    with tempfile.TemporaryDirectory(prefix="vp") as directory, postgres.pooler(Path(directory)) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres", pytest.param("pooler", marks=pytest.mark.long)])
def engine(request: pytest.FixtureRequest, tmp_path: Path, clock: TurnedClock) -> Engine:
    """Each test runs on SQLite and PostgreSQL. In the full check, it also runs behind a pooler."""
    name: str = request.param
    if name == "sqlite":
        return Engine(name, str(tmp_path / "ledger.db"), clock)
    if name == "pooler":
        return Engine(name, request.getfixturevalue("pooler"), clock)
    return Engine(name, request.getfixturevalue("postgres").fresh(), clock)


@pytest.fixture
async def ledger(engine: Engine) -> AsyncIterator[Ledger]:
    async with engine.open() as opened:
        yield opened
