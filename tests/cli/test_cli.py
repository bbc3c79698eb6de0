"""The command line as people type it: real processes, real ports."""

import contextlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
from jose import jwt
from typer.testing import CliRunner

from tests.canaries import API_KEY, JWT_SECRET, secrets_in
from tests.elevenlabs_emulator.wire import open_conversation
from tests.servers import free_port, started
from voicepass import cli

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("ELEVENLABS_", "VOICEPASS_"))}
ENVIRONMENT = CLEAN | {
    "ELEVENLABS_API_KEY": API_KEY,
    "ELEVENLABS_AGENT_ID": "agent_demo",
    "VOICEPASS_JWT_SECRET": JWT_SECRET,
    "VOICEPASS_JWT_ISSUER": "https://login.example",
    "VOICEPASS_JWT_AUDIENCE": "voicepass",
    "VOICEPASS_LOG_LEVEL": "debug",
}


@dataclass(frozen=True)
class CommandResult:
    """The output and the exit code of a command."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str, cwd: Path, environment: Mapping[str, str] = ENVIRONMENT) -> CommandResult:
    """Run a command with this environment, but in this process: to start one takes most of the time."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        with contextlib.chdir(cwd):
            result = CliRunner().invoke(cli.app, list(arguments), prog_name="voicepass")
    finally:
        os.environ.clear()
        os.environ.update(before)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return CommandResult(result.exit_code, result.stdout, result.stderr)


@contextlib.contextmanager
def run_server(*arguments: str, cwd: Path, environment: Mapping[str, str] = ENVIRONMENT) -> Iterator[list[str]]:
    with started([sys.executable, "-m", "voicepass", *arguments], cwd=cwd, environment=environment) as output:
        yield output
    assert secrets_in("".join(output)) == []


def test_every_command_accepts_an_env_file(tmp_path: Path) -> None:
    settings = [line for line in ENVIRONMENT if line.startswith(("ELEVENLABS_", "VOICEPASS_"))]
    (tmp_path / "named").write_text("".join(f"{name}={ENVIRONMENT[name]}\n" for name in settings))

    without = run("token", "--user", "u-1", cwd=tmp_path, environment=CLEAN)
    named = run("--env-file", "named", "token", "--user", "u-1", cwd=tmp_path, environment=CLEAN)
    missing = run("--env-file", "missing", "token", "--user", "u-1", cwd=tmp_path, environment=CLEAN)

    assert (without.returncode, named.returncode, missing.returncode) == (1, 0, 1)
    assert missing.stderr.startswith("VOICEPASS_ENV_FILE names a file that cannot be read")


def test_h_shows_the_help_of_the_program_and_of_each_command(tmp_path: Path) -> None:
    commands = [[], *([command] for command in COMMANDS), ["policy", "check"], ["doctor", "explain"]]

    short = [run(*command, "-h", cwd=tmp_path, environment=CLEAN).stdout for command in commands]

    assert short == [run(*command, "--help", cwd=tmp_path, environment=CLEAN).stdout for command in commands]
    assert [text for text in short if "Usage: voicepass" not in text] == []


def test_version_prints_the_version_of_the_package(tmp_path: Path) -> None:
    ended = run("--version", cwd=tmp_path, environment=CLEAN)

    assert (ended.returncode, ended.stdout) == (0, f"voicepass {version('voicepass')}\n")


def test_serve_without_any_settings_says_which_file_to_copy(tmp_path: Path) -> None:
    first = run("serve", cwd=tmp_path, environment=CLEAN).stderr.splitlines()
    incomplete = run("serve", cwd=tmp_path, environment=CLEAN | {"VOICEPASS_JWT_ISSUER": "i"}).stderr.splitlines()
    (tmp_path / ".env").write_text("# copied, but not filled in yet\n")
    copied = run("serve", cwd=tmp_path, environment=CLEAN).stderr.splitlines()

    assert first[0] == f"there are no settings in {tmp_path}: copy .env.example to .env"
    assert first[1:] == copied
    assert incomplete == [line for line in copied if "VOICEPASS_JWT_ISSUER" not in line]
    assert len(copied) == 5


