"""A decorator that runs one test for many rows."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import pytest

Test = Callable[..., Any]
Arguments = dict[str, Any]


def table(names: str | tuple[str, ...], rows: Iterable[Any]) -> Callable[[Test], Test]:
    """Run a test for every row, as `pytest.mark.parametrize` does, but as one test.

    Collecting and setting up a test takes each worker longer than most rows take. All rows share the fixtures, but each
    row gets its own `monkeypatch`. Every row runs; the failure names the rows that failed. An iterator of rows is read
    when the test runs.
    """

    def decorate(test: Test) -> Test:
        own = (names,) if isinstance(names, str) else names
        signature = inspect.signature(test)
        fixtures = [parameter for name, parameter in signature.parameters.items() if name not in own]

        def each_row() -> Iterator[Arguments]:
            for row in rows:
                yield dict(zip(own, (row,) if isinstance(names, str) else row, strict=True))

        if inspect.iscoroutinefunction(test):

            @functools.wraps(test)
            async def run_all(**given: Any) -> None:
                with _Outcomes() as outcomes:
                    for row in each_row():
                        with outcomes.of(row, given) as arguments:
                            await test(**arguments)
        else:

            @functools.wraps(test)
            def run_all(**given: Any) -> None:
                with _Outcomes() as outcomes:
                    for row in each_row():
                        with outcomes.of(row, given) as arguments:
                            test(**arguments)

        run_all.__signature__ = signature.replace(parameters=fixtures)  # type: ignore[attr-defined]
        return run_all

    return decorate


class _Outcomes:
    """The number of rows that ran, and the failures among them."""

    def __init__(self) -> None:
        self.rows = 0
        self.failures: list[BaseException] = []

    @contextmanager
    def of(self, row: Arguments, given: Arguments) -> Iterator[Arguments]:
        """Yield the arguments of a row, and keep its failure."""
        self.rows += 1
        try:
            with pytest.MonkeyPatch.context() as monkeypatch:
                yield given | row | ({"monkeypatch": monkeypatch} if "monkeypatch" in given else {})
        except (Exception, pytest.fail.Exception) as failure:  # noqa: BLE001 - raised again when all rows have run
            failure.add_note(f"in the row {row!r}")
            self.failures.append(failure)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not (self.failures and issubclass(kind, pytest.skip.Exception)):
            return
        assert self.rows, "the table has no rows"
        if len(self.failures) == 1:
            raise self.failures[0]
        if self.failures:
            raise BaseExceptionGroup(f"{len(self.failures)} of {self.rows} rows failed", self.failures)
