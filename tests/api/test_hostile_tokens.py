"""Hostile tokens over HTTP: each gets a 401 or a 431, causes no request to ElevenLabs and adds no row to the ledger."""

import json
import sqlite3
import time
from collections.abc import AsyncIterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx

from tests.canaries import JWT_SECRET
from tests.conftest import AUDIENCE, TOKEN_ISSUER, MakeToken, serving, signed_url
from tests.identity.hostile_tokens import Mint, make_hostile_tokens, make_valid_tokens, signer_for
from tests.tables import table

pytestmark = pytest.mark.anyio

WYCHEPROOF = json.loads((Path(__file__).parents[1] / "vectors" / "wycheproof_voicepass.json").read_text())["vectors"]
SERVICES: dict[str, Mapping[str, object]] = {
    "HS256": {},
    "RS256": {
        "voicepass_jwt_algorithm": "RS256",
        "voicepass_jwt_secret": None,
        "voicepass_jwt_public_key": signer_for("RS256").published,
    },
    "EdDSA": {
        "voicepass_jwt_algorithm": "EdDSA",
        "voicepass_jwt_secret": None,
        "voicepass_jwt_public_key": signer_for("EdDSA").published,
    },
}
both_kinds_of_key = pytest.mark.parametrize("algorithm", ["HS256", pytest.param("RS256", marks=pytest.mark.long)])


