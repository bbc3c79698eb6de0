"""Both engines, each test in a fresh place; PostgreSQL is started once, from the wheel that carries it."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.ledger.given import Engine, Postgres, TurnedClock
from voicepass.ledger import Ledger


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    # A short path, for it holds the server's socket; owned by a user of its own where the tests run as root.
    with tempfile.TemporaryDirectory(prefix="vp") as directory:
        server = Postgres(Path(directory) / "data")
        yield server
        server.cleanup()


@pytest.fixture
def clock() -> TurnedClock:
    return TurnedClock()


@pytest.fixture(params=["sqlite", "postgres"])
def engine(request: pytest.FixtureRequest, tmp_path: Path, clock: TurnedClock) -> Engine:
    name: str = request.param
    url = str(tmp_path / "ledger.db") if name == "sqlite" else request.getfixturevalue("postgres").fresh()
    return Engine(name, url, clock)


@pytest.fixture
async def ledger(engine: Engine) -> AsyncIterator[Ledger]:
    async with engine.opened() as opened:
        yield opened
