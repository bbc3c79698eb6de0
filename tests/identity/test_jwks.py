"""The keys that an issuer publishes: fetched once, rotated, outlived; and no token says where to fetch them."""

import asyncio
import gzip
import json
import statistics
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence, Sized
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final

import httpx
import pytest
import respx
import structlog
from cryptography.hazmat.primitives.asymmetric import ec

from elevenlabs_emulator import EmulatedAgent, Emulator, create_emulator
from tests.canaries import API_KEY
from tests.conftest import AGENT_ID, AUDIENCE, TOKEN_ISSUER, serving, settings_with
from tests.faults import tls
from tests.identity.hostile_jwks import KID, HostileSet, hostile_sets, jwk_of, right, set_of, stranger
from tests.identity.hostile_tokens import Mint, Sign, ec_key_of, ecdsa, rsa_key_of, signer_for
from tests.servers import free_port, listening, running
from voicepass.app import create_app
from voicepass.errors import KeysUnavailable, Refusal, TokenInvalid
from voicepass.identity import FixedKey, JwtAuthenticator, TrustedIssuer
from voicepass.identity.jwks import DISCOVERY_PATH, FETCH_SECONDS, MAX_DOCUMENT_BYTES, PublishedKeys
from voicepass.identity.keys import key_from_secret
from voicepass.model import User

pytestmark = pytest.mark.anyio

JWKS_PATH: Final = "/jwks.json"
IMPATIENT_SECONDS: Final = 0.3
NOW: Final = 1_800_000_000.0

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Clock:
    """Monotonic seconds, moved by hand."""

    def __init__(self) -> None:
        self.seconds = 50_000.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


class Issuer:
    """An issuer at its HTTP edge: remembers what it was asked for and when, and answers as a test says."""

    def __init__(self) -> None:
        self.url = ""
        self.clock = Clock()
        self.asked: list[str] = []
        self.asked_at: list[float] = []
        self.was_asked = asyncio.Event()
        self.answers: dict[str, Answer] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            chunk = await reader.read(65536)
            request += chunk
            if not chunk or not request.startswith(b"GET "):
                writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
        path = request.split(b" ")[1].decode()
        self.asked.append(path)
        self.asked_at.append(self.clock())
        self.was_asked.set()
        await self.answers[path](writer)
        await writer.drain()

    def publish(self, *keys: object) -> None:
        self.answers[JWKS_PATH] = saying(set_of(*keys))

    def describe(self, **members: object) -> None:
        """Publish a discovery document; None takes a member out."""
        document = {"issuer": TOKEN_ISSUER, "jwks_uri": self.url + JWKS_PATH} | members
        body = {member: value for member, value in document.items() if value is not None}
        self.answers[DISCOVERY_PATH] = saying(json.dumps(body).encode())


def saying(body: bytes, *, status: str = "200 OK", headers: str = "") -> Answer:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n".encode()

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head + body)

    return answer


