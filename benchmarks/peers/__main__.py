"""voicepass beside what users would deploy instead: the same task, one process and one core each, in turns."""

import argparse
import contextlib
import json
import os
import platform
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

from benchmarks.peers.figures import (
    CONNECTIONS,
    Figures,
    Warm,
    by_delay,
    footprints,
    long_loads,
    markdown,
    pairs,
    targets,
)
from benchmarks.peers.machine import CannotRunError, load, upstream
from benchmarks.peers.subjects import (
    ALL_LIMITS,
    ASK,
    ASK_UPSTREAM,
    CANDIDATES,
    VOICEPASS,
    WARM_PASSES,
    Candidate,
    check,
    first_pass,
    has_warm_store,
    write_tokens,
)

DELAYS_MS: Final = (0, 50, 200)
UPSTREAM: Final = "upstream"
LONG: Final = ("voicepass", "voicepass-all-limits", "bare", "fastify")
"""Who gets a long load, too."""
WARM_USERS, WARM_PER_SECOND, WARM_DELAY_MS = 64, 120, 200


def compare(
    figures: Figures,
    candidates: Sequence[Candidate],
    *,
    delay: int,
    rounds: int,
    seconds: float,
    numbers: Sequence[int] = CONNECTIONS,
) -> None:
    """Load all before an upstream with that delay, in rounds of all; a first round of several is not counted."""
    with temporary_directory() as directory, ExitStack() as stack:
        tokens = write_tokens(directory / "tokens")
        before = stack.enter_context(upstream(delay, directory))
        subjects = [(stack.enter_context(upstream(delay, directory, on=0)).subject, ASK_UPSTREAM)]
        for candidate in candidates:
            try:
                begun = time.monotonic()
                subject = stack.enter_context(candidate.running(before, directory))
                started = first_pass(subject, begun)
                check(subject)
                figures.start_seconds.setdefault(candidate.name, []).append(started)
                subjects.append((subject, ASK))
            except CannotRunError as error:
                figures.missing[candidate.name] = str(error)
        for number in range(rounds + (rounds > 1)):
            for connections in numbers:
                for subject, request in subjects:
                    sys.stderr.write(f"{delay} ms, round {number}, {connections} connections: {subject.name}\033[K\r")
                    try:
                        one = load(subject, connections=connections, seconds=seconds, request=request, tokens=tokens)
                    except CannotRunError as error:  # its process has ended; the others are still measured
                        figures.missing[subject.name] = f"{error}; its last word: {subject.last_word()}"
                        continue
                    subject.idle()
                    if number or rounds == 1:
                        name = UPSTREAM if request is ASK_UPSTREAM else subject.name
                        figures.loads.setdefault((delay, connections, name), []).append(one)
        for subject, _ in subjects:
            peak = max(figures.peak_megabytes.get(subject.name, 0), subject.peak_megabytes())
            figures.peak_megabytes[subject.name] = peak


def load_for_long(figures: Figures, candidates: Sequence[Candidate], *, seconds: float) -> None:
    """Load one subject after the other for a long time, with 64 connections."""
    with temporary_directory() as directory, upstream(0, directory) as before:
        tokens = write_tokens(directory / "tokens")
        for candidate in candidates:
            with candidate.running(before, directory) as subject:
                first_pass(subject, time.monotonic())
                sys.stderr.write(f"{seconds:g} s: {candidate.name}\033[K\r")
                long = load(subject, connections=64, seconds=seconds, request=ASK, tokens=tokens)
                figures.long[candidate.name] = long


def warm_store(figures: Figures, *, seconds: float) -> None:
    """Let users come at random to a voicepass that holds ready-made passes."""
    if not has_warm_store():
        return
    voicepass = replace(VOICEPASS, environment={"VOICEPASS_WARM_PASSES": str(WARM_PASSES)})
    with (
        temporary_directory() as directory,
        upstream(WARM_DELAY_MS, directory) as before,
        voicepass.running(before, directory) as subject,
    ):
        tokens = write_tokens(directory / "tokens", WARM_USERS)
        first_pass(subject, time.monotonic())
        calls = 0
        while calls < before.calls():  # until the store is full
            calls = before.calls()
            time.sleep(1)
        random = load(
            subject, connections=WARM_USERS, seconds=seconds, request=ASK, tokens=tokens, per_second=WARM_PER_SECOND
        )
        subject.idle()
        figures.warm.append(Warm(random, before.calls()))


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """Make a directory that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="vp") as directory:
        yield Path(directory)


def installed(figures: Figures, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Install what the candidates need; return those that can run, and note the others as missing."""
    ready = []
    for candidate in candidates:
        try:
            sys.stderr.write(f"installing {candidate.name}\033[K\r")
            candidate.install()
            ready.append(candidate)
        except CannotRunError as error:
            figures.missing[candidate.name] = str(error)
    return ready


