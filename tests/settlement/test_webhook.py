"""ElevenLabs' webhook: which signatures are accepted, how a body is parsed, and that it settles once."""

import base64
import hashlib
import hmac
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.conftest import AGENT_ID, NOW, Clock
from tests.ledger.given import rows
from tests.logs import capture_logs
from tests.settlement.given import grant, make_settlements
from tests.tables import table
from voicepass.errors import RequestInvalid, SignatureInvalid
from voicepass.ledger import Ledger
from voicepass.ledger.sqlite import open_sqlite
from voicepass.model import IssuedPass, Settlement
from voicepass.settlement.reports import parse_record
from voicepass.settlement.webhook import Webhook, verify_signature

pytestmark = pytest.mark.anyio

SECRET = "wsec_canary-of-the-webhook-2f6b1c"
OLD_SECRET = "wsec_canary-of-last-year-7d01aa"
FOREIGN_SECRET = "wsec_canary-of-another-workspace"


def event(
    conversation_id: object = "conv_1", *, seconds: object = 42, user_id: object = "u-1", **changes: object
) -> bytes:
    """Make a post-call event as ElevenLabs sends it, including members that voicepass ignores."""
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
    sent = {"type": "post_call_transcription", "event_timestamp": NOW, "data": account}
    return json.dumps(sent | changes).encode()


def mac(t: object, body: bytes, *, secret: str = SECRET, algorithm: str = "sha256") -> str:
    return hmac.new(secret.encode(), f"{t}.".encode() + body, algorithm).hexdigest()


def signature(now: object, body: bytes, *, secret: str = SECRET) -> str:
    return f"t={now},v0={mac(now, body, secret=secret)}"


def hostile(now: int) -> dict[str, tuple[Sequence[str | bytes], bytes]]:
    """Make headers and bodies that ElevenLabs would not send. The key of each says what is wrong with it."""
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
        "a body that was serialised again": ([good], json.dumps(json.loads(body), separators=(",", ":")).encode()),
        "a body with a line feed": ([good], body + b"\n"),
        "a body with a byte order mark": ([good], b"\xef\xbb\xbf" + body),
        "no body": ([good], b""),
    }


def join_headers(headers: Sequence[str | bytes]) -> str:
    return ", ".join(value if isinstance(value, str) else value.decode("latin-1") for value in headers)


@table("case", hostile(NOW))
def test_a_hostile_signature_is_refused(case: str) -> None:
    headers, body = hostile(NOW)[case]

    with pytest.raises(SignatureInvalid) as refused:
        verify_signature(join_headers(headers), body, [SECRET, OLD_SECRET], NOW)

    assert refused.value.operator_note.startswith("signature refused: ")
    assert refused.value.detail == SignatureInvalid.detail


def test_there_are_at_least_sixty_hostile_signatures() -> None:
    assert len(hostile(NOW)) >= 60


@pytest.mark.parametrize("signed_at", [NOW - 1800, NOW - 1, NOW, NOW + 300])
@pytest.mark.parametrize("secret", [SECRET, OLD_SECRET])
def test_signatures_of_both_secrets_are_valid_for_30_minutes_and_5_minutes_ahead(signed_at: int, secret: str) -> None:
    verify_signature(signature(signed_at, event(), secret=secret), event(), [SECRET, OLD_SECRET], NOW)


def test_a_secret_that_was_removed_is_not_accepted() -> None:
    with pytest.raises(SignatureInvalid):
        verify_signature(signature(NOW, event(), secret=OLD_SECRET), event(), [SECRET], NOW)


@pytest.mark.parametrize("secrets", [[], [""], ["", ""]])
def test_without_a_secret_every_signature_is_refused(secrets: list[str]) -> None:
    with pytest.raises(SignatureInvalid, match="not accepted") as refused:
        verify_signature(signature(NOW, event(), secret=""), event(), secrets, NOW)

    assert "ELEVENLABS_WEBHOOK_SECRET is not set" in refused.value.operator_note


# How a report is parsed.