def sending(data: bytes) -> Answer:
    """Bytes, whether they are HTTP or not."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


def repeating(start: bytes, again: bytes, *, every_seconds: float) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while True:
            writer.write(again)
            await writer.drain()
            await asyncio.sleep(every_seconds)

    return answer


async def silence(writer: asyncio.StreamWriter) -> None:
    del writer
    await asyncio.Event().wait()


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    """Publishes one ES256 key, `key-1`, until a test says otherwise."""
    issuer = Issuer()
    async with listening(issuer.serve) as issuer.url:
        issuer.publish(EC_JWK)
        issuer.describe()
        yield issuer


@asynccontextmanager
async def keys_of(
    issuer: Issuer,
    *,
    url: str | None = None,
    token_issuer: str = TOKEN_ISSUER,
    algorithm: str = "ES256",
    fetch_seconds: float = FETCH_SECONDS,
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


EC_JWK: Final = jwk_of(ec_key_of("provider", "ES256"), kid=KID)
OLD_KEY: Final = ec.generate_private_key(ec.SECP256R1())
NEW_KEY: Final = ec.generate_private_key(ec.SECP256R1())
OLD: Final = jwk_of(OLD_KEY, kid="old")
NEW: Final = jwk_of(NEW_KEY, kid="new")


async def outcome(keys: PublishedKeys, kid: str | None = KID) -> str | type[Refusal] | None:
    """The name of the one key that serves, or the refusal. Any other exception escapes, and fails the test."""
    try:
        served = await keys.keys_for({} if kid is None else {"kid": kid})
    except Refusal as refusal:
        return type(refusal)
    if not served:
        return TokenInvalid  # the authenticator refuses a token without a key
    (key,) = served
    return key.names.get("kid")


def signer_of(jwk: dict[str, object]) -> Sign:
    key = {EC_JWK["x"]: ec_key_of("provider", "ES256"), OLD["x"]: OLD_KEY, NEW["x"]: NEW_KEY}[jwk["x"]]
    return ecdsa(key, "ES256")


async def settled(keys: PublishedKeys) -> None:
    """Wait for a refresh that nobody waits for."""
    if keys._refresh is not None:
        await keys._refresh


# One fetch for all --------------------------------------------------------------------------------------------------


async def test_500_users_at_a_cold_start_cause_one_fetch_and_are_all_answered(issuer: Issuer) -> None:
    async with keys_of(issuer) as keys:
        outcomes = await asyncio.gather(*(outcome(keys) for _ in range(500)))

    assert outcomes == [KID] * 500
    assert len(issuer.asked) == 1


async def test_500_users_at_a_cold_start_amid_an_outage_cause_one_fetch_and_are_all_told(issuer: Issuer) -> None:
    issuer.answers[JWKS_PATH] = saying(b"", status="503 Service Unavailable")

    async with keys_of(issuer) as keys:
        outcomes = await asyncio.gather(*(outcome(keys) for _ in range(500)))

    assert outcomes == [KeysUnavailable] * 500
    assert len(issuer.asked) == 1


async def test_500_users_whose_keys_have_grown_old_wait_for_one_fetch(issuer: Issuer) -> None:
    issuer.publish(OLD)
    async with keys_of(issuer) as keys:
        await outcome(keys, "old")
        issuer.publish(NEW)
        issuer.clock.advance(600)

        outcomes = await asyncio.gather(*(outcome(keys, kid) for kid in ["old", "new"] * 250))

    assert outcomes == [TokenInvalid, "new"] * 250
    assert len(issuer.asked) == 2


async def test_a_user_who_hangs_up_takes_the_fetch_from_nobody(issuer: Issuer) -> None:
    hung_up = asyncio.Event()

    async def answer(writer: asyncio.StreamWriter) -> None:
        await hung_up.wait()
        await saying(set_of(EC_JWK))(writer)

    issuer.answers[JWKS_PATH] = answer
    async with keys_of(issuer) as keys:
        waiting = [asyncio.create_task(outcome(keys)) for _ in range(10)]
        await issuer.was_asked.wait()

        waiting[0].cancel()
        hung_up.set()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)

    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert outcomes[1:] == [KID] * 9
    assert len(issuer.asked) == 1


async def test_closing_ends_a_fetch_that_is_under_way(issuer: Issuer) -> None:
    issuer.answers[JWKS_PATH] = silence
    async with keys_of(issuer) as keys:
        waiting = asyncio.create_task(outcome(keys))
        await issuer.was_asked.wait()

        await keys.aclose()

        with pytest.raises(asyncio.CancelledError):
            await waiting


# A flood of names ---------------------------------------------------------------------------------------------------


async def test_10000_unknown_names_at_once_cause_no_fetch_within_the_cooldown(issuer: Issuer) -> None:
    async with keys_of(issuer) as keys:
        await outcome(keys)
        issuer.clock.advance(29.9)

        outcomes = await asyncio.gather(*(outcome(keys, f"unknown-{n}") for n in range(10_000)))

    assert set(outcomes) == {TokenInvalid}
    assert len(issuer.asked) == 1


async def test_a_flood_of_unknown_names_causes_one_fetch_in_30_seconds_and_hurts_no_good_token(issuer: Issuer) -> None:
    async with keys_of(issuer) as keys:
        await outcome(keys)
        sizes = sizes_of(keys)
        good: list[object] = []
        flood: list[object] = []
        for wave in range(100):
            issuer.clock.advance(3)
            names = [f"unknown-{wave}-{n}" for n in range(100)]
            *refused, served = await asyncio.gather(*(outcome(keys, name) for name in [*names, KID]))
            flood += refused
            good.append(served)

        grown = sizes_of(keys)

    gaps = [after - before for before, after in zip(issuer.asked_at, issuer.asked_at[1:], strict=False)]
    assert flood == [TokenInvalid] * 10_000
    assert good == [KID] * 100
    assert min(gaps) >= 30
    assert len(issuer.asked) == 1 + 300 // 30
    assert grown == sizes


def sizes_of(keys: PublishedKeys) -> dict[str, int | None]:
    """How much each attribute holds: nothing may grow with what is asked."""
    return {name: len(value) if isinstance(value, Sized) else None for name, value in vars(keys).items()}


async def test_a_flood_amid_a_hanging_fetch_keeps_no_good_token_waiting(issuer: Issuer) -> None:
    async with keys_of(issuer) as keys:
        await outcome(keys)
        issuer.answers[JWKS_PATH] = silence
        issuer.was_asked.clear()
        issuer.clock.advance(30)
        flood = [asyncio.create_task(outcome(keys, f"unknown-{n}")) for n in range(1000)]
        await issuer.was_asked.wait()

        async with asyncio.timeout(FETCH_SECONDS / 2):
            served = [await outcome(keys) for _ in range(1000)]

        assert served == [KID] * 1000
        assert not any(refused.done() for refused in flood)
        await keys.aclose()
        await asyncio.gather(*flood, return_exceptions=True)


# Which keys a token is tried with ------------------------------------------------------------------------------------


def named(owner: str, **names: str | None) -> dict[str, object]:
    return {"own": EC_JWK, "old": OLD, "new": NEW}[owner] | {"kid": None} | names


X5T: Final = {"x5t": "AAAA", "x5t#S256": "BBBB"}
CHOICES: dict[str, tuple[list[dict[str, object]], dict[str, str], list[int]]] = {
    "no name: all": ([named("own", kid="a"), named("old", kid="b")], {}, [0, 1]),
    "no name, one key": ([named("own", kid="a")], {}, [0]),
    "kid": ([named("own", kid="a"), named("old", kid="b")], {"kid": "b"}, [1]),
    "kid of two": ([named("own", kid="a"), named("old", kid="b"), named("new", kid="a")], {"kid": "a"}, [0, 2]),
    "kid of a key that is there twice": ([named("own", kid="a"), named("own", kid="a")], {"kid": "a"}, [0, 1]),
    "kid that no key has": ([named("own", kid="a"), named("old")], {"kid": "c"}, []),
    "kid, and no key has one": ([named("own"), named("old")], {"kid": "c"}, [0, 1]),
    "x5t": ([named("own", kid="a", **X5T), named("old", kid="b")], {"x5t": "AAAA"}, [0]),
    "x5t#S256": ([named("own", kid="a"), named("old", **X5T)], {"x5t#S256": "BBBB"}, [1]),
    "x5t of another": ([named("own", kid="a", **X5T)], {"x5t": "CCCC"}, []),
    "x5t, and no key has one": ([named("own", kid="a"), named("old", kid="b")], {"x5t": "AAAA"}, [0, 1]),
    "kid of one, x5t of another": ([named("own", kid="a"), named("old", **X5T)], {"kid": "a", "x5t": "AAAA"}, [0, 1]),
    "kid right, x5t renewed": ([named("own", kid="a", **X5T)], {"kid": "a", "x5t": "CCCC"}, [0]),
}


async def test_a_token_is_tried_with_the_keys_that_its_header_names_or_with_all(issuer: Issuer) -> None:
    seen = {}
    for choice, (published, names, _) in CHOICES.items():
        issuer.publish(*published)
        async with keys_of(issuer) as keys:
            served = await keys.keys_for(names)
        owners = [signer_of(jwk) for jwk in published]
        seen[choice] = [n for n, sign in enumerate(owners) if any(key.verifies(b"x", sign(b"x")) for key in served)]

    assert seen == {choice: expected for choice, (_, _, expected) in CHOICES.items()}


async def test_a_token_is_tried_with_eight_keys_at_most(issuer: Issuer) -> None:
    mint, others = mint_of("a", "ES256"), [OLD | {"kid": f"k{n}"} for n in range(8)]
    own, users = jwk_for(mint), []
    for published in ([*others[:7], own], [*others, own]):
        async with authenticator_for(issuer, mint, jwks=[published]) as authenticator:
            users.append(await user_of(authenticator, mint.token()))

    assert isinstance(users[0], User)
    assert users[1] is TokenInvalid


async def test_a_member_that_is_not_used_is_logged_once_with_the_reason(issuer: Issuer) -> None:
    members = [EC_JWK, EC_JWK | {"kid": "bad", "y": "AQ"}, EC_JWK | {"kid": "enc", "use": "enc"}, None]
    issuer.publish(*members)
    with structlog.testing.capture_logs() as logged:
        async with keys_of(issuer) as keys:
            for _ in range(3):
                await outcome(keys)
                await settled(keys)
                issuer.clock.advance(600)
            issuer.publish(*members, EC_JWK | {"kid": "rs", "alg": "RS256"})
            await outcome(keys)

    assert [(line["kid"], line["note"]) for line in logged if line["event"] == "keys.skipped"] == [
        ("bad", "is malformed"),
        ("enc", "is not meant for verifying signatures (use, key_ops)"),
        (None, "is not a JSON object"),
        ("rs", "is meant for another algorithm than ES256"),
    ]


async def test_where_no_key_can_be_used_the_refusal_says_why(issuer: Issuer) -> None:
    notes = []
    for members in ([EC_JWK | {"use": "enc"}, EC_JWK | {"use": "enc"}, {"kty": "RSA"}], []):
        issuer.publish(*members)
        async with keys_of(issuer) as keys:
            with pytest.raises(KeysUnavailable) as refused:
                await keys.check()
            notes.append(refused.value.operator_note.partition("the document ")[2])

    unfit = "is not meant for verifying signatures (use, key_ops), is not a key for ES256"
    assert notes == [f"holds no key for ES256: {unfit})", "holds no key for ES256: it is empty)"]


# Rotation -----------------------------------------------------------------------------------------------------------


async def test_a_new_key_is_accepted_on_the_first_request_after_the_cooldown(issuer: Issuer) -> None:
    issuer.publish(OLD)
    async with keys_of(issuer) as keys:
        await outcome(keys, "old")
        issuer.publish(OLD, NEW)
        outcomes = []
        for _ in range(30):
            issuer.clock.advance(1)
            outcomes.append(await outcome(keys, "new"))

    assert outcomes == [TokenInvalid] * 29 + ["new"]
    assert len(issuer.asked) == 2


@pytest.mark.parametrize("seconds_between", [1, 60, 200, 299, 301, 599, 600, 601, 3600, 86400])
async def test_a_withdrawn_key_is_refused_ten_minutes_later_however_rarely_users_come(
    issuer: Issuer, seconds_between: int
) -> None:
    issuer.publish(OLD)
    async with keys_of(issuer) as keys:
        await outcome(keys, "old")
        issuer.publish(NEW)
        seconds = 0
        served_until = 0
        while seconds < 700:
            seconds += seconds_between
            issuer.clock.advance(seconds_between)
            if await outcome(keys, "old") == "old":
                served_until = seconds
            await settled(keys)

    assert served_until < 600


async def test_a_failure_of_long_ago_does_not_let_a_withdrawn_key_serve(issuer: Issuer) -> None:
    issuer.publish(OLD)
    async with keys_of(issuer) as keys:
        await outcome(keys, "old")
        issuer.answers[JWKS_PATH] = saying(b"", status="502 Bad Gateway")
        issuer.clock.advance(301)
        await outcome(keys, "old")
        await settled(keys)
        issuer.publish(NEW)
        issuer.clock.advance(1200)

        after_a_quiet_time = await outcome(keys, "old")

    assert after_a_quiet_time is TokenInvalid


async def test_a_rotation_with_an_overlap_refuses_neither_key_in_1000_requests(issuer: Issuer) -> None:
    issuer.publish(OLD)
    async with keys_of(issuer) as keys:
        await outcome(keys, "old")
        issuer.publish(OLD, NEW)
        issuer.clock.advance(30)
        outcomes = []
        for request in range(1000):
            outcomes.append(await outcome(keys, ["new", "old"][request % 2]))
            issuer.clock.advance(1.5)

    assert outcomes == ["new", "old"] * 500
    assert len(issuer.asked) <= 1500 // 300 + 2


async def test_keys_that_have_not_aged_are_fetched_again_by_nobody(issuer: Issuer) -> None:
    async with keys_of(issuer) as keys:
        for _ in range(300):
            await outcome(keys)
            await settled(keys)
            issuer.clock.advance(1)

    assert len(issuer.asked) == 1


# Outages ------------------------------------------------------------------------------------------------------------


def refuse_connections(issuer: Issuer) -> None:
    issuer.describe(jwks_uri=f"http://127.0.0.1:{free_port()}{JWKS_PATH}")


def speak_no_tls(issuer: Issuer) -> None:
    issuer.describe(jwks_uri=issuer.url.replace("http:", "https:") + JWKS_PATH)


def answer_with(answer: Answer) -> Callable[[Issuer], None]:
    def begin(issuer: Issuer) -> None:
        issuer.answers[JWKS_PATH] = answer

    return begin


OUTAGES: dict[str, Callable[[Issuer], None]] = {
    "503": answer_with(saying(b"", status="503 Service Unavailable")),
    "404": answer_with(saying(b"", status="404 Not Found")),
    "hang": answer_with(silence),
    "garbage": answer_with(sending(b"\x16\x03\x01\x00\xff" * 100)),
    "a page": answer_with(saying(b"<!doctype html><title>Down for maintenance</title>")),
    "no TLS where https is asked for": speak_no_tls,
    "10 MB": answer_with(saying(b" " * 10_000_000)),
    "redirect": answer_with(saying(b"", status="302 Found", headers="Location: /elsewhere\r\n")),
    "connection refused": refuse_connections,
    "closed without an answer": answer_with(sending(b"")),
    "cut off": answer_with(sending(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"keys":')),
    "an empty key set": answer_with(saying(set_of())),
}

MOVED: Final = {"no TLS where https is asked for", "connection refused"}
"""Here it is the discovery document that leads to where nothing good answers."""

each_outage = pytest.mark.parametrize("outage", OUTAGES)


async def test_a_certificate_failure_is_logged_as_one_with_what_to_do() -> None:
    async def never(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        raise AssertionError("nothing is sent to a server whose certificate is refused")

    async with listening(never, tls=tls()) as base_url:
        keys = PublishedKeys(url=base_url + JWKS_PATH, token_issuer=TOKEN_ISSUER, algorithm="ES256", clock=Clock())
        with structlog.testing.capture_logs() as logged, pytest.raises(KeysUnavailable) as refused:
            await keys.check()
        await keys.aclose()

    reason = "the certificate of 127.0.0.1 was refused (self-signed certificate)"
    assert reason in refused.value.operator_note
    (line,) = [line for line in logged if line["event"] == "keys.refresh_failed"]
    assert line["note"].startswith(reason)
    assert "SSL_CERT_FILE" in line["note"]


def end_of_outage(issuer: Issuer) -> None:
    issuer.publish(EC_JWK)
    issuer.describe()


@each_outage
async def test_the_last_good_keys_serve_for_an_hour_of_outage_and_then_no_longer(issuer: Issuer, outage: str) -> None:
    path = DISCOVERY_PATH if outage in MOVED else JWKS_PATH
    async with keys_of(issuer, url=issuer.url + path, fetch_seconds=IMPATIENT_SECONDS) as keys:
        await outcome(keys)
        began = issuer.clock()
        OUTAGES[outage](issuer)

        amid = []
        for seconds in (1, 301, 3599):
            issuer.clock.seconds = began + seconds
            amid.append(await outcome(keys))
            await settled(keys)
        issuer.clock.seconds = began + 3600
        too_long = [await outcome(keys, kid) for kid in (KID, "unknown", None)]
        end_of_outage(issuer)
        issuer.clock.advance(5)
        afterwards = [await outcome(keys, kid) for kid in (KID, "unknown", None)]

    assert amid == [KID] * 3
    assert too_long == [KeysUnavailable] * 3
    assert afterwards == [KID, TokenInvalid, KID]


@each_outage
async def test_a_cold_start_amid_an_outage_fails_closed_and_recovers_by_itself(issuer: Issuer, outage: str) -> None:
    path = DISCOVERY_PATH if outage in MOVED else JWKS_PATH
    OUTAGES[outage](issuer)
    async with keys_of(issuer, url=issuer.url + path, fetch_seconds=IMPATIENT_SECONDS) as keys:
        amid = [await outcome(keys, kid) for kid in (KID, "unknown", None)]
        end_of_outage(issuer)
        issuer.clock.advance(4.9)
        too_soon = await outcome(keys)
        issuer.clock.advance(0.1)
        afterwards = await outcome(keys)

    assert [*amid, too_soon] == [KeysUnavailable] * 4
    assert afterwards == KID
    assert issuer.asked.count(path) == 2


async def test_an_outage_at_a_cold_start_is_tried_once_in_5_seconds(issuer: Issuer) -> None:
    issuer.answers[JWKS_PATH] = saying(b"", status="500 Internal Server Error")
    async with keys_of(issuer) as keys:
        for second in range(60):
            await asyncio.gather(*(outcome(keys, f"key-{second}-{n}") for n in range(10)))
            issuer.clock.advance(1)

    assert len(issuer.asked) == 60 // 5


async def test_an_outage_is_tried_once_in_30_seconds_while_there_are_keys(issuer: Issuer) -> None:
    async with keys_of(issuer) as keys:
        await outcome(keys)
        issuer.answers[JWKS_PATH] = saying(b"", status="500 Internal Server Error")
        for second in range(300):
            await asyncio.gather(*(outcome(keys, f"key-{second}-{n}") for n in range(10)))
            issuer.clock.advance(1)

    assert len(issuer.asked) == 300 // 30


async def test_users_wait_for_no_failing_fetch_while_there_are_keys(issuer: Issuer) -> None:
    async with keys_of(issuer) as keys:
        await outcome(keys)
        issuer.answers[JWKS_PATH] = saying(b"", status="500 Internal Server Error")
        issuer.clock.advance(301)
        await outcome(keys)
        await settled(keys)
        issuer.answers[JWKS_PATH] = silence

        async with asyncio.timeout(FETCH_SECONDS / 2):
            served = []
            for _ in range(1000):
                issuer.clock.advance(0.5)
                served.append(await outcome(keys))

        assert keys._refresh is not None  # it hangs still, and nobody hung with it

    assert served == [KID] * 1000


async def test_a_refresh_ahead_of_time_keeps_nobody_waiting(issuer: Issuer) -> None:
    async with keys_of(issuer) as keys:
        await outcome(keys)
        issuer.answers[JWKS_PATH] = silence
        issuer.was_asked.clear()
        issuer.clock.advance(300)

        async with asyncio.timeout(FETCH_SECONDS / 2):
            served = [await outcome(keys) for _ in range(1000)]
            await issuer.was_asked.wait()

    assert served == [KID] * 1000


async def test_an_outage_that_ends_is_over_for_users_within_30_seconds(issuer: Issuer) -> None:
    issuer.publish(OLD)
    async with keys_of(issuer) as keys:
        await outcome(keys, "old")
        issuer.answers[JWKS_PATH] = saying(b"", status="500 Internal Server Error")
        issuer.clock.advance(700)
        await outcome(keys, "new")
        issuer.publish(NEW)
        issuer.clock.advance(30)

        outcomes = [await outcome(keys, "new"), await outcome(keys, "old")]

    assert outcomes == ["new", TokenInvalid]


async def test_the_first_user_after_a_quiet_hour_is_served_though_the_last_fetch_had_failed(issuer: Issuer) -> None:
    async with keys_of(issuer) as keys:
        await outcome(keys)
        issuer.answers[JWKS_PATH] = saying(b"", status="500 Internal Server Error")
        issuer.clock.advance(301)
        await outcome(keys)
        await settled(keys)
        issuer.publish(EC_JWK)
        issuer.clock.advance(4000)

        first = await outcome(keys)

    assert first == KID


async def test_without_keys_the_service_answers_503_and_never_401() -> None:
    signer = signer_for("ES256")
    mint = Mint(signer=signer, token_issuer=TOKEN_ISSUER, audience=AUDIENCE, now=time.time())
    settings: dict[str, object] = {
        "voicepass_jwt_algorithm": "ES256",
        "voicepass_jwt_secret": None,
        "voicepass_jwks_url": f"http://127.0.0.1:{free_port()}{JWKS_PATH}",
    }

    async with serving(**settings) as client:
        response = await client.post("/v1/signed-url", headers={"Authorization": f"Bearer {mint.token()}"})

    assert (response.status_code, response.json()["code"]) == (503, "keys_unavailable")
    assert response.headers["retry-after"] == "5"


# What one fetch may cost --------------------------------------------------------------------------------------------

GZIPPED: Final = "Content-Encoding: gzip\r\n"
JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
ABUSES: dict[str, Answer] = {
    "headers in a trickle": repeating(b"HTTP/1.1 200 OK\r\nX: ", b"x", every_seconds=0.05),
    "a body in a trickle": repeating(JSON_HEAD + b"Content-Length: 100000\r\n\r\n", b" ", every_seconds=0.05),
    "chunks in a trickle": repeating(
        JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", every_seconds=0.05
    ),
    "interim answers without end": repeating(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100, every_seconds=0.01),
    "a header of 10 MB": sending(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000_000 + b"\r\n\r\n"),
    "one byte more than 512 kB": saying(set_of(EC_JWK).ljust(MAX_DOCUMENT_BYTES + 1)),
    "chunks without end": repeating(
        JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b" " * 0x1000 + b"\r\n", every_seconds=0
    ),
    "a body without end": repeating(JSON_HEAD + b"\r\n", b" " * 65536, every_seconds=0),
    "101 keys": saying(set_of(EC_JWK, *([OLD | {"kid": f"key-{n}"} for n in range(2, 102)]))),
    "a gzip bomb": saying(gzip.compress(bytes(50_000_000), 1), headers=GZIPPED),
    "a gzip bomb that does not say so": saying(gzip.compress(bytes(50_000_000), 1)),
    "a gzip bomb in gzip": saying(gzip.compress(gzip.compress(bytes(50_000_000), 1)), headers=GZIPPED),
    "one byte more than 512 kB when inflated": saying(
        gzip.compress(set_of(EC_JWK).ljust(MAX_DOCUMENT_BYTES + 1)), headers=GZIPPED
    ),
    "gzip that is cut off": saying(gzip.compress(set_of(EC_JWK))[:-9], headers=GZIPPED),
    "gzip with rubbish after it": saying(gzip.compress(set_of(EC_JWK)) + b"x", headers=GZIPPED),
    "gzip twice": saying(gzip.compress(set_of(EC_JWK)), headers=GZIPPED * 2),
    "brotli": saying(set_of(EC_JWK), headers="Content-Encoding: br\r\n"),
    "good keys that say they are gzip": saying(set_of(EC_JWK), headers=GZIPPED),
    "no content": saying(b"", status="204 No Content"),
    "half of it": saying(set_of(EC_JWK), status="206 Partial Content"),
}


@pytest.mark.parametrize("abuse", ABUSES)
async def test_an_answer_beyond_all_bounds_is_given_up(issuer: Issuer, abuse: str) -> None:
    issuer.answers[JWKS_PATH] = ABUSES[abuse]
    async with keys_of(issuer, fetch_seconds=IMPATIENT_SECONDS) as keys:
        began = time.monotonic()
        seen = await outcome(keys)
        took = time.monotonic() - began

    assert seen is KeysUnavailable
    assert took < IMPATIENT_SECONDS + 0.5
    assert len(issuer.asked) == 1


LARGEST: Final = set_of(EC_JWK).ljust(MAX_DOCUMENT_BYTES)
READABLE: dict[str, Answer] = {
    "512 kB": saying(LARGEST),
    "512 kB in gzip": saying(gzip.compress(LARGEST), headers=GZIPPED),
    "gzip, in capitals": saying(gzip.compress(LARGEST), headers="Content-Encoding: GZIP\r\n"),
    "gzip by its old name": saying(gzip.compress(LARGEST), headers="Content-Encoding: x-gzip\r\n"),
    "deflate": saying(zlib.compress(LARGEST), headers="Content-Encoding: deflate\r\n"),
    "not compressed, and says so": saying(LARGEST, headers="Content-Encoding: identity\r\n"),
}


async def test_a_document_up_to_512_kb_is_read_also_if_a_proxy_has_compressed_it(issuer: Issuer) -> None:
    seen = {}
    for name, answer in READABLE.items():
        issuer.answers[JWKS_PATH] = answer
        async with keys_of(issuer) as keys:
            seen[name] = await outcome(keys)

    assert seen == dict.fromkeys(READABLE, KID)


@pytest.mark.long
@pytest.mark.parametrize("abuse", ["headers in a trickle", "a body in a trickle", "interim answers without end"])
async def test_a_fetch_takes_three_seconds_in_all_however_it_is_drawn_out(issuer: Issuer, abuse: str) -> None:
    issuer.answers[JWKS_PATH] = ABUSES[abuse]
    async with keys_of(issuer) as keys:
        began = time.monotonic()
        seen = await outcome(keys)
        took = time.monotonic() - began

    assert seen is KeysUnavailable
    assert took < 3.3


@asynccontextmanager
async def trap() -> AsyncIterator[tuple[str, list[str]]]:
    """A listener that nobody should ever connect to; yields its URL and the list of those who did."""
    visitors: list[str] = []

    async def note(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visitors.append(str(writer.get_extra_info("peername")))

    async with listening(note) as url:
        yield url, visitors


@pytest.mark.parametrize("status", ["301", "302", "303", "307", "308", "300", "201"])
async def test_a_redirect_is_never_followed(issuer: Issuer, status: str) -> None:
    async with trap() as (elsewhere, visitors), keys_of(issuer) as keys:
        issuer.answers[JWKS_PATH] = saying(set_of(EC_JWK), status=f"{status} X", headers=f"Location: {elsewhere}/\r\n")

        seen = await outcome(keys)

    assert seen is KeysUnavailable
    assert visitors == []


async def test_the_proxy_of_the_environment_is_not_used(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with trap() as (elsewhere, visitors), keys_of(issuer) as keys:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, elsewhere)
            monkeypatch.setenv(name.lower(), elsewhere)
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("no_proxy", "")

        seen = await outcome(keys)

    assert seen == KID
    assert visitors == []


async def test_only_the_configured_host_is_contacted_whatever_its_answer_says(issuer: Issuer) -> None:
    async with trap() as (elsewhere, visitors), keys_of(issuer) as keys:
        address = elsewhere.removeprefix("http://")
        headers = f'Location: {elsewhere}/\r\nRefresh: 0; url={elsewhere}/\r\nAlt-Svc: http/1.1="{address}"\r\n'
        headers += f"Link: <{elsewhere}/>; rel=jwks_uri\r\nContent-Location: {elsewhere}/\r\n"
        document = {"jwks_uri": elsewhere, "keys": [EC_JWK | {"x5u": elsewhere, "jku": elsewhere}]}
        issuer.answers[JWKS_PATH] = saying(json.dumps(document).encode(), headers=headers)

        outcomes = [await outcome(keys), await outcome(keys, elsewhere)]

    assert outcomes == [KID, TokenInvalid]
    assert visitors == []
    assert issuer.asked == [JWKS_PATH]


@pytest.mark.parametrize(
    "url", ["https://\u2603\u2603.example/jwks", "https://127.0.0.1\n/jwks", "https://[v1.a]/jwks"]
)
async def test_an_address_that_is_none_fails_closed(issuer: Issuer, url: str) -> None:
    async with keys_of(issuer, url=url) as keys:
        seen = await outcome(keys)

    assert seen is KeysUnavailable


# Hostile documents --------------------------------------------------------------------------------------------------


async def test_a_cold_start_with_a_hostile_document_serves_the_right_key_or_fails_closed(issuer: Issuer) -> None:
    corpus = hostile_sets()

    outcomes = {hostile: await cold(issuer, hostile) for hostile in corpus}

    assert {hostile.name: seen for hostile, seen in outcomes.items() if seen is not hostile.expected} == {}
    assert len(outcomes) >= 110


async def cold(issuer: Issuer, hostile: HostileSet) -> type[Refusal] | None:
    issuer.answers[JWKS_PATH] = saying(hostile.body)
    async with keys_of(issuer, algorithm="RS256") as keys:
        return await rights_of(keys, serves_stranger=hostile.serves_stranger)


async def test_hostile_documents_take_no_good_key_away(issuer: Issuer) -> None:
    corpus = [hostile for hostile in hostile_sets() if hostile.expected is not TokenInvalid]
    issuer.publish(right(), stranger())
    outcomes = {}
    async with keys_of(issuer, algorithm="RS256") as keys:
        await outcome(keys)
        for hostile in corpus:
            issuer.answers[JWKS_PATH] = saying(hostile.body)
            issuer.clock.advance(600 if hostile.expected is None else 30)  # all that are useless come within the hour
            await keys.keys_for({"kid": "unknown"})
            outcomes[hostile.name] = await rights_of(keys, serves_stranger=hostile.serves_stranger)

    assert {name: seen for name, seen in outcomes.items() if seen is not None} == {}
    assert len(issuer.asked) == 1 + len(outcomes)


OWNERS: Final = ("provider", "attacker")


async def rights_of(keys: PublishedKeys, *, serves_stranger: bool) -> type[Refusal] | None:
    """Return None if the provider's key serves under its name, and no other key that it did not publish so."""
    try:
        served = await keys.keys_for({"kid": KID})
    except Refusal as refusal:
        return type(refusal)
    if not served:
        return TokenInvalid
    assert {key.names.get("kid") for key in served} <= {KID, None}
    assert {key.algorithm for key in served} == {"RS256"}
    signers = {owner: signer_for("RS256", owner=owner) for owner in OWNERS}
    trusted = {o for o, s in signers.items() if any(key.verifies(b"text", s.sign(b"text")) for key in served)}
    assert trusted == (set(OWNERS) if serves_stranger else {"provider"})
    return None


