"""What Prometheus is told: attempts and settlements as they end, and the state of this process and of the ledger.

With several workers each writes its counts to files that they share (prometheus-client's multiprocess mode), and
whichever is asked answers for all of them.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from voicepass.errors import LedgerUnavailable
from voicepass.model import IssuedPass, Standing, Transport
from voicepass.telemetry.attempt import Attempt, StepName
from voicepass.telemetry.workers import shared_directory, without_dead_workers

LOOK_SECONDS: Final = 5.0
"""How old another worker's state, or the ledger's, may be in an answer."""
LEDGER_SECONDS: Final = 0.5
"""The longest that a scrape waits to learn what is open."""

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8)


class AttemptMetrics:
    """Counts attempts and times their steps.

    Labels are bounded: outcomes are our codes, transports are two, and an agent is named only by an alias that the
    policy knows and let this user have.
    """

    def __init__(self, *, registry: CollectorRegistry) -> None:
        self._attempts = Counter(
            "voicepass_attempts",
            "Requests for a pass, by outcome",
            ["transport", "agent", "outcome"],
            registry=registry,
        )
        seconds = Histogram(
            "voicepass_attempt_duration_seconds",
            "From the request to the pass or the refusal",
            ["transport"],
            buckets=_SECONDS,
            registry=registry,
        )
        steps = Histogram(
            "voicepass_step_duration_seconds",
            "What an attempt's time went to",
            ["step"],
            buckets=(0.0001, 0.0005, *_SECONDS),
            registry=registry,
        )
        # To look a label up takes longer than to count.
        self._seconds = {transport: seconds.labels(transport.value) for transport in Transport}
        self._steps = {step: steps.labels(step) for step in StepName}
        self._reissued = Counter(
            "voicepass_passes_reissued",
            "Unopened passes returned again to a user who was at a limit",
            ["transport"],
            registry=registry,
        )
        self._unbound = Counter(
            "voicepass_conversation_id_missing",
            "Passes granted though ElevenLabs named no conversation",
            ["transport"],
            registry=registry,
        )

    def __call__(self, attempt: Attempt) -> None:
        transport = attempt.transport.value
        self._attempts.labels(transport, attempt.alias if attempt.agent else "", attempt.outcome).inc()
        self._seconds[attempt.transport].observe(attempt.duration_seconds)
        for step in attempt.steps:
            self._steps[step.name].observe(step.seconds)
        if attempt.outcome == "granted" and attempt.is_reissued:
            self._reissued.labels(transport).inc()
        if attempt.outcome == "granted" and attempt.conversation_id is None:
            self._unbound.labels(transport).inc()


class SettlementMetrics:
    """Counts settlements. The label is bounded: `webhook`, `reconciler` or `lookup`."""

    def __init__(self, *, registry: CollectorRegistry) -> None:
        self._settled = Counter("voicepass_settlements", "Conversations settled", ["source"], registry=registry)
        self._seconds = Counter(
            "voicepass_settled_seconds", "Seconds of conversation that were used", ["source"], registry=registry
        )
        self._lag = Histogram(
            "voicepass_settlement_lag_seconds",
            "From the pass to its settlement, without the conversation itself",
            ["source"],
            buckets=(1, 5, 15, 60, 300, 900, 1800, 3600, 4 * 3600, 24 * 3600),
            registry=registry,
        )
        self._mismatches = Counter(
            "voicepass_identity_mismatches",
            "Conversations in which the browser told ElevenLabs another user than the one they were issued to",
            registry=registry,
        )

    def __call__(self, settled: IssuedPass) -> None:
        source = settled.settled_by or ""
        self._settled.labels(source).inc()
        self._seconds.labels(source).inc(settled.seconds)
        self._lag.labels(source).observe(settled.lag_seconds)
        if settled.identity_mismatch:
            self._mismatches.inc()


class Calls(Protocol):
    """How many calls are under way or wait, as the bulkhead tells it."""

    @property
    def under_way(self) -> int: ...
    @property
    def waiting(self) -> int: ...


class Upstream(Protocol):
    """What calls ElevenLabs. `breakers`: whether each is open, by its host and what it stands before."""

    @property
    def bulkhead(self) -> Calls: ...
    @property
    def breakers(self) -> Mapping[tuple[str, str], bool]: ...


class StateMetrics:
    """The state of this process: looked at when somebody asks, for a gauge that is pushed at costs every pass."""

    def __init__(
        self,
        *,
        registry: CollectorRegistry,
        upstream: Upstream,
        warm_held: Callable[[], Mapping[str, int]],
        lines_dropped: Callable[[], int],
    ) -> None:
        self._upstream = upstream
        self._warm_held = warm_held
        self._lines_dropped = lines_dropped
        self._lines_counted = 0
        self._breakers = _gauge(
            registry, "voicepass_breaker_open", "Workers that do not call this host for now", "host", "calls"
        )
        self._under_way = _gauge(registry, "voicepass_calls_under_way", "Calls for a credential that are under way")
        self._waiting = _gauge(registry, "voicepass_calls_waiting", "Calls for a credential that wait for their turn")
        self._held = _gauge(registry, "voicepass_warm_held", "Signed URLs fetched ahead and not handed out", "agent")
        self._dropped = Counter(
            "voicepass_log_lines_dropped", "Lines of the log that could not be written", registry=registry
        )

    def look(self) -> None:
        """Set the gauges to what is now."""
        for (host, calls), is_open in self._upstream.breakers.items():
            self._breakers.labels(host, calls).set(is_open)
        self._under_way.set(self._upstream.bulkhead.under_way)
        self._waiting.set(self._upstream.bulkhead.waiting)
        for agent, held in self._warm_held().items():
            self._held.labels(agent).set(held)
        dropped = self._lines_dropped()
        self._dropped.inc(dropped - self._lines_counted)
        self._lines_counted = dropped

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        """Look every few seconds until the block ends, where another worker may have to answer for this one."""
        self.look()
        task = asyncio.create_task(self._look_on()) if shared_directory() else None
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look()


def _gauge(registry: CollectorRegistry, name: str, told: str, *labels: str) -> Gauge:
    return Gauge(name, told, labels, multiprocess_mode="livesum", registry=registry)


class Ledger(Protocol):
    """Raises LedgerUnavailable when it does not answer in time."""

    async def standing(self) -> Standing: ...


class LedgerMetrics(Collector):
    """Whether a pass can be written, as `/readyz` reports it, and what is open. The same from every worker.

    `check` raises LedgerUnavailable. Then the samples about what is open are missing.
    """

    def __init__(self, *, ledger: Ledger, check: Callable[[], Awaitable[None]], ticks: Callable[[], float]) -> None:
        self._ledger = ledger
        self._check = check
        self._ticks = ticks
        self._is_up = False
        self._standing: Standing | None = None
        self._good_until = float("-inf")
        self._asking = asyncio.Lock()

    async def look(self) -> None:
        """Check the ledger. Then ask what is open: once in five seconds and for half a second, however many scrape."""
        async with self._asking:
            try:
                await self._check()
                self._is_up = True
                await self._ask()
            except LedgerUnavailable:
                self._is_up, self._standing, self._good_until = False, None, float("-inf")

    async def _ask(self) -> None:
        if self._ticks() < self._good_until:
            return
        try:
            async with asyncio.timeout(LEDGER_SECONDS):
                self._standing = await self._ledger.standing()
        except TimeoutError:
            self._standing = None
        self._good_until = self._ticks() + LOOK_SECONDS

    def collect(self) -> Iterator[Metric]:
        """Return what the last look saw."""
        standing = self._standing
        yield GaugeMetricFamily("voicepass_ledger_up", "Whether a pass can be written", float(self._is_up))
        if standing is not None:
            yield GaugeMetricFamily(
                "voicepass_open_conversations",
                "Conversations that are open, or may still be opened; counted to 10,000",
                standing.open_conversations,
            )
            yield GaugeMetricFamily(
                "voicepass_passes_unsettled",
                "Passes older than 15 minutes that nothing has accounted for; counted to 10,000",
                standing.unsettled,
            )
            yield GaugeMetricFamily(
                "voicepass_oldest_unsettled_seconds", "The age of the oldest of them", standing.oldest_unsettled_seconds
            )


class Exposition:
    """Answers a scrape."""

    def __init__(self, *, registry: CollectorRegistry, state: StateMetrics, ledger: LedgerMetrics) -> None:
        self._registry = registry
        self._state = state
        self._ledger = ledger
        self._of_the_ledger = CollectorRegistry()
        self._of_the_ledger.register(ledger)

    async def text(self) -> bytes:
        """Return the metrics of all workers, as Prometheus reads them."""
        self._state.look()
        await self._ledger.look()
        return await self._of_all_workers() + generate_latest(self._of_the_ledger)

    async def _of_all_workers(self) -> bytes:
        directory = shared_directory()
        if directory is None:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(directory))  # type: ignore[no-untyped-call]
        async with without_dead_workers(directory):
            return generate_latest(registry)
