"""Real servers for tests: an app in a thread, raw bytes in the running event loop, or a command in its own process."""

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients of plain HTTP, because reading the machine's certificates takes longer than most tests."""


class _Server(uvicorn.Server):
    """Sets `listening` when it listens, so that no test has to poll."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.listening.set()


@contextlib.contextmanager
def running(
    make_app: Callable[[str], ASGIApp], *, more_sockets: Sequence[socket.socket] = (), **uvicorn_options: Any
) -> Iterator[str]:
    """Serve `make_app(base_url)` until the block ends; yields the base URL, such as `http://127.0.0.1:49152`.

    The port is bound before the app is made, because some apps need their own address. The same app also serves on
    `more_sockets`, which must be bound. The app's own log handler is removed, because it would
    write between two tests, where pytest captures nothing.
    """
    root = logging.getLogger()
    handlers = root.handlers[:]
    options = {"log_config": None, "access_log": False, "ws": "websockets-sansio"} | uvicorn_options
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = _Server(
            uvicorn.Config(
                make_app(base_url),
                timeout_graceful_shutdown=1,
                **options,
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener, *more_sockets]}, daemon=True)
        thread.start()
        try:
            if not server.listening.wait(timeout=10):
                raise RuntimeError("the server did not start")
            root.handlers[:] = handlers
            yield base_url
        finally:
            server.should_exit = True
            thread.join(timeout=10)


@contextlib.asynccontextmanager
async def listening(
    behave: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    *,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[str]:
    """Serve raw bytes on loopback in the running loop; yields the base URL. `behave` may break the rules of HTTP."""
    connections: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await behave(reader, writer)
        except ConnectionError:
            pass  # the client closed first
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def start_handling(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.create_task(handle(reader, writer)))

    server = await asyncio.start_server(start_handling, "127.0.0.1", 0, ssl=tls)
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


class Cable:
    """Carries bytes to a server at `url`. `pull` breaks every connection through it, without a close frame.

    Give the server this address as its own.
    """

    def __init__(self, listener: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.to_url = ""
        self._loop = loop
        self._is_in = True
        self._ends: set[asyncio.StreamWriter] = set()

    def pull(self) -> None:
        """Break every connection, and let no new one through."""
        self._is_in = False
        done = threading.Event()
        self._loop.call_soon_threadsafe(self._cut, done)
        done.wait(timeout=10)

    def plug_in(self) -> None:
        self._is_in = True

    def _cut(self, done: threading.Event) -> None:
        for end in self._ends:
            end.transport.abort()
        done.set()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._is_in:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", int(self.to_url.rpartition(":")[2]))
        ends = {writer, far_writer}
        self._ends |= ends
        await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        self._ends -= ends


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.contextmanager
def behind_a_cable(make_app: Callable[[str], ASGIApp]) -> Iterator[Cable]:
    """Serve `make_app(base_url)` behind a cable. The base URL is the cable's own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        cable = Cable(listener, loop)
        with running(lambda _url: make_app(cable.url)) as cable.to_url:
            start = asyncio.start_server(cable.carry, sock=listener)
            server = asyncio.run_coroutine_threadsafe(start, loop).result(timeout=10)
            try:
                yield cable
            finally:
                cable.pull()
                loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=10)
    loop.close()


_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def free_port() -> int:
    """Find a port on which no process listens at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(
    command: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    within_seconds: float = 30,
    until: str = "Uvicorn running on",
) -> Iterator[list[str]]:
    """Run a command that serves, until the block ends. It must end without an error on SIGTERM.

    The block begins when the command has written a line that contains `until`. Yields the growing list of its lines.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = threading.Timer(within_seconds, lambda: os.killpg(process.pid, signal.SIGKILL))
    deadline.start()
    output: list[str] = []
    stdout = process.stdout
    assert stdout is not None
    try:
        for line in stdout:
            output.append(line)
            if until in _COLOR.sub("", line):  # if CI is set, programs write colors into a pipe
                break
        else:
            raise AssertionError(f"{command} did not start:\n{''.join(output)}")
        deadline.cancel()
        reader = threading.Thread(target=output.extend, args=(stdout,), daemon=True)
        reader.start()
        try:
            yield output
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            reader.join(timeout=20)  # the thread ends when the last process of the group has closed its output
    finally:
        deadline.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        code = process.wait(timeout=20)
        stdout.close()
    assert code in {0, -signal.SIGTERM, 128 + signal.SIGTERM}, "".join(output)