def test_the_corpus_of_key_sets_says_nothing_twice() -> None:
    corpus = hostile_sets()

    assert len({hostile.name for hostile in corpus}) == len(corpus)
    assert len({hostile.body for hostile in corpus}) == len(corpus)


# Discovery ----------------------------------------------------------------------------------------------------------


async def test_the_keys_are_fetched_from_where_the_discovery_document_says(issuer: Issuer) -> None:
    issuer.answers["/elsewhere"] = saying(set_of(NEW))
    issuer.describe(jwks_uri=f"{issuer.url}/elsewhere", authorization_endpoint="https://login.example/authorize")

    async with keys_of(issuer, url=issuer.url + DISCOVERY_PATH) as keys:
        outcomes = [await outcome(keys, kid) for kid in ("new", KID)]

    assert outcomes == ["new", TokenInvalid]
    assert issuer.asked == [DISCOVERY_PATH, "/elsewhere"]


async def test_a_move_of_the_keys_is_followed_at_the_next_fetch(issuer: Issuer) -> None:
    async with keys_of(issuer, url=issuer.url + DISCOVERY_PATH) as keys:
        await outcome(keys)
        issuer.answers["/moved"] = saying(set_of(NEW))
        issuer.describe(jwks_uri=f"{issuer.url}/moved")
        issuer.clock.advance(30)

        outcomes = [await outcome(keys, kid) for kid in ("new", KID)]

    assert outcomes == ["new", TokenInvalid]


