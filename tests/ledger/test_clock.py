"""The clock of the ledger's decisions: it follows the wall clock, and none of its steps."""

import time
from itertools import pairwise
from threading import Thread

import pytest

from voicepass.ledger.clock import SLEW, SteadyClock, elapsed_seconds
from voicepass.ledger.limits import UNUSED_SECONDS
from voicepass.settlement import NEVER_OPENED_SECONDS

HOUR = 3600.0


class Machine:
    """A wall clock that can be set, and the time that really passes."""

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


def test_without_a_step_it_is_the_wall_clock_for_weeks(machine: Machine, clock: SteadyClock) -> None:
    differences = []
    for _ in range(24 * 30):
        machine.wait(HOUR)
        machine.elapsed += 0.4  # a monotonic clock that is fast by 100 millionths
        differences.append(abs(clock() - machine.wall()))

    assert max(differences) < 0.001


@pytest.mark.parametrize("step", [-HOUR, HOUR, -30 * 86_400, 30 * 86_400])
def test_after_a_step_it_neither_jumps_nor_goes_back(machine: Machine, clock: SteadyClock, step: float) -> None:
    before = clock()
    machine.wall_time += step

    at_once = clock()
    machine.wait(60)
    a_minute_later = clock()

    assert at_once == before
    assert a_minute_later - before == pytest.approx(60 * (1 + SLEW if step > 0 else 1 - SLEW))


@pytest.mark.parametrize("step", [-HOUR, HOUR])
def test_it_agrees_with_the_wall_clock_again_after_thirty_four_times_the_step(
    machine: Machine, clock: SteadyClock, step: float
) -> None:
    machine.wall_time += step
    differences = []
    for _ in range(36):
        machine.wait(HOUR)
        differences.append(abs(clock() - machine.wall()))

    assert differences[30] > 60
    assert max(differences[34:]) < 0.001


def test_no_pass_is_released_as_unopened_while_it_can_be_opened_however_fast_the_clock_runs() -> None:
    assert NEVER_OPENED_SECONDS / (1 + SLEW) > UNUSED_SECONDS


def test_time_that_a_machine_was_suspended_counts(machine: Machine, clock: SteadyClock) -> None:
    before = clock()

    machine.wait(8 * HOUR)  # its ticks go on, as those of CLOCK_BOOTTIME do

    assert clock() - before == pytest.approx(8 * HOUR)
    if hasattr(time, "CLOCK_BOOTTIME"):
        assert abs(elapsed_seconds() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 1


def test_threads_that_share_it_see_it_grow(machine: Machine) -> None:
    clock = SteadyClock(wall=machine.wall, ticks=elapsed_seconds)
    seen: list[list[float]] = [[] for _ in range(4)]

    threads = [Thread(target=lambda moments=each: moments.extend(clock() for _ in range(2000))) for each in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(earlier <= later for moments in seen for earlier, later in pairwise(moments))
