"""One real conversation, opened as the official SDK opens it, watched for a moment, and closed."""

import asyncio
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.typing import Origin, Subprotocol

from voicepass.doctor.explain import describe_close
from voicepass.doctor.findings import Case, Finding, report, report_ok
from voicepass.model import Scalar, User

USER: Final = User(issuer="", id="voicepass-doctor", name="voicepass doctor", claims={})
OPEN_SECONDS: Final = 10.0
SILENT_SECONDS: Final = 8.0
"""An agent that is silent for this long waits for the user: that is no failure."""

_ABNORMAL: Final = 1006
_SAMPLES: Final[Mapping[str | None, Scalar]] = {"number": 1, "boolean": True}
# Outside the tree of loggers, so that no configuration changes its level: at DEBUG websockets logs the secret URL.
_SILENT_LOGGER: Final = logging.Logger("silent", logging.CRITICAL)  # noqa: LOG001


async def try_conversation(case: Case, signed_url: str, *, open_seconds: float = OPEN_SECONDS) -> Finding:
    """Open the conversation, and report whether it lasts until the agent has spoken, `case.watch_seconds` at least."""
    samples = {name: _SAMPLES.get(variable.type, "doctor") for name, variable in case.rules.variables.items()}
    initiation = {
        "type": "conversation_initiation_client_data",
        "conversation_config_override": _nest(case.overrides),
        "dynamic_variables": samples | case.configuration.policy.variables_for(USER, case.agent),
        "user_id": USER.id,
    }
    try:
        async with connect(
            signed_url,
            subprotocols=[Subprotocol("convai")],
            origin=next(map(Origin, case.origins), None),
            open_timeout=open_seconds,
            close_timeout=1,
            proxy=None,
            logger=_SILENT_LOGGER,
        ) as socket:
            finding = await _watch(socket, json.dumps(initiation), case.watch_seconds, open_seconds)
    except (InvalidHandshake, OSError, TimeoutError) as error:  # its text may contain the URL
        return report("connection_broken", note=f" ({type(error).__name__})")
    if finding.cause == "request_refused" and case.agent.selection:
        return report("selection_unknown", check="conversation", agent=case.agent)
    return finding


async def _watch(socket: ClientConnection, initiation: str, watch_seconds: float, open_seconds: float) -> Finding:
    now = asyncio.get_running_loop().time
    until, error = now() + open_seconds, ""
    begun_at: float | None = None
    try:
        await socket.send(initiation)
        while True:
            frame: object = None
            async with asyncio.timeout_at(until):
                with suppress(ValueError, RecursionError):  # it is not JSON
                    frame = json.loads(await socket.recv())
            match frame:
                case {"type": "conversation_initiation_metadata"} if begun_at is None:
                    begun_at = now()
                    until = begun_at + max(watch_seconds, SILENT_SECONDS)
                case {"type": "agent_response" | "agent_chat_response_part" | "audio"} if begun_at is not None:
                    until = begun_at + watch_seconds
                case {"type": "ping", "ping_event": {"event_id": event_id}}:
                    await socket.send(json.dumps({"type": "pong", "event_id": event_id}))
                case {"type": "error", "error_event": {} as event} | {"type": "error", **event}:
                    parts = (event.get("error_type"), event.get("reason") or event.get("message"))
                    # The close frame that follows may have no reason.
                    error = " ".join(str(part) for part in parts if part) or error
    except ConnectionClosed as closed:
        code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (_ABNORMAL, "")
        return describe_close(code, reason or error, check="conversation")
    except TimeoutError:
        if begun_at is None:
            return report("conversation_not_begun", seconds=f"{open_seconds:g}")
        await socket.close(1000, "User ended conversation")  # as the official SDK does
        return report_ok("conversation")


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
