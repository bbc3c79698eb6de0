"""The figures as tables: one for each delay of the upstream, start and memory, and the targets."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any, Final

from benchmarks.peers.machine import Load

CONNECTIONS: Final = (1, 64, 500)
BASE: Final = "fastapi-shared"
MISSING: Final = "missing"

Table = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Warm:
    """The load of a store of ready-made passes, and the calls of the upstream."""

    load: Load
    calls: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Every load, a list of rounds by (upstream's delay in ms, connections, name), and the other figures by name."""

    loads: dict[tuple[int, int, str], list[Load]] = field(default_factory=dict)
    start_seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_megabytes: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    warm: list[Warm] = field(default_factory=list)
    long: dict[str, Load] = field(default_factory=dict)
    """One long load of each subject, with 64 connections and an upstream that answers at once."""

    def of(self, delay: int, connections: int, name: str, figure: str) -> float:
        """Return the median of a figure over the rounds; NaN if nothing was measured."""
        loads = self.loads.get((delay, connections, name), [])
        return median([getattr(load, figure) for load in loads]) if loads else math.nan

    def ratio(self, delay: int, connections: int, name: str, base: str) -> float:
        """Return the ratio of passes a second: the median over the rounds that measured both."""
        ratios = self.ratios(delay, connections, name, base, "per_second")
        return median(ratios) if ratios else math.nan

    def ratios(self, delay: int, connections: int, name: str, base: str, figure: str) -> list[float]:
        """Return the ratio of a figure in each round."""
        ours, theirs = (self.loads.get((delay, connections, each), []) for each in (name, base))
        pairs = [(getattr(one, figure), getattr(other, figure)) for one, other in zip(ours, theirs, strict=False)]
        return [one / other for one, other in pairs if other]

    def failed(self, delay: int, name: str, connections: Sequence[int] = CONNECTIONS) -> int:
        """Return the number of requests without a pass, in all rounds."""
        return sum(load.failed for each in connections for load in self.loads.get((delay, each, name), []))

    def as_json(self) -> dict[str, Any]:
        """Return everything, round by round."""
        return {
            "loads": [
                {"upstream_ms": delay, "connections": connections, "subject": name, "rounds": [*map(asdict, loads)]}
                for (delay, connections, name), loads in self.loads.items()
            ],
            "start_seconds": self.start_seconds,
            "peak_megabytes": self.peak_megabytes,
            "missing": self.missing,
            "warm": [asdict(warm) for warm in self.warm],
            "long": {name: asdict(load) for name, load in self.long.items()},
        }


def tabulate_delay(figures: Figures, delay: int, titles: Mapping[str, str]) -> Table:
    """Tabulate every subject with an upstream of that delay; the row of a missing one is marked."""
    table = []
    for name, title in titles.items():
        row = {"subject": title}

        def cell(connections: int, figure: str, name: str = name) -> str:
            return show(figures.of(delay, connections, name, figure))

        row["1: median ms"] = MISSING if name in figures.missing else cell(1, "median_ms")
        row |= {"64: passes/s": cell(64, "per_second"), "64: to shared": show(figures.ratio(delay, 64, name, BASE))}
        row |= {"64: median ms": cell(64, "median_ms"), "64: p99 ms": cell(64, "p99_ms")}
        row |= {"64: CPU µs": cell(64, "cpu_us"), "500: passes/s": cell(500, "per_second")}
        row |= {"500: median ms": cell(500, "median_ms"), "500: p99 ms": cell(500, "p99_ms")}
        row["no pass"] = f"{figures.failed(delay, name):,}"
        table.append(row)
    return table


def tabulate_footprints(figures: Figures, titles: Mapping[str, str]) -> Table:
    """Tabulate each subject's start time and peak memory."""
    return [
        {
            "subject": title,
            "start s": show(median(figures.start_seconds.get(name, [math.nan]))),
            "peak MB": show(figures.peak_megabytes.get(name, math.nan)),
        }
        for name, title in titles.items()
        if name != "upstream"
    ]


def tabulate_pairs(figures: Figures, delay: int, titles: Mapping[str, str], *, name: str = "voicepass") -> Table:
    """Tabulate voicepass' ratio to each subject, with the rounds' quartiles. The null experiment shows the noise."""

    def cell(other: str, figure: str) -> str:
        ratios = figures.ratios(delay, 64, name, other, figure)
        if len(ratios) < 2:  # noqa: PLR2004 - quartiles need two rounds
            return show(median(ratios) if ratios else math.nan)
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        return f"{show(middle)} ({show(low)} to {show(high)})"

    return [
        {"voicepass ÷": title, "passes/s": cell(other, "per_second"), "CPU of a pass": cell(other, "cpu_us")}
        for other, title in titles.items()
        if other not in {name, "upstream"}
    ]


