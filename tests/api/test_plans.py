"""Plans and extensions over HTTP: which limits apply to which user, and which answers name the plan."""

import json
from typing import Any

import httpx
import pytest

from tests.api.test_limits import fresh_conversations as fresh_conversations  # noqa: PLC0414 - a fixture
from tests.conftest import UNLIMITED, MakeToken, policy_file, serving

pytestmark = pytest.mark.anyio

SERVICE_TOKEN = "canary-service-token-of-the-plans-7b2c"
AS_SERVICE = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
PLANS = """
[[limits.plan]]
name = "pro"
when = { "app_metadata.plan" = "pro" }
passes_per_day = 3

[[limits.plan]]
name = "team"
when = [{ "app_metadata.plan" = "team" }, { role = "admin" }]
passes_per_day = "off"
"""


def with_policy(text: str) -> pytest.MarkDecorator:
    """Give the `api` fixture this policy."""
    settings = {"voicepass_policy_file": policy_file(text), "voicepass_service_tokens": SERVICE_TOKEN}
    return pytest.mark.parametrize("api", [settings], indirect=True)


def write_limits(**limits: int) -> str:
    lines = [line for line in UNLIMITED.splitlines() if line.partition(" ")[0] not in limits]
    return "\n".join([*lines, *(f"{name} = {value}" for name, value in limits.items())])


@with_policy(write_limits(passes_per_day=1) + PLANS)
async def test_a_changed_plan_applies_at_once_and_earlier_usage_still_counts(
    api: httpx.AsyncClient, make_token: MakeToken, capsys: pytest.CaptureFixture[str]
) -> None:
    async def ask(**claims: object) -> tuple[int, str | None, str | None]:
        """Ask for a pass; return the status, and the plan in the body and in the header."""
        answer = await api.post("/v1/signed-url", headers={"Authorization": f"Bearer {make_token(**claims)}"})
        policy = answer.headers.get("ratelimit-policy", "")
        return answer.status_code, answer.json().get("plan"), policy or None

    pro: dict[str, Any] = {"app_metadata": {"plan": "pro"}}
    answers = [await ask(), await ask(), await ask(**pro), await ask(**pro), await ask(**pro)]
    answers += [await ask(role="admin"), await ask(**pro), await ask()]

    free, of_pro = '"user_passes_per_day";q=1;w=86400', '"user_passes_per_day";q=3;w=86400;plan="pro"'
    granted = (200, None, None)
    assert answers == [
        granted,
        (429, None, free),
        granted,
        granted,
        (429, "pro", of_pro),
        granted,
        (429, "pro", of_pro),
        (429, None, free),
    ]
    lines = map(json.loads, capsys.readouterr().err.splitlines())
    plans = [line["plan"] for line in lines if line["event"].startswith("pass.")]
    assert plans == [None, None, "pro", "pro", "pro", "team", "pro", None]


@with_policy(write_limits(passes_per_day=1, minutes_per_day=20) + PLANS)
async def test_usage_names_the_plan_and_shows_its_limits_with_their_unit(
    api: httpx.AsyncClient, make_token: MakeToken
) -> None:
    user = {"Authorization": f"Bearer {make_token(app_metadata={'plan': 'pro'})}"}
    await api.post("/v1/signed-url", headers=user)

    usage = (await api.get("/v1/usage", headers=user)).json()
    other = (await api.get("/v1/usage", headers={"Authorization": f"Bearer {make_token(sub='u-2')}"})).json()

    resets = {limit["name"]: limit.pop("resets_at") for limit in usage["usage"]}
    assert usage["plan"] == "pro"
    assert usage["usage"] == [
        {"name": "user_passes_per_day", "unit": "passes", "limit": 3, "used": 1, "remaining": 2},
        {"name": "user_minutes_per_day", "unit": "seconds", "limit": 1200, "used": 600, "remaining": 600},
    ]
    assert all(resets.values())
    assert [(old["limit"], old["most"], old["used"], old["left"]) for old in usage["limits"]] == [
        ("user_passes_per_day", 3, 1, 2),
        ("user_minutes_per_day", 1200, 600, 600),
    ]
    assert (other["plan"], [limit["limit"] for limit in other["usage"]]) == (None, [1, 1200])