def test_token_prints_a_jwt_that_serve_accepts(tmp_path: Path) -> None:
    arguments = ["token", "--user", "u-1", "--name", "Ada", "--ttl", "60", "--claim", "plan=pro", "--claim", "n=3"]

    ended = run(*arguments, "--claim", 'roles=["seller"]', cwd=tmp_path)

    assert (ended.returncode, ended.stderr) == (0, "")
    claims = jwt.decode(
        ended.stdout.strip(), JWT_SECRET, ["HS256"], audience="voicepass", issuer="https://login.example"
    )
    assert claims["exp"] - claims["iat"] == 60
    del claims["exp"], claims["iat"]
    assert claims == {
        "iss": "https://login.example",
        "aud": "voicepass",
        "sub": "u-1",
        "name": "Ada",
        "plan": "pro",
        "n": 3,
        "roles": ["seller"],
    }


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"VOICEPASS_JWT_SECRET": ""}, "VOICEPASS_JWT_SECRET is not set"),
        ({"VOICEPASS_JWT_SECRET": "short"}, "VOICEPASS_JWT_SECRET must be"),
        ({"VOICEPASS_JWT_ALGORITHM": "PS256"}, "VOICEPASS_JWT_ALGORITHM must be one of"),
        ({"VOICEPASS_JWT_ISSUER": ""}, "VOICEPASS_JWT_ISSUER is not set"),
    ],
)
def test_token_names_each_missing_or_wrong_setting(tmp_path: Path, changes: dict[str, str], named: str) -> None:
    ended = run("token", "--user", "u-1", cwd=tmp_path, environment=ENVIRONMENT | changes)

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(named)


def test_a_claim_without_a_value_is_explained(tmp_path: Path) -> None:
    ended = run("token", "--user", "u-1", "--claim", "plan", cwd=tmp_path)

    assert ended.returncode == 2
    assert "key=value" in ended.stderr


@pytest.mark.long
def test_serve_grants_a_pass_from_the_emulator(tmp_path: Path) -> None:
    emulator_port, port = free_port(), free_port()
    environment = ENVIRONMENT | {"ELEVENLABS_BASE_URL": f"http://127.0.0.1:{emulator_port}"}
    token = run("token", "--user", "u-1", "--name", "Ada", cwd=tmp_path).stdout.strip()

    with (
        run_server("emulator", "--port", str(emulator_port), "--key", API_KEY, cwd=tmp_path),
        run_server("serve", "--port", str(port), cwd=tmp_path, environment=environment) as log,
    ):
        health = httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False)
        response = httpx.post(
            f"http://127.0.0.1:{port}/v1/signed-url", headers={"Authorization": f"Bearer {token}"}, trust_env=False
        )

    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    (begun,) = [json.loads(line) for line in log if '"service.started"' in line]
    assert begun["version"] == version("voicepass")
    assert (begun["agents"], begun["issuers"]) == (["default"], ["https://login.example"])
    assert begun["ledger"] == str(tmp_path / "voicepass.db")
    assert "server" not in health.headers
    assert response.status_code == 200
    assert response.json()["signed_url"].startswith(f"ws://127.0.0.1:{emulator_port}/v1/convai/conversation?")
    assert response.json()["dynamic_variables"] == {"user_id": "u-1", "user_name": "Ada"}
    assert "pass.granted" in "".join(log)
    assert (tmp_path / "voicepass.db").exists()


@pytest.mark.long
def test_serve_reads_its_port_from_the_environment_and_may_use_several_workers(tmp_path: Path) -> None:
    port = free_port()

    with (
        run_server("serve", "--workers", "2", cwd=tmp_path, environment=ENVIRONMENT | {"PORT": str(port)}),
        # The parent process reports that it runs before its workers listen.
        httpx.Client(transport=httpx.HTTPTransport(retries=8), trust_env=False) as client,
    ):
        ready = client.get(f"http://127.0.0.1:{port}/readyz")

    assert (ready.status_code, ready.json()["status"]) == (200, "ready")