@table(
    ("metadata", "counted"),
    [
        ({"call_duration_secs": 42, "cost": 420}, (42, 420)),
        ({"call_duration_secs": 0, "cost": 0}, (0, 0)),
        ({"call_duration_secs": 41.2, "cost": 4.5}, (42, 5)),
        ({"call_duration_secs": 24 * 3600, "cost": 2**31 - 1}, (24 * 3600, 2**31 - 1)),
        ({"call_duration_secs": 24 * 3600 + 1}, None),
        ({"call_duration_secs": 42, "cost": 2**31}, (42, None)),
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
def test_a_record_without_a_duration_settles_nothing(metadata: object, counted: tuple[int, int | None] | None) -> None:
    settlement = parse_record("conv_1", {"metadata": metadata}, source="webhook").settlement

    assert (settlement and (settlement.seconds, settlement.cost)) == counted


@table(("sent", "kept"), [(0.0123, 0.0123), (0, 0), (None, None), ("1", None), (-0.1, None), (float("nan"), None)])
def test_only_a_number_is_a_cost_in_dollars(sent: object, kept: float | None) -> None:
    record = {"metadata": {"call_duration_secs": 42, "cost_fiat": sent}}

    settlement = parse_record("conv_1", record, source="webhook").settlement

    assert settlement is not None
    assert settlement.cost_fiat == kept


@table(
    ("sent", "kept"),
    [(NOW, NOW), (NOW + 0.5, NOW + 0.5), (2**32, 2**32), (2**41, None), (0, None), (-1, None), (str(NOW), None)],
)
def test_a_conversation_begins_at_a_number_of_seconds_also_after_the_year_2038(
    sent: object, kept: float | None
) -> None:
    record = {"metadata": {"start_time_unix_secs": sent}}

    assert parse_record("conv_1", record, source="webhook").started_at == kept


@table(
    ("claimed", "kept"),
    [
        ("u-1", "u-1"),
        ("", None),
        (None, None),
        (7, "7"),
        (True, None),
        (["u-1"], None),
        ("a\0b", "a\ufffdb"),
        ("\ud83d", "\ufffd"),
        ("x" * 100_000, "x" * 256),
    ],
)
async def test_any_user_id_that_the_browser_claims_can_be_stored(claimed: object, kept: str | None) -> None:
    settlement = parse_record(
        "conv_1", {"user_id": claimed, "metadata": {"call_duration_secs": 1}}, source="webhook"
    ).settlement

    assert settlement is not None
    assert settlement.user_id == kept
    async with open_sqlite(":memory:", clock=Clock()) as ledger:
        await grant(ledger)
        await ledger.settle(settlement)


@table(
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
async def test_a_signed_body_that_is_not_an_event_is_refused_and_changes_nothing(body: bytes) -> None:
    async with open_sqlite(":memory:", clock=Clock()) as ledger:
        await grant(ledger)

        with pytest.raises(RequestInvalid):
            await receive(ledger, body)

        assert (await ledger.find_pass("conv_1")).settled_at is None


async def test_an_event_without_a_duration_settles_nothing_because_zero_would_be_free() -> None:
    async with open_sqlite(":memory:", clock=Clock()) as ledger:
        await grant(ledger)

        await receive(ledger, event(seconds=None))

        assert (await ledger.find_pass("conv_1")).settled_at is None


@pytest.mark.parametrize("kind", ["post_call_audio", "call_initiation_failure", "something_new"])
async def test_events_of_other_types_are_accepted_and_change_nothing(kind: str) -> None:
    async with open_sqlite(":memory:", clock=Clock()) as ledger:
        await grant(ledger)

        await receive(ledger, event(type=kind))

        assert (await ledger.find_pass("conv_1")).settled_at is None


async def test_an_event_that_settles_nothing_is_logged_and_a_body_that_is_not_an_event_is_explained() -> None:
    async with open_sqlite(":memory:", clock=Clock()) as ledger:
        with capture_logs() as logged:
            await receive(ledger, event(type="x" * 65))
            await receive(ledger, event(seconds=None))
        sentences = []
        for body in (event(None), b"{}"):
            with pytest.raises(RequestInvalid) as refused:
                await receive(ledger, body)
            sentences.append(refused.value.detail)

    assert logged == [
        {"event": "webhook.ignored", "log_level": "info", "kind": "x" * 64},
        {"event": "webhook.duration_missing", "log_level": "warning", "conversation_id": "conv_1"},
    ]
    assert sentences == [
        "The event names no conversation.",
        "The body is no event of ElevenLabs: an object with 'type' and 'data'.",
    ]


async def test_an_event_of_another_agent_settles_nothing_and_is_logged() -> None:
    sent_event = json.loads(event())
    sent_event["data"]["agent_id"] = "agent_other"
    body = json.dumps(sent_event).encode()
    async with open_sqlite(":memory:", clock=Clock()) as ledger:
        await grant(ledger)
        with capture_logs() as logged:
            await receive(ledger, body)
        found = await ledger.find_pass("conv_1")

        await receive(ledger, body.replace(b"conv_1", b"conv_2"))  # before its pass
        await grant(ledger, "conv_2")
        early = await ledger.find_pass("conv_2")

    assert (found.settled_at, early.settled_at) == (None, None)
    assert [(line["event"], line["conversation_id"], line["agent"]) for line in logged] == [
        ("conversation.wrong_agent", "conv_1", "default")
    ]
    assert "another agent" in logged[0]["note"]


@table(
    ("user_id", "variables", "reported", "is_mismatch"),
    [
        ("u-1", {"user_id": "u-1", "user_name": "Ada"}, "u-1", False),
        ("u-1", {"user_id": "u-2"}, "u-2", True),
        ("u-2", {"user_id": "u-1"}, "u-2", True),
        (None, {"user_id": "u-2"}, "u-2", True),
        (None, {"user_id": "u-1"}, "u-1", False),
        ("u-1", {}, "u-1", False),
        ("u-1", {"user_id": 7}, "7", True),
        (None, {"user_id": None}, None, False),
        (None, {"user_id": {}}, None, False),
        (None, {}, None, False),
        (None, None, None, False),
    ],
)
async def test_a_wrong_user_id_from_the_browser_is_flagged_and_a_missing_one_is_not(
    user_id: str | None, variables: object, reported: str | None, *, is_mismatch: bool
) -> None:
    sent_event = json.loads(event(user_id=user_id))
    sent_event["data"]["conversation_initiation_client_data"] = {"dynamic_variables": variables}
    async with open_sqlite(":memory:", clock=Clock()) as ledger:
        await grant(ledger)

        await receive(ledger, json.dumps(sent_event).encode())

        found = await ledger.find_pass("conv_1")
    assert (found.reported_user_id, found.identity_mismatch) == (reported, is_mismatch)


@table(
    ("method", "agent_id", "reasons"),
    [
        ("public", AGENT_ID, ["public"]),
        ("shareable_link", AGENT_ID, ["shareable_link"]),
        ("public", "agent_other", []),
        ("signed_url", AGENT_ID, []),
        ("livekit_token", AGENT_ID, []),
        (None, AGENT_ID, []),
        (["public"], AGENT_ID, []),
    ],
)
async def test_a_conversation_without_authorization_is_reported_once(
    method: object, agent_id: str, reasons: list[str]
) -> None:
    sent = json.loads(event("conv_9"))
    sent["data"]["agent_id"] = agent_id
    sent["data"]["metadata"]["authorization_method"] = method
    body, bypasses = json.dumps(sent).encode(), list[str]()
    async with open_sqlite(":memory:", clock=Clock()) as ledger:
        webhook = Webhook(
            settlements=make_settlements(ledger, lambda: NOW, bypasses=bypasses), secrets=[SECRET], clock=lambda: NOW
        )
        with capture_logs() as logged:
            for _ in range(2):
                await webhook.receive(signature=signature(NOW, body), body=body)

    assert bypasses == reasons
    lines = [line for line in logged if line["event"] == "conversation.bypassed"]
    assert [(line["conversation_id"], line["agent_id"], line["reason"]) for line in lines] == [
        ("conv_9", AGENT_ID, reason) for reason in reasons
    ]


# A webhook that arrives late, twice or early.


async def receive(ledger: Ledger, body: bytes) -> None:
    webhook = Webhook(settlements=make_settlements(ledger, lambda: NOW), secrets=[SECRET], clock=lambda: NOW)
    await webhook.receive(signature=signature(NOW, body), body=body)


async def test_an_observer_that_raises_does_not_stop_a_settlement_or_later_observers() -> None:
    def raise_error(_settled: IssuedPass) -> None:
        raise OSError

    seen: list[IssuedPass] = []
    settlement = Settlement(conversation_id="conv_1", seconds=40, cost=None, user_id=None, source="webhook")
    async with open_sqlite(":memory:", clock=Clock()) as ledger:
        await grant(ledger)

        settlements = make_settlements(ledger, Clock(), raise_error, seen.append)
        await settlements.settle(settlement)

        await grant(ledger, "conv_2")
        settlements.observe = raise_error
        await settlements.settle(replace(settlement, conversation_id="conv_2"))
        second = await ledger.find_pass("conv_2")
    assert [settled.seconds for settled in seen] == [40]
    assert second.seconds == 40


async def test_every_order_of_grant_webhook_expiry_and_reconciler_ends_the_same() -> None:
    reconciled = Settlement(conversation_id="conv_1", seconds=40, cost=None, user_id=None, source="reconciler")
    outcomes = set()

    orders = [
        order
        for order in itertools.permutations(["grant", "webhook", "webhook again", "expire", "reconcile"])
        if order.index("grant") < order.index("reconcile")  # it asks only about granted passes
    ]
    for order in orders:
        async with open_sqlite(":memory:", clock=Clock()) as ledger:
            for step in order:
                match step:
                    case "grant":
                        await grant(ledger)
                    case "expire":
                        await ledger.note_unopened("conv_1", expires_seconds=0)
                    case "reconcile":
                        await ledger.settle(reconciled)
                    case _:
                        await receive(ledger, event(user_id="u-mallory"))
            row = await ledger.find_pass("conv_1")
            outcomes.add((row.settled_by, row.seconds, row.cost, row.user_id))

    assert len(orders) == 60
    assert outcomes == {("webhook", 42, 420, "u-1")}


async def test_a_settlement_without_a_pass_is_kept_for_a_day_without_the_reported_user() -> None:
    clock = Clock()
    async with open_sqlite(":memory:", clock=clock) as ledger:
        await receive(ledger, event(user_id="u-mallory"))
        kept = str(await rows(ledger, "SELECT * FROM orphans"))
        clock.now += 24 * 3600 + 1
        await ledger.delete_old(age_seconds=31 * 24 * 3600)

        left = await rows(ledger, "SELECT * FROM orphans")
    assert "conv_1" in kept
    assert "mallory" not in kept
    assert left == []
