"""The service as a part of another FastAPI app: its routes there, and the request on its way into the service."""

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated, Any, cast

from fastapi import Depends, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from voicepass.api.routes import APP_USER, pass_routes, user_routes


def embed(app: FastAPI, path: str, service: ASGIApp, *, user: Callable[..., Any] | None) -> None:
    """Add the routes of `service` to `app`, below `path`. `user` is a dependency of the app."""
    serve = partial(_serve, service)
    if user is not None:
        _add_user_routes(app, path, serve, user)
    app.mount(path, serve)


async def _serve(service: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Let the service answer one request. It gets a copy of the scope, because the original belongs to the app."""
    inner = {**scope, "state": {}}
    if not inner["path"].startswith(inner["root_path"]):  # a proxy removed the prefix
        inner["path"] = inner["app_root_path"] + inner["path"]
    await service(inner, receive, send)


def _add_user_routes(app: FastAPI, path: str, serve: ASGIApp, user: Callable[..., Any]) -> None:
    async def serve_user(request: Request, response: Response, app_user: Annotated[object, Depends(user)]) -> Response:
        async def answer(scope: Scope, _receive: Receive, send: Send) -> None:
            async def send_with_headers(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"].extend(response.raw_headers)  # such as a session cookie that the app renewed
                await send(message)

            root_path = scope.get("root_path", "")
            inner = {"app_root_path": root_path, **scope, "root_path": root_path + path, APP_USER: app_user}
            await serve(inner, _receive_again(request), send_with_headers)

        return _Handover(answer)

    for route in cast("list[APIRoute]", [*pass_routes.routes, *user_routes.routes]):
        # An app may make the ids of its operations from the first tag.
        options: dict[str, Any] = {"methods": route.methods, "tags": ["voicepass"], "include_in_schema": False}
        app.add_api_route(f"{path}{route.path}", serve_user, **options)


class _Handover(Response):
    """Runs the service as a response: after the app's function-scoped dependencies have ended."""

    def __init__(self, answer: ASGIApp) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)
        if self.background is not None:  # of the app's dependency
            await self.background()


def _receive_again(request: Request) -> Receive:
    """Return a `receive` that gives the body, also if the app's dependency has read it."""
    chunks: AsyncIterator[bytes] = request.stream()

    async def receive() -> Message:
        chunk = await anext(chunks)
        return {"type": "http.request", "body": chunk, "more_body": bool(chunk)}

    return receive
