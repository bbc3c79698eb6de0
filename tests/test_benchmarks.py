"""The benchmarks still run, so that they still measure the code as it is."""

import shutil

import pytest

from benchmarks.layers import RUNGS, climb, tabulated
from benchmarks.peers.__main__ import compare, installed, report
from benchmarks.peers.figures import Figures
from benchmarks.peers.subjects import VOICEPASS, Candidate

pytestmark = pytest.mark.skipif(
    not shutil.which("gcc") or not shutil.which("taskset"), reason="compiles its load generator, and pins it to a core"
)


@pytest.mark.long
def test_voicepass_is_compared_and_the_report_names_a_candidate_that_does_not_start() -> None:
    absent = Candidate("absent", "Not there", ("no-such-program",))
    figures = Figures()

    ready = installed(figures, [VOICEPASS, absent])
    compare(figures, ready, delay=0, rounds=1, seconds=0.2, numbers=[1])
    text = report(figures, [VOICEPASS, absent])

    [load], [limit] = figures.loads[0, 1, "voicepass"], figures.loads[0, 1, "upstream"]
    assert load.failed == limit.failed == 0
    assert limit.answered > load.answered > 0
    assert load.cpu_us > 0
    assert "| Not there | missing |" in text
    assert "Missing: Not there: absent does not start: taskset: failed to execute no-such-program" in text


@pytest.mark.long
def test_every_layer_that_is_measured_gives_passes() -> None:
    loads = climb(delay=0, rounds=1, seconds=0.5, connections=4)

    assert {name: load.failed for name, [load] in loads.items()} == dict.fromkeys(RUNGS, 0)
    assert len(tabulated(loads)) == len(RUNGS)
