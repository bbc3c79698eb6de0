"""Which routes answer on which port, if operators have a port of their own (`serve --admin-port`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from voicepass.api.extensions import extension_routes
from voicepass.api.routes import block_routes, metrics_routes, probe_routes
from voicepass.errors import NotFound

admin_routes: Final[Sequence[BaseRoute]] = (*block_routes.routes, *extension_routes.routes, *metrics_routes.routes)
"""What end users never call: `serve --admin-port` gives these routes a port of their own."""
_ON_ADMIN_PORT: Final = (*admin_routes, *probe_routes.routes)


@dataclass(eq=False)
class AdminPort:
    """Plain ASGI: serves the admin routes on the admin port only. Besides them, that port serves only the probes.

    The port is the one of the connection's own socket, which no header changes. If it is unknown, the request is
    treated as public.
    """

    app: ASGIApp
    port: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises NotFound, as for a path that does not exist."""
        if scope["type"] == "http":
            is_admin = (scope.get("server") or (None, None))[1] == self.port
            is_served = _matches_any(_ON_ADMIN_PORT, scope) if is_admin else not _matches_any(admin_routes, scope)
            if not is_served:
                raise NotFound
        await self.app(scope, receive, send)


def _matches_any(routes: Sequence[BaseRoute], scope: Scope) -> bool:
    # The router's own test, because it also accepts "/metrics\n".
    return any(route.matches(scope)[0] is not Match.NONE for route in routes)