@pytest.mark.long
def test_the_emulator_accepts_faults_and_further_agents_and_explains_bad_faults(tmp_path: Path) -> None:
    port = free_port()

    once = '{"status": 503, "times": 1}'
    with run_server("emulator", "--port", str(port), "--fault", once, "--agent", "agent_x", cwd=tmp_path):
        url = f"http://127.0.0.1:{port}/v1/convai/conversation/get-signed-url?agent_id="
        with httpx.Client(headers={"xi-api-key": "sk_emulator"}, trust_env=False) as http:
            response, demo, added = [http.get(url + agent) for agent in ("agent_x", "agent_demo", "agent_x")]
    refused = run("emulator", "--fault", '{"status": 7}', cwd=tmp_path)

    assert (response.status_code, demo.status_code, added.status_code) == (503, 200, 200)
    assert refused.returncode == 2
    assert "--fault" in refused.stderr


@pytest.mark.long
def test_the_emulator_accepts_the_processing_time_of_conversations(tmp_path: Path) -> None:
    port = free_port()

    with run_server("emulator", "--port", str(port), "--open", "--processing-seconds", "3600", cwd=tmp_path):
        with open_conversation(f"ws://127.0.0.1:{port}/v1/convai/conversation?agent_id=agent_demo") as talk:
            talk.read_answer()
        base = f"http://127.0.0.1:{port}/v1/convai"
        with httpx.Client(base_url=base, headers={"xi-api-key": "sk_emulator"}, trust_env=False) as http:
            deadline = time.monotonic() + 5
            while (status := _read_status(http)) == "in-progress":
                assert time.monotonic() < deadline

    assert status == "processing"


def _read_status(http: httpx.Client) -> str:
    (row,) = http.get("/conversations").json()["conversations"]
    return str(row["status"])


COMMANDS = [
    "serve",
    "demo",
    "emulator",
    "token",
    "usage",
    "conversations",
    "export",
    "block",
    "unblock",
    "blocks",
    "extend",
    "extensions",
    "forget",
    "ledger",
    "policy",
    "doctor",
]

POLICY = """
[agents.default]
id = "agent_1"
allow = "everyone"
variables.plan = { claim = "plan", default = "free" }

[agents.seller]
id = "agent_2"
branch_id = "agtbrch_1"
environment = "staging"
allow = [{ role = ["seller", "admin"] }]

[agents.closed]
id = "agent_3"

[[limits.plan]]
name = "pro"
when = { plan = ["pro", "team"] }
minutes_per_day = "off"
"""


