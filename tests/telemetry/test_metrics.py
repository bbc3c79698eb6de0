"""What Prometheus reads: bounded labels, where the time went, a ledger that is down, and several workers as one."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from tests.cli.test_cli import ENVIRONMENT, serving
from tests.conftest import MakeToken
from tests.servers import free_port
from tests.telemetry.test_lines import attempt
from voicepass.errors import LedgerUnavailable
from voicepass.model import Standing, Transport, User
from voicepass.telemetry.metrics import (
    LEDGER_SECONDS,
    UPDATE_SECONDS,
    LedgerMetrics,
    Metrics,
    Samples,
    remove_dead_workers,
)

pytestmark = pytest.mark.anyio


@dataclass
class Process:
    """A process whose state changes."""

    breakers: dict[tuple[str, str], bool] = field(default_factory=lambda: {("api.elevenlabs.io", "passes"): False})
    calls_in_flight: int = 0
    warm: dict[str, int] = field(default_factory=lambda: {"default": 0})

    def read(self) -> Samples:
        for labels, is_open in self.breakers.items():
            yield "breaker_open", labels, is_open
        for name in ("calls_in_flight", "calls_under_way"):
            yield name, (), self.calls_in_flight
        for alias, held in self.warm.items():
            yield "warm_held", (alias,), held


@dataclass
class TurnedLedger:
    """Answers, fails or hangs, as a test sets it; counts the questions."""

    failing: Exception | None = None
    is_frozen: bool = False
    asked: int = 0

    async def check(self) -> None:
        if self.failing:
            raise self.failing

    async def standing(self) -> Standing:
        self.asked += 1
        if self.is_frozen:
            await asyncio.Event().wait()
        return Standing(open_conversations=3, unsettled=2, oldest_unsettled_seconds=4000.0)


class Ticks:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def metrics_of(
    process: Process, ledger: TurnedLedger, ticks: Ticks | None = None, *, aliases: Sequence[str] = ()
) -> Metrics:
    ledger_metrics = LedgerMetrics(check=ledger.check, read=ledger.standing, ticks=ticks or Ticks())
    return Metrics(aliases=aliases, read_state=process.read, ledger=ledger_metrics)


def samples(text: bytes | str) -> dict[str, float]:
    """Every sample as Prometheus reads it, by its name with its labels."""
    text = text if isinstance(text, str) else text.decode()
    return {
        sample.name + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_attempts_have_bounded_labels() -> None:
    metrics = metrics_of(Process(), TurnedLedger())

    for number in range(100):
        user = User(issuer="i", id=f"u-{number}", name=None, claims={})
        metrics.count_attempt(attempt(user=user))
        metrics.count_attempt(attempt(user=user, alias=f"alias-{number}", agent=None, outcome="agent_not_allowed"))

    counted = {name: count for name, count in samples(await metrics.render()).items() if "attempts_total" in name}
    assert counted == {
        "voicepass_attempts_total agent=default outcome=granted transport=websocket": 100,
        "voicepass_attempts_total agent= outcome=agent_not_allowed transport=websocket": 100,
    }


async def test_the_series_that_alerts_watch_exist_before_the_first_attempt() -> None:
    metrics = metrics_of(Process(), TurnedLedger(), aliases=["", "default"])

    names = set(samples(await metrics.render()))

    expected = {
        f"voicepass_attempts_total agent={agent} outcome={outcome} transport={transport}"
        for agent in ("", "default")
        for outcome in ("granted", "elevenlabs_key_rejected", "ledger_unavailable", "internal_error")
        for transport in Transport
    }
    expected |= {f"voicepass_settlements_total source={source}" for source in ("webhook", "reconciler", "lookup")}
    expected |= {f"voicepass_bypasses_total reason={reason}" for reason in ("public", "shareable_link", "not_issued")}
    assert expected <= names
    assert not [name for name in names if "outcome=token_invalid" in name], "the callers decide about these"


async def test_the_state_is_that_of_the_moment_in_which_it_is_asked_for() -> None:
    process = Process()
    answer = metrics_of(process, TurnedLedger())
    before = samples(await answer.render())

    process.calls_in_flight = 1
    process.breakers["api.elevenlabs.io", "passes"] = True
    process.warm["default"] = 7
    after = samples(await answer.render())

    breaker = "voicepass_breaker_open calls=passes host=api.elevenlabs.io"
    calls = ("voicepass_calls_in_flight", "voicepass_calls_under_way", "voicepass_calls_waiting")
    names = (*calls, breaker, "voicepass_warm_held agent=default")
    assert [before[name] for name in names] == [0, 0, 0, 0, 0]
    assert [after[name] for name in names] == [1, 1, 0, 1, 7]


@pytest.mark.parametrize("is_up", [pytest.param(0, id="not writable"), pytest.param(1, id="slow to tell what is open")])
async def test_a_ledger_that_does_not_answer_leaves_its_samples_out_and_says_so(is_up: int) -> None:
    ledger, ticks = TurnedLedger(), Ticks()
    answer = metrics_of(Process(), ledger, ticks)
    before = samples(await answer.render())

    ticks.now += UPDATE_SECONDS
    ledger.failing, ledger.is_frozen = (None, True) if is_up else (LedgerUnavailable(), False)
    async with asyncio.timeout(LEDGER_SECONDS + 2):
        down = samples(await answer.render())
    ticks.now += UPDATE_SECONDS if is_up else 0  # a ledger that can be written again is asked at once
    ledger.failing, ledger.is_frozen = None, False
    up = samples(await answer.render())

    assert set(before) - set(down) == {
        "voicepass_open_conversations",
        "voicepass_passes_unsettled",
        "voicepass_oldest_unsettled_seconds",
    }
    assert (down["voicepass_ledger_up"], down["voicepass_calls_in_flight"]) == (is_up, 0)
    assert up == before
    assert (up["voicepass_ledger_up"], up["voicepass_open_conversations"]) == (1, 3)
    assert (up["voicepass_passes_unsettled"], up["voicepass_oldest_unsettled_seconds"]) == (2, 4000)


async def test_however_many_scrape_the_ledger_is_asked_once_in_five_seconds() -> None:
    ledger, ticks = TurnedLedger(), Ticks()
    answer = metrics_of(Process(), ledger, ticks)

    await asyncio.gather(*(answer.render() for _ in range(100)))
    at_first = ledger.asked
    ticks.now += UPDATE_SECONDS
    await answer.render()

    assert (at_first, ledger.asked) == (1, 2)


def attempts(text: str) -> float:
    return sum(value for name, value in samples(text).items() if name.startswith("voicepass_attempts_total "))


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write_counts(directory: Path, *, pid: int, count: float) -> None:
    """Write what a worker with this id has counted, as prometheus-client does."""
    for kind, sample in (("counter", "asked_total"), ("histogram", "took_sum"), ("gauge_livesum", "waiting")):
        values = MmapedDict(str(directory / f"{kind}_{pid}.db"))  # type: ignore[no-untyped-call]
        name = sample.partition("_")[0]
        key = mmap_key(name, sample, ["transport"], ["websocket"], "help")
        values.write_value(key, count, 0.0)  # type: ignore[no-untyped-call]
        values.close()  # type: ignore[no-untyped-call]


def counted(directory: Path) -> dict[str, float]:
    collector = MultiProcessCollector(None, str(directory))  # type: ignore[no-untyped-call]
    return {sample.name: sample.value for metric in collector.collect() for sample in metric.samples}  # type: ignore[no-untyped-call]


def test_the_state_of_dead_workers_goes_and_their_counts_stay(tmp_path: Path) -> None:
    alive, dead = os.getpid(), dead_process()
    for pid, count in ((alive, 1), (dead, 20)):
        write_counts(tmp_path, pid=pid, count=count)

    remove_dead_workers(tmp_path)
    remove_dead_workers(tmp_path)

    assert counted(tmp_path) == {"asked_total": 21, "took_sum": 21, "waiting": 1}
    assert not (tmp_path / f"gauge_livesum_{dead}.db").exists()


@pytest.mark.long
@pytest.mark.alone
def test_two_workers_answer_as_one_and_what_a_dead_one_counted_stays(
    tmp_path: Path, elevenlabs: str, make_token: MakeToken
) -> None:
    port = free_port()
    environment = ENVIRONMENT | {"ELEVENLABS_BASE_URL": elevenlabs, "TMPDIR": str(tmp_path), "PORT": str(port)}
    url = f"http://127.0.0.1:{port}"
    asked = 0

    def ask(number: int) -> None:
        headers = {"Authorization": f"Bearer {make_token(sub=f'u-{number}')}"} if number % 2 else {}
        with httpx.Client(transport=httpx.HTTPTransport(retries=5), trust_env=False) as client:
            assert client.post(f"{url}/v1/signed-url", headers=headers).status_code in {200, 401}

    def files(kind: str) -> dict[int, Path]:
        return {
            int(path.stem.rpartition("_")[2]): path for path in tmp_path.glob(f"voicepass-metrics-*/{kind}_[0-9]*.db")
        }

    def busy() -> set[int]:
        return {pid for pid, path in files("counter").items() if b'"outcome": "granted"' in path.read_bytes()}

    def scraped() -> str:
        return httpx.get(f"{url}/metrics", trust_env=False).text

    with serving("serve", "--workers", "2", cwd=tmp_path, environment=environment), ThreadPoolExecutor(16) as pool:
        while len(busy()) < 2 and asked < 800:
            list(pool.map(ask, range(asked, asked + 40)))
            asked += 40
        two = busy()
        answers = list(pool.map(lambda _n: attempts(scraped()), range(8)))
        victim = min(two)
        os.kill(victim, signal.SIGKILL)
        while _is_there(victim):
            os.sched_yield()
        after = [scraped() for _ in range(4)]
        states = files("gauge_livesum")

    assert len(two) == 2
    assert answers == [asked] * 8
    assert {attempts(text) for text in after} == {asked}
    assert victim not in states
    assert samples(after[-1])["voicepass_ledger_up"] == 1
    assert not list(tmp_path.glob("voicepass-metrics-*")), "the directory goes with the service"


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
