"""The shop's own backend of three examples: it signs users in, and serves a page. `python shop.py FOLDER`."""

import os
import secrets
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from dotenv import load_dotenv
from fastapi import Cookie, FastAPI, HTTPException, Response
from fastapi.staticfiles import StaticFiles
from jose import jwt
from pydantic import BaseModel, Field

TOKEN_SECONDS = 300


class SignIn(BaseModel):
    """A real shop also checks a password, or asks an identity provider."""

    name: str = Field(min_length=1, max_length=60)


def create_shop(folder: str, *, secret: str, issuer: str, audience: str) -> FastAPI:
    """Serve the page in `folder`, and sign tokens that voicepass accepts."""
    app = FastAPI(openapi_url=None)
    sessions: dict[str, str] = {}

    def find_name(session: str) -> str:
        if session not in sessions:
            raise HTTPException(401, "sign in first")
        return sessions[session]

    @app.post("/api/sign-in")
    def sign_in(body: SignIn, response: Response) -> dict[str, str]:
        session = secrets.token_urlsafe(32)
        sessions[session] = body.name
        # Over https, add secure=True.
        response.set_cookie("session", session, httponly=True, samesite="strict")
        return {"name": body.name}

    @app.post("/api/me")
    def me(session: Annotated[str, Cookie()] = "") -> dict[str, str]:
        return {"name": find_name(session)}

    @app.post("/api/sign-out")
    def sign_out(response: Response, session: Annotated[str, Cookie()] = "") -> None:
        sessions.pop(session, None)
        response.delete_cookie("session")

    @app.post("/api/voice-token")
    def voice_token(response: Response, session: Annotated[str, Cookie()] = "") -> dict[str, str]:
        name = find_name(session)
        response.headers["Cache-Control"] = "no-store"
        claims: dict[str, Any] = {
            "sub": f"customer-{name.lower()}",
            "name": name,
            "iss": issuer,
            "aud": audience,
            "exp": int(time.time()) + TOKEN_SECONDS,
        }
        return {"token": str(jwt.encode(claims, secret, algorithm="HS256"))}

    app.mount("/", StaticFiles(directory=folder, html=True))
    return app


if __name__ == "__main__":
    load_dotenv(Path(__file__).with_name("shop.env"))  # the secret that voicepass has too
    shop = create_shop(
        sys.argv[1],
        secret=os.environ["VOICEPASS_JWT_SECRET"],
        issuer=os.environ["VOICEPASS_JWT_ISSUER"],
        audience=os.environ["VOICEPASS_JWT_AUDIENCE"],
    )
    uvicorn.run(shop, host=os.environ.get("HOST", "127.0.0.1"), port=int(os.environ.get("PORT", "3000")))
