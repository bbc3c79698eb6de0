"""The session cookie: voicepass accepts it from our own pages only, never in a request that another site can cause."""

from typing import Any

import httpx
import pytest
import respx

from tests.conftest import MakeToken
from tests.logs import capture_logs
from tests.tables import table

OURS = "https://app.example"
HOST = "https://voicepass.test"
JSON = {"content-type": "application/json"}
ON = {"voicepass_session_cookie": "session", "voicepass_allowed_origins": OURS}

pytestmark = pytest.mark.anyio
with_the_cookie = pytest.mark.parametrize("api", [ON], indirect=True)

FOREIGN: dict[str, dict[str, str]] = {
    "neither Origin nor Sec-Fetch-Site": {},
    "another site": {"origin": "https://evil.example"},
    "the null origin": {"origin": "null"},
    "an empty origin": {"origin": ""},
    "ours as the beginning of a host": {"origin": f"{OURS}.evil.example"},
    "ours as the end of a host": {"origin": "https://evil-app.example"},
    "a subdomain": {"origin": "https://www.app.example"},
    "the parent domain": {"origin": "https://example"},
    "ours in capitals": {"origin": OURS.upper()},
    "ours at another port": {"origin": f"{OURS}:8443"},
    "ours with its port spelled out": {"origin": f"{OURS}:443"},
    "ours over http": {"origin": "http://app.example"},
    "ours with a slash": {"origin": f"{OURS}/"},
    "ours with a dot": {"origin": f"{OURS}."},
    "ours as user info": {"origin": f"{OURS}@evil.example"},
    "ours with user info": {"origin": "https://evil@app.example"},
    "ours among others": {"origin": f"{OURS} https://evil.example"},
    "ours in a list": {"origin": f"{OURS},https://evil.example"},
    "every origin": {"origin": "*"},
    "our own host without Sec-Fetch-Site": {"origin": HOST},
    "cross-site": {"sec-fetch-site": "cross-site"},
    "same-site": {"sec-fetch-site": "same-site"},
    "none, as from the address bar": {"sec-fetch-site": "none"},
    "same-origin in capitals": {"sec-fetch-site": "Same-Origin"},
    "same-origin among others": {"sec-fetch-site": "same-origin, cross-site"},
    "cross-site from our own host": {"sec-fetch-site": "cross-site", "origin": HOST},
    "same-site from our own host": {"sec-fetch-site": "same-site", "origin": HOST},
    "same-origin from another site": {"sec-fetch-site": "same-origin", "origin": "https://evil.example"},
    "same-origin from the null origin": {"sec-fetch-site": "same-origin", "origin": "null"},
    "same-origin, our host over http": {"sec-fetch-site": "same-origin", "origin": "http://voicepass.test"},
    "same-origin with an empty Origin and Host": {"sec-fetch-site": "same-origin", "origin": "", "host": ""},
    "same-origin, our host at another port": {"sec-fetch-site": "same-origin", "origin": f"{HOST}:8080"},
    "same-origin, our host as a beginning": {"sec-fetch-site": "same-origin", "origin": f"{HOST}.evil.example"},
    "same-origin, our host with user info": {"sec-fetch-site": "same-origin", "origin": "https://u@voicepass.test"},
    "same-origin, our host with a path": {"sec-fetch-site": "same-origin", "origin": f"{HOST}/evil"},
    "same-origin, our host in an extension": {
        "sec-fetch-site": "same-origin",
        "origin": "chrome-extension://voicepass.test",
    },
    "same-origin, half an IPv6 address": {"sec-fetch-site": "same-origin", "origin": "https://[::1"},
    "same-origin, brackets around a name": {"sec-fetch-site": "same-origin", "origin": "https://[voicepass.test]"},
}

