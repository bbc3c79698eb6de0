"""Only a backend with a service token can read whose conversation it is."""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import httpx
import pytest
import respx

from tests.canaries import secrets_in
from tests.conftest import AGENT_ID, TOKEN_ISSUER, MakeToken
from tests.tables import table
from voicepass.identity.credentials import ServiceToken

TOOL = "canary-service-token-of-the-tools-1b9f3a5c"
WEBHOOKS = "canary-service-token-of-the-webhooks-77e0d2"
TOKENS = {"voicepass_service_tokens": f"{TOOL},{WEBHOOKS}"}

pytestmark = pytest.mark.anyio
with_two_tokens = pytest.mark.parametrize("api", [TOKENS], indirect=True)

WRONG: dict[str, str] = {
    "empty": "Bearer ",
    "blank": "Bearer    ",
    "only the scheme": "Bearer",
    "no scheme": TOOL,
    "another scheme": f"Basic {TOOL}",
    "a tab after the scheme": f"Bearer\t{TOOL}",
    "something else": f"Bearer {'x' * len(TOOL)}",
    "another last character": f"Bearer {TOOL[:-1]}d",
    "another first character": f"Bearer C{TOOL[1:]}",
    "another character in the middle": f"Bearer {TOOL[:20]}X{TOOL[21:]}",
    "without its last character": f"Bearer {TOOL[:-1]}",
    "without its first character": f"Bearer {TOOL[1:]}",
    "its first half": f"Bearer {TOOL[: len(TOOL) // 2]}",
    "one character": "Bearer c",
    "one character too many": f"Bearer {TOOL}c",
    "twice": f"Bearer {TOOL}{TOOL}",
    "in capitals": f"Bearer {TOOL.upper()}",
    "in quotes": f'Bearer "{TOOL}"',
    "both, as they are configured": f"Bearer {TOOL},{WEBHOOKS}",
    "both, with a space": f"Bearer {TOOL} {WEBHOOKS}",
    "a NUL and more after it": f"Bearer {TOOL}\0x",
    "scheme twice": f"Bearer Bearer {TOOL}",
    "bytes beyond ASCII": "Bearer \xff\xfe" + TOOL,
    "the null of JavaScript": "Bearer null",
}

IDS: dict[str, tuple[str, int, str]] = {
    "of another pass": ("conv_2", 404, "conversation_unknown"),
    "in capitals": ("CONV_1", 404, "conversation_unknown"),
    "cut": ("conv_", 404, "conversation_unknown"),
    "a space after it": ("conv_1 ", 404, "conversation_unknown"),
    "a NUL after it": ("conv_1\0", 422, "request_invalid"),
    "a line feed after it": ("conv_1\n", 404, "conversation_unknown"),
    "a pattern of SQL": ("conv_%", 404, "conversation_unknown"),
    "a percent sign": ("%", 404, "conversation_unknown"),
    "an asterisk": ("*", 404, "conversation_unknown"),
    "a condition of SQL": ("' OR '1'='1", 404, "conversation_unknown"),
    "a comment of SQL": ("conv_1'--", 404, "conversation_unknown"),
    "a union": ("x' UNION SELECT * FROM passes --", 404, "conversation_unknown"),
    "null": ("null", 404, "conversation_unknown"),
    "a number": ("0", 404, "conversation_unknown"),
    "fullwidth": ("\uff43onv_1", 404, "conversation_unknown"),
    "right to left": ("\u202econv_1", 404, "conversation_unknown"),
    "with a query": ("conv_1?x=1", 404, "conversation_unknown"),
    "128 characters": ("c" * 128, 404, "conversation_unknown"),
    "129 characters": ("c" * 129, 422, "request_invalid"),
    "a path upwards": ("../conversations/conv_1", 404, "not_found"),
    "a slash after it": ("conv_1/", 404, "not_found"),
    "nothing": ("", 404, "not_found"),
}


