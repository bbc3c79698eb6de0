"""What every test of keys starts with."""

from collections.abc import AsyncIterator

import pytest

from tests.identity.issuer import EC_JWK, Issuer
from tests.servers import listening


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    """Publishes one ES256 key, `key-1`, until a test says otherwise."""
    issuer = Issuer()
    async with listening(issuer.serve) as issuer.url:
        issuer.publish(EC_JWK)
        issuer.describe()
        yield issuer
