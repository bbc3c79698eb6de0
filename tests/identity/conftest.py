"""The fake issuer that the tests of keys use."""

from collections.abc import AsyncIterator

import pytest

from tests.identity.issuer import EC_JWK, Issuer
from tests.servers import listening


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    """A fake issuer that publishes one ES256 key, `key-1`, until a test changes that."""
    issuer = Issuer()
    async with listening(issuer.serve) as issuer.url:
        issuer.publish(EC_JWK)
        issuer.describe()
        yield issuer
