"""No query takes longer as the ledger grows: on both engines, each uses an index among 20,000 passes."""

import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.ledger.given import (
    ALONE_ON_POSTGRES,
    START,
    Engine,
    credential,
    explain_rule,
    limit,
    reservation,
    rows,
    settlement,
)
from voicepass.ledger import Ledger, forgetting, opened, records, rules, sums
from voicepass.ledger.dialogue import Dialogue
from voicepass.ledger.limits import count, find_room, prepare_question
from voicepass.model import Counted, Scope, User

pytestmark = pytest.mark.anyio

LIMITS = [limit(1_000_000, scope=scope, counted=counted, window_seconds=60) for scope in Scope for counted in Counted]
FILL = """
WITH RECURSIVE numbers (n) AS (SELECT CAST(:first AS INTEGER) UNION ALL SELECT n + 1 FROM numbers WHERE n < :last)
INSERT INTO passes (pass_id, request_id, token_issuer, user_id, agent_alias, agent_id, transport, reserved_at,
                    lapses_at, reserved_seconds, seconds, granted_at, conversation_id, credential_sha256, settled_at,
                    settled_by)
SELECT 'p' || n, 'r', 'https://login.example', 'u-' || (n & 511), 'a' || (n & 15), 'agent', 'websocket',
       1800000000 - n * 60, 1800000600 - n * 60, 60, 60, 1800000000 - n * 60, 'conv_' || n, 'h',
       CASE WHEN (n & 63) > 0 THEN 1800000000 - n * 60 END, CASE WHEN (n & 63) > 0 THEN 'webhook' END FROM numbers"""
OPENED = """
WITH RECURSIVE numbers (n) AS (SELECT CAST(:first AS INTEGER) UNION ALL SELECT n + 1 FROM numbers WHERE n < :last)
INSERT INTO passes (pass_id, request_id, token_issuer, user_id, agent_alias, agent_id, transport, reserved_at,
                    lapses_at, reserved_seconds, seconds, granted_at, conversation_id, credential_sha256)
SELECT 'o' || n, 'r', 'https://login.example', 'o-' || n, 'a' || (n & 15), 'agent', 'websocket',
       1800000000 - 30, 1800001500 - n / 100, 60, 60, 1800000000, 'open_' || n, 'h' FROM numbers"""
WHOSE = {"token_issuer": "https://login.example", "user_id": "u-1", "agent_alias": "a1"}

