"""What Prometheus reads: counts of attempts and settlements, and the state of this process and of the ledger.

With several workers each writes its counts to files that they share (prometheus-client's multiprocess mode). The worker
that gets the scrape answers for all of them.
"""

import asyncio
import os
import tomllib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from voicepass import errors
from voicepass.errors import LedgerUnavailable
from voicepass.model import VERSION, IssuedPass, MonotonicClock, Standing, Transport
from voicepass.telemetry.attempt import Attempt, StepName
from voicepass.telemetry.logs import log_writer

UPDATE_SECONDS: Final = 5.0  # how old another worker's state, or the ledger's, may be in an answer
LEDGER_SECONDS: Final = 0.5  # the longest that a scrape waits for the ledger to count what is open

_FAILURES: Final = [each.code for each in vars(errors).values() if getattr(each, "status", 0) >= 500]  # noqa: PLR2004
_TYPES: Final[Mapping[str, Callable[..., Any]]] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
_METRICS: Final = tomllib.loads(files("voicepass.telemetry").joinpath("metrics.toml").read_text(encoding="utf-8"))

Samples = Iterable[tuple[str, Sequence[str], float]]  # gauges of metrics.toml: the name, the labels' values, the value


@dataclass(kw_only=True, eq=False)
class LedgerMetrics(Collector):
    """Whether a pass can be written, as `/readyz` reports it, and what is open. Every worker answers the same.

    `check` raises LedgerUnavailable, and so does `read`. Then the samples about what is open are missing.
    """

    check: Callable[[], Awaitable[None]]
    read: Callable[[], Awaitable[Standing]]
    ticks: MonotonicClock
    _is_up: bool = field(default=False, init=False)
    _standing: Standing | None = field(default=None, init=False)
    _fresh_until: float = field(default=float("-inf"), init=False)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    async def update(self) -> None:
        """Check the ledger. Once in five seconds at most, also ask what is open, and wait half a second for it."""
        async with self._lock:
            try:
                await self.check()
                self._is_up = True
                if self.ticks() >= self._fresh_until:
                    self._standing = None
                    with suppress(TimeoutError):
                        async with asyncio.timeout(LEDGER_SECONDS):
                            self._standing = await self.read()
                    self._fresh_until = self.ticks() + UPDATE_SECONDS
            except LedgerUnavailable:
                self._is_up, self._standing, self._fresh_until = False, None, float("-inf")

    def collect(self) -> Iterator[Metric]:
        """Return the result of the last update."""
        gauge, standing = GaugeMetricFamily, self._standing
        yield gauge("voicepass_ledger_up", "Whether a pass can be written", float(self._is_up))
        if standing is not None:
            unsettled, oldest = standing.unsettled, standing.oldest_unsettled_seconds
            yield gauge("voicepass_open_conversations", "Open or may be opened, to 10,000", standing.open_conversations)
            yield gauge("voicepass_passes_unsettled", "Not settled after 15 minutes; counted to 10,000", unsettled)
            yield gauge("voicepass_oldest_unsettled_seconds", "The age of the oldest of them", oldest)


class Metrics:
    """Counts attempts, settlements and bypasses of this process, and answers scrapes.

    Labels are bounded: outcomes are our codes, and there are two transports. An agent is named only if the policy knows
    the alias and lets this user have it. The state of the process is read for each scrape, because a gauge set by each
    pass would slow them all.
    """

    def __init__(self, *, aliases: Iterable[str], read_state: Callable[[], Samples], ledger: LedgerMetrics) -> None:
        self._registry = registry = CollectorRegistry()
        self._read_state = read_state
        self._ledger = ledger
        self._lines_counted = 0
        families = {
            name: _TYPES[metric["type"]](
                f"voicepass_{name}", metric["help"], metric["labels"], registry=registry, **metric.get("options", {})
            )
            for name, metric in _METRICS.items()
        }
        # Looking up labels takes longer than counting.
        self._series = cache(lambda name, *labels: families[name].labels(*labels) if labels else families[name])
        known: Mapping[str, Iterable[str]] = {
            "transport": Transport,
            "agent": aliases,
            "outcome": ["granted", *_FAILURES],
            "step": StepName,
            "source": ["webhook", "reconciler", "lookup"],
            "reason": ["public", "shareable_link", "not_issued"],
        }
        # An alert sees an increase only if the series was there before.
        for name, metric in _METRICS.items():
            if metric["type"] != "gauge":
                for values in product(*(known[label] for label in metric["labels"])):
                    self._series(name, *values)
        self._series("build_info", VERSION).set(1)

    def count_attempt(self, attempt: Attempt) -> None:
        """Count an attempt and the time of its steps."""
        transport = attempt.request.transport
        self._series("attempts", transport, attempt.alias or "", attempt.outcome).inc()
        self._series("attempt_duration_seconds", transport).observe(attempt.seconds)
        for step in attempt.steps:
            self._series("step_duration_seconds", step.name).observe(step.seconds)
        if attempt.outcome == "granted" and attempt.is_reissued:
            self._series("passes_reissued", transport).inc()
        if attempt.outcome == "granted" and attempt.conversation_id is None:
            self._series("conversation_id_missing", transport).inc()

    def count_settlement(self, settled: IssuedPass) -> None:
        """Count a settlement by its source: `webhook`, `reconciler` or `lookup`."""
        source = settled.settled_by or ""
        self._series("settlements", source).inc()
        self._series("settled_seconds", source).inc(settled.seconds)
        self._series("settlement_lag_seconds", source).observe(settled.lag_seconds)
        if settled.identity_mismatch:
            self._series("identity_mismatches").inc()

    def count_bypass(self, reason: str) -> None:
        """Count a conversation that began without a pass: `public`, `shareable_link` or `not_issued`."""
        self._series("bypasses", reason).inc()

    async def update(self) -> None:
        """Set the gauges to the present state."""
        for name, labels, value in self._read_state():
            self._series(name, *labels).set(value)
        lines_dropped = log_writer.dropped
        self._series("log_lines_dropped").inc(lines_dropped - self._lines_counted)
        self._lines_counted = lines_dropped

    async def render(self) -> bytes:
        """Return the metrics of all workers, as Prometheus reads them."""
        await self.update()
        await self._ledger.update()
        process: Collector = self._registry
        if (directory := os.environ.get("PROMETHEUS_MULTIPROC_DIR")) is not None:
            remove_dead_workers(Path(directory))
            process = MultiProcessCollector(None, directory)  # type: ignore[no-untyped-call]
        return generate_latest(process) + generate_latest(self._ledger)


def remove_dead_workers(directory: Path) -> None:
    """Remove the state of workers that have ended, and keep their counts. A scrape at the same time does no harm."""
    for path in directory.glob("gauge_live*_*.db"):
        with suppress(PermissionError):  # the process exists, under another user
            try:
                os.kill(int(path.stem.rpartition("_")[2]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)  # another worker may have removed it