@pytest.fixture
async def service(algorithm: str, upstream: respx.MockRouter, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A service whose ledger is a file, so that a test can read it. Each pass gets a new conversation id."""
    numbers = count()
    upstream["signed_url"].side_effect = lambda _: httpx.Response(
        200, json={"signed_url": signed_url(conversation_id=f"conv_{next(numbers)}")}
    )
    overrides: dict[str, Any] = {**SERVICES[algorithm], "voicepass_database_url": f"sqlite:///{tmp_path}/ledger.db"}
    async with serving(**overrides) as client:
        yield client


def make_mint(algorithm: str) -> Mint:
    signer = signer_for(algorithm, secret=JWT_SECRET)
    return Mint(signer=signer, token_issuer=TOKEN_ISSUER, audience=AUDIENCE, now=time.time())


def count_rows(tmp_path: Path) -> int:
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        (rows,) = connection.execute("SELECT count(*) FROM passes").fetchone()
    connection.close()
    return int(rows)


async def get_refusal(service: httpx.AsyncClient, token: str) -> tuple[int, str]:
    headers = httpx.Headers({"Authorization": f"Bearer {token}"}, encoding="utf-8")
    response = await service.post("/v1/signed-url", headers=headers)
    assert response.headers["content-type"] == "application/problem+json", token
    assert response.json()["request_id"] == response.headers["x-request-id"]
    return response.status_code, response.json()["code"]


@both_kinds_of_key
async def test_every_hostile_token_gets_its_own_refusal_and_no_pass(
    service: httpx.AsyncClient, upstream: respx.MockRouter, tmp_path: Path, algorithm: str
) -> None:
    hostile = [token for token in make_hostile_tokens(make_mint(algorithm)) if token.fits_a_header]
    # These come first: on a slow machine they become valid during the test.
    hostile.sort(key=lambda token: "too early" not in token.name)

    answers = {each.name: await get_refusal(service, each.token) for each in hostile}

    expected = {each.name: (each.expected.status, each.expected.code) for each in hostile}
    # HTTP removes spaces, so a token of spaces alone is a missing token.
    expected |= {each.name: (401, "token_missing") for each in hostile if not each.token.strip(" ")}
    assert {name: answer for name, answer in answers.items() if answer != expected[name]} == {}
    assert {status for status, _ in answers.values()} == {401, 431}
    assert len(answers) > 680
    assert not upstream.calls
    assert count_rows(tmp_path) == 0


@pytest.mark.parametrize("algorithm", SERVICES)
async def test_every_valid_token_of_the_same_mint_gets_a_pass(
    service: httpx.AsyncClient, upstream: respx.MockRouter, tmp_path: Path, algorithm: str
) -> None:
    good = make_valid_tokens(make_mint(algorithm))

    responses = {
        name: await service.post("/v1/signed-url", headers={"Authorization": f"Bearer {token}"})
        for name, token in good.items()
    }

    assert {name: r.status_code for name, r in responses.items()} == dict.fromkeys(good, 200)
    assert {r.json()["user_id"] for r in responses.values()} == {"u-1"}
    assert len(upstream.calls) == count_rows(tmp_path) == len(good)


@both_kinds_of_key
async def test_no_wycheproof_token_is_accepted(
    service: httpx.AsyncClient, upstream: respx.MockRouter, tmp_path: Path, algorithm: str
) -> None:
    del algorithm

    answers = [await get_refusal(service, vector["token"]) for vector in WYCHEPROOF]

    assert len(answers) == 426
    assert set(answers) <= {(401, "token_invalid"), (401, "token_missing"), (431, "headers_too_large")}
    assert not upstream.calls
    assert count_rows(tmp_path) == 0


SHAPES: dict[str, tuple[str, int]] = {
    "as the RFC spells it": ("Bearer {}", 200),
    "scheme in small letters": ("bearer {}", 200),
    "scheme in capitals": ("BEARER {}", 200),
    "two spaces": ("Bearer  {}", 200),
    "a space after it": ("Bearer {} ", 200),
    "no scheme": ("{}", 401),
    "a space before the scheme, unstripped": (" Bearer {}", 401),
    "no space": ("Bearer{}", 401),
    "a tab": ("Bearer\t{}", 401),
    "a tab after a space": ("Bearer \t{}", 401),
    "a colon": ("Bearer: {}", 401),
    "an equals sign": ("Bearer={}", 401),
    "a parameter": ("Bearer token={}", 401),
    "in quotes": ('Bearer "{}"', 401),
    "another scheme": ("Token {}", 401),
    "basic": ("Basic {}", 401),
    "a proof of possession": ("DPoP {}", 401),
    "scheme twice": ("Bearer Bearer {}", 401),
    "two in a list": ("Bearer {}, Bearer {}", 401),
    "two tokens in a list": ("Bearer {},{}", 401),
    "a list with another scheme": ("Basic dTpw, Bearer {}", 401),
    "two tokens": ("Bearer {} {}", 401),
    "a comma after it": ("Bearer {},", 401),
    "a semicolon after it": ("Bearer {};", 401),
    "a line feed after it": ("Bearer {}\n", 401),
    "a NUL after it": ("Bearer {}\0", 401),
    "a no-break space after it": ("Bearer {}\xa0", 401),
    "no token": ("Bearer", 401),
    "a blank token": ("Bearer   ", 401),
    "nothing": ("", 401),
    "JavaScript's undefined": ("Bearer undefined", 401),
}


@table("case", SHAPES)
async def test_only_a_bearer_header_with_one_token_is_accepted(
    api: httpx.AsyncClient, upstream: respx.MockRouter, make_token: MakeToken, case: str
) -> None:
    upstream.reset()
    shape, status = SHAPES[case]
    headers = httpx.Headers({"Authorization": shape.replace("{}", make_token())}, encoding="latin-1")

    response = await api.post("/v1/signed-url", headers=headers)

    assert response.status_code == status
    assert len(upstream.calls) == (status == 200)


@table(
    "name",
    [
        *("Proxy-Authorization", "X-Authorization", "X-Forwarded-Authorization", "Authentication", "Authorization_"),
        *("X-Access-Token", "X-Auth-Token", "X-Api-Key", "xi-api-key", "Sec-WebSocket-Protocol", "Cookie"),
    ],
)
async def test_a_token_in_any_other_header_is_ignored(
    api: httpx.AsyncClient, upstream: respx.MockRouter, make_token: MakeToken, name: str
) -> None:
    response = await api.post("/v1/signed-url", headers={name: f"Bearer {make_token()}"})

    assert (response.status_code, response.json()["code"]) == (401, "token_missing")
    assert not upstream.calls


async def test_a_token_in_the_url_gets_no_pass(
    api: httpx.AsyncClient, upstream: respx.MockRouter, make_token: MakeToken
) -> None:
    query = {"access_token": make_token(), "token": make_token(), "authorization": f"Bearer {make_token()}"}

    posted = await api.post("/v1/signed-url", params=query)
    got = await api.get("/v1/signed-url", params=query)

    assert (posted.status_code, posted.json()["code"]) == (401, "token_missing")
    assert (got.status_code, got.json()["code"]) == (422, "request_invalid")
    assert not upstream.calls


async def test_only_the_token_names_the_user(api: httpx.AsyncClient, bearer: dict[str, str]) -> None:
    names = [
        "X-User",
        "X-User-Id",
        "X-Forwarded-User",
        "X-Forwarded-Email",
        "X-Auth-Request-User",
        "Remote-User",
        "From",
    ]

    response = await api.post("/v1/signed-url", headers=bearer | dict.fromkeys(names, "admin"))

    assert response.status_code == 200
    assert response.json()["user_id"] == "u-1"
    assert response.json()["dynamic_variables"] == {"user_id": "u-1", "user_name": "Ada"}
