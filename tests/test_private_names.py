"""Each undocumented name of another package that voicepass uses still exists."""

import importlib
import inspect
from typing import Any, Generic

from tests.tables import table

USED: dict[tuple[str, str], list[str]] = {
    ("uvicorn.config", ""): ["STARTUP_FAILURE"],
    ("uvicorn.supervisors", ""): ["Multiprocess"],
    ("uvicorn.protocols.http.httptools_impl", "HttpToolsProtocol"): [
        *("transport", "loop", "server_state", "cycle", "pipeline", "parser", "url", "headers"),
        *("_unset_keepalive_if_required", "_should_upgrade", "handle_websocket_upgrade"),
        *("on_message_begin", "on_header", "on_headers_complete", "on_body", "on_message_complete"),
    ],
    ("uvicorn.protocols.http.httptools_impl", "RequestResponseCycle"): [
        *("more_body", "response_started", "response_complete", "keep_alive", "disconnected"),
    ],
    ("uvicorn.protocols.websockets.websockets_sansio_impl", "WebSocketsSansIOProtocol"): ["handshake_initiated"],
    ("starlette.middleware.cors", "CORSMiddleware"): ["preflight_response", "is_allowed_origin"],
    ("fastapi.routing", "APIRoute"): ["app"],
    ("aiohttp", "TCPConnector"): ["_get", "_release"],
    ("aiohttp.connector", "Connection"): ["protocol", "close"],
    ("aiohttp.client_proto", "ResponseHandler"): ["should_close", "abort"],
    ("aiohttp.client_reqrep", ""): ["ConnectionKey"],
}


@table(("module", "owner"), USED)
def test_each_undocumented_name_that_voicepass_uses_exists(module: str, owner: str) -> None:
    place: Any = importlib.import_module(module)
    sources = []
    if owner:
        place = getattr(place, owner)
        written_in_c = (object, Generic)  # the second since Python 3.12
        sources = [inspect.getsource(parent) for parent in inspect.getmro(place) if parent not in written_in_c]

    missing = [
        name
        for name in USED[module, owner]
        if not hasattr(place, name) and not any(f"self.{name}" in source for source in sources)
    ]

    assert missing == [], (
        f"{module}.{owner} has no {', '.join(missing)} any more: read its new version, change what uses these names in "
        "src/voicepass, and then the bounds in pyproject.toml"
    )