MISLEADING: dict[str, dict[str, object]] = {
    "another issuer": {"issuer": "https://attacker.example"},
    "no issuer": {"issuer": None},
    "the issuer with a slash": {"issuer": f"{TOKEN_ISSUER}/"},
    "the issuer in capitals": {"issuer": TOKEN_ISSUER.upper()},
    "the issuer in a list": {"issuer": [TOKEN_ISSUER]},
    "no jwks_uri": {"jwks_uri": None},
    "a jwks_uri that is a list": {"jwks_uri": [f"https://127.0.0.1{JWKS_PATH}"]},
    "a jwks_uri that is a number": {"jwks_uri": 7},
    "an empty jwks_uri": {"jwks_uri": ""},
    "a relative jwks_uri": {"jwks_uri": JWKS_PATH},
    "a jwks_uri without a scheme": {"jwks_uri": f"//login.example{JWKS_PATH}"},
    "http:// to elsewhere": {"jwks_uri": f"http://login.example{JWKS_PATH}"},
    "http:// to a private address": {"jwks_uri": f"http://169.254.169.254{JWKS_PATH}"},
    "http:// to what looks like loopback": {"jwks_uri": f"http://127.0.0.1.attacker.example{JWKS_PATH}"},
    "a file": {"jwks_uri": "file:///etc/passwd"},
    "a data URL": {"jwks_uri": 'data:application/json,{"keys":[]}'},
    "a user in it": {"jwks_uri": f"https://user:password@127.0.0.1{JWKS_PATH}"},
    "a fragment in it": {"jwks_uri": f"https://127.0.0.1{JWKS_PATH}#x"},
    "no host": {"jwks_uri": f"https://{JWKS_PATH}"},
    "a port that is no number": {"jwks_uri": f"https://127.0.0.1:https{JWKS_PATH}"},
    "port 0": {"jwks_uri": f"https://127.0.0.1:0{JWKS_PATH}"},
    "a line break in the host": {"jwks_uri": f"https://127.0.0.1\n{JWKS_PATH}"},
    "a NUL in the path": {"jwks_uri": f"https://127.0.0.1{JWKS_PATH}\0"},
    "a surrogate in the path": {"jwks_uri": f"https://127.0.0.1{JWKS_PATH}\ud800"},
    "a surrogate in the host": {"jwks_uri": f"https://\ud800.example{JWKS_PATH}"},
    "a host that is no name": {"jwks_uri": f"https://\u2603\u2603.example{JWKS_PATH}"},
    "a punycode host that is none": {"jwks_uri": f"https://xn--a.example{JWKS_PATH}"},
    "a bracket too many": {"jwks_uri": f"https://[::1{JWKS_PATH}"},
    "an address of the future": {"jwks_uri": f"https://[v1.a]{JWKS_PATH}"},
    "70,000 characters": {"jwks_uri": f"https://127.0.0.1/{'x' * 70_000}"},
}


