"""Sums per slot of time, for an agent and for all: a limit reads a few slots, however many passes there were.

A rule that changes a pass changes its sums in the same transaction. It does so last, because all callers share them.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from voicepass.ledger.dialogue import LOCK_SUMS, Dialogue, Row

LENGTHS: Final = (5, 60, 3600, 86_400)
"""The seconds of a slot. Each length divides the next."""
DAY_SECONDS: Final = 86_400
KEPT_SECONDS: Final = {5: 49 * 3600, 60: 31 * DAY_SECONDS, 3600: 31 * DAY_SECONDS, DAY_SECONDS: 31 * DAY_SECONDS}
"""A slot of this length is deleted at this age. The longest window is 30 days, and no pass is deleted before 31."""
OPEN_SECONDS: Final = 25 * 3600
"""No pass is open for longer: a conversation may last 24 hours."""

_NOTHING: Final = {"passes": 0, "seconds": 0, "open": 0}
_Slot = tuple[str, int, int]


def change_sums(row: Row, *, passes: int = 0, failed: int = 0, seconds: int = 0, opened: int = 0) -> Dialogue[None]:
    """Add these numbers to the sums that count this pass."""
    if passes or failed or seconds or opened:
        slots = {f"slot_{length}": int(row["reserved_at"] // length) for length in LENGTHS}
        numbers = {"passes": passes, "failed": failed, "seconds": seconds, "opened": opened}
        scope_and_lapse = {"agent": f"agent {row['agent_alias']}", "lapses": int(row["lapses_at"] // 60)}
        yield CHANGE, slots | numbers | scope_and_lapse


def is_open(row: Row) -> bool:
    """Tell whether the sums count this pass as open until it lapses."""
    return row["settled_at"] is None and row["ended_at"] is None


def delete_old_sums(now: float) -> Dialogue[None]:
    """Delete the slots that no window reaches any more."""
    for length in LENGTHS:
        yield _DELETE_OLD, {"length": length, "before": math.floor((now - KEPT_SECONDS[length]) / length)}


def is_kept(length: int, age_seconds: float) -> bool:
    """Tell whether there are slots of this age: also after a clock was set back by a day."""
    return age_seconds <= KEPT_SECONDS[length] - DAY_SECONDS


def find_days(now: float) -> Dialogue[tuple[int, int]]:
    """Return the first and the last day whose sums can be compared, as slots."""
    (row,) = yield _DAYS, {}
    today = math.floor(now / DAY_SECONDS)
    days = [day for day in row.values() if day is not None]
    return max(today - 29, math.floor(min(days, default=today + 1))), math.floor(max(days, default=today))


def list_days(now: float) -> Dialogue[list[Row]]:
    """Return the sums of the last 30 days, of all and of each agent."""
    today = math.floor(now / DAY_SECONDS)
    return list((yield _SUMS, {"length": DAY_SECONDS, "first": today - 29, "end": today + 1}))


def fix_hour(hour: int, now: float) -> Dialogue[list[Row]]:
    """Compare the sums of an hour with its passes. Correct each sum that differs, and return the corrections."""
    yield LOCK_SUMS, {}
    lengths = [length for length in (5, 60, 3600) if is_kept(length, now - hour * 3600)]
    rows = yield _PASSES, {"begin": hour * 3600.0, "end": (hour + 1) * 3600.0}
    expected: defaultdict[_Slot, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for scope in (f"agent {row['agent_alias']}", "all"):
            for length in lengths:
                expected[scope, length, int(row["reserved_at"] // length)].update(passes=1, seconds=row["seconds"])
    sums: list[Row] = []
    for length in lengths:
        slots = {"length": length, "first": hour * 3600 // length, "end": (hour + 1) * 3600 // length}
        sums += yield _SUMS, slots
    return (yield from _correct(expected, sums, columns=("passes", "seconds")))


def fix_day(day: int, _now: float) -> Dialogue[list[Row]]:
    """Compare the sums of a day with those of its hours. Correct each sum that differs, and return the corrections."""
    yield LOCK_SUMS, {}
    expected: defaultdict[_Slot, Counter[str]] = defaultdict(Counter)
    for row in (yield _SUMS, {"length": 3600, "first": day * 24, "end": (day + 1) * 24}):
        expected[row["scope"], DAY_SECONDS, day].update(passes=row["passes"], seconds=row["seconds"])
    sums = yield _SUMS, {"length": DAY_SECONDS, "first": day, "end": day + 1}
    return (yield from _correct(expected, sums, columns=("passes", "seconds")))


def fix_open(now: float) -> Dialogue[list[Row]]:
    """Compare the sums of open passes with the passes. Correct each sum that differs, and return the corrections."""
    yield LOCK_SUMS, {}
    expected: defaultdict[_Slot, Counter[str]] = defaultdict(Counter)
    for row in (yield _OPEN, {"now": now, "open_since": now - OPEN_SECONDS}):
        for scope in (f"agent {row['agent_alias']}", "all"):
            expected[scope, 60, int(row["lapses_at"] // 60)].update(open=1)
    sums = yield _SUMS, {"length": 60, "first": math.floor(now / 60) + 1, "end": 2**53}
    return (yield from _correct(expected, sums, columns=("open",)))


def _correct(
    expected: Mapping[_Slot, Mapping[str, int]], sums: Iterable[Row], *, columns: Sequence[str]
) -> Dialogue[list[Row]]:
    found = {(row["scope"], row["length"], row["slot"]): row for row in sums}
    corrections: list[Row] = []
    for key in sorted(expected.keys() | found.keys()):
        right, wrong = expected.get(key, _NOTHING), found.get(key, _NOTHING)
        differences = {column: right[column] - wrong[column] for column in columns}
        if any(differences.values()):
            names = dict(zip(("scope", "length", "slot"), key, strict=True))
            corrections.append(_NOTHING | differences | names)
            yield _CORRECT, corrections[-1]
    return corrections


_ADD: Final = """
ON CONFLICT (scope, length, slot) DO UPDATE SET passes = sums.passes + excluded.passes,
    failed = sums.failed + excluded.failed, seconds = sums.seconds + excluded.seconds,
    open = sums.open + excluded.open"""

# All transactions change these rows in one order: by scope, length and slot. In two orders, they would deadlock.
_INTO: Final = "INSERT INTO sums (scope, length, slot, passes, failed, seconds, open) VALUES"
_OF_SCOPE: Final = """
({scope}, 5, :slot_5, :passes, :failed, :seconds, 0), ({scope}, 60, :slot_60, :passes, :failed, :seconds, 0),
({scope}, 60, :lapses, 0, 0, 0, :opened), ({scope}, 3600, :slot_3600, :passes, :failed, :seconds, 0),
({scope}, 86400, :slot_86400, :passes, :failed, :seconds, 0)"""
CHANGE: Final = _INTO + _OF_SCOPE.format(scope=":agent") + "," + _OF_SCOPE.format(scope="'all'") + _ADD
_CORRECT: Final = f"{_INTO} (:scope, :length, :slot, :passes, 0, :seconds, :open) {_ADD}"

# The key begins with the scope: naming each scope lets the engine jump to its slots.
_EACH_SCOPE: Final = """
WITH RECURSIVE scopes (scope) AS (SELECT min(scope) FROM sums UNION ALL
    SELECT (SELECT min(scope) FROM sums WHERE scope > scopes.scope) FROM scopes WHERE scope IS NOT NULL)"""

_DELETE_OLD: Final = f"""{_EACH_SCOPE}
DELETE FROM sums WHERE scope IN (SELECT scope FROM scopes) AND length = :length AND slot < :before"""  # noqa: S608

_SUMS: Final = f"""{_EACH_SCOPE}
SELECT sums.* FROM scopes JOIN sums ON sums.scope = scopes.scope
WHERE length = :length AND slot >= :first AND slot < :end"""  # noqa: S608

_DAYS: Final = """
SELECT (SELECT min(reserved_at) FROM passes WHERE transport <> '') / 86400 AS first,
       (SELECT max(reserved_at) FROM passes WHERE transport <> '') / 86400 AS last,
       (SELECT min(slot) FROM sums WHERE scope = 'all' AND length = 86400) AS first_sum,
       (SELECT max(slot) FROM sums WHERE scope = 'all' AND length = 86400) AS last_sum"""

_PASSES: Final = """
SELECT agent_alias, reserved_at, seconds FROM passes
WHERE transport <> '' AND reserved_at >= :begin AND reserved_at < :end"""

_OPEN: Final = """
SELECT agent_alias, lapses_at FROM passes
WHERE transport <> '' AND settled_at IS NULL AND ended_at IS NULL AND lapses_at > :now
AND reserved_at > :open_since"""
