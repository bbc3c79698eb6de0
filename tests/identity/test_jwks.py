"""The keys that an issuer publishes: fetched once, renewed, and kept through an outage."""

import asyncio
import gzip
import json
import time
import zlib
from collections.abc import Callable, Sized
from typing import Final

import pytest

from tests.conftest import AUDIENCE, TOKEN_ISSUER, Clock, serving
from tests.faults import tls
from tests.identity.hostile_jwks import KID, HostileSet, make_hostile_sets, make_other, make_right, make_set
from tests.identity.hostile_tokens import Mint, Sign, ecdsa, get_ec_key, signer_for
from tests.identity.issuer import (
    EC_JWK,
    JWKS_PATH,
    NEW,
    NEW_KEY,
    OLD,
    OLD_KEY,
    PATIENT_SECONDS,
    Answer,
    Issuer,
    find_key_name,
    make_answer,
    make_endless_answer,
    make_raw_answer,
    never_answer,
    open_keys,
    open_trap,
    wait_for_refresh,
)
from tests.logs import capture_logs
from tests.servers import free_port, listening
from tests.tables import table
from voicepass.errors import KeysUnavailable, Refusal, TokenInvalid
from voicepass.identity.jwks import DISCOVERY_PATH, FETCH_SECONDS, MAX_DOCUMENT_BYTES, PublishedKeys

pytestmark = pytest.mark.anyio

IMPATIENT_SECONDS: Final = 0.5

# One fetch for all --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(make_answer(make_set(EC_JWK)), KID), (make_answer(b"", status="503 Busy"), KeysUnavailable)],
)
async def test_500_users_at_a_cold_start_cause_one_fetch_and_are_all_answered(
    issuer: Issuer, answer: Answer, expected: object
) -> None:
    issuer.answers[JWKS_PATH] = answer

    async with open_keys(issuer) as keys:
        outcomes = await asyncio.gather(*(find_key_name(keys) for _ in range(500)))

    assert outcomes == [expected] * 500
    assert len(issuer.asked) == 1


async def test_500_requests_with_expired_cached_keys_wait_for_one_fetch(issuer: Issuer) -> None:
    issuer.publish(OLD)
    async with open_keys(issuer) as keys:
        await find_key_name(keys, "old")
        issuer.publish(NEW)
        issuer.clock.advance(600)

        outcomes = await asyncio.gather(*(find_key_name(keys, kid) for kid in ["old", "new"] * 250))

    assert outcomes == [TokenInvalid, "new"] * 250
    assert len(issuer.asked) == 2


async def test_a_fetch_asks_for_json_without_compression_and_names_voicepass(issuer: Issuer) -> None:
    async with open_keys(issuer) as keys:
        await find_key_name(keys)

    sent = set(issuer.last_request.lower().split("\r\n"))
    assert {"accept: application/json", "accept-encoding: identity", "user-agent: voicepass"} <= sent


async def test_a_user_who_disconnects_does_not_cancel_the_fetch_of_others(issuer: Issuer) -> None:
    is_cancelled = asyncio.Event()

    async def answer(writer: asyncio.StreamWriter) -> None:
        await is_cancelled.wait()
        await make_answer(make_set(EC_JWK))(writer)

    issuer.answers[JWKS_PATH] = answer
    async with open_keys(issuer) as keys:
        waiting = [asyncio.create_task(find_key_name(keys)) for _ in range(10)]
        await issuer.was_asked.wait()

        waiting[0].cancel()
        is_cancelled.set()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)

    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert outcomes[1:] == [KID] * 9
    assert len(issuer.asked) == 1


async def test_closing_cancels_a_fetch_in_flight(issuer: Issuer) -> None:
    issuer.answers[JWKS_PATH] = never_answer
    async with open_keys(issuer) as keys:
        waiting = asyncio.create_task(find_key_name(keys))
        await issuer.was_asked.wait()

        await keys.aclose()

        assert not any("_fetch_and_keep" in repr(task) for task in asyncio.all_tasks())
        with pytest.raises(asyncio.CancelledError):
            await waiting


# A flood of names ---------------------------------------------------------------------------------------------------