@pytest.mark.parametrize("document", MISLEADING)
async def test_a_misleading_discovery_document_is_not_followed(issuer: Issuer, document: str) -> None:
    issuer.describe(**MISLEADING[document])
    async with keys_of(issuer, url=issuer.url + DISCOVERY_PATH) as keys:
        outcomes = [await outcome(keys) for _ in range(3)]

    assert outcomes == [KeysUnavailable] * 3
    assert issuer.asked == [DISCOVERY_PATH]


@pytest.mark.parametrize("path", [DISCOVERY_PATH, JWKS_PATH])
async def test_a_redirect_is_followed_neither_to_the_document_nor_to_its_keys(issuer: Issuer, path: str) -> None:
    async with trap() as (elsewhere, visitors), keys_of(issuer, url=issuer.url + DISCOVERY_PATH) as keys:
        issuer.answers[path] = saying(b"", status="307 Temporary Redirect", headers=f"Location: {elsewhere}/\r\n")

        seen = await outcome(keys)

    assert seen is KeysUnavailable
    assert visitors == []


async def test_a_discovery_document_never_leads_from_https_to_http(issuer: Issuer) -> None:
    url = TOKEN_ISSUER + DISCOVERY_PATH
    with respx.mock(assert_all_called=False, using="voicepass") as router:
        insecure = router.get(f"http://127.0.0.1{JWKS_PATH}").respond(json={"keys": [EC_JWK]})
        secure = router.get(url).respond(json={"issuer": TOKEN_ISSUER, "jwks_uri": f"http://127.0.0.1{JWKS_PATH}"})

        async with keys_of(issuer, url=url) as keys:
            seen = await outcome(keys)

    assert seen is KeysUnavailable
    assert secure.called
    assert not insecure.called


