"""How uvicorn runs, and the limits on what arrives before it is a request, which no ASGI application can see.

uvicorn alone waits without end for the rest of a request, takes headers without end, and answers garbage in plain text.
"""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar, Final

import httptools
import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.supervisors import Multiprocess

from voicepass.api.middleware import add_headers
from voicepass.api.problems import log_and_answer
from voicepass.errors import HeadersTooLarge, Malformed, Refusal
from voicepass.model import new_id

RECEIVE_SECONDS: Final = 10.0
MAX_OVERHEAD_BYTES: Final = 64 * 1024  # of a request without its body; the middleware refuses whole headers sooner
MAX_OPEN_FILES: Final = 65_536
MAX_PIPELINED: Final = 16  # httptools queues requests without a bound: one connection used 800 MB in 5 s


def run(
    application: Any,  # noqa: ANN401 - an ASGI application, its factory, or the import path of either
    *,
    port: int,
    grace_seconds: int,
    admin_port: int | None = None,
    root_path: str = "",
    **options: Any,  # noqa: ANN401 - as uvicorn takes them
) -> None:
    """Serve until a signal ends the process. Requests in flight then get `grace_seconds` to finish.

    With `admin_port`, the same application also answers on that port of the host.
    """
    _raise_open_file_limit()
    options = {"workers": 1, **options, **UVICORN_OPTIONS}  # otherwise uvicorn takes the workers of WEB_CONCURRENCY
    options |= {"timeout_graceful_shutdown": grace_seconds, "root_path": write_prefix(root_path)}
    if admin_port is None:
        uvicorn.run(application, port=port, **options)
    else:
        _run_on_two_ports(*(uvicorn.Config(application, port=number, **options) for number in (port, admin_port)))


def write_prefix(path: str) -> str:
    """Return a path prefix as uvicorn needs it: a slash before it and none behind, because it adds it to every path."""
    return f"/{path.strip('/')}".rstrip("/")


def _run_on_two_ports(public: uvicorn.Config, admin: uvicorn.Config) -> None:
    """Do what `uvicorn.run` does, which binds only one port."""
    sockets = [public.bind_socket(), admin.bind_socket()]
    if public.workers > 1:
        Multiprocess(public, sockets=sockets).run()
        return
    server = uvicorn.Server(public)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets)
    if not server.started:
        sys.exit(STARTUP_FAILURE)


def _raise_open_file_limit() -> None:
    # Each user and each call is an open file, and the usual soft limit is 1,024.
    if sys.platform != "win32":
        import resource  # noqa: PLC0415 - Windows does not have it

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY:
            most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a deadline while the peer sends, bounds on size, and refusals as problem documents.

    It uses attributes that uvicorn does not document; tests/test_private_names.py lists them.
    """

    receive_seconds: ClassVar[float] = RECEIVE_SECONDS

    _deadline: asyncio.TimerHandle | None = None
    _is_in_head = False
    _overhead_bytes = 0  # of the current request, without its body and without the chunk that it began in

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_deadline()
        if sys.platform == "linux":  # elsewhere a peer that never reads its answer can keep the connection
            milliseconds = int(self.receive_seconds * 1000)
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._overhead_bytes += len(data)
        self._start_deadline()
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._handle_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(Malformed())
        self._update_deadline()
        if self._overhead_bytes > MAX_OVERHEAD_BYTES:
            self._refuse(HeadersTooLarge())

    def _handle_upgrade(self, rest: bytes) -> None:
        """Open a WebSocket, or answer over HTTP/1.1. `rest` is what follows the headers."""
        if self._should_upgrade():
            self.handle_websocket_upgrade()
        elif self._offers_other_protocol():
            # httptools does not read the body of an upgrade. It gets the request again, without that header.
            line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
            fields = [b"%s: %s" % field for field in self.headers if field[0] != b"upgrade"]
            self.data_received(b"\r\n".join([line, *fields, b"", rest]))

    def _offers_other_protocol(self) -> bool:
        """Whether the client offers a protocol that voicepass does not speak, such as h2c."""
        has_field = any(name == b"upgrade" for name, _ in self.headers)
        return self.parser.should_upgrade() and has_field and not self._should_upgrade()

    def on_message_begin(self) -> None:
        self._is_in_head, self._overhead_bytes = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # uvicorn would treat a trailer as a header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        if self._offers_other_protocol():
            return
        if len(self.pipeline) == MAX_PIPELINED:
            raise Malformed  # the parser turns it into an error of its own
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._overhead_bytes = max(0, self._overhead_bytes - len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._offers_other_protocol():
            super().on_message_complete()

    def _update_deadline(self) -> None:
        """Keep the deadline only while the peer has to send more of a request."""
        protocol = self.transport.get_protocol()
        if isinstance(protocol, WebSocketsSansIOProtocol):
            self._stop_deadline()
            if not protocol.handshake_initiated:  # it did not accept the request, and would never answer
                self._refuse(Malformed())
        elif self.cycle is not None and self.cycle.more_body:
            self._start_deadline()
        elif self.cycle is not None and not self.cycle.response_complete:
            self._stop_deadline()  # voicepass has to answer, and the peer waits

    def _start_deadline(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.receive_seconds, self.transport.abort)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, refusal: Refusal) -> None:
        """Answer a request that no application will see whole, at most once; then close the connection."""
        cycle = self.cycle
        if self.transport.is_closing():
            return
        if cycle is not None and not cycle.more_body and not cycle.response_complete:
            cycle.keep_alive = False  # an earlier request still gets its answer, which is then the last one
            self.transport.pause_reading()
            return
        if cycle is None or not cycle.more_body or not cycle.response_started:
            self.transport.write(self._write_problem(refusal))
        if cycle is not None:
            cycle.disconnected = True  # otherwise the application might answer as well
        self.transport.close()

    def _write_problem(self, refusal: Refusal) -> bytes:
        request_id = new_id()
        response = log_and_answer(refusal, request_id=request_id)
        add_headers(response.raw_headers, request_id=request_id)
        response.headers["Connection"] = "close"
        status = HTTPStatus(refusal.status)
        headers = [*self.server_state.default_headers, *response.raw_headers]
        lines = [b"HTTP/1.1 %d %s" % (status, status.phrase.encode()), *(b"%s: %s" % header for header in headers)]
        return b"\r\n".join([*lines, b"", bytes(response.body)])


UVICORN_OPTIONS: Final[Mapping[str, Any]] = {
    "http": GuardedProtocol,
    "log_config": None,  # configure_logging sets it up
    "access_log": False,  # the line of each attempt says more, and holds no query string
    "server_header": False,
    "proxy_headers": False,  # uvicorn would trust any peer on loopback
    "ws": "websockets-sansio",
    "timeout_worker_healthcheck": 30,  # a busy machine needs more than uvicorn's 5 s to start a worker
}
