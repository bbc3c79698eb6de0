"""The REST calls: signing, tokens, and their refusals."""

import re

import httpx
import pytest
from jose import jwt
from starlette.applications import Starlette
from starlette.routing import Mount

from elevenlabs_emulator import EmulatedAgent, Emulator, create_emulator
from tests.elevenlabs_emulator.wire import AGENT, KEY, SIGN, TOKEN, Serve, Service, open_conversation, parameters
from tests.servers import running

# Members of bodies of the live service, as users have quoted them.
QUOTED = {
    "a permission is missing": {
        "type": "authentication_error",
        "code": "unauthorized",
        "message": "The API key you used is missing the permission convai_write to execute this operation.",
        "status": "missing_permissions",
    },
    "no key": {
        "status": "needs_authorization",
        "message": "Neither authorization header nor xi-api-key received, please provide one.",
    },
    "a wrong key": {"status": "invalid_api_key", "message": "Invalid API key"},
    "an unknown agent": {"status": "document_not_found", "message": "Document with id agent_x not found."},
    "an unknown conversation": {"code": "conversation_not_found", "status": "conversation_history_not_found"},
}


@pytest.mark.parametrize("path", [SIGN, SIGN.replace("-", "_")])
def test_both_spellings_of_the_path_return_a_url_of_the_emulator(service: Service, path: str) -> None:
    url = service.ask(path).json()["signed_url"]

    assert url.startswith(service.url.replace("http", "ws", 1) + "/v1/convai/conversation?")
    assert parameters(url).keys() == {"agent_id", "conversation_signature"}
    assert re.fullmatch(r"cvtkn_[0-9a-z]{28}", parameters(url)["conversation_signature"])


def test_the_conversation_id_is_in_the_url_and_not_a_member_of_the_answer(service: Service) -> None:
    answer = service.ask(include_conversation_id="true").json()

    assert answer.keys() == {"signed_url"}
    assert re.fullmatch(r"conv_[a-zA-Z0-9]+", parameters(answer["signed_url"])["conversation_id"])


@pytest.mark.parametrize("path", [SIGN, TOKEN])
def test_a_missing_or_wrong_key_is_refused(service: Service, path: str) -> None:
    wrong = service.ask(path, key="sk_wrong")
    missing = service.http.get(path, params={"agent_id": AGENT.agent_id})

    for answer, quoted in ((wrong, QUOTED["a wrong key"]), (missing, QUOTED["no key"])):
        assert answer.status_code == 401
        assert answer.json()["detail"].items() >= quoted.items()


def test_each_error_that_users_have_quoted_has_its_live_form(serve: Serve) -> None:
    keys = {KEY: frozenset({"convai_read"}), "sk_writer": frozenset({"convai_write"})}
    service = serve(Emulator(agents=[AGENT], api_keys=keys))

    permission = service.ask()
    conversation = service.http.get("/v1/convai/conversations/conv_x", headers={"xi-api-key": KEY})
    agent = service.http.get("/v1/convai/agents/agent_x", headers={"xi-api-key": KEY})
    query = service.http.get(SIGN, headers={"xi-api-key": "sk_writer"})
    method = service.http.post(SIGN)

    assert [each.status_code for each in (permission, conversation, agent, query, method)] == [401, 404, 404, 422, 405]
    assert permission.json()["detail"].items() >= QUOTED["a permission is missing"].items()
    assert conversation.json()["detail"].items() >= QUOTED["an unknown conversation"].items()
    assert agent.json()["detail"].items() >= QUOTED["an unknown agent"].items()
    (mistake,) = query.json()["detail"]
    assert (mistake["loc"], mistake["type"]) == (["query", "agent_id"], "missing")
    assert method.json() == {"detail": "Method Not Allowed"}


def test_a_call_that_the_emulator_does_not_have_gets_an_explanation(service: Service) -> None:
    for method, path in (("GET", "/v1/voices"), ("POST", "/v1/convai/conversations/conv_x/files")):
        answer = service.http.request(method, path)

        assert answer.status_code == 501
        assert answer.json()["detail"]["message"].startswith(f"The emulator does not have {method} {path}.")


def test_pages_of_any_origin_may_call_the_emulator(service: Service) -> None:
    asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "GET"}
    preflight = service.http.options(TOKEN, headers=asked | {"Access-Control-Request-Headers": "xi-api-key"})
    call = service.http.get(TOKEN, headers={"Origin": "https://shop.example"})

    assert (preflight.status_code, preflight.headers["access-control-allow-headers"]) == (200, "xi-api-key")
    for answer in (preflight, call):
        assert answer.headers["access-control-allow-origin"] == "*"
    assert [call.method for call in service.emulator.records.calls] == ["GET"]


@pytest.mark.parametrize("path", [SIGN, TOKEN])
def test_an_unknown_agent_is_not_found(service: Service, path: str) -> None:
    answer = service.ask(path, agent_id="agent_x")

    assert answer.status_code == 404
    assert answer.json()["detail"]["message"] == "Document with id agent_x not found."


def test_the_token_has_the_claims_of_livekit_and_names_the_conversation(service: Service) -> None:
    answer = service.ask(TOKEN, participant_name="ada").json()

    claims = jwt.get_unverified_claims(answer["token"])
    assert claims["sub"] == "ada"
    assert claims["exp"] > claims["nbf"]
    assert re.findall(r"conv_[a-zA-Z0-9]+", claims["video"]["room"]) == [answer["conversation_id"]]


def test_a_public_agent_gives_its_token_without_a_key_but_no_signed_url(serve: Serve) -> None:
    service = serve(Emulator(agents=[EmulatedAgent(agent_id="agent_public", requires_auth=False)]))

    token = service.http.get(TOKEN, params={"agent_id": "agent_public"})
    signed_url = service.http.get(SIGN, params={"agent_id": "agent_public"})

    assert (token.status_code, signed_url.status_code) == (200, 401)


def test_mounted_under_a_prefix_the_signed_url_has_the_prefix_and_works() -> None:
    emulator = Emulator(agents=[AGENT])
    app = Starlette(routes=[Mount("/_elevenlabs", app=create_emulator(emulator))])

    with running(lambda _url: app) as url, httpx.Client(base_url=f"{url}/_elevenlabs", trust_env=False) as http:
        signed_url = Service(emulator=emulator, url=url, http=http).mint()
        with open_conversation(signed_url) as talk:
            greeting = talk.read_answer()

    assert signed_url.startswith(url.replace("http", "ws", 1) + "/_elevenlabs/v1/convai/conversation?")
    assert greeting == "Hello Ada! What would you like to sell today?"
    assert emulator.records.calls[0].path == SIGN


def test_an_explicit_base_url_replaces_the_address_that_the_caller_used(serve: Serve) -> None:
    service = serve(Emulator(agents=[AGENT], public_ws_base="wss://shop.example/_elevenlabs/"))

    assert service.mint().startswith("wss://shop.example/_elevenlabs/v1/convai/conversation?")
