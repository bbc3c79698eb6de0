"""What a conversation used: whose word counts, that it counts once, and who asks where no word came."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import itertools
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx
import structlog
from websockets.sync.client import connect

from tests.canaries import API_KEY
from tests.conftest import AGENT_ID, TOKEN_ISSUER, UPSTREAM
from tests.servers import running
from voicepass.elevenlabs import ElevenLabs, Workspace
from voicepass.emulator import EmulatedAgent, Emulator, Fault, create_emulator
from voicepass.errors import (
    BadAnswer,
    Busy,
    ConversationUnknown,
    KeyRejected,
    LedgerUnavailable,
    QuotaExhausted,
    RequestInvalid,
    SignatureInvalid,
    Timeout,
    Unavailable,
)
from voicepass.ledger import Ledger
from voicepass.ledger.sqlite import open_sqlite
from voicepass.model import Agent, Credential, IssuedPass, Reservation, Settlement, Transport
from voicepass.outbound import http_transport
from voicepass.settlement import (
    CALLS_PER_ROUND,
    NEVER_OPENED_SECONDS,
    UNACCOUNTED_SECONDS,
    Provider,
    Reconciler,
    Settlements,
    Webhook,
    told,
    verify_signature,
)

pytestmark = pytest.mark.anyio

NOW = 1_790_000_000
SECRET = "wsec_canary-of-the-webhook-2f6b1c"
OLD_SECRET = "wsec_canary-of-last-year-7d01aa"
FOREIGN_SECRET = "wsec_canary-of-another-workspace"


class Clock:
    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


def event(
    conversation_id: object = "conv_1", *, seconds: object = 42, user_id: object = "u-1", **changes: object
) -> bytes:
    """A post-call event as ElevenLabs sends it, with much that is of no use here."""
    account = {
        "agent_id": AGENT_ID,
        "conversation_id": conversation_id,
        "status": "done",
        "user_id": user_id,
        "transcript": [{"role": "agent", "message": "Hello Ada!", "time_in_call_secs": 0}],
        "metadata": {"start_time_unix_secs": NOW - 60, "call_duration_secs": seconds, "cost": 420, "error": None},
        "analysis": {"call_successful": "success"},
        "has_audio": False,
    }
    told = {"type": "post_call_transcription", "event_timestamp": NOW, "data": account}
    return json.dumps(told | changes).encode()


def mac(t: object, body: bytes, *, secret: str = SECRET, algorithm: str = "sha256") -> str:
    return hmac.new(secret.encode(), f"{t}.".encode() + body, algorithm).hexdigest()


def signature(now: object, body: bytes, *, secret: str = SECRET) -> str:
    return f"t={now},v0={mac(now, body, secret=secret)}"


def hostile(now: int) -> dict[str, tuple[Sequence[str | bytes], bytes]]:
    """Headers and bodies that ElevenLabs did not send, or not so: what each of them is, and the two."""
    body = event()
    good, right = signature(now, body), mac(now, body)
    changed = event(seconds=0)
    old, late = now - 31 * 60, now - 1801
    fullwidth = str(now).replace("1", "\uff11")

    def sent(value: str | bytes) -> tuple[Sequence[str | bytes], bytes]:
        return [value], body

    return {
        "no header": ([], body),
        "an empty header": sent(""),
        "a blank header": sent(" "),
        "a bare MAC": sent(right),
        "t alone": sent(f"t={now}"),
        "v0 alone": sent(f"v0={right}"),
        "the other order": sent(f"v0={right},t={now}"),
        "a space after the comma": sent(f"t={now}, v0={right}"),
        "a space before": sent(f" {good}"),
        "a space after": sent(f"{good} "),
        "a tab after": sent(f"{good}\t"),
        "a line feed after": sent(f"{good}\n"),
        "a NUL after": sent(f"{good}\0"),
        "a comma after": sent(f"{good},"),
        "a comma before": sent(f",{good}"),
        "a semicolon between": sent(f"t={now};v0={right}"),
        "another scheme beside it": sent(f"{good},v1={right}"),
        "two t, alike": sent(f"t={now},{good}"),
        "two t, the first old": sent(f"t={old},{good}"),
        "two t, the last old": sent(f"{good},t={old}"),
        "two v0, alike": sent(f"{good},v0={right}"),
        "two v0, the last wrong": sent(f"{good},v0={'0' * 64}"),
        "two v0, the first wrong": sent(f"t={now},v0={'0' * 64},v0={right}"),
        "two headers, alike": ([good, good], body),
        "two headers, the first wrong": ([f"t={now},v0={'0' * 64}", good], body),
        "one header in two": ([f"t={now}", f"v0={right}"], body),
        "t of letters": sent(signature("abc", body)),
        "t that is empty": sent(signature("", body)),
        "t with a sign": sent(signature(f"+{now}", body)),
        "t below zero": sent(signature(-1, body)),
        "t with a fraction": sent(signature(f"{now}.0", body)),
        "t with an exponent": sent(signature(f"{now}e0", body)),
        "t in hexadecimal": sent(signature(hex(now), body)),
        "t with an underscore": sent(signature(f"{now:_}", body)),
        "t with a superscript": sent(f"t=\xb2{now},v0={right}".encode("latin-1")),
        "t in fullwidth digits": sent(f"t={fullwidth},v0={right}".encode()),
        "t in milliseconds": sent(signature(now * 1000, body)),
        "t that is no number": sent(signature("nan", body)),
        "t of 4,300 digits": sent(signature("9" * 4300, body)),
        "t of zero": sent(signature(0, body)),
        "t of 31 minutes ago": sent(signature(old, body)),
        "t a second too old": sent(signature(late, body)),
        "t more than five minutes ahead": sent(signature(now + 400, body)),
        "t of tomorrow": sent(signature(now + 86_400, body)),
        "t that was not signed": sent(f"t={now + 1},v0={right}"),
        "v0 in capitals": sent(f"t={now},v0={right.upper()}"),
        "v0 cut by one": sent(good[:-1]),
        "v0 one too long": sent(f"{good}0"),
        "v0 twice in one": sent(f"{good}{right}"),
        "v0 that is empty": sent(f"t={now},v0="),
        "v0 of zeros": sent(f"t={now},v0={'0' * 64}"),
        "v0 with its last digit changed": sent(good[:-1] + ("0" if good[-1] != "0" else "1")),
        "v0 in quotes": sent(f't={now},v0="{right}"'),
        "v0 with a prefix": sent(f"t={now},v0=sha256={right}"),
        "v0 in Base64": sent(f"t={now},v0={base64.b64encode(bytes.fromhex(right)).decode()}"),
        "v0 beyond ASCII": sent(f"t={now},v0={right[:-1]}\xe9".encode("latin-1")),
        "v1 for v0": sent(f"t={now},v1={right}"),
        "names in capitals": sent(f"T={now},V0={right}"),
        "SHA-1": sent(f"t={now},v0={mac(now, body, algorithm='sha1')}"),
        "SHA-512": sent(f"t={now},v0={mac(now, body, algorithm='sha512')}"),
        "a hash without a key": sent(f"t={now},v0={hashlib.sha256(f'{now}.'.encode() + body).hexdigest()}"),
        "of the body without t": sent(f"t={now},v0={hmac.new(SECRET.encode(), body, 'sha256').hexdigest()}"),
        "of t without the body": sent(f"t={now},v0={mac(now, b'')}"),
        "an empty secret": sent(signature(now, body, secret="")),
        "another workspace's secret": sent(signature(now, body, secret=FOREIGN_SECRET)),
        "the secret with a line break": sent(signature(now, body, secret=f"{SECRET}\n")),
        "the secret cut by one": sent(signature(now, body, secret=SECRET[:-1])),
        "both secrets as configured": sent(signature(now, body, secret=f"{SECRET},{OLD_SECRET}")),
        "another body": ([good], changed),
        "a body written anew": ([good], json.dumps(json.loads(body), separators=(",", ":")).encode()),
        "a body with a line feed": ([good], body + b"\n"),
        "a body with a byte order mark": ([good], b"\xef\xbb\xbf" + body),
        "no body": ([good], b""),
    }


def as_read(headers: Sequence[str | bytes]) -> str:
    return ", ".join(value if isinstance(value, str) else value.decode("latin-1") for value in headers)


@pytest.mark.parametrize("case", hostile(NOW))
def test_a_hostile_signature_is_refused(case: str) -> None:
    headers, body = hostile(NOW)[case]

    with pytest.raises(SignatureInvalid) as refused:
        verify_signature(as_read(headers), body, [SECRET, OLD_SECRET], NOW)

    assert refused.value.operator_note.startswith("signature refused: ")
    assert refused.value.detail == SignatureInvalid.detail


def test_there_are_sixty_hostile_signatures_and_more() -> None:
    assert len(hostile(NOW)) >= 60


@pytest.mark.parametrize("signed_at", [NOW - 1800, NOW - 1, NOW, NOW + 300])
@pytest.mark.parametrize("secret", [SECRET, OLD_SECRET])
def test_both_secrets_count_while_they_are_rotated_for_30_minutes_and_5_ahead(signed_at: int, secret: str) -> None:
    verify_signature(signature(signed_at, event(), secret=secret), event(), [SECRET, OLD_SECRET], NOW)


def test_a_secret_that_was_taken_out_counts_no_longer() -> None:
    with pytest.raises(SignatureInvalid):
        verify_signature(signature(NOW, event(), secret=OLD_SECRET), event(), [SECRET], NOW)


@pytest.mark.parametrize("secrets", [[], [""], ["", ""]])
def test_without_a_secret_every_signature_is_refused(secrets: list[str]) -> None:
    with pytest.raises(SignatureInvalid, match="not accepted") as refused:
        verify_signature(signature(NOW, event(), secret=""), event(), secrets, NOW)

    assert "ELEVENLABS_WEBHOOK_SECRET is not set" in refused.value.operator_note


# What ElevenLabs tells, as it is understood.


@pytest.mark.parametrize(
    ("metadata", "counted"),
    [
        ({"call_duration_secs": 42, "cost": 420}, (42, 420)),
        ({"call_duration_secs": 0, "cost": 0}, (0, 0)),
        ({"call_duration_secs": 41.2, "cost": 4.5}, (42, 5)),
        ({"call_duration_secs": 42}, (42, None)),
        ({"call_duration_secs": 42, "cost": None}, (42, None)),
        ({"call_duration_secs": 42, "cost": "420"}, (42, None)),
        ({"call_duration_secs": 42, "cost": 2**63}, (42, None)),
        ({"call_duration_secs": 42, "cost": -1}, (42, None)),
        ({"call_duration_secs": None, "cost": 420}, None),
        ({"call_duration_secs": "42"}, None),
        ({"call_duration_secs": True}, None),
        ({"call_duration_secs": -1}, None),
        ({"call_duration_secs": 2**31}, None),
        ({"call_duration_secs": float("nan")}, None),
        ({"call_duration_secs": float("inf")}, None),
        ({}, None),
        (None, None),
        ([42], None),
    ],
)
def test_a_duration_that_is_not_told_is_not_made_up(metadata: object, counted: tuple[int, int | None] | None) -> None:
    settlement = told("conv_1", {"metadata": metadata}, source="webhook")

    assert (settlement and (settlement.seconds, settlement.cost)) == counted


@pytest.mark.parametrize(
    ("claimed", "kept"),
    [
        ("u-1", "u-1"),
        ("", None),
        (None, None),
        (7, None),
        (["u-1"], None),
        ("a\0b", "a\ufffdb"),
        ("\ud83d", "\ufffd"),
        ("x" * 100_000, "x" * 256),
    ],
)
async def test_whatever_the_browser_claimed_to_be_can_be_stored(claimed: object, kept: str | None) -> None:
    settlement = told("conv_1", {"user_id": claimed, "metadata": {"call_duration_secs": 1}}, source="webhook")

    assert settlement is not None
    assert settlement.user_id == kept
    async with open_sqlite(":memory:", clock=Clock()) as ledger:
        await granted(ledger)
        await ledger.settle(settlement)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"post_call_transcription"',
        b"{}",
        b'{"type": 7, "data": {}}',
        b'{"type": "post_call_transcription"}',
        b'{"type": "post_call_transcription", "data": []}',
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"type": ' + b"9" * 5000 + b"}",
        event(None),
        event(7),
        event(""),
        event("conv_1\0"),
        event("c" * 129),
        event("../agents"),
    ],
)
async def test_a_signed_body_that_is_no_event_is_named_so_and_changes_nothing(body: bytes) -> None:
    async with open_sqlite(":memory:", clock=Clock()) as ledger:
        await granted(ledger)

        with pytest.raises(RequestInvalid):
            await receive(ledger, body)

        assert (await ledger.issued("conv_1")).settled_at is None


async def test_an_event_without_a_duration_settles_nothing_for_none_would_be_free() -> None:
    async with open_sqlite(":memory:", clock=Clock()) as ledger:
        await granted(ledger)

        await receive(ledger, event(seconds=None))

        assert (await ledger.issued("conv_1")).settled_at is None


@pytest.mark.parametrize("kind", ["post_call_audio", "call_initiation_failure", "something_new"])
async def test_other_events_are_taken_in_and_change_nothing(kind: str) -> None:
    async with open_sqlite(":memory:", clock=Clock()) as ledger:
        await granted(ledger)

        await receive(ledger, event(type=kind))

        assert (await ledger.issued("conv_1")).settled_at is None


# Late, twice, early: one ledger.


async def granted(ledger: Ledger, conversation_id: str = "conv_1", *, agent_id: str = AGENT_ID) -> None:
    reservation = Reservation(
        pass_id=f"pass of {conversation_id}",
        request_id="r-1",
        token_issuer=TOKEN_ISSUER,
        user_id="u-1",
        agent_alias="default",
        agent_id=agent_id,
        transport=Transport.WEBSOCKET,
        seconds=600,
    )
    await ledger.reserve(reservation, [])
    await ledger.grant(reservation, Credential(secret="s", conversation_id=conversation_id, expires_at=None))


async def receive(ledger: Ledger, body: bytes) -> None:
    webhook = Webhook(settlements=Settlements(ledger=ledger, observers=[]), secrets=[SECRET], clock=lambda: NOW)
    await webhook.receive(signature=signature(NOW, body), body=body)


async def test_an_observer_that_raises_changes_nothing_about_a_settlement() -> None:
    def broken(_settled: IssuedPass) -> None:
        raise OSError

    seen: list[IssuedPass] = []
    settlement = Settlement(conversation_id="conv_1", seconds=40, cost=None, user_id=None, source="webhook")
    async with open_sqlite(":memory:", clock=Clock()) as ledger:
        await granted(ledger)

        await Settlements(ledger=ledger, observers=[broken, seen.append]).settle(settlement)

    assert [settled.seconds for settled in seen] == [40]


async def test_every_order_of_what_can_happen_ends_in_the_same_ledger() -> None:
    asked = Settlement(conversation_id="conv_1", seconds=40, cost=None, user_id=None, source="reconciler")
    outcomes = set()

    orders = [
        order
        for order in itertools.permutations(["grant", "webhook", "webhook again", "expire", "reconcile"])
        if order.index("grant") < order.index("reconcile")  # it asks of passes that were granted
    ]
    for order in orders:
        async with open_sqlite(":memory:", clock=Clock()) as ledger:
            for step in order:
                match step:
                    case "grant":
                        await granted(ledger)
                    case "expire":
                        await ledger.expire("conv_1")
                    case "reconcile":
                        await ledger.settle(asked)
                    case _:
                        await receive(ledger, event(user_id="u-mallory"))
            row = await ledger.issued("conv_1")
            outcomes.add((row.settled_by, row.seconds, row.cost, row.user_id, row.reported_user_id))

    assert len(orders) == 60
    assert outcomes == {("webhook", 42, 420, "u-1", "u-mallory")}


# Where no word came, somebody asks.


class Told:
    """A provider by hand: answers with the accounts it was given, raises what is an exception, notes who asked."""

    def __init__(self, accounts: Mapping[str, object] | None = None, *, default: object = None) -> None:
        self.asked: list[str] = []
        self._accounts = accounts or {}
        self._default = default if default is not None else {"status": "in-progress"}

    async def conversation(self, agent_base_url: str, conversation_id: str) -> Mapping[str, object]:
        self.asked.append(conversation_id)
        account = self._accounts.get(conversation_id, self._accounts.get(agent_base_url, self._default))
        if isinstance(account, Exception):
            raise account
        assert isinstance(account, dict)
        return account


def reconciler_of(
    ledger: Ledger,
    provider: Provider,
    clock: Clock,
    *,
    base_urls: Mapping[str, str] | None = None,
    every_seconds: float = 60,
) -> Reconciler:
    return Reconciler(
        ledger=ledger,
        provider=provider,
        settlements=Settlements(ledger=ledger, observers=[]),
        base_urls={AGENT_ID: "https://here"} if base_urls is None else base_urls,
        every_seconds=every_seconds,
        keep_seconds=31 * 24 * 3600,
        clock=clock,
    )


def account(status: str, **metadata: object) -> dict[str, object]:
    return {"status": status, "user_id": "u-1", "metadata": metadata}


OPEN = (None, 600)
EXPIRED = ("expiry", 0)
IN_FULL = ("reconciler", 600)
USED = ("reconciler", 42)

ANSWERS: dict[str, tuple[object, float, tuple[str | None, int]]] = {
    "done": (account("done", call_duration_secs=42), 901, USED),
    "failed": (account("failed", call_duration_secs=42), 901, USED),
    "done, and it does not tell how long": (account("done"), 901, OPEN),
    "still talking": (account("in-progress", call_duration_secs=0), NEVER_OPENED_SECONDS, OPEN),
    "being written up": (account("processing", call_duration_secs=0), NEVER_OPENED_SECONDS, OPEN),
    "only just opened, perhaps": (account("initiated", call_duration_secs=0), NEVER_OPENED_SECONDS - 1, OPEN),
    "never really opened": (account("initiated", call_duration_secs=0), NEVER_OPENED_SECONDS, EXPIRED),
    "not known, so far": (ConversationUnknown(), NEVER_OPENED_SECONDS - 1, OPEN),
    "never opened": (ConversationUnknown(), NEVER_OPENED_SECONDS, EXPIRED),
    "a state of tomorrow": (account("archived", call_duration_secs=42), 901, OPEN),
    "no state at all": ({"detail": []}, 901, OPEN),
    "not readable": (BadAnswer(), 901, OPEN),
    "not readable for a day": (BadAnswer(), UNACCOUNTED_SECONDS, IN_FULL),
    "being written up for a day": (account("processing"), UNACCOUNTED_SECONDS, IN_FULL),
    "out of order for a day": (Unavailable(), UNACCOUNTED_SECONDS, OPEN),
    "done, after a day": (account("done", call_duration_secs=42), UNACCOUNTED_SECONDS, USED),
}


@pytest.mark.parametrize("case", ANSWERS)
async def test_an_answer_settles_expires_or_leaves_a_pass(case: str) -> None:
    answer, age_seconds, expected = ANSWERS[case]
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await granted(ledger)
        clock.now += age_seconds

        await reconciler_of(ledger, Told({"conv_1": answer}), clock).round()

        row = await ledger.issued("conv_1")
    assert (row.settled_by, row.seconds) == expected


async def test_a_pass_that_may_still_be_opened_is_not_asked_about() -> None:
    clock, provider = Clock(), Told()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await granted(ledger)
        clock.now += 900

        await reconciler_of(ledger, provider, clock).round()

    assert provider.asked == []


async def test_an_agent_that_is_no_longer_configured_is_charged_in_full_after_a_day() -> None:
    clock, provider = Clock(), Told()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await granted(ledger, agent_id="agent_gone")
        reconciler = reconciler_of(ledger, provider, clock)
        clock.now += 901
        await reconciler.round()
        left = await ledger.issued("conv_1")
        clock.now += UNACCOUNTED_SECONDS
        await reconciler.round()
        row = await ledger.issued("conv_1")

    assert provider.asked == []
    assert left.settled_by is None
    assert (row.settled_by, row.seconds) == IN_FULL


async def test_a_late_webhook_overrules_an_expiry_and_what_was_charged_for_want_of_an_answer() -> None:
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        for number, answer in enumerate([ConversationUnknown(), BadAnswer()]):
            await granted(ledger, f"conv_{number}")
            clock.now += UNACCOUNTED_SECONDS
            await reconciler_of(ledger, Told(default=answer), clock).round()

            await receive(ledger, event(f"conv_{number}"))

            row = await ledger.issued(f"conv_{number}")
            assert (row.settled_by, row.seconds) == ("webhook", 42)


async def test_a_round_asks_for_20_and_the_next_for_the_others() -> None:
    clock, provider = Clock(), Told()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        for number in range(25):
            clock.now += 1
            await granted(ledger, f"conv_{number}")
        clock.now += 901
        reconciler = reconciler_of(ledger, provider, clock)
        per_round = []
        for _ in range(3):
            await reconciler.round()
            per_round.append(provider.asked[:])
            provider.asked.clear()
            clock.now += 60

    ids = [f"conv_{number}" for number in range(25)]
    assert per_round == [ids[:CALLS_PER_ROUND], ids[CALLS_PER_ROUND:], ids[:CALLS_PER_ROUND]]


@pytest.mark.parametrize("refusal", [Busy(), Unavailable(), Timeout(), QuotaExhausted(), KeyRejected()])
async def test_a_host_that_refuses_is_asked_once_a_round_and_the_others_go_on(refusal: Exception) -> None:
    clock, provider = Clock(), Told({"https://there": refusal}, default=account("done", call_duration_secs=42))
    async with open_sqlite(":memory:", clock=clock) as ledger:
        for number in range(6):
            await granted(ledger, f"conv_{number}", agent_id=AGENT_ID if number % 2 else "agent_there")
        clock.now += 901
        base_urls = {AGENT_ID: "https://here", "agent_there": "https://there"}

        with structlog.testing.capture_logs() as logged:
            await reconciler_of(ledger, provider, clock, base_urls=base_urls).round()

        settled = [(await ledger.issued(f"conv_{number}")).settled_by for number in range(6)]
    assert settled == [None, "reconciler"] * 3
    assert provider.asked == ["conv_0", "conv_1", "conv_3", "conv_5"]
    assert [line["event"] for line in logged] == ["reconciler.stopped", "passes.reconciled"]


async def test_two_instances_ask_once(tmp_path: Path) -> None:
    clock, provider = Clock(), Told()
    path = str(tmp_path / "ledger.db")
    async with open_sqlite(path, clock=clock) as one, open_sqlite(path, clock=clock) as other:
        await granted(one)
        clock.now += 901
        instances = [reconciler_of(ledger, provider, clock) for ledger in (one, other)]
        asked = []

        for _ in range(3):
            await asyncio.gather(*(instance.round() for instance in instances))
            asked.append(len(provider.asked))
            clock.now += 60

    assert asked == [1, 2, 3]


async def test_a_round_forgets_what_is_older_than_the_ledger_is_to_remember() -> None:
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await granted(ledger)
        remembered = []

        for days in (30, 2):
            clock.now += days * 24 * 3600
            await reconciler_of(ledger, Told(), clock).round()
            remembered.append(len(await ledger.listed(most=10)))

    assert remembered == [1, 0]


async def test_a_lease_is_nobody_elses_until_it_lapses() -> None:
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        got = [await ledger.lease("a", 10), await ledger.lease("a", 10), await ledger.lease("b", 10)]
        clock.now += 9.9
        got.append(await ledger.lease("a", 10))
        clock.now += 0.1
        got += [await ledger.lease("a", 10), await ledger.lease("a", 10)]

    assert got == [True, False, True, False, True, False]


async def test_a_ledger_that_is_out_ends_the_round_and_not_the_reconciler() -> None:
    class Out:
        async def lease(self, _name: str, _seconds: float) -> bool:
            raise LedgerUnavailable(operator_note="the disk is full")

    with structlog.testing.capture_logs() as logged:
        await reconciler_of(Out(), Told(), Clock()).round()  # type: ignore[arg-type]

    assert [(line["event"], line["note"]) for line in logged] == [("reconciler.stopped", "the disk is full")]


async def test_nothing_ends_the_reconciler_but_the_service_and_that_at_once() -> None:
    clock, enough = Clock(), asyncio.Event()

    class Broken(Told):
        async def conversation(self, agent_base_url: str, conversation_id: str) -> Mapping[str, object]:
            await super().conversation(agent_base_url, conversation_id)
            clock.now += 1  # the lease has lapsed
            if len(self.asked) == 3:
                enough.set()
                await asyncio.Event().wait()
            raise RuntimeError("a bug")

    before = asyncio.all_tasks()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await granted(ledger)
        clock.now += 901
        reconciler = reconciler_of(ledger, Broken(), clock, every_seconds=0.01)

        with structlog.testing.capture_logs() as logged:
            async with reconciler.running(), asyncio.timeout(5):
                await enough.wait()

    assert [(line["event"], line["cause"]) for line in logged] == [("reconciler.failed", "RuntimeError")] * 2
    assert asyncio.all_tasks() == before


# And over real sockets, with the pretend ElevenLabs.


@contextlib.contextmanager
def elevenlabs(*permissions: str) -> Iterator[tuple[Emulator, str]]:
    emulator = Emulator(
        agents=[EmulatedAgent(agent_id=AGENT_ID)], api_keys={API_KEY: frozenset({"convai_write", *permissions})}
    )
    with running(lambda _url: create_emulator(emulator)) as url:
        yield emulator, url


@contextlib.asynccontextmanager
async def asking(url: str, ledger: Ledger, clock: Clock) -> AsyncIterator[Reconciler]:
    async with http_transport(connect_seconds=4) as transport:
        workspace = Workspace(base_url=url, api_keys=[API_KEY])
        provider = ElevenLabs(transport=transport, workspaces=[workspace], deadline_seconds=4, max_calls=8, clock=clock)
        yield reconciler_of(ledger, provider, clock, base_urls={AGENT_ID: url})
        await provider.aclose()


async def conversed(emulator: Emulator, url: str, *, seconds: int) -> str:
    """Hold a conversation of so many seconds, as far as the emulator's clock is concerned; returns its id."""
    conversation_signature, conversation_id = emulator.issue(AGENT_ID, bound=True)
    query = f"agent_id={AGENT_ID}&conversation_signature={conversation_signature}"
    initiation = {"type": "conversation_initiation_client_data", "user_id": "u-2", "dynamic_variables": {}}
    with connect(f"{url.replace('http', 'ws', 1)}/v1/convai/conversation?{query}", proxy=None) as socket:
        socket.send(json.dumps(initiation | {"dynamic_variables": {"user_name": "Ada"}}))
        socket.recv(timeout=5)
        emulator.advance(seconds)
    assert conversation_id is not None
    async with asyncio.timeout(5):
        while emulator.accounts[conversation_id].seconds is None:  # noqa: ASYNC110 - no event of this loop tells it
            await asyncio.sleep(0.001)  # the server hears of the end in its own thread
    return conversation_id


