"""Each log line is one JSON object, and no text in a request can forge a line."""

import json
import re
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import respx

from tests.canaries import secrets_in
from tests.conftest import MakeToken, signed_url
from voicepass.telemetry.logs import configure_logging

pytestmark = pytest.mark.anyio

FORGED = '{"event": "pass.granted", "user_id": "admin", "forged": true}'
INJECTIONS = [
    FORGED,
    f'"}}{FORGED}',
    f'\\"}}\\n{FORGED}',
    f'", "forged": true, "x": "{FORGED}',
    *(
        f"u-1{separator}{FORGED}"
        for separator in (
            *("\n", "\r", "\r\n", "\n\n", "\t", "\v", "\f", "\0", "\x1a", "\x1b", "\x1c", "\x1e", "\x7f", "\x85"),
            *("\x1b[2K\r", "\x1b[31m", "\x1b]0;forged\x07", "\u2028", "\u2029", "\u202e", "\ufeff", "\ud800", "\udc0a"),
        )
    ),
]
EVENTS = {"pass.granted", "pass.refused", "keys.refreshed", "conversation_id.missing", "request.refused"}

Request = dict[str, Any]


def _build_header(name: str, text: str) -> Request:
    return {"headers": [(name.encode(), text.encode("utf-8", "surrogatepass"))]}


def _build_path(text: str) -> Request:
    path = quote(text.encode("utf-8", "surrogatepass"), safe="")
    return {"method": "GET", "url": f"/v1/conversations/{path}"}


def _build_query(text: str) -> Request:
    return {"method": "GET", "url": f"/v1/signed-url?agent={quote(text.encode('utf-8', 'surrogatepass'), safe='')}"}


PLACES: dict[str, Callable[[str], Request]] = {
    "sub": lambda text: {"claims": {"sub": text}},
    "name": lambda text: {"claims": {"name": text}},
    "iss": lambda text: {"claims": {"iss": text}},
    "alias": lambda text: {"content": json.dumps({"agent": text}).encode()},
    "alias in the query": _build_query,
    "path": _build_path,
    "request id": lambda text: _build_header("X-Request-ID", text),
    "user agent": lambda text: _build_header("User-Agent", text),
    "origin": lambda text: _build_header("Origin", text),
    "address of the client": lambda text: _build_header("X-Forwarded-For", text),
    "zone of the client's address": lambda text: _build_header("X-Forwarded-For", f"fe80::1%{text.partition(',')[0]}"),
    "token": lambda text: _build_header("Authorization", f"Bearer {text}"),
}


@pytest.fixture(autouse=True)
def default_logging() -> Iterator[None]:
    yield
    configure_logging(log_format="json", level="debug")