# Two issuers --------------------------------------------------------------------------------------------------------

PAIRS: Final = [("RS256", "RS256"), ("RS256", "ES256"), ("RS256", "HS256"), ("ES256", "ES256"), ("ES256", "HS256")]


def mint_of(letter: str, algorithm: str) -> Mint:
    signer = signer_for(algorithm, owner="provider" if letter == "a" else "attacker")
    return Mint(
        signer=signer,
        token_issuer=f"https://{letter}.example",
        audience=f"audience of {letter}",
        now=NOW,
        kid=f"key of {letter}",
    )


@asynccontextmanager
async def authenticator_for(
    issuer: Issuer, *mints: Mint, jwks: Sequence[object] = ()
) -> AsyncIterator[JwtAuthenticator]:
    """Trusts the issuer of each mint; their keys are fetched, but for the secrets of HS*."""
    sources: list[FixedKey | PublishedKeys] = []
    for mint, jwk in zip(mints, jwks, strict=True):
        if jwk is None:
            sources.append(
                FixedKey(replace(key_from_secret(mint.signer.published, "HS256"), names={"kid": mint.kid or ""}))
            )
            continue
        path = f"/{len(sources)}"
        issuer.answers[path] = saying(set_of(*jwk) if isinstance(jwk, list) else set_of(jwk))
        sources.append(
            PublishedKeys(
                url=issuer.url + path,
                token_issuer=mint.token_issuer,
                algorithm=mint.signer.algorithm,
                clock=issuer.clock,
            )
        )
    trusted = [
        TrustedIssuer(
            token_issuer=mint.token_issuer,
            algorithm=mint.signer.algorithm,
            keys=source,
            audience=mint.audience,
            leeway_seconds=mint.leeway_seconds,
        )
        for mint, source in zip(mints, sources, strict=True)
    ]
    try:
        yield JwtAuthenticator(trusted=trusted, clock=lambda: NOW)
    finally:
        for source in sources:
            if isinstance(source, PublishedKeys):
                await source.aclose()