async def test_what_no_webhook_told_is_asked_for() -> None:
    clock = Clock()
    with elevenlabs("convai_read") as (emulator, url):
        async with open_sqlite(":memory:", clock=clock) as ledger, asking(url, ledger, clock) as reconciler:
            used = await conversed(emulator, url, seconds=42)
            _, unused = emulator.issue(AGENT_ID, bound=True)
            for conversation_id in (used, str(unused)):
                await granted(ledger, conversation_id)
            clock.now += NEVER_OPENED_SECONDS

            await reconciler.round()

            row = await ledger.issued(used)
            assert (row.settled_by, row.seconds, row.cost, row.reported_user_id) == ("reconciler", 42, 420, "u-2")
            row = await ledger.issued(str(unused))
            assert (row.settled_by, row.seconds) == EXPIRED
    assert [(call.path.rpartition("/")[2], call.status) for call in emulator.records.calls] == [
        (used, 200),
        (unused, 404),
    ]


async def test_an_outage_is_waited_out() -> None:
    clock = Clock()
    with elevenlabs("convai_read") as (emulator, url):
        async with open_sqlite(":memory:", clock=clock) as ledger, asking(url, ledger, clock) as reconciler:
            ids = [await conversed(emulator, url, seconds=5) for _ in range(3)]
            for conversation_id in ids:
                await granted(ledger, conversation_id)
            clock.now += 901
            emulator.faults["account"] = Fault(target="account", status=503)
            await reconciler.round()
            during = [(await ledger.issued(conversation_id)).settled_by for conversation_id in ids]
            calls = len(emulator.records.calls)

            emulator.faults.clear()
            clock.now += 60
            await reconciler.round()

            after = [(await ledger.issued(conversation_id)).settled_by for conversation_id in ids]
    assert (during, calls) == ([None] * 3, 1)
    assert after == ["reconciler"] * 3


