"""What the tests of the emulator share: an emulator on a loopback port, and a client that speaks raw frames."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from voicepass.emulator import EmulatedAgent, Emulator

Frame = dict[str, Any]

AGENT = EmulatedAgent(agent_id="agent_market")
KEY = "sk_emulator"
CONVAI = Subprotocol("convai")
# What the JavaScript SDK 1.25.0 sends first in a text conversation.
JS_TEXT_INITIATION: Frame = {
    "type": "conversation_initiation_client_data",
    "conversation_config_override": {"agent": {}, "tts": {}, "conversation": {"text_only": True}},
    "dynamic_variables": {"user_name": "Ada"},
    "user_id": "user-1",
    "source_info": {"source": "js_sdk", "version": "1.25.0"},
}
# And in a voice conversation.
JS_VOICE_INITIATION: Frame = JS_TEXT_INITIATION | {
    "conversation_config_override": {"agent": {}, "tts": {}, "conversation": {}}
}


@dataclass(frozen=True, kw_only=True)
class Service:
    """An emulator that listens."""

    emulator: Emulator
    url: str
    http: httpx.Client

    def mint(self, *, path: str = "get-signed-url", key: str = KEY, **query: str) -> str:
        answer = self.http.get(
            f"/v1/convai/conversation/{path}",
            params={"agent_id": AGENT.agent_id, **query},
            headers={"xi-api-key": key},
        )
        assert answer.status_code == 200, answer.text
        signed_url = answer.json()["signed_url"]
        assert isinstance(signed_url, str)
        return signed_url

    def public_url(self, agent_id: str) -> str:
        return f"{self.url.replace('http', 'ws', 1)}/v1/convai/conversation?agent_id={agent_id}"


class Stage:
    """The app behind the one server of a test run: whatever a test has put on it."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None and scope["type"] != "lifespan":
            await self.app(scope, receive, send)


Serve = Callable[[Emulator], Service]


@dataclass(kw_only=True)
class Talk:
    """A client's side of one conversation; keeps every frame it was sent."""

    socket: ClientConnection
    frames: list[Frame] = field(default_factory=list)

    def send(self, frame: Frame) -> None:
        self.socket.send(json.dumps(frame))

    def next(self, kind: str | None = None) -> Frame:
        """The next frame, or the next of this type; what is passed over is kept too."""
        deadline = time.monotonic() + 5  # for the whole wait: pings would prolong a limit on each frame
        while True:
            frame: Frame = json.loads(self.socket.recv(timeout=deadline - time.monotonic()))
            self.frames.append(frame)
            if kind is None or frame["type"] == kind:
                return frame

    def says(self) -> str:
        text = self.next("agent_response")["agent_response_event"]["agent_response"]
        assert isinstance(text, str)
        return text

    def closed(self) -> tuple[int, str]:
        """The code and reason of the close frame, after reading all that came before it."""
        with pytest.raises(ConnectionClosed) as closed:
            self.next("a type that no frame has")
        frame = closed.value.rcvd
        assert frame is not None
        return frame.code, frame.reason


@contextlib.contextmanager
def talking(
    url: str,
    initiation: Frame | None = JS_TEXT_INITIATION,
    *,
    subprotocols: list[Subprotocol] | None = None,
    origin: str | None = None,
) -> Iterator[Talk]:
    headers = {} if origin is None else {"Origin": origin}
    with connect(url, subprotocols=subprotocols, additional_headers=headers, proxy=None) as socket:
        talk = Talk(socket=socket)
        if initiation is not None:
            with contextlib.suppress(ConnectionClosed):  # refused at the door, it may be closed already
                talk.send(initiation)
        yield talk


def parameters(url: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(url).query, keep_blank_values=True).items()}
