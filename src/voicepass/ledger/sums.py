"""Sums per slot of time, for an agent and for all: a limit reads a few slots, however many passes there were.

A rule that changes a pass changes its sums in the same transaction. It does so last, because all callers share them.
"""

import math
from collections import Counter, defaultdict
from typing import Final

from voicepass.ledger.dialogue import LOCK_SUMS, Dialogue, Row, read_statements

LENGTHS: Final = (5, 60, 3600, 86_400)
"""The seconds of a slot. Each length divides the next."""
DAY_SECONDS: Final = 86_400
KEPT_SECONDS: Final = {5: 49 * 3600, 60: 31 * DAY_SECONDS, 3600: 31 * DAY_SECONDS, DAY_SECONDS: 31 * DAY_SECONDS}
"""A slot of this length is deleted at this age. The longest window is 30 days, and no pass is deleted before 31."""
OPEN_SECONDS: Final = 25 * 3600
"""No pass is open for longer: a conversation may last 24 hours."""

SQL: Final = read_statements("sums")
CHANGE: Final = SQL["change"]

_Differences = defaultdict[tuple[str, int, int], Counter[str]]  # by scope, length and slot


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
        yield SQL["delete_old"], {"length": length, "before": math.floor((now - KEPT_SECONDS[length]) / length)}


def is_kept(length: int, age_seconds: float) -> bool:
    """Tell whether there are slots of this age: also after a clock was set back by a day."""
    return age_seconds <= KEPT_SECONDS[length] - DAY_SECONDS


def list_days(now: float) -> Dialogue[list[Row]]:
    """Return the sums of the last 30 days, of all and of each agent."""
    today = math.floor(now / DAY_SECONDS)
    return list((yield SQL["slots"], {"length": DAY_SECONDS, "first": today - 29, "end": today + 1}))


def find_days(now: float) -> Dialogue[range]:
    """Return the days whose sums can be compared with their passes, as slots."""
    (row,) = yield SQL["days"], {}
    today = math.floor(now / DAY_SECONDS)
    days = [math.floor(day) for day in row.values() if day is not None]
    return range(max(today - 29, min(days, default=today)), max(days, default=today - 1) + 1)


def fix_hour(now: float, hour: int) -> Dialogue[list[Row]]:
    """Compare the sums of an hour with its passes. Correct each sum that differs, and return the corrections."""
    yield LOCK_SUMS, {}
    differences: _Differences = defaultdict(Counter)
    lengths = [length for length in (5, 60, 3600) if is_kept(length, now - hour * 3600)]
    for row in (yield SQL["passes"], {"begin": hour * 3600.0, "end": (hour + 1) * 3600.0}):
        for scope in (f"agent {row['agent_alias']}", "all"):
            for length in lengths:
                differences[scope, length, int(row["reserved_at"] // length)].update(passes=1, seconds=row["seconds"])
    for length in lengths:
        first, end = hour * 3600 // length, (hour + 1) * 3600 // length
        for row in (yield SQL["slots"], {"length": length, "first": first, "end": end}):
            differences[row["scope"], length, row["slot"]].update(passes=-row["passes"], seconds=-row["seconds"])
    return (yield from _correct(differences))


def fix_day(_now: float, day: int) -> Dialogue[list[Row]]:
    """Compare the sums of a day with those of its hours. Correct each sum that differs, and return the corrections."""
    yield LOCK_SUMS, {}
    differences: _Differences = defaultdict(Counter)
    for row in (yield SQL["slots"], {"length": 3600, "first": day * 24, "end": (day + 1) * 24}):
        differences[row["scope"], DAY_SECONDS, day].update(passes=row["passes"], seconds=row["seconds"])
    for row in (yield SQL["slots"], {"length": DAY_SECONDS, "first": day, "end": day + 1}):
        differences[row["scope"], DAY_SECONDS, day].update(passes=-row["passes"], seconds=-row["seconds"])
    return (yield from _correct(differences))


def fix_open(now: float) -> Dialogue[list[Row]]:
    """Compare the sums of open passes with the passes. Correct each sum that differs, and return the corrections."""
    yield LOCK_SUMS, {}
    differences: _Differences = defaultdict(Counter)
    for row in (yield SQL["open_passes"], {"now": now, "open_since": now - OPEN_SECONDS}):
        for scope in (f"agent {row['agent_alias']}", "all"):
            differences[scope, 60, int(row["lapses_at"] // 60)].update(open=1)
    for row in (yield SQL["slots"], {"length": 60, "first": math.floor(now / 60) + 1, "end": 2**53}):
        differences[row["scope"], 60, row["slot"]].update(open=-row["open"])
    return (yield from _correct(differences))


def _correct(differences: _Differences) -> Dialogue[list[Row]]:
    corrections: list[Row] = [
        {"scope": scope, "length": length, "slot": slot, "passes": 0, "seconds": 0, "open": 0, **difference}
        for (scope, length, slot), difference in sorted(differences.items())
        if any(difference.values())
    ]
    for correction in corrections:
        yield SQL["correct"], correction
    return corrections