async def test_a_key_that_may_not_read_is_named_with_the_remedy_once_a_round() -> None:
    clock = Clock()
    with elevenlabs() as (emulator, url):
        async with open_sqlite(":memory:", clock=clock) as ledger, asking(url, ledger, clock) as reconciler:
            for number in range(3):
                await granted(ledger, f"conv_{number}")
            clock.now += 901

            with structlog.testing.capture_logs() as logged:
                await reconciler.round()

    (line,) = logged
    assert (line["event"], line["code"]) == ("reconciler.stopped", "elevenlabs_key_rejected")
    assert "lacks the permission convai_read: give the key 'ElevenAgents: Read'" in line["note"]
    assert "VOICEPASS_RECONCILE_SECONDS=0" in line["note"]
    assert len(emulator.records.calls) == 1


# The one call that it makes.

ACCOUNT = "/v1/convai/conversations/conv_1"


@contextlib.asynccontextmanager
async def provider_with(*api_keys: str) -> AsyncIterator[ElevenLabs]:
    async with http_transport(connect_seconds=4) as transport:
        workspace = Workspace(base_url=UPSTREAM, api_keys=api_keys)
        yield ElevenLabs(transport=transport, workspaces=[workspace], deadline_seconds=4, max_calls=8, clock=Clock())


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"status_code": 404, "json": {"detail": {"status": "document_not_found"}}}, ConversationUnknown),
        ({"status_code": 404, "json": {"detail": {"code": "not_found", "type": "not_found"}}}, ConversationUnknown),
        ({"status_code": 404, "json": {"detail": "Not Found"}}, BadAnswer),
        ({"status_code": 404, "html": "<h1>nginx</h1>"}, BadAnswer),
        ({"status_code": 422, "json": {"detail": []}}, BadAnswer),
        ({"status_code": 400, "json": {"detail": {"status": "invalid"}}}, BadAnswer),
        ({"status_code": 200, "html": "<h1>Please wait</h1>"}, BadAnswer),
        ({"status_code": 200, "json": []}, BadAnswer),
        ({"status_code": 200, "json": {"x": "y" * 4 * 1024 * 1024}}, BadAnswer),
        ({"status_code": 429, "json": {}}, Busy),
        ({"status_code": 500, "json": {}}, Unavailable),
    ],
)
async def test_only_elevenlabs_own_word_makes_a_conversation_unknown(
    upstream: respx.MockRouter, answer: dict[str, Any], error: type[Exception]
) -> None:
    upstream.get(ACCOUNT).respond(**answer)

    async with provider_with(API_KEY) as provider:
        with pytest.raises(error):
            await provider.conversation(UPSTREAM, "conv_1")