def jwk_for(mint: Mint, *, kid: str | None = None) -> dict[str, object] | None:
    owner = "provider" if mint.token_issuer == "https://a.example" else "attacker"
    if mint.signer.algorithm == "HS256":
        return None
    key = rsa_key_of(owner) if mint.signer.algorithm == "RS256" else ec_key_of(owner, mint.signer.algorithm)
    return jwk_of(key, kid=kid or mint.kid)


def crossed(own: Mint, other: Mint) -> Iterator[tuple[str, str]]:
    """Tokens that say they are `own`'s and hold something of `other`'s."""
    ours, theirs = own.header(kid=own.kid), other.header(kid=other.kid)
    as_text = signer_for("HS256", secret=own.signer.published)
    as_their_text = signer_for("HS256", secret=other.signer.published)
    yield "their key", own.token(header=ours, sign=other.signer.sign)
    yield "their key, no name", own.token(sign=other.signer.sign)
    yield "their key under its name", own.token(header=ours | {"kid": other.kid}, sign=other.signer.sign)
    yield "their key and algorithm", own.token(header=ours | {"alg": theirs["alg"]}, sign=other.signer.sign)
    yield "their whole header and key", own.token(header=theirs, sign=other.signer.sign)
    yield "their name, our key", own.token(header=ours | {"kid": other.kid})
    yield (
        "our issuer and theirs in a list",
        own.token(
            header=theirs, claims=other.claims(iss=[own.token_issuer, other.token_issuer]), sign=other.signer.sign
        ),
    )
    yield "their issuer, our key", own.token(header=ours, claims=other.claims())
    yield "their audience, our key", own.token(header=ours, claims=own.claims(aud=other.audience))
    yield "our public key as a secret", own.token(header=ours | {"alg": "HS256"}, sign=as_text.sign)
    yield "their public key as a secret", own.token(header=theirs | {"alg": "HS256"}, sign=as_their_text.sign)
    yield "their issuer in the header", own.token(header=ours | {"iss": other.token_issuer}, sign=other.signer.sign)