async def test_10000_unknown_names_at_once_cause_no_fetch_within_the_cooldown(issuer: Issuer) -> None:
    async with open_keys(issuer) as keys:
        await find_key_name(keys)
        issuer.clock.advance(29.9)

        outcomes = await asyncio.gather(*(find_key_name(keys, f"unknown-{n}") for n in range(10_000)))

    assert set(outcomes) == {TokenInvalid}
    assert len(issuer.asked) == 1


async def test_a_flood_of_unknown_names_causes_one_fetch_in_30_seconds_and_refuses_no_good_token(
    issuer: Issuer,
) -> None:
    async with open_keys(issuer) as keys:
        await find_key_name(keys)
        sizes = measure_sizes(keys)
        good: list[object] = []
        flood: list[object] = []
        for wave in range(100):
            issuer.clock.advance(3)
            names = [f"unknown-{wave}-{n}" for n in range(100)]
            *refused, served = await asyncio.gather(*(find_key_name(keys, name) for name in [*names, KID]))
            flood += refused
            good.append(served)

        grown = measure_sizes(keys)

    gaps = [after - before for before, after in zip(issuer.asked_at, issuer.asked_at[1:], strict=False)]
    assert flood == [TokenInvalid] * 10_000
    assert good == [KID] * 100
    assert min(gaps) >= 30
    assert len(issuer.asked) == 1 + 300 // 30
    assert grown == sizes


def measure_sizes(keys: PublishedKeys) -> dict[str, int | None]:
    """Return the size of each attribute: no request may make one grow."""
    return {name: len(value) if isinstance(value, Sized) else None for name, value in vars(keys).items()}


async def test_a_flood_during_a_hanging_fetch_delays_no_good_token(issuer: Issuer) -> None:
    async with open_keys(issuer) as keys:
        await find_key_name(keys)
        issuer.answers[JWKS_PATH] = never_answer
        issuer.was_asked.clear()
        issuer.clock.advance(30)
        flood = [asyncio.create_task(find_key_name(keys, f"unknown-{n}")) for n in range(1000)]
        await issuer.was_asked.wait()

        async with asyncio.timeout(FETCH_SECONDS / 2):
            served = [await find_key_name(keys) for _ in range(1000)]

        assert served == [KID] * 1000
        assert not any(refused.done() for refused in flood)
        await keys.aclose()
        await asyncio.gather(*flood, return_exceptions=True)


# Which keys a token is tried with ------------------------------------------------------------------------------------


def pick(owner: str, **names: str | None) -> dict[str, object]:
    return {"own": EC_JWK, "old": OLD, "new": NEW}[owner] | {"kid": None} | names


def get_signer(jwk: dict[str, object]) -> Sign:
    key = {EC_JWK["x"]: get_ec_key("provider", "ES256"), OLD["x"]: OLD_KEY, NEW["x"]: NEW_KEY}[jwk["x"]]
    return ecdsa(key, "ES256")


X5T: Final = {"x5t": "AAAA", "x5t#S256": "BBBB"}
CHOICES: dict[str, tuple[list[dict[str, object]], dict[str, str], list[int]]] = {
    "no name: all": ([pick("own", kid="a"), pick("old", kid="b")], {}, [0, 1]),
    "no name, one key": ([pick("own", kid="a")], {}, [0]),
    "kid": ([pick("own", kid="a"), pick("old", kid="b")], {"kid": "b"}, [1]),
    "kid of two": ([pick("own", kid="a"), pick("old", kid="b"), pick("new", kid="a")], {"kid": "a"}, [0, 2]),
    "kid of a key that is there twice": ([pick("own", kid="a"), pick("own", kid="a")], {"kid": "a"}, [0, 1]),
    "kid that no key has": ([pick("own", kid="a"), pick("old")], {"kid": "c"}, []),
    "kid, and no key has one": ([pick("own"), pick("old")], {"kid": "c"}, [0, 1]),
    "x5t": ([pick("own", kid="a", **X5T), pick("old", kid="b")], {"x5t": "AAAA"}, [0]),
    "x5t#S256": ([pick("own", kid="a"), pick("old", **X5T)], {"x5t#S256": "BBBB"}, [1]),
    "x5t of another": ([pick("own", kid="a", **X5T)], {"x5t": "CCCC"}, []),
    "x5t, and no key has one": ([pick("own", kid="a"), pick("old", kid="b")], {"x5t": "AAAA"}, [0, 1]),
    "kid of one, x5t of another": ([pick("own", kid="a"), pick("old", **X5T)], {"kid": "a", "x5t": "AAAA"}, [0, 1]),
    "kid right, x5t renewed": ([pick("own", kid="a", **X5T)], {"kid": "a", "x5t": "CCCC"}, [0]),
}


