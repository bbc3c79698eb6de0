"""The REST calls: signing, tokens, and their refusals."""

import base64
import json
import re

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.emulator.wire import AGENT, KEY, Serve, Service, Stage, parameters, talking
from voicepass.emulator import EmulatedAgent, Emulator, create_emulator

SIGN = "/v1/convai/conversation/get-signed-url"
TOKEN = "/v1/convai/conversation/token"
WITH_KEY = {"xi-api-key": KEY}


@pytest.mark.parametrize("path", ["get-signed-url", "get_signed_url"])
def test_both_spellings_of_the_path_mint_a_url_that_leads_back_here(service: Service, path: str) -> None:
    url = service.mint(path=path)

    assert url.startswith(service.url.replace("http", "ws", 1) + "/v1/convai/conversation?")
    assert parameters(url).keys() == {"agent_id", "conversation_signature"}
    assert re.fullmatch(r"cvtkn_[0-9a-z]{28}", parameters(url)["conversation_signature"])


def test_the_conversation_id_stands_in_the_url_and_not_in_the_answer(service: Service) -> None:
    answer = service.http.get(
        SIGN, params={"agent_id": AGENT.agent_id, "include_conversation_id": "true"}, headers=WITH_KEY
    ).json()

    assert answer.keys() == {"signed_url"}
    assert re.fullmatch(r"conv_[a-zA-Z0-9]+", parameters(answer["signed_url"])["conversation_id"])


def test_parameters_the_emulator_has_no_use_for_are_ignored(service: Service) -> None:
    assert service.mint(branch_id="b", version_id="v", environment="staging", debug_events_request="true", new="1")


@pytest.mark.parametrize("headers", [{}, {"xi-api-key": "sk_wrong"}, {"xi-api-key": "clé"}])
@pytest.mark.parametrize("path", [SIGN, TOKEN])
def test_a_missing_or_wrong_key_is_refused(service: Service, path: str, headers: dict[str, str]) -> None:
    raw = httpx.Headers([(name.encode(), value.encode()) for name, value in headers.items()])

    answer = service.http.get(path, params={"agent_id": AGENT.agent_id}, headers=raw)

    assert answer.status_code == 401
    assert answer.json() == {"detail": {"status": "invalid_api_key", "message": "Invalid API key"}}


def test_a_key_without_the_permission_is_refused_with_401_and_the_permissions_name(serve: Serve) -> None:
    service = serve(Emulator(agents=[AGENT], api_keys={"sk_reader": frozenset({"convai_read"})}))

    answer = service.http.get(SIGN, params={"agent_id": AGENT.agent_id}, headers={"xi-api-key": "sk_reader"})

    assert answer.status_code == 401
    assert answer.json()["detail"] == {
        "status": "missing_permissions",
        "message": "The API key you used is missing the permission convai_write to execute this operation.",
    }


@pytest.mark.parametrize("path", [SIGN, TOKEN])
def test_an_unknown_agent_is_not_found(service: Service, path: str) -> None:
    answer = service.http.get(path, params={"agent_id": "agent_x"}, headers=WITH_KEY)

    assert answer.status_code == 404
    assert answer.json()["detail"] == {
        "status": "document_not_found",
        "message": "Document with id agent_x not found.",
    }


def test_a_missing_agent_id_is_unprocessable_in_list_form(service: Service) -> None:
    answer = service.http.get(SIGN, headers=WITH_KEY)

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", "agent_id"]
    assert {"msg", "type"} <= answer.json()["detail"][0].keys()


def test_post_is_not_allowed(service: Service) -> None:
    answer = service.http.post(SIGN, headers=WITH_KEY)

    assert (answer.status_code, answer.json()) == (405, {"detail": "Method Not Allowed"})


def test_the_token_is_shaped_like_livekits_and_names_the_conversation(service: Service) -> None:
    answer = service.http.get(
        TOKEN, params={"agent_id": AGENT.agent_id, "participant_name": "ada"}, headers=WITH_KEY
    ).json()

    _, claims_segment, _ = answer["token"].split(".")
    claims = json.loads(base64.urlsafe_b64decode(claims_segment + "=="))
    assert claims["sub"] == "ada"
    assert claims["exp"] > claims["nbf"]
    assert re.findall(r"conv_[a-zA-Z0-9]+", claims["video"]["room"]) == [answer["conversation_id"]]


def test_a_public_agent_gives_its_token_without_a_key_but_no_signed_url(serve: Serve) -> None:
    service = serve(Emulator(agents=[EmulatedAgent(agent_id="agent_public", requires_auth=False)]))

    token = service.http.get(TOKEN, params={"agent_id": "agent_public"})
    signed_url = service.http.get(SIGN, params={"agent_id": "agent_public"})

    assert (token.status_code, signed_url.status_code) == (200, 401)


def test_mounted_under_a_prefix_the_signed_url_bears_the_prefix_and_works(stage: Stage, base_url: str) -> None:
    emulator = Emulator(agents=[AGENT])
    stage.app = Starlette(routes=[Mount("/_elevenlabs", app=create_emulator(emulator))])

    with httpx.Client(base_url=f"{base_url}/_elevenlabs") as http:
        service = Service(emulator=emulator, url=f"{base_url}/_elevenlabs", http=http)
        url = service.mint()
    with talking(url) as talk:
        greeting = talk.says()

    assert url.startswith(service.url.replace("http", "ws", 1))
    assert greeting == "Hello Ada! What would you like to sell today?"
    assert emulator.records.calls[0].path == SIGN


def test_an_explicit_base_wins_over_the_callers_address(serve: Serve) -> None:
    service = serve(Emulator(agents=[AGENT], public_ws_base="wss://shop.example/_elevenlabs/"))

    assert service.mint().startswith("wss://shop.example/_elevenlabs/v1/convai/conversation?")
