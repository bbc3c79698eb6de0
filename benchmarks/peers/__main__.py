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
    markdown,
    tabulate_delay,
    tabulate_footprints,
    tabulate_long_loads,
    tabulate_pairs,
    tabulate_targets,
)
from benchmarks.peers.machine import CannotRunError, load, run_upstream
from benchmarks.peers.subjects import (
    ALL_LIMITS,
    ASK,
    ASK_UPSTREAM,
    CANDIDATES,
    VOICEPASS,
    WARM_PASSES,
    Candidate,
    check,
    has_warm_store,
    voicepass_of,
    wait_for_first_pass,
    write_tokens,
)

DELAYS_MS: Final = (0, 50, 200)
UPSTREAM: Final = "upstream"
LONG: Final = ("voicepass", "voicepass-all-limits", "bare", "fastify")
"""The candidates that also get a long load."""
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
    """Load all candidates with an upstream of that delay. Of several rounds, the first is not counted."""
    with make_temporary_directory() as directory, ExitStack() as stack:
        tokens = write_tokens(directory / "tokens")
        upstream = stack.enter_context(run_upstream(delay, directory))
        subjects = [(stack.enter_context(run_upstream(delay, directory, on=0)).subject, ASK_UPSTREAM)]
        for candidate in candidates:
            try:
                begun = time.monotonic()
                subject = stack.enter_context(candidate.run(upstream, directory))
                started = wait_for_first_pass(subject, begun)
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
                        figures.missing[subject.name] = f"{error}; its last line: {subject.last_line()}"
                        continue
                    subject.wait_until_idle()
                    if number or rounds == 1:
                        name = UPSTREAM if request is ASK_UPSTREAM else subject.name
                        figures.loads.setdefault((delay, connections, name), []).append(one)
        for subject, _ in subjects:
            peak = max(figures.peak_megabytes.get(subject.name, 0), subject.peak_megabytes())
            figures.peak_megabytes[subject.name] = peak


def load_for_long(figures: Figures, candidates: Sequence[Candidate], *, seconds: float) -> None:
    """Load one subject after the other for a long time, with 64 connections."""
    with make_temporary_directory() as directory, run_upstream(0, directory) as upstream:
        tokens = write_tokens(directory / "tokens")
        for candidate in candidates:
            with candidate.run(upstream, directory) as subject:
                wait_for_first_pass(subject, time.monotonic())
                sys.stderr.write(f"{seconds:g} s: {candidate.name}\033[K\r")
                long = load(subject, connections=64, seconds=seconds, request=ASK, tokens=tokens)
                figures.long[candidate.name] = long


def measure_warm_store(figures: Figures, *, seconds: float) -> None:
    """Send requests at random times to a voicepass that holds ready-made passes."""
    if not has_warm_store():
        return
    voicepass = replace(VOICEPASS, environment={"VOICEPASS_WARM_PASSES": str(WARM_PASSES)})
    with (
        make_temporary_directory() as directory,
        run_upstream(WARM_DELAY_MS, directory) as upstream,
        voicepass.run(upstream, directory) as subject,
    ):
        tokens = write_tokens(directory / "tokens", WARM_USERS)
        wait_for_first_pass(subject, time.monotonic())
        calls = 0
        while calls < upstream.calls():  # until the store is full
            calls = upstream.calls()
            time.sleep(1)
        random = load(
            subject, connections=WARM_USERS, seconds=seconds, request=ASK, tokens=tokens, per_second=WARM_PER_SECOND
        )
        subject.wait_until_idle()
        figures.warm.append(Warm(random, upstream.calls()))


@contextlib.contextmanager
def make_temporary_directory() -> Iterator[Path]:
    """Make a directory, and delete it at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="vp") as directory:
        yield Path(directory)


def install_all(figures: Figures, candidates: Sequence[Candidate]) -> list[Candidate]:
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


def write_report(figures: Figures, candidates: Sequence[Candidate]) -> str:
    """Return all tables."""
    titles = {candidate.name: candidate.title for candidate in candidates} | {UPSTREAM: "the upstream itself"}
    tables = {
        f"The upstream answers {f'after {delay} ms' if delay else 'at once'}": tabulate_delay(figures, delay, titles)
        for delay in dict.fromkeys(delay for delay, _, _ in figures.loads)
    }
    for delay in dict.fromkeys(delay for delay, _, _ in figures.loads):
        tables[f"Ratios in paired rounds, 64 connections, {delay} ms"] = tabulate_pairs(figures, delay, titles)
    if figures.long:
        tables["A long load, 64 connections, the upstream answers at once"] = tabulate_long_loads(figures, titles)
    tables |= {"Start and memory": tabulate_footprints(figures, titles), "Targets": tabulate_targets(figures)}
    text = f"{describe_interpreter()}\n\n"
    text += "\n".join(f"## {title}\n\n{markdown(table)}" for title, table in tables.items())
    return text + "".join(f"\nMissing: {titles[name]}: {why}\n" for name, why in figures.missing.items())


def describe_interpreter() -> str:
    """Name the interpreter, and how it was built: one without PGO takes 5 to 9 % more CPU."""
    built_with = str(sysconfig.get_config_var("CONFIG_ARGS"))
    options = {"PGO": "--enable-optimizations", "LTO": "--with-lto"}
    built = ", ".join(f"{'with' if option in built_with else 'without'} {name}" for name, option in options.items())
    return f"{platform.python_implementation()} {platform.python_version()}, built {built}."


def main() -> int:
    """Measure, and print the tables; return 1 if a requested subject is missing."""
    names = [candidate.name for candidate in CANDIDATES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of a second, to check that everything works")
    parser.add_argument("--only", default=",".join(names), help="names, with commas")
    parser.add_argument("--beside", type=Path, action="append", default=[], help="another checkout with a .venv")
    parser.add_argument("--delays", default=",".join(map(str, DELAYS_MS)), help="of the upstream in ms, with commas")
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
        parser.error(f"--only accepts {', '.join(names)}, not {', '.join(unknown)}")
    candidates = [candidate for candidate in CANDIDATES if candidate.name in options.only.split(",")]
    candidates += [ALL_LIMITS] if options.all_limits else []
    candidates[1:1] = [voicepass_of(checkout.resolve()) for checkout in options.beside]
    figures, others = Figures(), os.getloadavg()[0]
    try:
        ready = install_all(figures, candidates)
        for delay in map(int, options.delays.split(",")):
            compare(figures, ready, delay=delay, rounds=options.rounds, seconds=options.seconds)
        if options.long_seconds:
            long_candidates = [candidate for candidate in ready if candidate.name in LONG]
            load_for_long(figures, long_candidates, seconds=options.long_seconds)
        if VOICEPASS in ready:
            measure_warm_store(figures, seconds=options.warm_seconds)
    except CannotRunError as error:  # without the upstream or the load generator nothing can be measured
        sys.exit(f"nothing was measured: {error}")
    sys.stderr.write("\033[K")
    if options.json:
        machine = {"python": describe_interpreter(), "cores": os.cpu_count(), "load_average_before": others}
        options.json.write_text(json.dumps({"at": time.time(), **machine, **figures.as_json()}, indent=2) + "\n")
    sys.stdout.write(write_report(figures, candidates))
    return 1 if figures.missing else 0


if __name__ == "__main__":
    sys.exit(main())