@pytest.mark.parametrize(("algorithm", "other_algorithm"), PAIRS)
@pytest.mark.parametrize("is_one_name", [False, True])
async def test_two_issuers_never_share_a_key_an_algorithm_or_an_audience(
    issuer: Issuer, algorithm: str, other_algorithm: str, *, is_one_name: bool
) -> None:
    a, b = mint_of("a", algorithm), mint_of("b", other_algorithm)
    if is_one_name:
        a, b = (replace(mint, kid="key-1") for mint in (a, b))
    tokens = {
        f"{own.token_issuer}: {name}": token for own, other in ((a, b), (b, a)) for name, token in crossed(own, other)
    }
    if is_one_name:  # then these are good
        del tokens["https://a.example: their name, our key"], tokens["https://b.example: their name, our key"]
    if other_algorithm == "HS256":  # and so is a token signed with the secret that it should be signed with
        del tokens["https://b.example: our public key as a secret"]

    async with authenticator_for(issuer, a, b, jwks=[jwk_for(a), jwk_for(b)]) as authenticator:
        good = [await user_of(authenticator, mint.token(header=mint.header(kid=mint.kid))) for mint in (a, b)]
        accepted = [name for name, token in tokens.items() if await user_of(authenticator, token) is not TokenInvalid]

    assert [user.issuer for user in good if isinstance(user, User)] == ["https://a.example", "https://b.example"]
    assert accepted == []
    assert len(tokens) >= 21


async def user_of(authenticator: JwtAuthenticator, token: str) -> User | type[Refusal]:
    try:
        return await authenticator.user_of(token)
    except Refusal as refusal:
        return type(refusal)


# Keys on a token's word ---------------------------------------------------------------------------------------------


async def test_no_address_in_a_token_is_ever_fetched(issuer: Issuer) -> None:
    mint = replace(mint_of("a", "ES256"), kid=KID)
    attacker = signer_for("ES256", owner="attacker")
    attackers_jwk = jwk_of(ec_key_of("attacker", "ES256"), kid=KID)
    async with (
        trap() as (key_url, key_visitors),
        trap() as (chain_url, chain_visitors),
        authenticator_for(issuer, mint, jwks=[EC_JWK]) as authenticator,
    ):
        lures: list[dict[str, object]] = [
            {"jku": f"{key_url}/jwks.json"},
            {"x5u": f"{chain_url}/chain.pem"},
            {"jwk": attackers_jwk},
            {"jwk": attackers_jwk | {"x5u": chain_url, "jku": key_url}},
            {"x5c": [chain_url]},
            {"iss": key_url},
            {"jku": key_url, "x5u": chain_url, "jwk": attackers_jwk, "x5c": ["AAAA"], "x5t": "AAAA"},
        ]
        lures += [lure | {"kid": kid} for lure in lures for kid in (KID, "unknown", key_url, f"{chain_url}/key")]
        forged = [mint.token(header=mint.header(**lure), sign=attacker.sign) for lure in lures]
        forged += [
            mint.token(header=mint.header(kid=KID), claims=mint.claims(iss=url), sign=sign)
            for url in (key_url, chain_url)
            for sign in (mint.signer.sign, attacker.sign)
        ]

        refused = [await user_of(authenticator, token) for token in forged]
        honest = await user_of(authenticator, mint.token(header=mint.header(**lures[-1] | {"kid": KID})))

    assert refused == [TokenInvalid] * len(forged)
    assert isinstance(honest, User)
    assert (key_visitors, chain_visitors) == ([], [])


# The whole service --------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(400)
async def test_a_flood_of_unknown_names_over_http_hurts_no_signed_in_user(issuer: Issuer) -> None:
    mint = Mint(signer=signer_for("ES256"), token_issuer=TOKEN_ISSUER, audience=AUDIENCE, now=time.time())
    good = {
        "Authorization": f"Bearer {mint.token(header=mint.header(kid=KID), claims=mint.claims(exp=time.time() + 900))}"
    }
    flood = [{"Authorization": f"Bearer {mint.token(header=mint.header(kid=f'unknown-{n}'))}"} for n in range(10_000)]

    def emulator(url: str) -> Any:
        return create_emulator(
            Emulator(
                agents=[EmulatedAgent(agent_id=AGENT_ID)],
                api_keys={API_KEY: frozenset({"convai_write"})},
                public_ws_base=url.replace("http", "ws"),
            )
        )

    with running(emulator) as elevenlabs:
        settings = settings_with(
            voicepass_jwt_algorithm="ES256",
            voicepass_jwt_secret=None,
            voicepass_jwks_url=issuer.url + JWKS_PATH,
            elevenlabs_base_url=elevenlabs,
            voicepass_log_level="warning",
        )
        with running(lambda _url: create_app(settings)) as service:
            async with httpx.AsyncClient(base_url=service, trust_env=False, timeout=30) as client:
                idle = [await timed(client, good) for _ in range(300)]
                began = time.monotonic()
                refused, flooded = [], []
                for wave in range(0, len(flood), 25):
                    *answers, served = await asyncio.gather(
                        *(timed(client, headers) for headers in [*flood[wave : wave + 25], good])
                    )
                    refused += answers
                    flooded.append(served)
                took = time.monotonic() - began

    p99s = [statistics.quantiles([seconds for _, seconds in answers], n=100)[-1] * 1000 for answers in (idle, flooded)]
    print(f"\n10,000 unknown names in {took:.0f} s: {len(issuer.asked)} fetches; ")
    print(f"p99 of a good token {p99s[0]:.1f} ms idle, {p99s[1]:.1f} ms amid waves of 25")
    assert {status for status, _ in idle + flooded} == {200}
    assert {status for status, _ in refused} == {401}
    assert len(issuer.asked) <= 1 + (took + 30) // 30


async def timed(client: httpx.AsyncClient, headers: dict[str, str]) -> tuple[int, float]:
    began = time.monotonic()
    response = await client.post("/v1/signed-url", headers=headers)
    return response.status_code, time.monotonic() - began