async def test_a_transcript_longer_than_any_credential_is_read(upstream: respx.MockRouter) -> None:
    upstream.get(ACCOUNT).respond(json={"status": "done", "transcript": ["x" * 1024 * 1024]})

    async with provider_with(API_KEY) as provider:
        assert (await provider.conversation(UPSTREAM, "conv_1"))["status"] == "done"


async def test_a_key_that_may_only_read_is_not_preferred_for_passes(upstream: respx.MockRouter) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.headers["xi-api-key"] == "sk_reader":
            return httpx.Response(200, json={"status": "done"})
        return httpx.Response(401, json={"detail": {"status": "missing_permissions"}})

    upstream.get(ACCOUNT).mock(side_effect=answer)
    async with provider_with("sk_writer", "sk_reader") as provider:
        await provider.conversation(UPSTREAM, "conv_1")
        agent = Agent(alias="default", agent_id=AGENT_ID, base_url=UPSTREAM)
        await provider.credential(agent, Transport.WEBSOCKET)

    assert upstream["signed_url"].calls.last.request.headers["xi-api-key"] == "sk_writer"
    assert upstream["signed_url"].call_count == 1


async def test_an_id_cannot_lead_the_call_elsewhere(upstream: respx.MockRouter) -> None:
    route = upstream.get(path__regex=r".*").respond(json={"status": "done"})

    async with provider_with(API_KEY) as provider:
        await provider.conversation(UPSTREAM, "../agents?x=1#y")

    assert route.calls.last.request.url.raw_path == b"/v1/convai/conversations/..%2Fagents%3Fx%3D1%23y"
