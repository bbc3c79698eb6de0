"""How uvicorn is run, and the limits that no ASGI application can see: on what arrives before it is a request.

Alone, uvicorn waits for ever for the rest of a request, takes headers without end, and answers garbage in plain text.
"""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar, Final, Literal

import h11
import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.supervisors import Multiprocess

from voicepass.api.middleware import label
from voicepass.api.problems import noted
from voicepass.errors import HeadersTooLarge, Malformed, Refusal
from voicepass.model import new_id

RECEIVE_SECONDS: Final = 10.0
MAX_OVERHEAD_BYTES: Final = 64 * 1024  # of a request without its body; the middleware refuses whole headers sooner
MAX_OPEN_FILES: Final = 65_536
MAX_PIPELINED: Final = 16  # httptools queues without end: one connection took 800 MB in 5 s

Parser = Literal["auto", "h11", "httptools"]

UVICORN_OPTIONS: Final[Mapping[str, Any]] = {
    "log_config": None,  # configure_logging owns it
    "access_log": False,  # one line per attempt says more, and no query string
    "server_header": False,
    "proxy_headers": False,  # uvicorn would believe anyone on loopback
    "ws": "websockets-sansio",
    "h11_max_incomplete_event_size": MAX_OVERHEAD_BYTES,
}


def run(
    application: Any,  # noqa: ANN401 - an ASGI application, its factory, or where to import either from
    *,
    host: str,
    port: int,
    grace_seconds: int,
    parser: Parser = "auto",
    workers: int = 1,
    factory: bool = False,
    admin_port: int | None = None,
) -> None:
    """Serve until a signal ends it; requests that are being answered then get `grace_seconds` to finish.

    With `admin_port`, the same application also gets what arrives on that port of the host.
    """
    _allow_open_files()
    options = dict(UVICORN_OPTIONS) | {
        "host": host,
        "timeout_graceful_shutdown": grace_seconds,
        "http": protocol(parser),
        "workers": workers,
        "factory": factory,
    }
    if admin_port is None:
        uvicorn.run(application, port=port, **options)
    else:
        _run_on_two_ports(*(uvicorn.Config(application, port=number, **options) for number in (port, admin_port)))


def _run_on_two_ports(public: uvicorn.Config, admin: uvicorn.Config) -> None:
    """Do as `uvicorn.run`, which binds one port only."""
    sockets = [public.bind_socket(), admin.bind_socket()]
    if public.workers > 1:
        Multiprocess(public, sockets=sockets).run()
        return
    server = uvicorn.Server(public)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets)
    if not server.started:
        sys.exit(STARTUP_FAILURE)


def _allow_open_files() -> None:
    """Raise the soft limit: each user and each call is an open file, and 1,024 are usual, for the sake of select()."""
    if sys.platform != "win32":
        import resource  # noqa: PLC0415 - not there on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY:
            most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def protocol(parser: Parser = "auto", *, receive_seconds: float = RECEIVE_SECONDS) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol with our limits; "auto" is the faster one, httptools."""
    guarded: type[_Guarded] = _H11 if parser == "h11" else _HttpTools
    if receive_seconds == guarded.receive_seconds:
        return guarded  # workers find it again by its name
    return type(guarded.__name__, (guarded,), {"receive_seconds": receive_seconds})


class _Guarded(asyncio.Protocol):
    """What both protocols share: a deadline while the peer owes us bytes, and refusals worded as problems."""

    receive_seconds: ClassVar[float] = RECEIVE_SECONDS

    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    server_state: Any
    cycle: Any
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._start_deadline()
        if sys.platform == "linux":  # elsewhere a peer that never reads its answer may keep the connection
            milliseconds = int(self.receive_seconds * 1000)
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def data_received(self, data: bytes) -> None:
        self._start_deadline()
        super().data_received(data)
        self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        super().connection_lost(exc)

    def send_400_response(self, _msg: str) -> None:
        self._refuse(Malformed())

    def _settle(self) -> None:
        """Let the deadline run on only while a request is on its way."""
        heir = self.transport.get_protocol()
        if isinstance(heir, WebSocketsSansIOProtocol):
            self._stop_deadline()
            if not heir.handshake_initiated:  # it took offence at the request and would say nothing, for ever
                self._refuse(Malformed())
        elif self.cycle is not None and self.cycle.more_body:
            self._start_deadline()
        elif self.cycle is not None and not self.cycle.response_complete:
            self._stop_deadline()  # ours to answer, however long that takes

    def _start_deadline(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.receive_seconds, self.transport.abort)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, refusal: Refusal) -> None:
        """Answer, at most once, what no application will see whole; then hang up."""
        cycle = self.cycle
        if self.transport.is_closing():
            return
        if cycle is not None and not cycle.more_body and not cycle.response_complete:
            cycle.keep_alive = False  # an earlier request is being answered: let that be the last word
            self.transport.pause_reading()
            return
        if cycle is None or not cycle.more_body or not cycle.response_started:
            self.transport.write(self._worded(refusal))
        if cycle is not None:
            cycle.disconnected = True  # else the application might still answer as well
        self.transport.close()

    def _worded(self, refusal: Refusal) -> bytes:
        request_id = new_id()
        response = noted(refusal, request_id=request_id)
        label(response.raw_headers, request_id=request_id)
        response.headers["Connection"] = "close"
        status = HTTPStatus(refusal.status)
        headers = [*self.server_state.default_headers, *response.raw_headers]
        lines = [b"HTTP/1.1 %d %s" % (status, status.phrase.encode()), *(b"%s: %s" % header for header in headers)]
        return b"\r\n".join([*lines, b"", bytes(response.body)])


class _H11(_Guarded, H11Protocol):
    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._settle()  # the next request may have waited in the parser

    def send_400_response(self, msg: str) -> None:
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == HeadersTooLarge.status:
            self._refuse(HeadersTooLarge())
        else:
            super().send_400_response(msg)


class _HttpTools(_Guarded, HttpToolsProtocol):
    _in_head = False
    _overhead_bytes = 0  # of the request that is on its way, without its body and without the chunk that it began in

    def data_received(self, data: bytes) -> None:
        self._overhead_bytes += len(data)
        super().data_received(data)
        if self._overhead_bytes > MAX_OVERHEAD_BYTES:
            self._refuse(HeadersTooLarge())

    def on_message_begin(self) -> None:
        self._in_head, self._overhead_bytes = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else it is a trailer, and uvicorn would pass it off as a header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if len(self.pipeline) == MAX_PIPELINED:
            raise Malformed  # to the parser this is an error like any other
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._overhead_bytes = max(0, self._overhead_bytes - len(body))
        super().on_body(body)