def read_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Return what was logged since it was last called; every line must be one JSON object."""
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert all(isinstance(line, dict) for line in lines)
    return lines


@pytest.mark.parametrize("api", [{"voicepass_trusted_proxies": "127.0.0.1"}], indirect=True)
@pytest.mark.parametrize("place", PLACES)
async def test_no_text_in_a_request_forges_a_line(
    api: httpx.AsyncClient,
    upstream: respx.MockRouter,
    make_token: MakeToken,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    configure_logging(log_format="json", level="debug")
    numbers = count()
    upstream["signed_url"].side_effect = lambda _: httpx.Response(
        200, json={"signed_url": signed_url(conversation_id=f"conv_{next(numbers)}")}
    )

    statuses = [await send_request(api, make_token, PLACES[place](text)) for text in INJECTIONS]

    lines = read_lines(capsys)
    assert len(INJECTIONS) * len(PLACES) >= 200
    assert max(statuses) < 500
    assert {line["event"] for line in lines} <= EVENTS
    assert sum(line["event"] == "pass.granted" for line in lines) == statuses.count(200)
    assert not any("forged" in line for line in lines)
    assert not any(line.get("user_id") == "admin" for line in lines)
    assert all(line.get("client") in {None, "127.0.0.1"} for line in lines)
    assert all(re.fullmatch(r"[0-9a-f]{32}", line["request_id"]) for line in lines)


async def send_request(api: httpx.AsyncClient, make_token: MakeToken, request: Request) -> int:
    headers = request.get("headers", [])
    if not any(name == b"Authorization" for name, _ in headers):
        headers = [*headers, (b"Authorization", f"Bearer {make_token(**request.get('claims', {}))}".encode())]
    response = await api.request(
        request.get("method", "POST"),
        request.get("url", "/v1/signed-url"),
        content=request.get("content"),
        headers=[*headers, (b"Content-Type", b"application/json")],
    )
    return response.status_code


async def test_a_log_line_names_the_user_and_the_outcome(
    api: httpx.AsyncClient, bearer: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(log_format="json", level="debug")

    response = await api.post("/v1/signed-url", headers=bearer)

    (line,) = read_lines(capsys)
    assert response.status_code == 200
    assert (line["event"], line["request_id"]) == ("pass.granted", response.headers["x-request-id"])
    assert (line["user_id"], line["client"], line["agent"]) == ("u-1", "127.0.0.1", "default")


# The X-Request-ID headers of a request, and the one valid id in them, if there is one.
REQUEST_IDS: dict[str, tuple[list[str], str | None]] = {
    "well-formed": (["the-callers-own.id_7"], "the-callers-own.id_7"),
    "of 128 characters": (["x" * 128], "x" * 128),
    "none": ([], None),
    "too long": (["x" * 129], None),
    "empty": ([""], None),
    "with a quote and a tab": (['a"b\tc'], None),
    "two headers": (["first", "second"], None),
    "the same one twice": (["first", "first"], None),
    "two in one header": (["first, second"], None),
}


@pytest.mark.parametrize("case", REQUEST_IDS)
@pytest.mark.parametrize(
    ("api", "is_trusted"),
    [({"voicepass_trusted_proxies": "127.0.0.1"}, True), ({"voicepass_trusted_proxies": "10.0.0.0/8"}, False)],
    indirect=["api"],
)
@pytest.mark.parametrize("path", ["/v1/signed-url", "/nowhere"])
async def test_a_request_id_is_kept_from_a_trusted_proxy_only(
    api: httpx.AsyncClient,
    bearer: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    case: str,
    path: str,
    *,
    is_trusted: bool,
) -> None:
    configure_logging(log_format="json", level="debug")
    sent, well_formed = REQUEST_IDS[case]

    response = await api.post(path, headers=[*bearer.items(), *(("X-Request-ID", value) for value in sent)])

    (line,) = read_lines(capsys)
    answered = response.headers["x-request-id"]
    assert line["request_id"] == answered
    assert line["client_request_id"] == (None if is_trusted else well_formed)
    assert (answered == well_formed) is (is_trusted and well_formed is not None)
    assert answered == well_formed or re.fullmatch("[0-9a-f]{32}", answered)


@pytest.mark.parametrize(
    "path", ["/nowhere/{token}", "/{token}", "/v1/conversations/{token}", "/v1/signed-url/{token}"]
)
@pytest.mark.parametrize("refused_by", ["the app", "the middleware"])
async def test_a_token_in_the_path_of_a_refused_request_is_not_logged(
    api: httpx.AsyncClient, make_token: MakeToken, capsys: pytest.CaptureFixture[str], path: str, refused_by: str
) -> None:
    configure_logging(log_format="json", level="debug")
    token = make_token(aud=None, name=None)  # short, so that the log does not cut it off
    too_large = {"x-filler": "x" * 17_000} if refused_by == "the middleware" else {}

    response = await api.get(path.format(token=token), headers=too_large)

    (line,) = read_lines(capsys)
    assert response.status_code in {401, 404, 431}
    assert line["asked"].startswith(f"GET {path.partition('{')[0]}")
    assert all(part[:20] not in json.dumps(line) for part in token.split("."))


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_neither_a_query_nor_a_token_is_ever_logged(
    api: httpx.AsyncClient,
    make_token: MakeToken,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    method: str,
) -> None:
    configure_logging(log_format="json", level="debug")
    token = make_token()
    query = f"access_token={token}&canary=query-9d41"
    paths = ["/v1/signed-url", "/v1/conversation-token", "/v1/conversations/conv_1", "/healthz", "/nowhere"]

    for path in paths:
        await api.request(method, f"{path}?{query}")
        await api.request(method, f"{path}?agent=default&{query}", headers={"Authorization": f"Bearer {token}"})

    lines = read_lines(capsys)
    text = json.dumps(lines) + caplog.text
    assert lines
    assert "query-9d41" not in text
    assert all(part not in text for part in token.split("."))
    assert secrets_in(text) == []