NOT_JSON: dict[str, dict[str, Any]] = {
    "text": {"content": b"{}", "headers": {"content-type": "text/plain"}},
    "text with JSON as a parameter": {"content": b"{}", "headers": {"content-type": "text/plain;application/json"}},
    "text with a charset": {"content": b"{}", "headers": {"content-type": "text/plain; charset=utf-8"}},
    "JSON under another name": {"content": b"{}", "headers": {"content-type": "text/json"}},
    "a format based on JSON": {"content": b"{}", "headers": {"content-type": "application/problem+json"}},
    "almost JSON": {"content": b"{}", "headers": {"content-type": "application/json5"}},
    "two types": {"content": b"{}", "headers": {"content-type": "application/json, text/plain"}},
    "a form": {"data": {"agent": "default"}},
    "a form of several parts": {"files": {"agent": b"default"}},
    "a form whose text is JSON": {"content": b'{"agent":"default"}=', "headers": {"content-type": "text/plain"}},
    "bytes without a type": {"content": b"{}"},
    "an empty type": {"content": b"{}", "headers": {"content-type": ""}},
    "no body and no type": {},
    "no body, text": {"headers": {"content-type": "text/plain"}},
    "no body, a form": {"headers": {"content-type": "application/x-www-form-urlencoded"}},
}

