"""Trouble on demand, by constructor and by the control routes."""

import json
import time
from typing import Any, get_args

import httpx
import pytest

from tests.emulator.wire import AGENT, KEY, Serve, Service, parameters, talking
from voicepass.emulator import EmulatedAgent, Emulator, Fault
from voicepass.emulator.faults import BrokenBody

SIGN = "/v1/convai/conversation/get-signed-url"
TOKEN = "/v1/convai/conversation/token"
BROKEN_BODIES = [name for name in get_args(BrokenBody) if name != "slow_trickle"]


def _ask(service: Service, path: str = SIGN, **query: str) -> httpx.Response:
    return service.http.get(path, params={"agent_id": AGENT.agent_id, **query}, headers={"xi-api-key": KEY})


def _put(service: Service, **fault: object) -> None:
    assert service.http.put("/_emulator/faults", json=fault).status_code == 204


def test_a_fault_lasts_for_its_calls_and_no_longer(service: Service) -> None:
    _put(service, status=503, times=2)

    assert [_ask(service).status_code for _ in range(3)] == [503, 503, 200]


def test_a_fault_without_a_number_lasts_until_cleared(service: Service) -> None:
    _put(service, status=500)

    before = [_ask(service).status_code for _ in range(3)]
    service.http.delete("/_emulator/faults")

    assert before == [500, 500, 500]
    assert _ask(service).status_code == 200


def test_each_target_has_its_own_fault(service: Service) -> None:
    _put(service, target="token", status=429, retry_after_seconds=7)

    token = _ask(service, TOKEN)

    assert (token.status_code, token.headers["retry-after"]) == (429, "7")
    assert _ask(service).status_code == 200


def test_faults_can_be_in_force_from_the_start(serve: Serve) -> None:
    service = serve(Emulator(agents=[AGENT], faults=[Fault(status=402, code="quota_exceeded")]))

    assert _ask(service).json()["detail"]["status"] == "quota_exceeded"


def test_the_envelopes_are_the_old_the_new_a_bare_string_and_a_page(service: Service) -> None:
    bodies = {}
    for envelope in ("legacy", "new", "string", "html"):
        _put(service, status=429, envelope=envelope, code="system_busy")
        bodies[envelope] = _ask(service).text

    assert json.loads(bodies["legacy"])["detail"].keys() == {"status", "message"}
    new = json.loads(bodies["new"])["detail"]
    assert (new["type"], new["code"], new["status"]) == ("rate_limit_error", "system_busy", "system_busy")
    assert isinstance(json.loads(bodies["string"])["detail"], str)
    assert bodies["html"].startswith("<!doctype html>")


def _signed_url(answer: httpx.Response) -> Any:
    return answer.json()["signed_url"]


def test_broken_bodies_are_broken_in_the_way_they_are_named(service: Service) -> None:
    answers = {}
    for body in BROKEN_BODIES:
        _put(service, body=body)
        answers[body] = _ask(service, include_conversation_id="true")

    assert {answer.status_code for name, answer in answers.items() if name != "redirect"} == {200}
    assert answers["html200"].headers["content-type"].startswith("text/html")
    for name in ("not_json", "truncated"):
        with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
            answers[name].json()
    assert answers["no_credential"].json() == {}
    assert isinstance(_signed_url(answers["wrong_type"]), list)
    assert len(answers["oversized"].content) > 10 * 1024 * 1024
    assert _signed_url(answers["foreign_host"]).startswith("wss://api.elevenlabs.io.attacker.invalid/v1/")
    assert _signed_url(answers["http_scheme"]).startswith("http://127.0.0.1")
    assert parameters(_signed_url(answers["other_agent"]))["agent_id"] == "agent_other"
    assert "conversation_id" not in parameters(_signed_url(answers["missing_conversation_id"]))
    assert answers["redirect"].status_code == 307


@pytest.mark.parametrize("spelling", ["get-signed-url", "get_signed_url"])
def test_who_follows_a_redirect_is_seen_doing_it(service: Service, spelling: str) -> None:
    _put(service, body="redirect", times=1)

    service.http.get(
        f"/v1/convai/conversation/{spelling}",
        params={"agent_id": AGENT.agent_id},
        headers={"xi-api-key": KEY},
        follow_redirects=True,
    )

    seen = [(call.path.rpartition("/")[2], call.status, call.key) for call in service.emulator.records.calls]
    other = {"get-signed-url", "get_signed_url"} - {spelling}
    assert seen == [(spelling, 307, "right"), (other.pop(), 200, "right")]


def test_a_token_can_be_broken_too(service: Service) -> None:
    _put(service, target="token", body="wrong_type")

    assert isinstance(_ask(service, TOKEN).json()["token"], list)


def test_a_trickle_gives_one_byte_and_lets_the_caller_hang(service: Service) -> None:
    _put(service, body="slow_trickle", trickle_seconds=60)

    with service.http.stream("GET", SIGN, params={"agent_id": AGENT.agent_id}, headers={"xi-api-key": KEY}) as answer:
        first = next(answer.iter_bytes())

    assert first == b"{"


def test_latency_holds_the_answer_back_and_a_caller_who_leaves_frees_it(service: Service) -> None:
    _put(service, latency_seconds=0.05, times=1)
    started = time.monotonic()
    held_back = _ask(service)
    elapsed = time.monotonic() - started

    _put(service, latency_seconds=300, times=1)
    with pytest.raises(httpx.ReadTimeout):
        service.http.get(SIGN, params={"agent_id": AGENT.agent_id}, headers={"xi-api-key": KEY}, timeout=0.05)

    assert held_back.status_code == 200
    assert elapsed >= 0.05


@pytest.mark.parametrize(
    "fault",
    [
        {"body": "nonsense"},
        {"status": 200},
        {"status": 500, "body": "html200"},
        {"times": 0},
        {"surprise": True},
        {"closing": "internal_error"},
        {"target": "conversation"},
        {"target": "conversation", "closing": "nonsense"},
        {"target": "conversation", "closing": "override_not_allowed"},
        {"target": "conversation", "closing": "internal_error", "latency_seconds": 1},
        {"target": "token", "body": "foreign_host"},
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(service: Service, fault: dict[str, object]) -> None:
    assert service.http.put("/_emulator/faults", json=fault).status_code == 422


def test_an_agent_can_be_put_over_the_wire(service: Service) -> None:
    settings = {"requires_auth": False, "first_message": "Welcome!"}

    put = service.http.put("/_emulator/agents/agent_new", json=settings)
    with talking(service.public_url("agent_new")) as talk:
        greeting = talk.says()

    assert put.status_code == 204
    assert greeting == "Welcome!"
    assert service.emulator.agent("agent_new") == EmulatedAgent(
        agent_id="agent_new", requires_auth=False, first_message="Welcome!"
    )


def test_an_agent_with_a_setting_nobody_knows_is_refused(service: Service) -> None:
    assert service.http.put("/_emulator/agents/agent_new", json={"requires_atuh": False}).status_code == 422


def test_the_clock_can_be_advanced_past_a_urls_end(service: Service) -> None:
    url = service.mint()

    advanced = service.http.post("/_emulator/clock", json={"advance_seconds": 901})
    with talking(url) as talk:
        refusal = talk.closed()

    assert advanced.status_code == 200
    assert refusal == (3000, "Could not authorize the conversation.")


@pytest.mark.parametrize("body", [{"advance_seconds": -1}, {"advance_minutes": 1}, {}])
def test_the_clock_never_goes_back(service: Service, body: dict[str, float]) -> None:
    assert service.http.post("/_emulator/clock", json=body).status_code == 422