@with_policy(write_limits(minutes_per_day=10))
async def test_a_backend_extends_a_user_lists_the_extension_and_revokes_it(
    api: httpx.AsyncClient, bearer: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    body = {"user_id": "u-1", "minutes": 10, "ends_at": "2030-12-31T23:59:59Z"}

    async def read_remaining() -> int:
        (limit,) = (await api.get("/v1/usage", headers=bearer)).json()["usage"]
        return int(limit["remaining"])

    unknown = await api.post("/v1/extensions", headers=AS_SERVICE, json=body)
    answers = [await api.post("/v1/signed-url", headers=bearer) for _ in range(2)]
    known = await api.post("/v1/extensions", headers=AS_SERVICE, json=body | {"minutes": 30})
    listed = await api.get("/v1/extensions", headers=AS_SERVICE)
    extended = await read_remaining()
    ended = await api.request("DELETE", "/v1/extensions", headers=AS_SERVICE, json={"user_id": "u-1"})

    assert (unknown.status_code, unknown.json()) == (200, {"is_known_user": False})
    assert (known.status_code, known.json()) == (200, {"is_known_user": True})
    assert [answer.status_code for answer in answers] == [200, 200]
    assert listed.json() == {"extensions": [body | {"token_issuer": "", "minutes": 30}]}
    assert (extended, ended.status_code, await read_remaining()) == (1200, 204, 0)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    audit = [line for line in lines if line["event"].startswith("extension.")]
    assert [(line["event"], line["user_id"], line.get("minutes")) for line in audit] == [
        ("extension.set", "u-1", 10),
        ("extension.set", "u-1", 30),
        ("extension.removed", "u-1", None),
    ]
    assert {line["level"] for line in audit} == {"warning"}


GOOD = {"user_id": "u-1", "minutes": 30, "ends_at": "2030-12-31T23:59:59Z"}


@with_policy(UNLIMITED)
async def test_an_invalid_extension_is_refused_and_not_stored(
    api: httpx.AsyncClient,
) -> None:
    bad: list[dict[str, Any]] = [{"user_id": ""}, {"user_id": "u\0"}, {"user_id": "u" * 256}, {"user_id": 1}]
    bad += [{"minutes": minutes} for minutes in (0, -30, 1.5, "30", True, 10**7, None)]
    bad += [{"ends_at": ends_at} for ends_at in ("2030-12-31", "2030-12-31T00:00:00", "2020-01-01T00:00:00Z", "x")]
    bad += [{"user_id": "\ud800"}, {"ends_at": "9999-12-31T23:59:59-23:59"}, {"token_issuer": "\0"}, {"kind": "user"}]

    headers = AS_SERVICE | {"Content-Type": "application/json"}
    bodies = [json.dumps(GOOD | change) for change in bad]
    answers = [await api.post("/v1/extensions", headers=headers, content=body) for body in bodies]
    listed = await api.get("/v1/extensions", headers=AS_SERVICE)

    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(422, "request_invalid")] * len(bad)
    assert listed.json() == {"extensions": []}


@with_policy(UNLIMITED)
async def test_a_user_id_with_line_breaks_is_one_line_of_the_log(
    api: httpx.AsyncClient, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = 'u\n{"event": "extension.removed"}\x1b[31m'

    answer = await api.post("/v1/extensions", headers=AS_SERVICE, json=GOOD | {"user_id": hostile})

    text = capsys.readouterr().err
    assert answer.status_code == 200
    assert [json.loads(line)["event"] for line in text.splitlines()] == ["extension.set"]
    assert "\x1b" not in text


async def test_an_agents_limit_applies_to_users_of_every_plan(make_token: MakeToken) -> None:
    text = f"{UNLIMITED}\n[limits.agent]\npasses_per_day = 2\n{PLANS}"
    async with serving(voicepass_policy_file=policy_file(text)) as client:
        tokens = [make_token(sub=f"u-{number}", app_metadata={"plan": "pro"}) for number in range(3)]
        answers = [
            await client.post("/v1/signed-url", headers={"Authorization": f"Bearer {token}"}) for token in tokens
        ]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].headers["ratelimit-policy"] == '"agent_passes_per_day";q=2;w=86400'
    assert "plan" not in answers[2].json()


MINUTES_BY_PLAN = """
[[limits.plan]]
name = "pro"
when = { plan = "pro" }
minutes_per_day = 60
"""


async def test_a_pass_and_the_agents_tool_get_the_remaining_seconds_of_the_plan(make_token: MakeToken) -> None:
    settings = {
        "voicepass_policy_file": policy_file(write_limits(minutes_per_day=20) + MINUTES_BY_PLAN),
        "voicepass_service_tokens": SERVICE_TOKEN,
        "voicepass_tell_seconds_left": True,
    }
    async with serving(**settings) as api:
        for claims, left in (({"sub": "u-1", "plan": "pro"}, 3600), ({"sub": "u-2"}, 1200)):
            headers = {"Authorization": f"Bearer {make_token(**claims)}"}
            voice_pass = (await api.post("/v1/signed-url", headers=headers)).json()
            tool = await api.get(f"/v1/conversations/{voice_pass['conversation_id']}", headers=AS_SERVICE)

            assert voice_pass["dynamic_variables"]["seconds_left"] == left
            assert left - 5 <= tool.json()["seconds_left"] <= left
