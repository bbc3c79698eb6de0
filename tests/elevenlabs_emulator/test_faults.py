"""Faults that a test orders, by the constructor or by the control routes."""

from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from elevenlabs_emulator import EmulatedAgent, Emulator, Fault, create_emulator
from tests.elevenlabs_emulator.wire import AGENT, SIGN, TOKEN, Serve, Service, open_conversation, parameters
from tests.tables import table


def _put(service: Service, **fault: object) -> None:
    assert service.http.put("/_emulator/faults", json=fault).status_code == 204


def test_a_fault_lasts_for_its_number_of_calls_or_until_it_is_cleared(service: Service) -> None:
    _put(service, status=503, times=2)
    counted = [service.ask().status_code for _ in range(3)]
    _put(service, status=500)
    uncounted = [service.ask().status_code for _ in range(3)]
    service.http.delete("/_emulator/faults")

    assert (counted, uncounted) == ([503, 503, 200], [500, 500, 500])
    assert service.ask().status_code == 200


def test_each_target_has_its_own_fault(service: Service) -> None:
    _put(service, target="token", status=429, retry_after_seconds=7)

    token = service.ask(TOKEN)

    assert (token.status_code, token.headers["retry-after"]) == (429, "7")
    assert service.ask().status_code == 200


def test_an_error_has_the_live_or_the_legacy_form_with_any_code_and_status(serve: Serve) -> None:
    service = serve(Emulator(agents=[AGENT], faults=[Fault(status=429)]))
    live = service.ask().json()["detail"]
    _put(service, status=401, code="unauthorized", vendor_status="missing_permissions", message="No.")
    both = service.ask().json()["detail"]
    _put(service, status=429, code="system_busy", envelope="legacy")
    legacy = service.ask().json()["detail"]

    assert live.keys() == {"type", "code", "message", "status", "request_id"}
    assert (live["type"], live["code"], live["status"]) == ("rate_limit_error", "rate_limit_exceeded", live["code"])
    assert (both["code"], both["status"], both["message"]) == ("unauthorized", "missing_permissions", "No.")
    assert legacy == {"status": "system_busy", "message": "The emulator was told to fail."}


def test_each_broken_body_has_the_mistake_that_its_name_says(service: Service) -> None:
    def ask_for_broken(body: str) -> httpx.Response:
        _put(service, body=body)
        answer = service.ask(include_conversation_id="true")
        assert answer.status_code == 200
        return answer

    def read_broken_url(body: str) -> Any:
        return ask_for_broken(body).json()["signed_url"]

    assert ask_for_broken("html200").headers["content-type"].startswith("text/html")
    for body in ("not_json", "truncated"):
        with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
            ask_for_broken(body).json()
    assert ask_for_broken("no_credential").json() == {}
    assert isinstance(read_broken_url("wrong_type"), list)
    assert len(ask_for_broken("oversized").content) > 10 * 1024 * 1024
    assert read_broken_url("foreign_host").startswith("wss://api.elevenlabs.io.attacker.invalid/v1/")
    assert read_broken_url("http_scheme").startswith("http://127.0.0.1")
    assert parameters(read_broken_url("other_agent"))["agent_id"] == "agent_other"
    assert "conversation_id" not in parameters(read_broken_url("missing_conversation_id"))


def test_a_client_that_follows_a_redirect_is_recorded_twice(service: Service) -> None:
    _put(service, body="redirect", times=1)

    redirect = service.ask()
    service.http.send(redirect.next_request or redirect.request)

    assert [(call.path, call.status, call.key) for call in service.emulator.records.calls] == [
        (SIGN, 307, "right"),
        (SIGN, 200, "right"),
    ]


@pytest.mark.parametrize("fault", [{"body": "slow_trickle"}, {"latency_seconds": 1}])
def test_a_slow_answer_takes_longer_than_the_callers_timeout(service: Service, fault: dict[str, object]) -> None:
    _put(service, **fault)
    service.http.timeout = httpx.Timeout(0.1)

    with pytest.raises(httpx.ReadTimeout):
        service.ask()


@table(
    "fault",
    [
        {"body": "nonsense"},
        {"status": 200},
        {"status": 500, "body": "html200"},
        {"times": 0},
        {"surprise": True},
        {"closing": "internal_error"},
        {"target": "conversation", "closing": "nonsense"},
        {"target": "signed_url", "delivery": "lost"},
        {"target": "webhook", "delivery": "eaten"},
        {"target": "webhook", "status": 500},
        {"target": "list", "body": "foreign_host"},
        {"target": "token", "body": "foreign_host"},
        {"target": "conversation"},
        {"target": "conversation", "closing": "internal_error", "status": 500},
    ],
)
def test_a_wrong_fault_is_refused_and_the_existing_keys_are_listed(service: Service, fault: dict[str, object]) -> None:
    refusal = service.http.put("/_emulator/faults", json=fault)

    assert refusal.status_code == 422
    assert refusal.json()["keys"].keys() == Fault.model_fields.keys()
    assert "internal_error" in str(refusal.json()["keys"]["closing"])


def test_every_control_is_listed_and_its_example_works(service: Service) -> None:
    listed = service.http.get("/_emulator").json()["controls"]

    answers = [
        service.http.request(*control["call"].split(" "), json=control.get("example")).status_code for control in listed
    ]
    existing = {
        f"{method} {route.path}"
        for route in create_emulator(service.emulator).routes
        if isinstance(route, APIRoute) and route.path.startswith("/_emulator/")
        for method in route.methods or ()
    }
    assert {control["call"] for control in listed} == existing
    assert set(answers) == {200, 204}


def test_an_agent_can_be_added_by_http(service: Service) -> None:
    agent = {"agent_id": "agent_new", "requires_auth": False, "first_message": "Welcome!"}

    put = service.http.put("/_emulator/agents", json=agent)
    with open_conversation(service.public_url("agent_new")) as talk:
        greeting = talk.read_answer()
    misspelt = service.http.put("/_emulator/agents", json=agent | {"requires_atuh": True})

    assert (put.status_code, misspelt.status_code) == (204, 422)
    assert misspelt.json()["keys"].keys() == EmulatedAgent.model_fields.keys()
    assert greeting == "Welcome!"


def test_the_clock_can_be_advanced_until_a_url_expires_but_never_set_back(service: Service) -> None:
    url = service.mint()

    advanced = service.http.post("/_emulator/clock", json={"advance_seconds": 901})
    back = service.http.post("/_emulator/clock", json={"advance_seconds": -901})
    with open_conversation(url) as talk:
        refusal = talk.read_close()

    assert (advanced.status_code, back.status_code) == (200, 422)
    assert refusal == (3000, "Could not authorize the conversation.")