async def test_a_token_is_tried_with_the_keys_that_its_header_names_or_with_all(issuer: Issuer) -> None:
    seen = {}
    for choice, (published, names, _) in CHOICES.items():
        issuer.publish(*published)
        async with open_keys(issuer) as keys:
            served = await keys.keys_for(names)
        owners = [get_signer(jwk) for jwk in published]
        seen[choice] = [n for n, sign in enumerate(owners) if any(key.verifies(b"x", sign(b"x")) for key in served)]

    assert seen == {choice: expected for choice, (_, _, expected) in CHOICES.items()}


async def test_a_member_that_is_not_used_is_logged_once_with_the_reason(issuer: Issuer) -> None:
    members = [EC_JWK, EC_JWK | {"kid": "bad", "y": "AQ"}, EC_JWK | {"kid": "enc", "use": "enc"}, None]
    issuer.publish(*members)
    with capture_logs() as logged:
        async with open_keys(issuer) as keys:
            for _ in range(3):
                await find_key_name(keys)
                await wait_for_refresh(keys)
                issuer.clock.advance(600)
            issuer.publish(*members, EC_JWK | {"kid": "rs", "alg": "RS256"})
            await find_key_name(keys)

    assert [(line["kid"], line["note"]) for line in logged if line["event"] == "keys.skipped"] == [
        ("bad", "is malformed"),
        ("enc", "is not meant for verifying signatures (use, key_ops)"),
        (None, "is not a JSON object"),
        ("rs", "is meant for another algorithm than ES256"),
    ]


UNFIT: Final = "is not meant for verifying signatures (use, key_ops), is not a key for ES256"
UNUSABLE: dict[str, tuple[Answer, str]] = {
    "members that do not fit": (
        make_answer(make_set(EC_JWK | {"use": "enc"}, EC_JWK | {"use": "enc"}, {"kty": "RSA"})),
        f"the document holds no key for ES256: {UNFIT}",
    ),
    "no members": (make_answer(make_set()), "the document holds no key for ES256: it is empty"),
    "101 members": (make_answer(make_set(*[EC_JWK] * 101)), "the document is no JWKS of at most 100 keys"),
    "no JWKS": (make_answer(b"{}"), "the document is no JWKS of at most 100 keys"),
    "a list": (make_answer(b"[]"), "the document is not a JSON object"),
    "a page": (make_answer(b"<!doctype html>"), "the document is not a JSON object"),
    "an error": (make_answer(b"", status="500 Oops"), "HTTP 500"),
    "too long": (make_answer(b" " * (MAX_DOCUMENT_BYTES + 1)), "the answer is longer than 524288 bytes"),
}


async def test_if_no_key_can_be_used_the_refusal_and_the_log_say_why(issuer: Issuer) -> None:
    url, noted, expected = issuer.url + JWKS_PATH, {}, {}
    for name, (answer, note) in UNUSABLE.items():
        issuer.answers[JWKS_PATH] = answer
        with capture_logs() as logged:
            async with open_keys(issuer) as keys:
                with pytest.raises(KeysUnavailable) as refused:
                    await keys.check()
        noted[name] = refused.value.operator_note, [line for line in logged if line["event"] != "keys.skipped"]
        line = {"event": "keys.refresh_failed", "log_level": "error", "cause": "AnswerUnusableError", "note": note}
        expected[name] = f"no keys from {url} ({note})", [line | {"url": url}]

    assert noted == expected


async def test_a_fetch_without_an_answer_is_called_a_timeout_in_the_refusal_and_the_log(issuer: Issuer) -> None:
    issuer.answers[JWKS_PATH] = never_answer
    with capture_logs() as logged:
        async with open_keys(issuer, fetch_seconds=0.05) as keys:
            with pytest.raises(KeysUnavailable) as refused:
                await keys.check()

    assert refused.value.operator_note == f"no keys from {issuer.url}{JWKS_PATH} (TimeoutError)"
    assert [(line["cause"], line["note"]) for line in logged] == [("TimeoutError", "TimeoutError")]


