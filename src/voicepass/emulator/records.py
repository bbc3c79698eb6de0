"""What the emulator was asked, for assertions; and the one place that knows what must never be kept or logged."""

import math
import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Where the middleware leaves the query as it arrived; everyone else sees it without the signature.
RAW_QUERY = "voicepass.emulator.raw_query"

_KEPT = 1_000  # of each kind; a forgotten emulator must not eat the machine
_SECRET_PARAMETERS = frozenset({"conversation_signature", "token"})
_SIGNATURE = re.compile(r"cvtkn_\w*")

KeySeen = Literal["right", "wrong", "absent"]


@dataclass(frozen=True, kw_only=True)
class RecordedCall:
    """One REST call. Of the headers only the names are kept; secrets in the query are left out."""

    method: str
    path: str
    query: Mapping[str, str]
    header_names: tuple[str, ...]
    key: KeySeen
    status: int


@dataclass(kw_only=True)
class RecordedConversation:
    """One WebSocket, filled in while it is open: the only value here that grows, because a log does."""

    agent_id: str
    signed: bool
    source: str | None
    version: str | None
    origin: str | None
    subprotocols: tuple[str, ...]
    conversation_id: str | None = None
    initiation: object = None
    frames_received: Counter[str] = field(default_factory=Counter)
    microphone_seconds: float = 0
    close_code: int | None = None
    close_reason: str | None = None
    closed_by: Literal["client", "emulator"] | None = None

    def closed(self, code: int, reason: str, *, by: Literal["client", "emulator"]) -> None:
        """Note the end; the first end stands."""
        if self.close_code is None:
            self.close_code, self.close_reason, self.closed_by = code, reason, by


class Records:
    """The latest calls and conversations, oldest first."""

    def __init__(self) -> None:
        self.calls: deque[RecordedCall] = deque(maxlen=_KEPT)
        self.conversations: deque[RecordedConversation] = deque(maxlen=_KEPT)

    def clear(self) -> None:
        """Forget everything so far."""
        self.calls.clear()
        self.conversations.clear()


def scrubbed(value: object, *, secrets: Collection[str], depth: int = 10) -> object:
    """Copy JSON without signatures, without the given secrets and without values named `secret__…`.

    What no JSON encoder would take again (infinities, lone surrogates, bottomless nesting) is made harmless.
    """
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "[secret]")
        return _SIGNATURE.sub("[signature]", value).encode(errors="replace").decode()
    if isinstance(value, dict | list) and depth == 0:
        return "[too deep]"
    if isinstance(value, dict):
        return {
            scrubbed(name, secrets=secrets): "[secret]"
            if name.startswith("secret__")
            else scrubbed(member, secrets=secrets, depth=depth - 1)
            for name, member in value.items()
        }
    if isinstance(value, list):
        return [scrubbed(member, secrets=secrets, depth=depth - 1) for member in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Recorder:
    """ASGI middleware: records the calls under `/v1/` and takes signatures out of what the server will log.

    uvicorn logs `"WebSocket <path?query>" [accepted]` from the very scope it handed us. So the query is taken from the
    scope before anything is accepted and put back without the signature, in that same dict.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        records: Records,
        key_seen: Callable[[str | None], KeySeen],
        secrets: Collection[str],
    ) -> None:
        self._app, self._records, self._key_seen, self._secrets = app, records, key_seen, secrets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        shown = {
            str(scrubbed(name, secrets=self._secrets)): str(scrubbed(value, secrets=self._secrets))
            for name, value in query
            if name not in _SECRET_PARAMETERS
        }
        scope[RAW_QUERY] = dict(query)
        scope["query_string"] = urlencode(shown).encode()
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        if scope["type"] == "websocket" or not path.startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._records.calls.append(
                    RecordedCall(
                        method=scope["method"],
                        path=str(scrubbed(path, secrets=self._secrets)),
                        query=shown,
                        header_names=tuple(sorted(headers.keys())),
                        key=self._key_seen(headers.get("xi-api-key")),
                        status=message["status"],
                    )
                )
            await send(message)

        await self._app(scope, receive, noting)
