"""A shop whose customers talk to a voice agent. The page, the shop's API and voicepass run in one FastAPI app.

Put ELEVENLABS_API_KEY and ELEVENLABS_AGENT_ID into `.env` in this folder, then run `uvicorn app:app`.
"""

import secrets
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from fastapi import Cookie, FastAPI, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field

import voicepass

PAGE = Path(__file__).parent / "page"
# The browser build of @elevenlabs/client comes with voicepass. With a bundler, install the npm package instead.
SDK = str(files("voicepass.demo") / "static/vendor/elevenlabs-client")


class SignIn(BaseModel):
    """What a customer types. A real shop also checks a password."""

    name: str = Field(pattern=r"^\w{1,40}$")


app = FastAPI()
app.mount("/page", StaticFiles(directory=PAGE))
app.mount("/sdk", StaticFiles(directory=SDK))

# A real shop keeps its sessions in its database, so that they survive a restart.
sessions: dict[str, voicepass.User] = {}


def current_user(session: Annotated[str, Cookie()] = "") -> voicepass.User | None:
    """Return the signed-in customer, or None. Every route of the shop can depend on this."""
    return sessions.get(session)


voicepass.mount(app, "/voice", user=current_user)


@app.get("/", response_class=FileResponse)
def show_page() -> Path:
    """Return the shop's only page."""
    return PAGE / "index.html"


@app.post("/sign-in", status_code=204)
def sign_in(body: SignIn, request: Request, response: Response) -> None:
    """Start a session. The id must be the same each time, because voicepass counts minutes by it."""
    session = secrets.token_urlsafe(32)
    sessions[session] = voicepass.User(id=f"customer-{body.name.lower()}", name=body.name)
    response.set_cookie("session", session, httponly=True, samesite="lax", secure=request.url.scheme == "https")


@app.post("/sign-out", status_code=204)
def sign_out(response: Response, session: Annotated[str, Cookie()] = "") -> None:
    """End the session."""
    sessions.pop(session, None)
    response.delete_cookie("session")
