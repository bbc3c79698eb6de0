from collections.abc import Iterator

import pytest

from tests.ledger.conftest import postgres
from tests.ledger.given import Postgres

__all__ = ["postgres"]


@pytest.fixture
def quick_postgres(postgres: Postgres) -> Iterator[Postgres]:
    """A server that does not sync its commits, because a simulated day has a hundred thousand of them."""
    postgres.run("ALTER SYSTEM SET fsync = off")
    postgres.run("SELECT pg_reload_conf()")
    yield postgres
    postgres.run("ALTER SYSTEM RESET fsync")
    postgres.run("SELECT pg_reload_conf()")