async def test_100_keys_of_one_issuer_are_all_used(issuer: Issuer) -> None:
    issuer.publish(*(EC_JWK | {"kid": f"key-{number}"} for number in range(100)))
    async with open_keys(issuer) as keys:
        seen = [await find_key_name(keys, kid) for kid in ("key-0", "key-99", "key-100")]

    assert seen == ["key-0", "key-99", TokenInvalid]


async def test_the_log_says_where_keys_came_from_and_how_many_can_be_used(issuer: Issuer) -> None:
    issuer.publish(OLD, NEW, None)
    with capture_logs() as logged:
        async with open_keys(issuer) as keys:
            await keys.check()

    url = issuer.url + JWKS_PATH
    assert logged == [
        {"event": "keys.skipped", "log_level": "info", "url": url, "kid": None, "note": "is not a JSON object"},
        {"event": "keys.refreshed", "log_level": "info", "url": url, "count": 2},
    ]


# Rotation -----------------------------------------------------------------------------------------------------------


async def test_a_new_key_is_accepted_on_the_first_request_after_the_cooldown(issuer: Issuer) -> None:
    issuer.publish(OLD)
    async with open_keys(issuer) as keys:
        await find_key_name(keys, "old")
        issuer.publish(OLD, NEW)
        outcomes = []
        for _ in range(30):
            issuer.clock.advance(1)
            outcomes.append(await find_key_name(keys, "new"))

    assert outcomes == [TokenInvalid] * 29 + ["new"]
    assert len(issuer.asked) == 2


@pytest.mark.parametrize("seconds_between", [1, 60, 200, 299, 301, 599, 600, 601, 3600, 86400])
async def test_a_withdrawn_key_is_refused_ten_minutes_later_at_any_interval_between_requests(
    issuer: Issuer, seconds_between: int
) -> None:
    issuer.publish(OLD)
    async with open_keys(issuer) as keys:
        await find_key_name(keys, "old")
        issuer.publish(NEW)
        seconds = 0
        served_until = 0
        while seconds < 700:
            seconds += seconds_between
            issuer.clock.advance(seconds_between)
            if await find_key_name(keys, "old") == "old":
                served_until = seconds
            await wait_for_refresh(keys)

    assert served_until < 600


@pytest.mark.parametrize("quiet_seconds", [600, 1200])
async def test_an_old_failure_does_not_keep_a_withdrawn_key_in_use(issuer: Issuer, quiet_seconds: int) -> None:
    issuer.publish(OLD)
    async with open_keys(issuer) as keys:
        await find_key_name(keys, "old")
        issuer.answers[JWKS_PATH] = make_answer(b"", status="502 Bad Gateway")
        issuer.clock.advance(301)
        await find_key_name(keys, "old")
        await wait_for_refresh(keys)
        issuer.publish(NEW)
        issuer.clock.advance(quiet_seconds)

        after_a_quiet_time = await find_key_name(keys, "old")

    assert after_a_quiet_time is TokenInvalid


async def test_a_rotation_with_an_overlap_refuses_neither_key_in_1000_requests(issuer: Issuer) -> None:
    issuer.publish(OLD)
    async with open_keys(issuer) as keys:
        await find_key_name(keys, "old")
        issuer.publish(OLD, NEW)
        issuer.clock.advance(30)
        outcomes = []
        for request in range(1000):
            outcomes.append(await find_key_name(keys, ["new", "old"][request % 2]))
            issuer.clock.advance(1.5)

    assert outcomes == ["new", "old"] * 500
    assert len(issuer.asked) <= 1500 // 300 + 2


