"""The clock that the ledger decides by: it follows the wall clock but does not repeat its steps."""

import time
from itertools import pairwise
from threading import Thread

import pytest

from voicepass.ledger.clock import SLEW, SteadyClock, elapsed_seconds
from voicepass.ledger.limits import UNUSED_SECONDS
from voicepass.settlement import NEVER_OPENED_SECONDS

HOUR = 3600.0


class Machine:
    """A wall clock that a test can set, and the real elapsed time."""

    def __init__(self) -> None:
        self.wall_time, self.elapsed = 1_800_000_000.0, 5000.0

    def wait(self, seconds: float) -> None:
        self.wall_time += seconds
        self.elapsed += seconds

    def wall(self) -> float:
        return self.wall_time

    def ticks(self) -> float:
        return self.elapsed


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def clock(machine: Machine) -> SteadyClock:
    return SteadyClock(wall=machine.wall, ticks=machine.ticks)


def test_without_a_step_it_equals_the_wall_clock_for_weeks(machine: Machine, clock: SteadyClock) -> None:
    differences = []
    for _ in range(24 * 30):
        machine.wait(HOUR)
        machine.elapsed += 0.4  # a monotonic clock that is fast by 100 millionths
        differences.append(abs(clock() - machine.wall()))

    assert max(differences) < 0.001


@pytest.mark.parametrize("step", [-HOUR, HOUR, -30 * 86_400, 30 * 86_400])
def test_after_a_step_it_does_not_jump_or_go_back(machine: Machine, clock: SteadyClock, step: float) -> None:
    before = clock()
    machine.wall_time += step

    at_once = clock()
    machine.wait(60)
    a_minute_later = clock()

    assert at_once == before
    assert a_minute_later - before == pytest.approx(60 * (1 + SLEW if step > 0 else 1 - SLEW))


@pytest.mark.parametrize("step", [-HOUR, HOUR])
def test_it_equals_the_wall_clock_after_34_times_the_step(machine: Machine, clock: SteadyClock, step: float) -> None:
    machine.wall_time += step
    differences = []
    for _ in range(36):
        machine.wait(HOUR)
        differences.append(abs(clock() - machine.wall()))

    assert differences[30] > 60
    assert max(differences[34:]) < 0.001


def test_no_pass_that_can_be_opened_is_released_even_while_the_clock_runs_fast() -> None:
    assert NEVER_OPENED_SECONDS / (1 + SLEW) > UNUSED_SECONDS


def test_the_time_during_which_a_machine_was_suspended_counts(machine: Machine, clock: SteadyClock) -> None:
    before = clock()

    machine.wait(8 * HOUR)  # its ticks count the suspended time, as CLOCK_BOOTTIME does

    assert clock() - before == pytest.approx(8 * HOUR)
    if hasattr(time, "CLOCK_BOOTTIME"):
        assert abs(elapsed_seconds() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 1


def test_threads_that_share_it_never_see_it_go_back(machine: Machine) -> None:
    clock = SteadyClock(wall=machine.wall, ticks=elapsed_seconds)
    seen: list[list[float]] = [[] for _ in range(4)]

    threads = [Thread(target=lambda moments=each: moments.extend(clock() for _ in range(2000))) for each in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(earlier <= later for moments in seen for earlier, later in pairwise(moments))