def test_policy_check_prints_who_may_use_which_agent_and_needs_no_secret(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(POLICY)

    ended = run("policy", "check", "policy.toml", cwd=tmp_path, environment=CLEAN)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [
        "agent default (agent_1) is open to every signed-in user",
        "  plan = the claim plan, else 'free'",
        (
            "agent seller (agent_2, branch_id agtbrch_1, environment staging) is open to users whose role is seller or "
            "admin"
        ),
        "agent closed (agent_3) is open to nobody",
        "plan pro is for users whose plan is pro or team",
        "  passes_per_minute = 10",
        "  passes_per_day = 200",
        "  open_conversations = 3",
        "  minutes_per_day = off",
        "  minutes_per_month = 600",
    ]


def test_policy_check_warns_of_rules_that_never_hold_and_plans_that_never_apply(tmp_path: Path) -> None:
    plans = '[[limits.plan]]\nname = "{}"\nwhen = {}\n'
    text = POLICY.replace("allow = [{", 'allow = [{ scope = "a b" }, {')
    text += plans.format("team", '{ plan = "team" }') + plans.format("odd", "{ level = nan }")
    (tmp_path / "policy.toml").write_text(text)

    ended = run("policy", "check", "policy.toml", cwd=tmp_path, environment=CLEAN)

    assert ended.returncode == 0
    assert ended.stderr.splitlines() == [
        "warning: policy.toml: agents.seller.allow: never holds, because no token can hold a listed value of scope",
        "warning: policy.toml: limits.plan.2.when: never holds, because no token can hold a listed value of level",
        "warning: policy.toml: limits.plan.1: never applies, because limits.plan.0 applies to its users",
    ]


def test_policy_check_names_each_mistake_and_exits(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(POLICY.replace("allow =", "alow ="))

    ended = run("policy", "check", cwd=tmp_path, environment=CLEAN | {"VOICEPASS_POLICY_FILE": "policy.toml"})

    assert (ended.returncode, ended.stdout) == (1, "")
    lines = ended.stderr.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["policy.toml", "agents.default.alow"],
        ["policy.toml", "agents.seller.alow"],
    ]
    assert all("allowed here: id, allow, variables, base_url, api_key_env" in line for line in lines)


@pytest.mark.parametrize(
    ("claims", "agent", "code", "text"),
    [
        (
            ["--claim", "role=seller"],
            "seller",
            0,
            "may use the agent seller (agent_2, branch_id agtbrch_1, environment staging), open to users whose role",
        ),
        ([], "default", 0, "plan = 'free'"),
        ([], "default", 0, "has no plan"),
        (["--claim", "plan=team"], "closed", 1, "has the limits of plan pro"),
        (["--claim", "role=buyer"], "seller", 1, "refused: agent_not_allowed: no rule opens the agent 'seller'"),
        ([], "closed", 1, "refused: agent_not_allowed: no rule opens the agent 'closed'"),
        ([], "missing", 1, "refused: agent_not_allowed: no agent has this alias"),
        (["--claim", "exp=1"], "default", 1, "refused: token_expired"),
        (["--claim", "aud=other"], "default", 1, "refused: token_invalid: token refused: aud does not name"),
    ],
)
def test_policy_explain_says_which_check_or_rule_decided(
    tmp_path: Path, claims: list[str], agent: str, code: int, text: str
) -> None:
    (tmp_path / "policy.toml").write_text(POLICY)
    environment = ENVIRONMENT | {"VOICEPASS_POLICY_FILE": "policy.toml", "ELEVENLABS_AGENT_ID": ""}
    token = run("token", "--user", "u-1", *claims, cwd=tmp_path).stdout.strip()

    ended = run("policy", "explain", token, "--agent", agent, cwd=tmp_path, environment=environment)

    assert ended.returncode == code
    assert text in ended.stdout + ended.stderr
    assert token not in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("changes", "arguments", "text"),
    [
        (
            {"VOICEPASS_DATABASE_URL": "sqlite:////nowhere/x.db"},
            [],
            "VOICEPASS_DATABASE_URL cannot be used: /nowhere/x.db",
        ),
        ({"VOICEPASS_DATABASE_URL": "sqlite://"}, ["--workers", "2"], "VOICEPASS_DATABASE_URL is in memory"),
        ({"VOICEPASS_DATABASE_URL": "sqlite://"}, ["--host", "192.0.2.1"], "cannot listen on 192.0.2.1 port 8000"),
    ],
)
def test_serve_prints_one_line_if_it_cannot_start(
    tmp_path: Path, changes: dict[str, str], arguments: list[str], text: str
) -> None:
    ended = run("serve", *arguments, cwd=tmp_path, environment=ENVIRONMENT | changes)

    assert ended.returncode == 1
    assert ended.stderr.startswith(text)
    assert len(ended.stderr.splitlines()) == 1


def test_a_port_in_use_is_reported_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        ended = run("demo", "--port", str(port), cwd=tmp_path)

    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [
        f"cannot listen on 127.0.0.1 port {port} (Address already in use): choose another with --port"
    ]


def test_help_names_every_command(tmp_path: Path) -> None:
    shown = run("--help", cwd=tmp_path, environment=CLEAN | {"COLUMNS": "100"}).stdout

    assert re.findall(r"^│ (\w+) ", shown, re.MULTILINE) == COMMANDS