async def test_fresh_keys_are_not_fetched_again(issuer: Issuer) -> None:
    async with open_keys(issuer) as keys:
        await find_key_name(keys)
        tasks = asyncio.all_tasks()
        for _ in range(299):
            issuer.clock.advance(1)
            await find_key_name(keys)
            assert asyncio.all_tasks() <= tasks, "a refresh in the background has begun"

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
    "503": answer_with(make_answer(b"", status="503 Service Unavailable")),
    "404": answer_with(make_answer(b"", status="404 Not Found")),
    "hang": answer_with(never_answer),
    "garbage": answer_with(make_raw_answer(b"\x16\x03\x01\x00\xff" * 100)),
    "a page": answer_with(make_answer(b"<!doctype html><title>Down for maintenance</title>")),
    "no TLS where https is asked for": speak_no_tls,
    "10 MB": answer_with(make_answer(b" " * 10_000_000)),
    "redirect": answer_with(make_answer(b"", status="302 Found", headers="Location: /elsewhere\r\n")),
    "connection refused": refuse_connections,
    "closed without an answer": answer_with(make_raw_answer(b"")),
    "cut off": answer_with(make_raw_answer(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"keys":')),
    "an empty key set": answer_with(make_answer(make_set())),
}

MOVED: Final = {"no TLS where https is asked for", "connection refused"}
"""In these outages, the discovery document names a URL without a working server."""

each_outage = pytest.mark.parametrize("outage", OUTAGES)


async def test_a_refused_certificate_is_logged_with_its_reason_and_remedy() -> None:
    async def fail_if_called(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        raise AssertionError("nothing is sent to a server whose certificate is refused")

    async with listening(fail_if_called, tls=tls()) as base_url:
        keys = PublishedKeys(url=base_url + JWKS_PATH, token_issuer=TOKEN_ISSUER, algorithm="ES256", clock=Clock())
        with capture_logs() as logged, pytest.raises(KeysUnavailable) as refused:
            await keys.check()
        await keys.aclose()

    reason = "the certificate of 127.0.0.1 was refused (self-signed certificate)"
    assert reason in refused.value.operator_note
    (line,) = [line for line in logged if line["event"] == "keys.refresh_failed"]
    assert line["note"].startswith(reason)
    assert "SSL_CERT_FILE" in line["note"]


def choose_timeout(outage: str) -> float:
    """Return the time limit of a fetch: it is short only if no answer ever comes."""
    return IMPATIENT_SECONDS if outage == "hang" else PATIENT_SECONDS


def end_outage(issuer: Issuer) -> None:
    issuer.publish(EC_JWK)
    issuer.describe()


@each_outage
async def test_the_last_good_keys_serve_for_an_hour_of_outage_and_then_no_longer(issuer: Issuer, outage: str) -> None:
    path = DISCOVERY_PATH if outage in MOVED else JWKS_PATH
    async with open_keys(issuer, url=issuer.url + path, fetch_seconds=choose_timeout(outage)) as keys:
        await find_key_name(keys)
        began = issuer.clock()
        OUTAGES[outage](issuer)

        during = []
        for seconds in (1, 301, 3599):
            issuer.clock.now = began + seconds
            during.append(await find_key_name(keys))
            await wait_for_refresh(keys)
        issuer.clock.now = began + 3600
        too_long = [await find_key_name(keys, kid) for kid in (KID, "unknown", None)]
        end_outage(issuer)
        issuer.clock.advance(5)
        afterwards = [await find_key_name(keys, kid) for kid in (KID, "unknown", None)]

    assert during == [KID] * 3
    assert too_long == [KeysUnavailable] * 3
    assert afterwards == [KID, TokenInvalid, KID]


@each_outage
async def test_a_cold_start_during_an_outage_fails_closed_and_recovers_by_itself(issuer: Issuer, outage: str) -> None:
    path = DISCOVERY_PATH if outage in MOVED else JWKS_PATH
    OUTAGES[outage](issuer)
    async with open_keys(issuer, url=issuer.url + path, fetch_seconds=choose_timeout(outage)) as keys:
        during = [await find_key_name(keys, kid) for kid in (KID, "unknown", None)]
        end_outage(issuer)
        issuer.clock.advance(4.9)
        too_soon = await find_key_name(keys)
        issuer.clock.advance(0.1)
        afterwards = await find_key_name(keys)

    assert [*during, too_soon] == [KeysUnavailable] * 4
    assert afterwards == KID
    assert issuer.asked.count(path) == 2


@pytest.mark.parametrize(("has_keys", "seconds_between"), [(False, 5), (True, 30)])
async def test_during_an_outage_the_issuer_is_asked_every_5_seconds_or_every_30_while_keys_are_cached(
    issuer: Issuer, *, has_keys: bool, seconds_between: int
) -> None:
    async with open_keys(issuer) as keys:
        if has_keys:
            await find_key_name(keys)
        issuer.answers[JWKS_PATH] = make_answer(b"", status="500 Internal Server Error")
        for second in range(10 * seconds_between):
            await asyncio.gather(*(find_key_name(keys, f"key-{second}-{n}") for n in range(10)))
            issuer.clock.advance(1)

    assert len(issuer.asked) == 10


async def test_users_wait_for_no_failing_fetch_while_keys_are_cached(issuer: Issuer) -> None:
    async with open_keys(issuer) as keys:
        await find_key_name(keys)
        issuer.answers[JWKS_PATH] = make_answer(b"", status="500 Internal Server Error")
        issuer.clock.advance(301)
        await find_key_name(keys)
        await wait_for_refresh(keys)
        issuer.answers[JWKS_PATH] = never_answer
        issuer.was_asked.clear()

        async with asyncio.timeout(FETCH_SECONDS / 2):
            served = []
            for _ in range(1000):
                issuer.clock.advance(0.5)
                served.append(await find_key_name(keys))

            await issuer.was_asked.wait()

    assert served == [KID] * 1000
    assert len(issuer.asked) == 3, "the third fetch still hangs, so no other one has begun"


async def test_no_user_waits_for_an_early_refresh(issuer: Issuer) -> None:
    async with open_keys(issuer) as keys:
        await find_key_name(keys)
        issuer.answers[JWKS_PATH] = never_answer
        issuer.was_asked.clear()
        issuer.clock.advance(300)

        async with asyncio.timeout(FETCH_SECONDS / 2):
            served = [await find_key_name(keys) for _ in range(1000)]
            await issuer.was_asked.wait()

    assert served == [KID] * 1000


async def test_new_keys_serve_users_within_30_seconds_after_an_outage(issuer: Issuer) -> None:
    issuer.publish(OLD)
    async with open_keys(issuer) as keys:
        await find_key_name(keys, "old")
        issuer.answers[JWKS_PATH] = make_answer(b"", status="500 Internal Server Error")
        issuer.clock.advance(700)
        await find_key_name(keys, "new")
        issuer.publish(NEW)
        issuer.clock.advance(30)

        outcomes = [await find_key_name(keys, "new"), await find_key_name(keys, "old")]

    assert outcomes == ["new", TokenInvalid]


async def test_the_first_user_after_a_quiet_hour_is_served_even_if_the_last_fetch_failed(issuer: Issuer) -> None:
    async with open_keys(issuer) as keys:
        await find_key_name(keys)
        issuer.answers[JWKS_PATH] = make_answer(b"", status="500 Internal Server Error")
        issuer.clock.advance(301)
        await find_key_name(keys)
        await wait_for_refresh(keys)
        issuer.publish(EC_JWK)
        issuer.clock.advance(4000)

        first = await find_key_name(keys)

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
BOMB: Final = gzip.compress(bytes(50_000_000), 1)
JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
ABUSES: dict[str, Answer] = {
    "headers in a trickle": make_endless_answer(b"HTTP/1.1 200 OK\r\nX: ", b"x", every_seconds=0.05),
    "a body in a trickle": make_endless_answer(JSON_HEAD + b"Content-Length: 100000\r\n\r\n", b" ", every_seconds=0.05),
    "chunks in a trickle": make_endless_answer(
        JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", every_seconds=0.05
    ),
    "interim answers without end": make_endless_answer(
        b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100, every_seconds=0.01
    ),
    "a header of 10 MB": make_raw_answer(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000_000 + b"\r\n\r\n"),
    "one byte more than 512 kB": make_answer(make_set(EC_JWK).ljust(MAX_DOCUMENT_BYTES + 1)),
    "chunks without end": make_endless_answer(
        JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b" " * 0x1000 + b"\r\n", every_seconds=0
    ),
    "a body without end": make_endless_answer(JSON_HEAD + b"\r\n", b" " * 65536, every_seconds=0),
    "101 keys": make_answer(make_set(EC_JWK, *([OLD | {"kid": f"key-{n}"} for n in range(2, 102)]))),
    "a gzip bomb": make_answer(BOMB, headers=GZIPPED),
    "a gzip bomb without its header": make_answer(BOMB),
    "a gzip bomb in gzip": make_answer(gzip.compress(BOMB), headers=GZIPPED),
    "one byte more than 512 kB when inflated": make_answer(
        gzip.compress(make_set(EC_JWK).ljust(MAX_DOCUMENT_BYTES + 1)), headers=GZIPPED
    ),
    "gzip that is cut off": make_answer(gzip.compress(make_set(EC_JWK))[:-9], headers=GZIPPED),
    "gzip with rubbish after it": make_answer(gzip.compress(make_set(EC_JWK)) + b"x", headers=GZIPPED),
    "gzip twice": make_answer(gzip.compress(make_set(EC_JWK)), headers=GZIPPED * 2),
    "brotli": make_answer(make_set(EC_JWK), headers="Content-Encoding: br\r\n"),
    "good keys with a false gzip header": make_answer(make_set(EC_JWK), headers=GZIPPED),
    "no content": make_answer(b"", status="204 No Content"),
    "half of it": make_answer(make_set(EC_JWK), status="206 Partial Content"),
}


async def measure_failed_fetch(issuer: Issuer, *, fetch_seconds: float) -> float:
    async with open_keys(issuer, fetch_seconds=fetch_seconds) as keys:
        began = time.monotonic()
        assert await find_key_name(keys) is KeysUnavailable
        return time.monotonic() - began


@pytest.mark.long
@table("abuse", ABUSES)
async def test_a_fetch_of_an_abusive_answer_fails_in_time(issuer: Issuer, abuse: str) -> None:
    issuer.asked.clear()
    issuer.answers[JWKS_PATH] = ABUSES[abuse]

    took = await measure_failed_fetch(issuer, fetch_seconds=IMPATIENT_SECONDS)

    assert took < IMPATIENT_SECONDS + 0.5
    assert len(issuer.asked) == 1


LARGEST: Final = make_set(EC_JWK).ljust(MAX_DOCUMENT_BYTES)
RAW_DEFLATE: Final = zlib.compress(LARGEST, wbits=-zlib.MAX_WBITS)
READABLE: dict[str, Answer] = {
    "512 kB": make_answer(LARGEST),
    "512 kB in gzip": make_answer(gzip.compress(LARGEST), headers=GZIPPED),
    "gzip, in capitals": make_answer(gzip.compress(LARGEST), headers="Content-Encoding: GZIP\r\n"),
    "gzip by its old name": make_answer(gzip.compress(LARGEST), headers="Content-Encoding: x-gzip\r\n"),
    "deflate": make_answer(zlib.compress(LARGEST), headers="Content-Encoding: deflate\r\n"),
    "deflate without zlib's header": make_answer(RAW_DEFLATE, headers="Content-Encoding: deflate\r\n"),
    "not compressed, with a header": make_answer(LARGEST, headers="Content-Encoding: identity\r\n"),
}


async def test_a_document_up_to_512_kb_is_read_also_if_a_proxy_has_compressed_it(issuer: Issuer) -> None:
    seen = {}
    for name, answer in READABLE.items():
        issuer.answers[JWKS_PATH] = answer
        async with open_keys(issuer) as keys:
            seen[name] = await find_key_name(keys)

    assert seen == dict.fromkeys(READABLE, KID)


@pytest.mark.long
@pytest.mark.parametrize("abuse", ["headers in a trickle", "a body in a trickle", "interim answers without end"])
@pytest.mark.alone
async def test_a_slow_fetch_fails_after_three_seconds(issuer: Issuer, abuse: str) -> None:
    issuer.answers[JWKS_PATH] = ABUSES[abuse]

    took = await measure_failed_fetch(issuer, fetch_seconds=FETCH_SECONDS)

    assert took < 3.3


@pytest.mark.parametrize("status", ["301", "302", "303", "307", "308", "300", "201"])
async def test_a_redirect_is_never_followed(issuer: Issuer, status: str) -> None:
    async with open_trap() as (elsewhere, visitors), open_keys(issuer) as keys:
        issuer.answers[JWKS_PATH] = make_answer(
            make_set(EC_JWK), status=f"{status} X", headers=f"Location: {elsewhere}/\r\n"
        )

        seen = await find_key_name(keys)

    assert seen is KeysUnavailable
    assert visitors == []


async def test_the_proxy_of_the_environment_is_not_used(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_trap() as (elsewhere, visitors), open_keys(issuer) as keys:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, elsewhere)
            monkeypatch.setenv(name.lower(), elsewhere)
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("no_proxy", "")

        seen = await find_key_name(keys)

    assert seen == KID
    assert visitors == []


async def test_only_the_configured_host_is_contacted_even_if_its_answer_names_others(issuer: Issuer) -> None:
    async with open_trap() as (elsewhere, visitors), open_keys(issuer) as keys:
        address = elsewhere.removeprefix("http://")
        headers = f'Location: {elsewhere}/\r\nRefresh: 0; url={elsewhere}/\r\nAlt-Svc: http/1.1="{address}"\r\n'
        headers += f"Link: <{elsewhere}/>; rel=jwks_uri\r\nContent-Location: {elsewhere}/\r\n"
        document = {"jwks_uri": elsewhere, "keys": [EC_JWK | {"x5u": elsewhere, "jku": elsewhere}]}
        issuer.answers[JWKS_PATH] = make_answer(json.dumps(document).encode(), headers=headers)

        outcomes = [await find_key_name(keys), await find_key_name(keys, elsewhere)]

    assert outcomes == [KID, TokenInvalid]
    assert visitors == []
    assert issuer.asked == [JWKS_PATH]


@pytest.mark.parametrize(
    "url", ["https://\u2603\u2603.example/jwks", "https://127.0.0.1\n/jwks", "https://[v1.a]/jwks"]
)
async def test_an_invalid_address_fails_closed(issuer: Issuer, url: str) -> None:
    async with open_keys(issuer, url=url) as keys:
        seen = await find_key_name(keys)

    assert seen is KeysUnavailable


# Hostile documents --------------------------------------------------------------------------------------------------


async def test_a_cold_start_with_a_hostile_document_serves_the_right_key_or_fails_closed(issuer: Issuer) -> None:
    corpus = make_hostile_sets()

    outcomes = {hostile: await start_and_check(issuer, hostile) for hostile in corpus}

    assert {hostile.name: seen for hostile, seen in outcomes.items() if seen is not hostile.expected} == {}
    assert len(outcomes) >= 110


async def start_and_check(issuer: Issuer, hostile: HostileSet) -> type[Refusal] | None:
    issuer.answers[JWKS_PATH] = make_answer(hostile.body)
    async with open_keys(issuer, algorithm="RS256") as keys:
        return await check_serving_keys(keys, has_other_key=hostile.has_other_key)


async def test_hostile_documents_never_remove_a_good_key(issuer: Issuer) -> None:
    corpus = [hostile for hostile in make_hostile_sets() if hostile.expected is not TokenInvalid]
    issuer.publish(make_right(), make_other())
    outcomes = {}
    async with open_keys(issuer, algorithm="RS256") as keys:
        await find_key_name(keys)
        for hostile in corpus:
            issuer.answers[JWKS_PATH] = make_answer(hostile.body)
            # Cached keys serve for an hour, and all useless sets come within it.
            issuer.clock.advance(600 if hostile.expected is None else 30)
            await keys.keys_for({"kid": "unknown"})
            outcomes[hostile.name] = await check_serving_keys(keys, has_other_key=hostile.has_other_key)

    assert {name: seen for name, seen in outcomes.items() if seen is not None} == {}
    assert len(issuer.asked) == 1 + len(outcomes)


OWNERS: Final = ("provider", "attacker")


async def check_serving_keys(keys: PublishedKeys, *, has_other_key: bool) -> type[Refusal] | None:
    """Return None if the provider's key serves under its name and no unpublished key does; else the refusal."""
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
    assert trusted == (set(OWNERS) if has_other_key else {"provider"})
    return None


def test_the_corpus_of_key_sets_holds_no_name_and_no_body_twice() -> None:
    corpus = make_hostile_sets()

    assert len({hostile.name for hostile in corpus}) == len(corpus)
    assert len({hostile.body for hostile in corpus}) == len(corpus)
