"""One real conversation, opened as the official SDK opens it, watched for a moment, and closed."""

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any, Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.typing import Origin, Subprotocol

from voicepass.doctor.explain import describe_close
from voicepass.doctor.findings import Finding, report, report_ok
from voicepass.model import Scalar

OPEN_SECONDS: Final = 10.0
SILENT_SECONDS: Final = 8.0
"""An agent that is silent for this long waits for the user: that is no failure."""

MAX_FRAME_BYTES: Final = 1024 * 1024
_ABNORMAL: Final = 1006
_SPEECH: Final = frozenset({"agent_response", "agent_chat_response_part", "audio"})
# Outside the tree of loggers, so that no configuration changes its level: at DEBUG websockets logs the secret URL.
_SILENT_LOGGER: Final = logging.Logger("silent", logging.CRITICAL)  # noqa: LOG001


async def try_conversation(
    signed_url: str,
    *,
    user_id: str,
    variables: Mapping[str, Scalar],
    overrides: Mapping[str, Scalar],
    origin: str | None,
    watch_seconds: float,
    open_seconds: float = OPEN_SECONDS,
) -> Finding:
    """Open the conversation, and report whether it lasts until the agent has spoken, `watch_seconds` at least."""
    initiation = {
        "type": "conversation_initiation_client_data",
        "conversation_config_override": _nest(overrides),
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
            logger=_SILENT_LOGGER,
        ) as socket:
            return await _watch(socket, json.dumps(initiation), watch_seconds, open_seconds)
    except (InvalidHandshake, OSError, TimeoutError) as error:  # its text may contain the URL
        return report("connection_broken", note=f" ({type(error).__name__})")


async def _watch(socket: ClientConnection, initiation: str, watch_seconds: float, open_seconds: float) -> Finding:
    error = ""
    try:
        await socket.send(initiation)
        async with asyncio.timeout(open_seconds):
            while (frame := _parse(await socket.recv())).get("type") != "conversation_initiation_metadata":
                error = _read_error(frame) or error
        begun_at, has_spoken = asyncio.get_running_loop().time(), False
        while True:
            until = begun_at + (watch_seconds if has_spoken else max(watch_seconds, SILENT_SECONDS))
            try:
                async with asyncio.timeout_at(until):
                    frame = _parse(await socket.recv())
            except TimeoutError:
                await socket.close(1000, "User ended conversation")  # as the official SDK does
                return report_ok("conversation")
            error = _read_error(frame) or error
            has_spoken = has_spoken or frame.get("type") in _SPEECH
            if frame.get("type") == "ping":
                event_id = _read_event(frame, "ping_event").get("event_id")
                await socket.send(json.dumps({"type": "pong", "event_id": event_id}))
    except ConnectionClosed as closed:
        code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (_ABNORMAL, "")
        return describe_close(code, reason or error, check="conversation")
    except TimeoutError:
        return report("conversation_not_begun", seconds=f"{open_seconds:g}")


def _parse(message: str | bytes) -> dict[str, Any]:
    try:
        frame = json.loads(message)
    except (ValueError, RecursionError):
        return {}
    return frame if isinstance(frame, dict) else {}


def _read_event(frame: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    event = frame.get(name)
    return event if isinstance(event, dict) else {}


def _read_error(frame: Mapping[str, Any]) -> str:
    """Return the text of an error event, of either shape: the close frame after it may have no reason."""
    if frame.get("type") != "error":
        return ""
    event = _read_event(frame, "error_event") or frame
    parts = (event.get("error_type"), event.get("reason") or event.get("message"))
    return " ".join(str(part) for part in parts if part)


def _nest(overrides: Mapping[str, Scalar]) -> dict[str, Any]:
    """Put overrides into the object that the JavaScript SDK sends: its empty members override nothing."""
    config: dict[str, Any] = {"agent": {}, "tts": {}, "conversation": {}}
    for path, value in overrides.items():
        *sections, name = path.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return config
