"""A fake issuer over HTTP: it publishes what a test sets, and records the requests."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from tests.conftest import TOKEN_ISSUER, Clock
from tests.identity.hostile_jwks import KID, make_jwk, make_set
from tests.identity.hostile_tokens import get_ec_key
from tests.servers import listening
from voicepass.errors import Refusal, TokenInvalid
from voicepass.identity.jwks import DISCOVERY_PATH, PublishedKeys

JWKS_PATH: Final = "/jwks.json"
PATIENT_SECONDS: Final = 60.0  # the issuer of the tests answers at once, but the machine may be busy

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Issuer:
    """A fake issuer over HTTP: it records the path and time of each request, and gives the answers that a test sets."""

    def __init__(self) -> None:
        self.url = ""
        self.clock = Clock(50_000.0)
        self.asked: list[str] = []
        self.asked_at: list[float] = []
        self.was_asked = asyncio.Event()
        self.last_request = ""
        self.answers: dict[str, Answer] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            chunk = await reader.read(65536)
            request += chunk
            if not chunk or not request.startswith(b"GET "):
                writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
        self.last_request = request.decode()
        path = self.last_request.split(" ")[1]
        self.asked.append(path)
        self.asked_at.append(self.clock())
        self.was_asked.set()
        await self.answers[path](writer)
        await writer.drain()

    def publish(self, *keys: object) -> None:
        self.answers[JWKS_PATH] = make_answer(make_set(*keys))

    def describe(self, **members: object) -> None:
        """Publish a discovery document; None removes a member."""
        document = {"issuer": TOKEN_ISSUER, "jwks_uri": self.url + JWKS_PATH} | members
        body = {member: value for member, value in document.items() if value is not None}
        self.answers[DISCOVERY_PATH] = make_answer(json.dumps(body).encode())


def make_answer(body: bytes, *, status: str = "200 OK", headers: str = "") -> Answer:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n".encode()

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head + body)

    return answer


def make_raw_answer(data: bytes) -> Answer:
    """Answer with these bytes, which need not be HTTP."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


def make_endless_answer(start: bytes, again: bytes, *, every_seconds: float) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while True:
            writer.write(again)
            await writer.drain()
            await asyncio.sleep(every_seconds)

    return answer


async def never_answer(writer: asyncio.StreamWriter) -> None:
    del writer
    await asyncio.Event().wait()


@asynccontextmanager
async def open_keys(
    issuer: Issuer,
    *,
    url: str | None = None,
    token_issuer: str = TOKEN_ISSUER,
    algorithm: str = "ES256",
    fetch_seconds: float = PATIENT_SECONDS,
) -> AsyncIterator[PublishedKeys]:
    keys = PublishedKeys(
        url=url or issuer.url + JWKS_PATH,
        token_issuer=token_issuer,
        algorithm=algorithm,
        clock=issuer.clock,
        fetch_seconds=fetch_seconds,
    )
    try:
        yield keys
    finally:
        await keys.aclose()


EC_JWK: Final = make_jwk(get_ec_key("provider", "ES256"), kid=KID)
OLD_KEY: Final = ec.generate_private_key(ec.SECP256R1())
NEW_KEY: Final = ec.generate_private_key(ec.SECP256R1())
OLD: Final = make_jwk(OLD_KEY, kid="old")
NEW: Final = make_jwk(NEW_KEY, kid="new")


async def find_key_name(keys: PublishedKeys, kid: str | None = KID) -> str | type[Refusal] | None:
    """Return the name of the one key that serves, or the refusal. Any other exception fails the test."""
    try:
        served = await keys.keys_for({} if kid is None else {"kid": kid})
    except Refusal as refusal:
        return type(refusal)
    if not served:
        return TokenInvalid  # the authenticator refuses a token without a key
    (key,) = served
    return key.names.get("kid")


async def wait_for_refresh(keys: PublishedKeys) -> None:
    """Wait until the refresh in flight has ended: a token with an unknown key waits for it and starts no other one."""
    await find_key_name(keys, "unknown")


@asynccontextmanager
async def open_trap() -> AsyncIterator[tuple[str, list[str]]]:
    """Run a listener that voicepass must never connect to. Yield its URL and the list of connections."""
    visitors: list[str] = []

    async def note(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visitors.append(str(writer.get_extra_info("peername")))

    async with listening(note) as url:
        yield url, visitors
