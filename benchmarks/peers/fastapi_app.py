"""FastAPI as tutorials show it: with one httpx client for each request, or with one for all requests."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from jose import JWTError, jwt

User = dict[str, Any]

REQUIRED = {f"require_{claim}": True for claim in ("iss", "aud", "exp", "sub")}


async def current_user(bearer: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> User:
    """Return the claims of a valid token."""
    try:
        return jwt.decode(
            bearer.credentials,
            os.environ["JWT_SECRET"],
            algorithms=["HS256"],
            issuer=os.environ["JWT_ISSUER"],
            audience=os.environ["JWT_AUDIENCE"],
            options=REQUIRED,
        )
    except JWTError:
        raise HTTPException(status_code=401, detail="sign in") from None


async def answer_for(user: User, client: httpx.AsyncClient) -> dict[str, Any]:
    """Ask the upstream, and answer with its signed URL and the user's variables."""
    response = await client.get(
        f"{os.environ['UPSTREAM']}/v1/convai/conversation/get-signed-url",
        params={"agent_id": os.environ["AGENT_ID"], "include_conversation_id": "true"},
        headers={"xi-api-key": os.environ["API_KEY"]},
    )
    if response.status_code != httpx.codes.OK:
        raise HTTPException(status_code=502, detail="no signed URL")
    return {
        "signed_url": response.json()["signed_url"],
        "dynamic_variables": {"user_id": user["sub"], "user_name": user.get("name")},
    }


per_request = FastAPI()


@per_request.post("/v1/signed-url")
async def signed_url_by_own_client(user: Annotated[User, Depends(current_user)]) -> dict[str, Any]:
    """Answer with a client for this request only."""
    async with httpx.AsyncClient() as client:
        return await answer_for(user, client)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with httpx.AsyncClient() as client:
        app.state.client = client
        yield


shared = FastAPI(lifespan=_lifespan)


@shared.post("/v1/signed-url")
async def signed_url_by_shared_client(request: Request, user: Annotated[User, Depends(current_user)]) -> dict[str, Any]:
    """Answer with the client that all requests share."""
    return await answer_for(user, request.app.state.client)