def report(figures: Figures, candidates: Sequence[Candidate]) -> str:
    """Return all tables."""
    titles = {candidate.name: candidate.title for candidate in candidates} | {UPSTREAM: "the upstream itself"}
    tables = {
        f"The upstream answers {f'after {delay} ms' if delay else 'at once'}": by_delay(figures, delay, titles)
        for delay in dict.fromkeys(delay for delay, _, _ in figures.loads)
    }
    for delay in dict.fromkeys(delay for delay, _, _ in figures.loads):
        tables[f"Ratios in paired rounds, 64 connections, {delay} ms"] = pairs(figures, delay, titles)
    if figures.long:
        tables["A long load, 64 connections, the upstream answers at once"] = long_loads(figures, titles)
    tables |= {"To start and to hold": footprints(figures, titles), "Targets": targets(figures)}
    text = f"{interpreter()}\n\n"
    text += "\n".join(f"## {title}\n\n{markdown(table)}" for title, table in tables.items())
    return text + "".join(f"\nMissing: {titles[name]}: {why}\n" for name, why in figures.missing.items())


def interpreter() -> str:
    """Name the interpreter, and how it was built: one without PGO takes 5 to 9 % more CPU."""
    built_with = str(sysconfig.get_config_var("CONFIG_ARGS"))
    options = {"PGO": "--enable-optimizations", "LTO": "--with-lto"}
    built = ", ".join(f"{'with' if option in built_with else 'without'} {name}" for name, option in options.items())
    return f"{platform.python_implementation()} {platform.python_version()}, built {built}."


def main() -> int:
    """Measure, and print the tables; exit 1 where one of those asked for is missing."""
    names = [candidate.name for candidate in CANDIDATES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of a second, to see that all works")
    parser.add_argument("--only", default=",".join(names), help="names, by comma")
    parser.add_argument("--delays", default=",".join(map(str, DELAYS_MS)), help="of the upstream, in ms, by comma")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="of one load")
    parser.add_argument("--long-seconds", type=float, default=60, help="of the long load; 0 leaves it out")
    parser.add_argument("--all-limits", action="store_true", help="also voicepass with every limit of every scope")
    parser.add_argument("--warm-seconds", type=float, default=30, help="of the load of the warm store")
    parser.add_argument("--json", type=Path, help="a file for the figures, round by round")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.warm_seconds, options.long_seconds = 1, 1, 5, 2
    if unknown := set(options.only.split(",")) - set(names):
        parser.error(f"--only knows {', '.join(names)}, not {', '.join(unknown)}")
    candidates = [candidate for candidate in CANDIDATES if candidate.name in options.only.split(",")]
    candidates += [ALL_LIMITS] if options.all_limits else []
    figures, others = Figures(), os.getloadavg()[0]
    try:
        ready = installed(figures, candidates)
        for delay in map(int, options.delays.split(",")):
            compare(figures, ready, delay=delay, rounds=options.rounds, seconds=options.seconds)
        if options.long_seconds:
            lasting = [candidate for candidate in ready if candidate.name in LONG]
            load_for_long(figures, lasting, seconds=options.long_seconds)
        if VOICEPASS in ready:
            warm_store(figures, seconds=options.warm_seconds)
    except CannotRunError as error:  # without the upstream or the load generator there is nothing to tell
        sys.exit(f"nothing was measured: {error}")
    sys.stderr.write("\033[K")
    if options.json:
        machine = {"python": interpreter(), "cores": os.cpu_count(), "load_average_before": others}
        options.json.write_text(json.dumps({"at": time.time(), **machine, **figures.as_json()}, indent=2) + "\n")
    sys.stdout.write(report(figures, candidates))
    return 1 if figures.missing else 0


if __name__ == "__main__":
    sys.exit(main())
