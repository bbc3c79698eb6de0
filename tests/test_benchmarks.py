"""The benchmarks still run with the current code."""

import shutil

import pytest

from benchmarks.layers import RUNGS, measure_rungs, tabulate
from benchmarks.peers.__main__ import compare, install_all, write_report
from benchmarks.peers.figures import Figures
from benchmarks.peers.subjects import VOICEPASS, Candidate

pytestmark = pytest.mark.skipif(
    not shutil.which("gcc") or not shutil.which("taskset"), reason="compiles the load generator, and pins it to a core"
)


@pytest.mark.long
def test_voicepass_is_compared_and_a_candidate_that_does_not_run_is_reported_as_missing() -> None:
    absent = Candidate("absent", "Not there", ("no-such-program",))
    figures = Figures()

    ready = install_all(figures, [VOICEPASS, absent])
    compare(figures, ready, delay=0, rounds=1, seconds=0.2, numbers=[1])
    text = write_report(figures, [VOICEPASS, absent])

    [load], [limit] = figures.loads[0, 1, "voicepass"], figures.loads[0, 1, "upstream"]
    assert load.failed == limit.failed == 0
    assert limit.answered > load.answered > 0
    assert load.cpu_us > 0
    assert "| Not there | missing |" in text
    assert "Missing: Not there: absent does not start: taskset: failed to execute no-such-program" in text


@pytest.mark.long
def test_the_service_of_every_layer_gives_passes() -> None:
    loads = measure_rungs(delay=0, rounds=1, seconds=0.5, connections=4)

    assert {name: load.failed for name, [load] in loads.items()} == dict.fromkeys(RUNGS, 0)
    assert len(tabulate(loads)) == len(RUNGS)