OWN: dict[str, dict[str, str]] = {
    "a listed origin": {"origin": OURS},
    "a listed origin on another site": {"origin": OURS, "sec-fetch-site": "cross-site"},
    "our own host on loopback": {"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}
    | {"host": "localhost:8000"},
    "our own host": {"origin": HOST, "sec-fetch-site": "same-origin"},
    "our own host without an Origin": {"sec-fetch-site": "same-origin"},
    "our own host at a port": {"origin": "https://voicepass.test:8000", "sec-fetch-site": "same-origin"}
    | {"host": "voicepass.test:8000"},
    "a charset": {"origin": OURS, "content-type": "application/json; charset=utf-8"},
    "a type in capitals": {"origin": OURS, "content-type": "Application/JSON"},
}


@pytest.fixture
def cookie(make_token: MakeToken) -> dict[str, str]:
    return {"cookie": f"theme=dark; session={make_token()}; lang=en"}


def read_refusal(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/problem+json"
    assert "set-cookie" not in response.headers
    return response.status_code, response.json()["code"]


@with_the_cookie
@table("case", FOREIGN)
async def test_a_cookie_from_a_foreign_page_is_refused(
    api: httpx.AsyncClient, upstream: respx.MockRouter, cookie: dict[str, str], case: str
) -> None:
    response = await api.post("/v1/signed-url", content=b"{}", headers=cookie | JSON | FOREIGN[case])

    assert read_refusal(response) == (403, "origin_not_allowed")
    assert not upstream.calls


@with_the_cookie
@table("case", NOT_JSON)
async def test_a_cookie_without_json_is_refused_because_any_site_can_send_a_form(
    api: httpx.AsyncClient, upstream: respx.MockRouter, cookie: dict[str, str], case: str
) -> None:
    headers = cookie | {"origin": OURS} | NOT_JSON[case].get("headers", {})

    response = await api.post("/v1/signed-url", **(NOT_JSON[case] | {"headers": headers}))

    assert read_refusal(response) == (415, "unsupported_media_type")
    assert not upstream.calls


@with_the_cookie
@table("case", OWN)
async def test_a_cookie_from_our_own_page_gets_a_pass(
    api: httpx.AsyncClient, cookie: dict[str, str], case: str
) -> None:
    response = await api.post("/v1/signed-url", content=b"{}", headers=cookie | JSON | OWN[case])

    assert response.status_code == 200
    assert response.json()["user_id"] == "u-1"
    assert "set-cookie" not in response.headers


@with_the_cookie
@pytest.mark.parametrize("route", ["/v1/signed-url", "/v1/conversation-token"])
@pytest.mark.parametrize("headers", [{"origin": OURS}, {"sec-fetch-site": "same-origin"}, {}])
async def test_a_get_with_a_cookie_never_gets_a_pass(
    api: httpx.AsyncClient, upstream: respx.MockRouter, cookie: dict[str, str], route: str, headers: dict[str, str]
) -> None:
    response = await api.get(route, headers=cookie | JSON | headers)

    assert read_refusal(response) == (401, "token_missing")
    assert not upstream.calls


@with_the_cookie
async def test_the_route_of_conversation_tokens_checks_the_cookie_in_the_same_way(
    api: httpx.AsyncClient, upstream: respx.MockRouter, cookie: dict[str, str]
) -> None:
    foreign = await api.post("/v1/conversation-token", json={}, headers=cookie | {"origin": "https://evil.example"})
    form = await api.post("/v1/conversation-token", data={"agent": "default"}, headers=cookie | {"origin": OURS})

    assert read_refusal(foreign) == (403, "origin_not_allowed")
    assert read_refusal(form) == (415, "unsupported_media_type")
    assert not upstream.calls


SERVED = (200, "u-1")
INVALID = (401, "token_invalid")
CONFLICT = (400, "credentials_conflict")
SPLIT = "session.0={0}; session.1={1}; session.2={2}"
COOKIES: dict[str, tuple[list[str], tuple[int, str]]] = {
    "one": (["session={token}"], SERVED),
    "the same one twice": (["session={token}; session={token}"], SERVED),
    "two of one user": (["session={token}; session={same_user}"], SERVED),
    "two of one user, in two headers": (["session={token}", "session={same_user}"], SERVED),
    "a good one after a bad one": (["session=x.y.z; session={token}"], SERVED),
    "a good one before a bad one": (["session={token}; session=x.y.z"], SERVED),
    "a good one beside an expired one": (["session={expired}; session={token}"], SERVED),
    "a good one beside an empty one": (["session=; session={token}"], SERVED),
    "two users": (["session={token}; session={other_user}"], CONFLICT),
    "two users, in two headers": (["session={other_user}", "session={token}"], CONFLICT),
    "two bad ones": (["session=x.y.z; session=a.b.c"], INVALID),
    "an expired one before a bad one": (["session={expired}; session=x.y.z"], (401, "token_expired")),
    "eight, one of them good": (["; ".join(f"session=x.y.{n}" for n in range(7)) + "; session={token}"], SERVED),
    "nine, one of them good": (["; ".join(f"session=x.y.{n}" for n in range(8)) + "; session={token}"], INVALID),
    "parts": ([SPLIT], SERVED),
    "parts in another order": (["session.2={2}; session.0={0}; session.1={1}"], SERVED),
    "parts in two headers": (["session.1={1}; session.2={2}", "session.0={0}"], SERVED),
    "one part": (["session.0={token}"], SERVED),
    "parts twice": ([f"{SPLIT}; {SPLIT}"], SERVED),
    "parts of two users": ([SPLIT, "session.0={other_0}; session.1={other_1}; session.2={other_2}"], CONFLICT),
    "parts beside a whole one of one user": (["session={same_user}; " + SPLIT], SERVED),
    "parts beside a whole one of another user": (["session={other_user}; " + SPLIT], CONFLICT),
    "a stray part beside a whole one": (["session={token}; session.4=x"], SERVED),
    "cookies whose names only begin in the same way": (["session={token}; session.theme=dark; session.=x"], SERVED),
    "the first part missing": (["session.1={1}; session.2={2}"], INVALID),
    "a part missing": (["session.0={0}; session.2={2}"], INVALID),
    "the last part missing": (["session.0={0}; session.1={1}"], INVALID),
    "a part empty": (["session.0={0}; session.1=; session.2={2}"], INVALID),
    "one part twice": ([SPLIT + "; session.1={1}"], INVALID),
    "a part after a gap": ([SPLIT + "; session.4=x"], INVALID),
    "parts with leading zeros": (["session.00={0}; session.01={1}; session.02={2}"], INVALID),
    "parts beyond the longest token": (
        ["session.0=" + "a" * 5000 + "; session.1=" + "a" * 5000],
        (431, "headers_too_large"),
    ),
}


@with_the_cookie
async def test_a_cookie_may_come_in_parts_or_twice_if_all_name_one_user(
    api: httpx.AsyncClient, make_token: MakeToken
) -> None:
    other = make_token(sub="u-2")
    texts = {"token": make_token(), "same_user": make_token(name="Eve"), "other_user": other}
    texts |= {"expired": make_token(exp=1_700_000_000)}
    texts |= {f"other_{n}": other[n * 80 :][: 80 if n < 2 else None] for n in range(3)}
    parts = [texts["token"][:80], texts["token"][80:160], texts["token"][160:]]
    seen, conflicts = {}, set()
    for name, (cookies, expected) in COOKIES.items():
        headers = [("cookie", cookie.format(*parts, **texts)) for cookie in cookies]
        response = await api.post(
            "/v1/signed-url", content=b"{}", headers=[*headers, *(JSON | {"origin": OURS}).items()]
        )
        answer = response.json()
        seen[name] = (response.status_code, answer.get("user_id") or answer.get("code"))
        if expected == CONFLICT:
            conflicts.add(answer["detail"])

    assert seen == {name: expected for name, (_, expected) in COOKIES.items()}
    assert conflicts == {"Two session cookies name different users. Sign out and sign in again."}


@with_the_cookie
@table("cookie", ["", "theme=dark", "session=", "Session=x.y.z", "session.=x.y.z"])
async def test_if_the_cookie_is_missing_the_refusal_names_it(api: httpx.AsyncClient, cookie: str) -> None:
    response = await api.post("/v1/signed-url", json={}, headers={"origin": OURS, "cookie": cookie})

    assert read_refusal(response) == (401, "token_missing")
    assert "the cookie 'session'" in response.json()["detail"]


@with_the_cookie
@table(
    ("value", "expected"),
    [
        ("session=", (401, "token_missing")),
        ("Session=x.y.z", (401, "token_missing")),
        ("xsession=x.y.z; session2=x.y.z", (401, "token_missing")),
        ("session", (401, "token_missing")),
        ("session=nonsense", (401, "token_invalid")),
        ("session=x.y.z=", (401, "token_invalid")),
        ("session=[" + "[" * 1500, (401, "token_invalid")),
        ("session=" + "a" * 8193, (431, "headers_too_large")),
    ],
)
async def test_a_cookie_that_holds_no_good_token_is_refused(
    api: httpx.AsyncClient, upstream: respx.MockRouter, value: str, expected: tuple[int, str]
) -> None:
    response = await api.post("/v1/signed-url", headers=JSON | {"origin": OURS, "cookie": value})

    assert read_refusal(response) == expected
    assert not upstream.calls


@with_the_cookie
async def test_an_expired_cookie_has_its_own_code(
    api: httpx.AsyncClient, upstream: respx.MockRouter, make_token: MakeToken
) -> None:
    cookie = {"cookie": f"session={make_token(exp=1_700_000_000)}"}

    response = await api.post("/v1/signed-url", json={}, headers=cookie | {"origin": OURS})

    assert read_refusal(response) == (401, "token_expired")
    assert not upstream.calls


@with_the_cookie
@pytest.mark.parametrize("claims", [{"sub": "u-2"}, {"sub": "U-1"}, {"sub": "u-1\u200d"}])
async def test_a_header_and_a_cookie_of_different_users_are_a_conflict(
    api: httpx.AsyncClient,
    upstream: respx.MockRouter,
    make_token: MakeToken,
    bearer: dict[str, str],
    claims: dict[str, str],
) -> None:
    cookie = {"cookie": f"session={make_token(**claims)}"}

    response = await api.post("/v1/signed-url", json={}, headers=bearer | cookie)

    assert read_refusal(response) == (400, "credentials_conflict")
    assert not upstream.calls


@with_the_cookie
@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"exp": 4_000_000_000},
        {"name": "Eve"},
    ],
)
async def test_a_header_and_a_cookie_of_one_user_are_accepted_and_the_header_is_used(
    api: httpx.AsyncClient, make_token: MakeToken, bearer: dict[str, str], claims: dict[str, object]
) -> None:
    cookie = {"cookie": f"session={make_token(**claims)}"}

    response = await api.post("/v1/signed-url", json={}, headers=bearer | cookie)

    assert response.status_code == 200
    assert response.json()["dynamic_variables"] == {"user_id": "u-1", "user_name": "Ada"}


@pytest.mark.parametrize("api", [{"voicepass_allowed_origins": OURS}], indirect=True)
async def test_a_cookie_is_ignored_unless_a_setting_names_it(
    api: httpx.AsyncClient, upstream: respx.MockRouter, cookie: dict[str, str]
) -> None:
    response = await api.post("/v1/signed-url", json={}, headers=cookie | {"origin": OURS})

    assert read_refusal(response) == (401, "token_missing")
    assert not upstream.calls


@with_the_cookie
async def test_if_a_proxy_may_have_rewritten_host_the_log_tells_the_operator_to_list_the_origin(
    api: httpx.AsyncClient, cookie: dict[str, str]
) -> None:
    rewritten = {"origin": "https://public.example", "host": "127.0.0.1:8000", "sec-fetch-site": "same-origin"}

    with capture_logs() as logged:
        response = await api.post("/v1/signed-url", content=b"{}", headers=cookie | JSON | rewritten)

    (note,) = [line["note"] for line in logged if line.get("code") == "origin_not_allowed"]
    assert response.status_code == 403
    assert "rewrites the Host header" in note
    assert "VOICEPASS_ALLOWED_ORIGINS" in note
