"""What the emulator's tests share: an emulator on a loopback port, and a client that sends raw frames."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlsplit

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from elevenlabs_emulator import EmulatedAgent, Emulator
from tests.elevenlabs_emulator.contract import Frame, check_frame

AGENT = EmulatedAgent(agent_id="agent_market")
KEY = "sk_emulator"
SIGN = "/v1/convai/conversation/get-signed-url"
TOKEN = "/v1/convai/conversation/token"
# The first frame that the JavaScript SDK 1.25.0 sends in a text conversation.
JS_TEXT_INITIATION: Frame = {
    "type": "conversation_initiation_client_data",
    "conversation_config_override": {"agent": {}, "tts": {}, "conversation": {"text_only": True}},
    "dynamic_variables": {"user_name": "Ada"},
    "user_id": "user-1",
}
# The first frame that it sends in a voice conversation.
JS_VOICE_INITIATION: Frame = JS_TEXT_INITIATION | {
    "conversation_config_override": {"agent": {}, "tts": {}, "conversation": {}}
}


@dataclass(frozen=True, kw_only=True)
class Service:
    """A running emulator."""

    emulator: Emulator
    url: str
    http: httpx.Client

    def ask(self, path: str = SIGN, *, key: str = KEY, **query: str) -> httpx.Response:
        return self.http.get(path, params={"agent_id": AGENT.agent_id} | query, headers={"xi-api-key": key})

    def mint(self, **query: str) -> str:
        return str(self.ask(**query).raise_for_status().json()["signed_url"])

    def public_url(self, agent_id: str) -> str:
        return f"{self.url.replace('http', 'ws', 1)}/v1/convai/conversation?agent_id={agent_id}"

    def advance(self, seconds: float) -> None:
        self.http.post("/_emulator/clock", json={"advance_seconds": seconds}).raise_for_status()

    def await_end(self, conversation_id: str) -> None:
        """Wait until the emulator, in its own thread, has noted the end of a conversation."""
        deadline = time.monotonic() + 5
        while self.emulator.accounts[conversation_id].seconds is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)


Serve = Callable[[Emulator], Service]


@dataclass(kw_only=True)
class Talk:
    """The client's side of one conversation. It checks and keeps every frame that it receives."""

    socket: ClientConnection
    frames: list[Frame] = field(default_factory=list)

    @property
    def kinds(self) -> list[str]:
        return [frame["type"] for frame in self.frames]

    def send(self, kind: str, **members: object) -> None:
        self.socket.send(json.dumps({"type": kind} | members))

    def next(self, kind: str | None = None) -> Frame:
        """Receive the next frame, or the next one of this type. The frames before it are kept too."""
        deadline = time.monotonic() + 5  # for the whole wait, because pings would extend a limit on each frame
        while True:
            frame: Frame = json.loads(self.socket.recv(timeout=deadline - time.monotonic()))
            check_frame(frame)
            self.frames.append(frame)
            if kind is None or frame["type"] == kind:
                return frame

    def read_answer(self) -> str:
        return str(self.next("agent_response")["agent_response_event"]["agent_response"])

    def read_close(self) -> tuple[int, str]:
        """Read all frames until the connection is closed; return the code and reason of the close frame."""
        with pytest.raises(ConnectionClosed) as closed:
            self.next("a type that no frame has")
        frame = closed.value.rcvd
        assert frame is not None
        return frame.code, frame.reason


@contextlib.contextmanager
def open_conversation(
    url: str,
    initiation: Frame | None = JS_TEXT_INITIATION,
    *,
    subprotocol: str | None = None,
    origin: str | None = None,
) -> Iterator[Talk]:
    offered = [Subprotocol(subprotocol)] if subprotocol else None
    headers = {"Origin": origin} if origin else {}
    with connect(url, subprotocols=offered, additional_headers=headers, proxy=None) as socket:
        if initiation is not None:
            with contextlib.suppress(ConnectionClosed):  # a refused client may be closed already
                socket.send(json.dumps(initiation))
        yield Talk(socket=socket)


def parameters(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query))
