"""The task and a durable row for each pass, and nothing else: no framework, no httpx, one limit, no metrics.

It leaves out everything of voicepass that is not the task: the floor of uvicorn, aiohttp and SQLite in Python.
"""

import asyncio
import base64
import gc
import hmac
import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import aiohttp
from starlette.types import Receive, Scope, Send

Query = Callable[[sqlite3.Cursor], Any]

SECRET = os.environ["JWT_SECRET"].encode()
EXPECTED = {"iss": os.environ["JWT_ISSUER"], "aud": os.environ["JWT_AUDIENCE"]}
URL = (
    f"{os.environ['UPSTREAM']}/v1/convai/conversation/get-signed-url"
    f"?agent_id={os.environ['AGENT_ID']}&include_conversation_id=true"
)
SCHEMA = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "CREATE TABLE passes (id INTEGER PRIMARY KEY, user_id TEXT, reserved_at REAL, conversation_id TEXT UNIQUE)",
    "CREATE INDEX of_user ON passes (user_id, reserved_at)",
)


class Ledger:
    """Commits together all queries that arrived during the last commit."""

    def __init__(self) -> None:
        self._connection = sqlite3.connect("bare.db", isolation_level=None, check_same_thread=False)
        for statement in SCHEMA:
            self._connection.execute(statement)
        self._thread = ThreadPoolExecutor(1)
        self._waiting: list[tuple[Query, asyncio.Future[Any]]] = []
        self._is_busy = False

    def run(self, query: Query) -> asyncio.Future[Any]:
        """Run the query in the next transaction."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, answer))
        if not self._is_busy:
            self._next()
        return answer

    def _next(self) -> None:
        batch, self._waiting = self._waiting, []
        self._is_busy = bool(batch)
        if batch:
            written = asyncio.get_running_loop().run_in_executor(self._thread, self._commit, batch)
            written.add_done_callback(lambda done: self._answer(batch, done.result()))

    def _commit(self, batch: list[tuple[Query, asyncio.Future[Any]]]) -> list[Any]:
        cursor = self._connection.cursor()
        cursor.execute("BEGIN IMMEDIATE")
        outcomes = [query(cursor) for query, _ in batch]
        cursor.execute("COMMIT")
        return outcomes

    def _answer(self, batch: list[tuple[Query, asyncio.Future[Any]]], outcomes: list[Any]) -> None:
        for (_, answer), outcome in zip(batch, outcomes, strict=True):
            answer.set_result(outcome)
        self._next()


def decode(segment: bytes) -> bytes:
    return base64.urlsafe_b64decode(segment + b"=" * (-len(segment) % 4))


def read_claims(token: bytes) -> dict[str, Any] | None:
    """Return the claims of a valid token, else None."""
    signed, _, signature = token.rpartition(b".")
    header, claims = (json.loads(decode(segment)) for segment in signed.split(b"."))
    is_good = (
        header["alg"] == "HS256"
        and hmac.compare_digest(hmac.digest(SECRET, signed, "sha256"), decode(signature))
        and claims | EXPECTED == claims
        and claims.get("exp", 0) > time.time()
        and "sub" in claims
    )
    return claims if is_good else None


class App:
    """The ASGI app. Its lifespan opens the ledger and the client."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            self.ids, self.ledger = count(), Ledger()
            self.client = aiohttp.ClientSession(
                headers={"xi-api-key": os.environ["API_KEY"]}, connector=aiohttp.TCPConnector(limit=0)
            )
            gc.freeze()
            gc.set_threshold(10_000)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self.client.close()
            await send({"type": "lifespan.shutdown.complete"})
            return
        user = read_claims(dict(scope["headers"])[b"authorization"].removeprefix(b"Bearer "))
        status, answer = (401, {}) if user is None else (200, await self.issue(user))
        body = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def issue(self, user: dict[str, Any]) -> dict[str, Any]:
        """Reserve a row, request a signed URL, store its conversation, and return the pass."""
        pass_id, user_id, now = next(self.ids), user["sub"], time.time()

        def reserve(cursor: sqlite3.Cursor) -> None:
            query = "SELECT count(*) FROM passes WHERE user_id = ? AND reserved_at > ?"
            (used,) = cursor.execute(query, (user_id, now - 86_400)).fetchone()
            assert used < 1_000_000  # noqa: PLR2004
            statement = "INSERT INTO passes (id, user_id, reserved_at) VALUES (?, ?, ?)"
            cursor.execute(statement, (pass_id, user_id, now))

        await self.ledger.run(reserve)
        async with self.client.get(URL) as response:
            url = (await response.json())["signed_url"]
        conversation_id = url.rpartition("conversation_id=")[2]
        statement = "UPDATE passes SET conversation_id = ? WHERE id = ?"
        await self.ledger.run(lambda cursor: cursor.execute(statement, (conversation_id, pass_id)).rowcount)
        sys.stderr.write(json.dumps({"event": "pass.granted", "user_id": user_id, "at": now}) + "\n")
        return {
            "signed_url": url,
            "conversation_id": conversation_id,
            "dynamic_variables": {"user_id": user_id, "user_name": user.get("name")},
        }


app = App()
