"""The service as a part of another FastAPI app: its routes there, and the request on its way into the service."""

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated, Any, cast

from fastapi import Depends, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
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
        answer = Response()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status_code = message["status"]
                # The app's dependency may have set headers, such as a session cookie that it renewed.
                answer.raw_headers = [*message["headers"], *response.raw_headers]
            else:
                answer.body = bytes(answer.body) + message.get("body", b"")

        root_path = request.scope.get("root_path", "")
        inner = {"app_root_path": root_path, **request.scope, "root_path": root_path + path, APP_USER: app_user}
        await serve(inner, _receive_again(request), send)
        return answer

    for route in cast("list[APIRoute]", [*pass_routes.routes, *user_routes.routes]):
        # An app may make the ids of its operations from the first tag.
        options: dict[str, Any] = {"methods": route.methods, "tags": ["voicepass"], "include_in_schema": False}
        app.add_api_route(f"{path}{route.path}", serve_user, **options)


def _receive_again(request: Request) -> Receive:
    """Return a `receive` that gives the body, also if the app's dependency has read it."""
    chunks: AsyncIterator[bytes] = request.stream()

    async def receive() -> Message:
        try:
            chunk = await anext(chunks)
        except ClientDisconnect:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": chunk, "more_body": bool(chunk)}

    return receive
