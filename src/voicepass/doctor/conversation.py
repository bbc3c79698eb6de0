"""One real conversation, opened as the official SDK opens it, watched for a moment, and closed."""

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any, Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.typing import Origin, Subprotocol

from voicepass.doctor.causes import Finding, fine, found
from voicepass.doctor.closings import of_closing
from voicepass.model import Scalar

OPEN_SECONDS: Final = 10.0
SILENT_SECONDS: Final = 8.0
"""So long an agent may be silent before it counts as one that waits for the user."""

MAX_FRAME_BYTES: Final = 1024 * 1024
_ABNORMAL: Final = 1006
_SPEECH: Final = frozenset({"agent_response", "agent_chat_response_part", "audio"})
# Not of the tree of loggers, where somebody could turn it up: at DEBUG websockets writes the URL with its secret.
_UNHEARD: Final = logging.Logger("unheard", logging.CRITICAL)  # noqa: LOG001


async def converse(
    signed_url: str,
    *,
    user_id: str,
    variables: Mapping[str, Scalar],
    overrides: Mapping[str, Scalar],
    origin: str | None,
    watch_seconds: float,
    open_seconds: float = OPEN_SECONDS,
) -> Finding:
    """Open the conversation; return whether it lasts until the agent has spoken and `watch_seconds` are over."""
    initiation = {
        "type": "conversation_initiation_client_data",
        "conversation_config_override": _nested(overrides),
        "dynamic_variables": dict(variables),
        "user_id": user_id,
    }
    try:
        async with connect(
            signed_url,
            subprotocols=[Subprotocol("convai")],
            origin=None if origin is None else Origin(origin),
            open_timeout=open_seconds,
            close_timeout=1,
            max_size=MAX_FRAME_BYTES,
            proxy=None,
            logger=_UNHEARD,
        ) as socket:
            return await _watched(socket, json.dumps(initiation), watch_seconds, open_seconds)
    except (InvalidHandshake, OSError, TimeoutError) as error:  # its text may hold the URL
        return found("no_goodbye", note=f" ({type(error).__name__})")


async def _watched(socket: ClientConnection, initiation: str, watch_seconds: float, open_seconds: float) -> Finding:
    told = ""
    try:
        await socket.send(initiation)
        async with asyncio.timeout(open_seconds):
            while (frame := _frame(await socket.recv())).get("type") != "conversation_initiation_metadata":
                told = _told(frame) or told
        begun_at, has_spoken = asyncio.get_running_loop().time(), False
        while True:
            until = begun_at + (watch_seconds if has_spoken else max(watch_seconds, SILENT_SECONDS))
            try:
                async with asyncio.timeout_at(until):
                    frame = _frame(await socket.recv())
            except TimeoutError:
                await socket.close(1000, "User ended conversation")  # as the official SDK does
                return fine("conversation")
            told = _told(frame) or told
            has_spoken = has_spoken or frame.get("type") in _SPEECH
            if frame.get("type") == "ping":
                event = frame.get("ping_event") or {}
                await socket.send(json.dumps({"type": "pong", "event_id": event.get("event_id")}))
    except ConnectionClosed as closed:
        code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (_ABNORMAL, "")
        return of_closing(code, reason or told, check="conversation")
    except TimeoutError:
        return found("no_beginning", seconds=f"{open_seconds:g}")


def _frame(message: str | bytes) -> dict[str, Any]:
    try:
        frame = json.loads(message)
    except ValueError:
        return {}
    return frame if isinstance(frame, dict) else {}


def _told(frame: Mapping[str, Any]) -> str:
    """Return what an error event says, of either shape: the close frame after it may have no reason."""
    if frame.get("type") != "error":
        return ""
    event = frame.get("error_event") or frame
    return str(event.get("reason") or event.get("message") or "")


def _nested(overrides: Mapping[str, Scalar]) -> dict[str, Any]:
    """Put overrides into the object that the JavaScript SDK sends, whose empty members override nothing."""
    config: dict[str, Any] = {"agent": {}, "tts": {}, "conversation": {}}
    for path, value in overrides.items():
        *sections, name = path.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return config
