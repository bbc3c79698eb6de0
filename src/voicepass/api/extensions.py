"""The routes of extensions: more minutes for one user. They are next to the blocks, and on the same port."""

from dataclasses import asdict
from functools import partial
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from voicepass.api.routes import FOR_BACKENDS, describe_backend
from voicepass.ledger.extensions import MAX_MINUTES, Extension, extend, list_extensions, revoke
from voicepass.telemetry.logger import Logger

_log = Logger("voicepass.api")


class ExtendedUser(BaseModel):
    """Whose extension it is: that of a user with this id, of every issuer or of one."""

    model_config = ConfigDict(extra="forbid")

    user_id: str = Field(pattern="^[^\\x00]{1,255}$", examples=["u-1"])
    token_issuer: str = Field("", pattern="^[^\\x00]{0,255}$", description="Empty for every issuer.")


class UserExtension(ExtendedUser):
    """More minutes for one user: they are added to each of the user's limits of minutes."""

    minutes: Annotated[int, Field(strict=True, ge=1, le=MAX_MINUTES, examples=[30])]
    ends_at: AwareDatetime = Field(description="Within ten years.", examples=["2026-12-31T23:59:59Z"])


class Extended(BaseModel):
    """The extension is set."""

    is_known_user: bool = Field(description="Whether this user has ever got a pass. If not, check the id.")


class Extensions(BaseModel):
    """All extensions that have not ended, the next to end first."""

    extensions: list[UserExtension]


extension_routes = APIRouter(**FOR_BACKENDS)


@extension_routes.post("/extensions", summary="Give one user more minutes")
async def post_extension(request: Request, body: UserExtension) -> Extended:
    """Add minutes to each of the user's limits of minutes, in place of an earlier extension of this user."""
    extension = Extension(**body.model_dump() | {"ends_at": body.ends_at.timestamp()})
    is_known_user = await request.app.state.ledger.run(partial(extend, extension=extension))
    _log.warning("extension.set", **body.model_dump(mode="json"), **describe_backend(request))
    return Extended(is_known_user=is_known_user)


@extension_routes.get("/extensions", summary="All extensions that have not ended")
async def get_extensions(request: Request) -> Extensions:
    """Return the next to end first."""
    extensions = await request.app.state.ledger.run(list_extensions)
    return Extensions(extensions=[UserExtension.model_validate(asdict(extension)) for extension in extensions])


@extension_routes.delete("/extensions", summary="End the extension of one user", status_code=HTTPStatus.NO_CONTENT)
async def delete_extension(request: Request, body: ExtendedUser) -> None:
    """End it at once, on every instance. A user without an extension is no error."""
    await request.app.state.ledger.run(partial(revoke, user_id=body.user_id, token_issuer=body.token_issuer))
    _log.warning("extension.removed", **body.model_dump(), **describe_backend(request))
