"""`voicepass serve`."""

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Annotated

import typer

from voicepass.api.server import run
from voicepass.app import create_app
from voicepass.cli.failures import check_port, fail
from voicepass.cli.tables import with_ledger
from voicepass.config.build import configure, find_sqlite_path
from voicepass.config.settings import Settings, load_settings
from voicepass.errors import LedgerUnavailable
from voicepass.identity.jwks import FETCH_SECONDS
from voicepass.ledger import ANSWER_SECONDS, Ledger
from voicepass.telemetry.logs import configure_logging, log_writer

AdminPort = Annotated[
    int | None,
    typer.Option(min=1, max=65535, help="A port for the routes of operators; --port then answers them with 404."),
]


def serve(
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 inside a container.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, envvar="PORT", help="The port to listen on.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes that share the port.")] = 1,
    admin_port: AdminPort = None,
    root_path: Annotated[str, typer.Option(help="The path prefix under which a proxy serves voicepass: /voice.")] = "",
) -> None:
    """Run the service. If a setting is missing or unsafe, print a line for each problem and exit."""
    settings = load_settings()
    configure(settings)
    if workers > 1 and find_sqlite_path(settings) == ":memory:":
        fail(["VOICEPASS_DATABASE_URL is in memory, and each worker would have its own: name a file or PostgreSQL"])
    try:
        # The schema is then up to date before a worker opens the ledger. This only reads, because the service may start
        # on a replica that is about to become the primary.
        with_ledger(Ledger.list_blocks, settings)
    except LedgerUnavailable as error:
        fail([f"VOICEPASS_DATABASE_URL cannot be used: {error.operator_note}"])
    if admin_port == port:
        fail([f"--admin-port and --port are both {port}: choose two ports"])
    check_port(host, port)
    if admin_port is not None:
        check_port(host, admin_port, option="--admin-port")
    configure_logging(log_format=settings.voicepass_log_format, level=settings.voicepass_log_level)
    # Workers buffer their own lines, and so does one process that serves; a parent of workers has no lifespan.
    with _share_metrics(workers), log_writer.buffered() if workers > 1 else nullcontext():
        run(
            # Each worker imports or unpickles its own. Only the second takes an option.
            "voicepass.app:create_app" if admin_port is None else partial(create_app, admin_port=admin_port),
            host=host,
            port=port,
            admin_port=admin_port,
            factory=True,
            workers=workers,
            grace_seconds=longest_answer_seconds(settings),
            root_path=root_path,
        )


@contextmanager
def _share_metrics(workers: int) -> Iterator[None]:
    """Let several workers share metrics in a new directory: prometheus-client writes a few files for each there."""
    name = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client reads it when it is imported
    if workers == 1 or name in os.environ:  # one worker shares nothing; the operator may have set it
        yield
        return
    with tempfile.TemporaryDirectory(prefix="voicepass-metrics-") as directory:
        os.environ[name] = directory
        try:
            yield
        finally:
            del os.environ[name]


def longest_answer_seconds(settings: Settings) -> int:
    """Return how long keys, ledger and ElevenLabs may take together. uvicorn may cut an answer that takes longer."""
    return math.ceil(settings.voicepass_deadline_seconds + 2 * ANSWER_SECONDS + FETCH_SECONDS)
