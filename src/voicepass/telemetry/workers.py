"""The directory in which workers share their metrics. prometheus-client writes a few files for each worker there.

A worker that ends leaves its files. Its counts must stay. Its state is removed.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_DIRECTORY: Final = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client reads it when it is imported


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


def remove_dead_workers(directory: Path) -> None:
    """Remove the state of workers that have ended. A scrape at the same time does not need these files."""
    for path in directory.glob("gauge_live*_*.db"):
        if not _is_alive(int(path.stem.rpartition("_")[2])):
            path.unlink(missing_ok=True)  # another worker may have removed it


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # the process exists, under another user
    return True
