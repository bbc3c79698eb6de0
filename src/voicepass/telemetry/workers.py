"""The directory in which workers share their metrics. prometheus-client writes a few files for each worker there.

A worker that ends leaves its files. Their counts must stay, so they are added to one file, and the others removed.
"""

import asyncio
import os
import re
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

from prometheus_client.mmap_dict import MmapedDict

LOCK_SECONDS: Final = 1.0
"""The longest that a scrape waits for another worker's scrape."""

_DIRECTORY: Final = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client reads it when it is imported
_STATE: Final = re.compile(r"gauge_live[a-z]*_(\d+)\.db")
_COUNTS: Final = re.compile(r"(counter|histogram)_(\d+)\.db")


def shared_directory() -> Path | None:
    """Return the directory that the workers share, or None where there is one process."""
    directory = os.environ.get(_DIRECTORY)
    return Path(directory) if directory is not None else None


@contextmanager
def share_metrics(workers: int) -> Iterator[None]:
    """Let several workers that are started in the block share metrics in a new directory."""
    if workers == 1 or _DIRECTORY in os.environ:  # one worker shares nothing; the operator may have set it
        yield
        return
    with tempfile.TemporaryDirectory(prefix="voicepass-metrics-") as directory:
        os.environ[_DIRECTORY] = directory
        try:
            yield
        finally:
            del os.environ[_DIRECTORY]


@asynccontextmanager
async def lock_and_clean(directory: Path, *, lock_seconds: float = LOCK_SECONDS) -> AsyncIterator[None]:
    """Remove the files of dead workers, and keep other workers from removing any until the block ends.

    If another worker keeps the lock for too long, this removes nothing: a frozen worker must not stop all scrapes.
    """
    import fcntl  # noqa: PLC0415 - Windows does not have it, and uvicorn starts no workers there

    give_up_at = time.monotonic() + lock_seconds
    with (directory / "lock").open("wb") as file:  # closing it releases the lock
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= give_up_at:
                    break
                await asyncio.sleep(0.01)
            else:
                _remove_dead_workers(directory)
                break
        yield


def _remove_dead_workers(directory: Path) -> None:
    for path in sorted(directory.iterdir()):
        if (found := _COUNTS.fullmatch(path.name)) and not _is_alive(int(found[2])):
            _add_counts(path, to=directory / f"{found[1]}_dead.db")
            path.unlink()
        elif (found := _STATE.fullmatch(path.name)) and not _is_alive(int(found[1])):
            path.unlink()


def _add_counts(path: Path, *, to: Path) -> None:
    total = MmapedDict(str(to))  # type: ignore[no-untyped-call]
    for key, count, timestamp, _ in MmapedDict.read_all_values_from_file(str(path)):  # type: ignore[no-untyped-call]
        total.write_value(key, total.read_value(key)[0] + count, timestamp)  # type: ignore[no-untyped-call]
    total.close()  # type: ignore[no-untyped-call]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # the process exists, under another user
    return True
