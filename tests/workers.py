"""Which of pytest's workers runs which tests."""

from collections import Counter

import pytest
from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

_FOLDERS = {
    "tests/browser/": "Chromium",
    "tests/examples/": "Chromium",
    "tests/elevenlabs_emulator/": "the models of ElevenLabs' SDK",
}


def _find_need(nodeid: str) -> str | None:
    """Name what a test needs and takes seconds to start or to import."""
    if nodeid.startswith("tests/ledger/") and "postgres" in nodeid:
        return "PostgreSQL"
    return next((need for folder, need in _FOLDERS.items() if nodeid.startswith(folder)), None)


class ByNeed(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """Gives a worker all tests with the same need, so that only that worker pays for it. Other files go anywhere."""

    def _split_scope(self, nodeid: str) -> str:
        return _find_need(nodeid) or super()._split_scope(nodeid)


def put_long_work_first(items: list[pytest.Item]) -> None:
    """Sort the tests so that no worker begins a long piece of work when the others have nothing left to do."""
    size = Counter(item.path for item in items)
    items.sort(key=lambda item: (_find_need(item.nodeid) is None, -size[item.path]))
