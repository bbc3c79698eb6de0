"""What Prometheus reads: counts of attempts and settlements, and the state of this process and of the ledger.

With several workers each writes its counts to files that they share (prometheus-client's multiprocess mode). The worker
that gets the scrape answers for all of them.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from voicepass import errors
from voicepass.errors import LedgerUnavailable
from voicepass.model import VERSION, IssuedPass, MonotonicClock, Standing, Transport
from voicepass.telemetry.attempt import Attempt, StepName
from voicepass.telemetry.workers import remove_dead_workers, shared_directory

UPDATE_SECONDS: Final = 5.0
"""How old another worker's state, or the ledger's, may be in an answer."""
LEDGER_SECONDS: Final = 0.5
"""The longest that a scrape waits for the ledger to count what is open."""

_FAILURES: Final = [each.code for each in vars(errors).values() if getattr(each, "status", 0) >= 500]  # noqa: PLR2004
"""Their series exist from the start: an alert sees an increase only if the series was there before."""

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8)
_LAG_SECONDS: Final = (1, 5, 15, 60, 300, 900, 1800, 3600, 4 * 3600, 24 * 3600)


class AttemptMetrics:
    """Counts attempts and times their steps.

    Labels are bounded: outcomes are our codes, and there are two transports. An agent is named only if the policy knows
    the alias and lets this user have it.
    """

    def __init__(self, *, registry: CollectorRegistry, aliases: Iterable[str] = ()) -> None:
        counter, histogram = partial(Counter, registry=registry), partial(Histogram, registry=registry)
        by_transport = ["transport"]
        self._attempts = counter(
            "voicepass_attempts", "Requests for a pass, by outcome", ["transport", "agent", "outcome"]
        )
        self._reissued = counter(
            "voicepass_passes_reissued", "Unopened passes returned again to a user at a limit", by_transport
        )
        self._unbound = counter("voicepass_conversation_id_missing", "Passes without a conversation id", by_transport)
        seconds = histogram(
            "voicepass_attempt_duration_seconds", "From the request to its answer", by_transport, buckets=_SECONDS
        )
        steps = histogram(
            "voicepass_step_duration_seconds", "The time of each step", ["step"], buckets=(0.0001, 0.0005, *_SECONDS)
        )
        for transport, alias, outcome in product(Transport, aliases, ("granted", *_FAILURES)):
            self._attempts.labels(transport.value, alias, outcome)
        for transport in Transport:
            self._reissued.labels(transport.value)
            self._unbound.labels(transport.value)
        # Looking up a label takes longer than counting.
        self._seconds = {transport: seconds.labels(transport.value) for transport in Transport}
        self._steps = {step: steps.labels(step.value) for step in StepName}

    def __call__(self, attempt: Attempt) -> None:
        transport = attempt.transport.value
        self._attempts.labels(transport, attempt.alias if attempt.agent else "", attempt.outcome).inc()
        self._seconds[attempt.transport].observe(attempt.duration_seconds)
        for step in attempt.steps:
            self._steps[step.name].observe(step.seconds)
        if attempt.outcome == "granted":
            if attempt.is_reissued:
                self._reissued.labels(transport).inc()
            if attempt.conversation_id is None:
                self._unbound.labels(transport).inc()


class SettlementMetrics:
    """Counts settlements. The label is bounded: `webhook`, `reconciler` or `lookup`."""

    def __init__(self, *, registry: CollectorRegistry) -> None:
        counter = partial(Counter, registry=registry)
        self._settled = counter("voicepass_settlements", "Conversations settled", ["source"])
        self._seconds = counter("voicepass_settled_seconds", "Seconds of conversation used", ["source"])
        self._mismatches = counter(
            "voicepass_identity_mismatches", "Conversations in which the browser named another user"
        )
        text = "From the pass to its settlement, without the conversation itself"
        self._lag = Histogram(
            "voicepass_settlement_lag_seconds", text, ["source"], buckets=_LAG_SECONDS, registry=registry
        )
        for metric, source in product((self._settled, self._seconds, self._lag), ("webhook", "reconciler", "lookup")):
            metric.labels(source)

    def __call__(self, settled: IssuedPass) -> None:
        source = settled.settled_by or ""
        self._settled.labels(source).inc()
        self._seconds.labels(source).inc(settled.seconds)
        self._lag.labels(source).observe(settled.lag_seconds)
        if settled.identity_mismatch:
            self._mismatches.inc()


class BypassMetrics:
    """Counts conversations that began without a pass. The label has these three values only."""

    def __init__(self, *, registry: CollectorRegistry) -> None:
        text = "Conversations of our agents that began without a pass"
        self._bypasses = Counter("voicepass_bypasses", text, ["reason"], registry=registry)
        for reason in ("public", "shareable_link", "not_issued"):
            self._bypasses.labels(reason)

    def __call__(self, reason: str) -> None:
        self._bypasses.labels(reason).inc()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessState:
    """What a scrape shows of this process. `breakers`: whether each is open, by host and kind of call."""

    breakers: Mapping[tuple[str, str], bool]
    calls_in_flight: int
    calls_waiting: int
    warm_held: Mapping[str, int]
    lines_dropped: int


class StateMetrics:
    """The state of this process. It is read for each scrape, because a gauge set by each pass would slow them all."""

    def __init__(self, *, registry: CollectorRegistry, read: Callable[[], ProcessState]) -> None:
        self._read = read
        self._lines_counted = 0
        gauge = partial(Gauge, multiprocess_mode="livesum", registry=registry)
        self._breakers = gauge("voicepass_breaker_open", "Workers that do not call this host now", ["host", "calls"])
        self._in_flight = gauge("voicepass_calls_in_flight", "Calls for a credential that are in flight")
        self._under_way = gauge("voicepass_calls_under_way", "Deprecated: use voicepass_calls_in_flight")
        self._waiting = gauge("voicepass_calls_waiting", "Calls for a credential that wait for a free slot")
        self._held = gauge("voicepass_warm_held", "Signed URLs fetched ahead and not handed out yet", ["agent"])
        build = gauge("voicepass_build_info", "Always 1, for the label", ["version"], multiprocess_mode="max")
        build.labels(VERSION).set(1)
        self._dropped = Counter("voicepass_log_lines_dropped", "Log lines that could not be written", registry=registry)

    async def update(self) -> None:
        """Set the gauges to the present state."""
        state = self._read()
        for (host, calls), is_open in state.breakers.items():
            self._breakers.labels(host, calls).set(is_open)
        self._in_flight.set(state.calls_in_flight)
        self._under_way.set(state.calls_in_flight)
        self._waiting.set(state.calls_waiting)
        for agent, held in state.warm_held.items():
            self._held.labels(agent).set(held)
        self._dropped.inc(state.lines_dropped - self._lines_counted)
        self._lines_counted = state.lines_dropped


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
            opened, unsettled = standing.open_conversations, standing.unsettled
            oldest = standing.oldest_unsettled_seconds
            yield gauge("voicepass_open_conversations", "Open, or may still be opened; counted to 10,000", opened)
            yield gauge("voicepass_passes_unsettled", "Not settled after 15 minutes; counted to 10,000", unsettled)
            yield gauge("voicepass_oldest_unsettled_seconds", "The age of the oldest of them", oldest)


@dataclass(frozen=True, kw_only=True)
class Exposition:
    """Answers a scrape."""

    registry: CollectorRegistry
    state: StateMetrics
    ledger: LedgerMetrics

    async def text(self) -> bytes:
        """Return the metrics of all workers, as Prometheus reads them."""
        await self.state.update()
        await self.ledger.update()
        process: Collector = self.registry
        if (directory := shared_directory()) is not None:
            remove_dead_workers(directory)
            process = MultiProcessCollector(None, str(directory))  # type: ignore[no-untyped-call]
        return generate_latest(process) + generate_latest(self.ledger)