def read_refusal(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/problem+json"
    return response.status_code, response.json()["code"]


def authorize(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@with_two_tokens
@pytest.mark.parametrize("token", [TOOL, WEBHOOKS])
async def test_each_of_two_service_tokens_reads_the_conversation_of_a_pass(
    api: httpx.AsyncClient, bearer: dict[str, str], token: str
) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    voice_pass = await api.post("/v1/signed-url", headers=bearer)

    response = await api.get("/v1/conversations/conv_1", headers=authorize(token))

    assert response.status_code == 200
    issued = response.json()
    issued_at = datetime.fromisoformat(issued.pop("issued_at"))
    assert before <= issued_at <= before + timedelta(seconds=5)
    assert issued == {
        "conversation_id": "conv_1",
        "user_id": "u-1",
        "token_issuer": TOKEN_ISSUER,
        "agent": "default",
        "agent_id": AGENT_ID,
        "settled_at": None,
        "seconds": None,
        "seconds_left": None,
        "identity_mismatch": False,
        "reported_user_id": None,
        "request_id": voice_pass.headers["x-request-id"],
    }
    assert response.headers["cache-control"] == "no-store"


@with_two_tokens
@pytest.mark.parametrize("header", ["bearer {}", "BEARER {}", "Bearer   {}", "Bearer {}  "])
async def test_scheme_and_spaces_are_read_as_http_says(
    api: httpx.AsyncClient, bearer: dict[str, str], header: str
) -> None:
    await api.post("/v1/signed-url", headers=bearer)

    response = await api.get("/v1/conversations/conv_1", headers={"Authorization": header.format(TOOL)})

    assert response.status_code == 200


@with_two_tokens
@table("case", WRONG)
async def test_a_wrong_service_token_gets_the_same_refusal_for_known_and_unknown_conversations(
    api: httpx.AsyncClient, bearer: dict[str, str], case: str
) -> None:
    await api.post("/v1/signed-url", headers=bearer)
    headers = httpx.Headers({"Authorization": WRONG[case]}, encoding="latin-1")

    known = await api.get("/v1/conversations/conv_1", headers=headers)
    unknown = await api.get("/v1/conversations/conv_2", headers=headers)

    assert read_refusal(known) in {(401, "token_missing"), (401, "token_invalid")}
    assert read_refusal(known) == read_refusal(unknown)
    assert known.headers["www-authenticate"].startswith("Bearer")


@with_two_tokens
async def test_a_request_without_exactly_one_service_token_is_refused(
    api: httpx.AsyncClient, bearer: dict[str, str]
) -> None:
    await api.post("/v1/signed-url", headers=bearer)

    none = await api.get("/v1/conversations/conv_1")
    two = await api.get("/v1/conversations/conv_1", headers=[("authorization", f"Bearer {TOOL}")] * 2)
    elsewhere = await api.get("/v1/conversations/conv_1?token=" + TOOL, headers={"cookie": f"session={TOOL}"})

    assert "VOICEPASS_SERVICE_TOKENS" in none.json()["detail"]
    assert [read_refusal(response) for response in (none, two, elsewhere)] == [
        (401, "token_missing"),
        (401, "token_invalid"),
        (401, "token_missing"),
    ]


@with_two_tokens
async def test_a_users_token_is_refused_on_a_backend_route(api: httpx.AsyncClient, bearer: dict[str, str]) -> None:
    await api.post("/v1/signed-url", headers=bearer)

    response = await api.get("/v1/conversations/conv_1", headers=bearer)

    assert read_refusal(response) == (401, "token_invalid")


@with_two_tokens
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("route", ["/v1/signed-url", "/v1/conversation-token"])
async def test_a_service_token_gets_no_pass(
    api: httpx.AsyncClient, upstream: respx.MockRouter, method: str, route: str
) -> None:
    response = await api.request(method, route, headers=authorize(TOOL))

    assert read_refusal(response) == (401, "token_invalid")
    assert not upstream.calls


@with_two_tokens
@table("case", IDS)
async def test_a_conversation_that_was_not_issued_here_is_unknown(
    api: httpx.AsyncClient, bearer: dict[str, str], case: str
) -> None:
    conversation_id, status, code = IDS[case]
    await api.post("/v1/signed-url", headers=bearer)
    url = httpx.URL(f"http://voicepass.test/v1/conversations/{quote(conversation_id, safe='')}")

    response = await api.get(url, headers=authorize(TOOL))

    assert read_refusal(response) == (status, code)


@with_two_tokens
async def test_each_conversation_is_reported_with_its_own_user(
    api: httpx.AsyncClient, upstream: respx.MockRouter, make_token: MakeToken
) -> None:
    for user in ("u-1", "u-2"):
        url = f"wss://api.elevenlabs.io/c?conversation_signature=cvtkn_canary&conversation_id=conv_{user}"
        upstream["signed_url"].respond(json={"signed_url": url})
        await api.post("/v1/signed-url", headers=authorize(make_token(sub=user)))

    answers = [await api.get(f"/v1/conversations/conv_{user}", headers=authorize(TOOL)) for user in ("u-1", "u-2")]

    assert [answer.json()["user_id"] for answer in answers] == ["u-1", "u-2"]


@pytest.mark.parametrize("api", [{}], indirect=True)
@pytest.mark.parametrize("header", ["Bearer", "Bearer ", "Bearer x", f"Bearer {TOOL}", "Bearer " + "0" * 64])
async def test_without_a_configured_service_token_every_token_is_refused(
    api: httpx.AsyncClient, bearer: dict[str, str], header: str
) -> None:
    await api.post("/v1/signed-url", headers=bearer)

    response = await api.get("/v1/conversations/conv_1", headers={"Authorization": header})

    assert response.status_code == 401


@pytest.mark.parametrize(
    ("api", "name"),
    [
        ({"voicepass_service_tokens": f"crm.eu-1:{TOOL},webhooks:{WEBHOOKS}"}, "crm.eu-1"),
        (TOKENS, hashlib.sha256(TOOL.encode()).hexdigest()[:8]),
    ],
    indirect=["api"],
)
async def test_each_line_of_a_service_tokens_request_names_the_token_and_never_holds_it(
    api: httpx.AsyncClient, bearer: dict[str, str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    await api.post("/v1/signed-url", headers=bearer)
    capsys.readouterr()

    await api.get("/v1/conversations/conv_1", headers=authorize(TOOL))
    await api.get("/v1/conversations/conv_2", headers=authorize(TOOL))
    await api.post("/v1/blocks", headers=authorize(TOOL), json={"kind": "everyone"})
    await api.request("DELETE", "/v1/blocks", headers=authorize(TOOL), json={"kind": "everyone"})
    wrong = await api.get("/v1/conversations/conv_1", headers=authorize(f"{name}:{TOOL}"))

    text = capsys.readouterr().err
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["event"], line["service_token"]) for line in lines] == [
        ("conversation.read", name),
        ("request.refused", name),
        ("block.set", name),
        ("block.removed", name),
        ("request.refused", None),
    ]
    assert (lines[0]["user_id"], lines[0]["token_issuer"]) == ("u-1", TOKEN_ISSUER)
    assert wrong.status_code == 401
    assert secrets_in(text) == []
    assert TOOL not in text


@pytest.mark.parametrize(
    ("entry", "name", "token"),
    [
        ("crm:a:b", "crm", "a:b"),
        # The environment holds a byte beyond UTF-8 in this form.
        ("\udcff", hashlib.sha256(b"\xff").hexdigest()[:8], "\udcff"),
    ],
)
async def test_a_service_tokens_name_ends_at_the_first_colon_or_is_the_hash_of_a_token_without_colon(
    entry: str, name: str, token: str
) -> None:
    assert ServiceToken.parse(entry) == ServiceToken(name, token)