def tabulate_long_loads(figures: Figures, titles: Mapping[str, str]) -> Table:
    """Tabulate the long load: a short one ends before a checkpoint or a garbage collection slows a request."""
    return [
        {"subject": titles[name], "passes/s": show(load.per_second), "median ms": show(load.median_ms)}
        | {"p99 ms": show(load.p99_ms), "p99 ÷ median": show(load.p99_ms / load.median_ms)}
        | {"no pass": f"{load.failed:,}"}
        for name, load in figures.long.items()
    ]


def tabulate_targets(figures: Figures) -> Table:
    """Tabulate each target and the figure that was reached."""
    ours, floor, fastify = "voicepass", "bare", "fastify"

    def cpu_by(base: str) -> float:
        ratios = figures.ratios(0, 64, ours, base, "cpu_us")
        return median(ratios) if ratios else math.nan

    def added(name: str) -> float:
        return figures.of(0, 1, name, "median_ms") - figures.of(0, 1, "upstream", "median_ms")

    best = [rate for name in (floor, fastify) if not math.isnan(rate := figures.of(200, 500, name, "per_second"))]
    at_500 = figures.of(200, 500, ours, "per_second") / (max(best, default=0) or math.nan)
    no_pass = math.nan if math.isnan(at_500) else figures.failed(200, ours, [500])
    added_ratio = added(ours) / (added(floor) or math.nan)
    all_limits, long = figures.ratio(0, 64, "voicepass-all-limits", ours), figures.long.get(ours)
    warm = figures.warm[0] if figures.warm else None
    return [
        _target("passes/s, 64 connections, ÷ FastAPI with a shared client", figures.ratio(0, 64, ours, BASE), ">=", 8),
        _target("the same, ÷ Express with its key built once", figures.ratio(0, 64, ours, "express-key")),
        _target("CPU of a pass ÷ the floor's, 64 connections", cpu_by(floor), "<=", 2.1),
        _target("CPU of a pass ÷ Fastify's, 64 connections", cpu_by(fastify), "<=", 4.5),
        _target("median that it adds ÷ that the floor adds, 1 connection", added_ratio, "<=", 1.15),
        _target("passes/s with every limit of every scope ÷ those with the default limits", all_limits, ">=", 0.8),
        _target("the long load: p99 ÷ median", long.p99_ms / long.median_ms if long else math.nan, "<=", 3),
        _target("passes/s, 500 connections, 200 ms, ÷ the better of the floor and Fastify", at_500, ">=", 0.97),
        _target("the same: no pass", no_pass, "<=", 0),
        _target("warm store: median ms", warm.load.median_ms if warm else math.nan, "<=", 0.9),
        _target("warm store: p99 ms", warm.load.p99_ms if warm else math.nan, "<=", 3),
        _target("warm store: calls of the upstream per pass", _calls_per_pass(warm), "<=", 1.1),
        _target("peak MB", figures.peak_megabytes.get(ours, math.nan), "<=", 95),
        _target("start s", median(figures.start_seconds.get(ours, [math.nan])), "<=", 0.5),
    ]


def _calls_per_pass(warm: Warm | None) -> float:
    return warm.calls / warm.load.answered if warm and warm.load.answered else math.nan


def _target(what: str, reached: float, sign: str = "", bound: float = math.nan) -> dict[str, str]:
    holds: dict[str, Callable[[float], bool]] = {">=": lambda it: it >= bound, "<=": lambda it: it <= bound}
    row = {"what": what, "target": f"{sign} {bound:g}" if sign else "-", "reached": show(reached)}
    verdict = "yes" if sign and holds[sign](reached) else "no"
    return row | {"met": "not measured" if math.isnan(reached) else verdict if sign else "-"}


def show(figure: float) -> str:
    """Write a figure with three significant digits, or a dash if nothing was measured."""
    if math.isnan(figure):
        return "-"
    digits = 0 if figure == 0 else max(0, 2 - math.floor(math.log10(abs(figure))))
    return f"{figure:,.{digits}f}"


def markdown(table: Table) -> str:
    """Write a table as Markdown does."""
    head = list(table[0])
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *([*row.values()] for row in table)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