RULES: dict[str, Callable[[], Dialogue[Any]]] = {
    "usage": lambda: rules.read_usage(START, WHOSE, LIMITS),
    "used up": lambda: count(START, limit(1, counted=Counted.SECONDS, window_seconds=600), WHOSE),
    "reserve": lambda: rules.reserve(START, reservation(), prepare_question(LIMITS)),
    "lapse": lambda: rules.lapse(START),
    "grant": lambda: rules.grant(START, reservation(pass_id="p8"), credential("conv_new")),
    "release": lambda: rules.release("p7"),
    "settle": lambda: rules.settle(START, settlement("conv_7")),
    "issued": lambda: rules.find_pass(START, "conv_7"),
    "seconds left": lambda: rules.read_seconds_left(START, LIMITS, conversation_id="conv_7", pass_id="p8"),
    "issuers of a user": lambda: forgetting.find_issuers(START, "u-1"),
    "due": lambda: records.list_unsettled(START, 100, min_age_seconds=1200),
    "look up conversations": lambda: opened.begin_lookup(
        START, reservation(), limit(3, counted=Counted.CONVERSATIONS), seconds=1
    ),
    "look up minutes": lambda: opened.begin_lookup(
        START, reservation(), limit(3, counted=Counted.SECONDS, window_seconds=600), seconds=1
    ),
    "look up everyone's conversations": lambda: opened.begin_lookup(
        START, reservation(), limit(3, counted=Counted.CONVERSATIONS, scope=Scope.ALL), seconds=1
    ),
    "refuse": lambda: find_room(START, prepare_question([limit(0, counted=Counted.CONVERSATIONS)]), WHOSE, 600),
    "refuse everyone": lambda: find_room(
        START, prepare_question([limit(0, counted=Counted.CONVERSATIONS, scope=Scope.ALL)]), WHOSE, 600
    ),
    "fix sums": lambda: sums.fix_hour(START, int(START // 3600)),
    "fix open sums": lambda: sums.fix_open(START),
    "is in flight": lambda: opened.is_in_flight(START, reservation()),
    "note unopened": lambda: opened.note_unopened(START, "conv_64", expires_seconds=930),
    "note opened": lambda: opened.note_opened(START, "conv_7", 0),
    "note ended": lambda: opened.note_ended(START, "conv_64"),
    "unopened": lambda: opened.list_unopened(START, reservation()),
    "erase sealed": lambda: opened.erase_sealed(START),
    "begin listing": lambda: opened.begin_listing(START, "agent", every_seconds=240, recent_seconds=1200),
    "never opened": lambda: opened.list_never_opened(START, "agent", 5, min_age_seconds=930),
    "find": lambda: opened.find(START, ["conv_7", "conv_8"]),
    "standing": lambda: records.read_standing(START),
    "page": lambda: records.list_page(START, (START - 6000, ""), 100),
    "listed": lambda: records.list_passes(START, most=50),
    "listed of a user": lambda: records.list_passes(START, user_id="u-1", most=50),
    "totals": lambda: records.sum_usage(START, window_seconds=3600, most=50),
    "delete old": lambda: records.delete_old(START, age_seconds=86_400 * 13),
}


@pytest.fixture
async def filled_ledger(engine: Engine) -> AsyncIterator[Ledger]:
    async with engine.open() as ledger:
        for first in range(0, 20_000, 2_000):  # in parts, because a statement may take at most two seconds
            await rows(ledger, FILL, first=first, last=first + 1_999)
        await rows(ledger, "ANALYZE")
        yield ledger


@ALONE_ON_POSTGRES
async def test_every_query_uses_an_index(filled_ledger: Ledger, engine: Engine) -> None:
    plans = {name: await explain_rule(filled_ledger, engine, rule) for name, rule in RULES.items()}

    scanned = re.compile(
        r"SCAN passes(?! USING (COVERING )?INDEX)" if engine.name == "sqlite" else r'"Seq Scan", [^}]*"passes"'
    )
    assert [name for name, texts in plans.items() if any(map(scanned.search, texts))] == []
    unbounded = re.compile(
        r"SCAN passes USING" if engine.name == "sqlite" else r"a^"
    )  # reads a whole index until LIMIT ends it
    assert {name for name, texts in plans.items() if any(map(unbounded.search, texts))} <= {"listed", "refuse everyone"}


@ALONE_ON_POSTGRES
async def test_usage_counts_every_pass_in_the_window(filled_ledger: Ledger) -> None:
    user = User(issuer="https://login.example", id="u-1", name=None, claims={})

    (answer,) = await filled_ledger.usage(user, [limit(1000, window_seconds=86_400 * 30)])

    assert answer.used == 40


@ALONE_ON_POSTGRES
async def test_a_query_about_a_user_reads_no_passes_of_other_users(filled_ledger: Ledger, engine: Engine) -> None:
    """PostgreSQL expects no open or recent passes if all were settled and old at its last ANALYZE."""
    await rows(filled_ledger, "UPDATE passes SET settled_at = reserved_at WHERE settled_at IS NULL")
    await rows(filled_ledger, "ANALYZE")
    for first in range(0, 8_000, 2_000):
        await rows(filled_ledger, OPENED, first=first, last=first + 1_999)
    limits = [limit(1_000_000, counted=counted, window_seconds=60) for counted in Counted]

    questions = {
        "room": lambda: find_room(START, prepare_question(limits), WHOSE, 600),
        "exact": lambda: rules.read_usage(START, WHOSE, limits),
        "lookup": lambda: opened.begin_lookup(START, reservation(), limits[2], seconds=1),
    }
    plans = {name: json.dumps(await explain_rule(filled_ledger, engine, rule)) for name, rule in questions.items()}

    assert [name for name, text in plans.items() if "passes_of_user" not in text] == []
    assert [name for name, text in plans.items() if "passes_by_time" in text or "unsettled" in text] == []


@ALONE_ON_POSTGRES
async def test_a_pass_within_its_limits_takes_three_statements_to_reserve_and_one_to_grant(
    filled_ledger: Ledger, engine: Engine
) -> None:
    """Other transactions read and write what a lookup needs."""
    reserve = await explain_rule(
        filled_ledger, engine, lambda: rules.reserve(START, reservation(pass_id="p-new"), prepare_question(LIMITS))
    )
    grant = await explain_rule(
        filled_ledger,
        engine,
        lambda: rules.grant(START, reservation(pass_id="p-new"), replace(credential("conv_new"), sealed=b"sealed")),
    )

    assert (len(reserve), len(grant)) == (3, 1)
