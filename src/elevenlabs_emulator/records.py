"""The calls and conversations that the emulator received, for assertions, without their secrets."""

import re
from collections import Counter, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The scope's key for the query as it arrived; all other code gets the query without the signature.
RAW_QUERY = "elevenlabs_emulator.raw_query"

Key = Literal["right", "wrong", "absent"]

_KEPT = 1_000  # of each kind, so that an emulator that runs for weeks needs a bounded memory
_SIGNATURE = re.compile(r"cvtkn_\w*")


@dataclass(frozen=True, kw_only=True)
class RecordedCall:
    """One REST call. Of a parameter that is repeated, `query` keeps the last value."""

    method: str
    path: str
    query: Mapping[str, str]
    key: Key
    status: int


@dataclass(kw_only=True)
class RecordedConversation:
    """One WebSocket, filled in while it is open."""

    query: Mapping[str, str]
    signed: bool
    conversation_id: str | None = None
    initiation: object = None
    frames_received: Counter[str] = field(default_factory=Counter)
    microphone_seconds: float = 0
    close_code: int | None = None
    close_reason: str | None = None
    closed_by: Literal["client", "emulator"] | None = None


class Records:
    """The latest calls and conversations, oldest first, without API keys and signatures."""

    def __init__(self, *, api_keys: Collection[str]) -> None:
        self.api_keys = api_keys
        self.calls: deque[RecordedCall] = deque(maxlen=_KEPT)
        self.conversations: deque[RecordedConversation] = deque(maxlen=_KEPT)

    def clear(self) -> None:
        """Delete all that is recorded."""
        self.calls.clear()
        self.conversations.clear()

    def scrub_text(self, text: str) -> str:
        """Remove keys and signatures from a text."""
        for key in self.api_keys:
            text = text.replace(key, "[secret]")
        return _SIGNATURE.sub("[signature]", text)

    def scrub(self, value: object) -> Any:  # noqa: ANN401 - JSON like `value`
        """Copy JSON without keys, signatures, and the values of variables named `secret__…`."""
        if isinstance(value, str):
            return self.scrub_text(value)
        if isinstance(value, list):
            return [self.scrub(member) for member in value]
        if isinstance(value, dict):
            return {
                self.scrub_text(name): "[secret]" if name.startswith("secret__") else self.scrub(member)
                for name, member in value.items()
            }
        return value


class Recorder:
    """ASGI middleware: records the calls under `/v1/` and removes signatures from what the server will log.

    uvicorn logs `"WebSocket <path?query>" [accepted]` from the scope that it passed on. So the middleware replaces the
    query in that same dict before the WebSocket is accepted.
    """

    def __init__(self, app: ASGIApp, *, records: Records) -> None:
        self._app, self._records = app, records

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        scrub = self._records.scrub_text
        shown = [(scrub(name), scrub(value)) for name, value in pairs if name != "conversation_signature"]
        scope[RAW_QUERY], scope["query_string"] = dict(pairs), urlencode(shown).encode()
        path, method = scrub(scope["path"].removeprefix(scope.get("root_path", ""))), scope.get("method", "")
        is_call = path.startswith("/v1/") and method != "OPTIONS"  # a browser's preflight is none
        api_key = Headers(scope=scope).get("xi-api-key")
        key: Key = "absent" if api_key is None else "right" if api_key in self._records.api_keys else "wrong"

        async def record_and_send(message: Message) -> None:
            if is_call and message["type"] == "http.response.start":
                call = RecordedCall(method=method, path=path, query=dict(shown), key=key, status=message["status"])
                self._records.calls.append(call)
            await send(message)

        await self._app(scope, receive, record_and_send)
