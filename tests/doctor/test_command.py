"""The output of `voicepass doctor`, as text and as JSON."""

import json
from pathlib import Path

import pytest

from tests.canaries import API_KEY, secrets_in
from tests.cli.test_cli import CLEAN, ENVIRONMENT, CommandResult, run
from tests.doctor.conftest import AGENT_ID, WEBHOOK_SECRET, State, build_emulator
from tests.elevenlabs_emulator.wire import Serve
from tests.tables import table
from voicepass.doctor.findings import CHECKS


def run_doctor(serve: Serve, folder: Path, *arguments: str, state: State, **environment: str) -> CommandResult:
    url = serve(build_emulator(state)).url
    variables = ENVIRONMENT | {"ELEVENLABS_BASE_URL": url, "ELEVENLABS_AGENT_ID": AGENT_ID} | environment
    return run("doctor", *arguments, cwd=folder, environment=variables)


NO_USERNAME = State(
    agent={"first_message": "Hi {{username}}", "is_shareable": True}, permissions=("convai_write", "convai_read")
)


def test_the_failure_and_its_remedy_are_printed_last(serve: Serve, tmp_path: Path) -> None:
    ended = run_doctor(serve, tmp_path, state=NO_USERNAME)

    assert (ended.returncode, ended.stderr) == (1, "")
    about, empty, *rows, last_empty, verdict = ended.stdout.splitlines()
    assert about.startswith(f"agent default ({AGENT_ID}) at 127.0.0.1:")
    assert (empty, last_empty, verdict) == ("", "", "2 of 24 checks failed; warnings: 4.")
    assert [row[:6] for row in rows if row[0] != " "] == ["ok    ", *["warn  "] * 4, "FAIL  "]
    fail = " ".join(" ".join(rows).rpartition("FAIL")[2].split())
    assert fail.startswith("variables, conversation: The agent needs username (in its first message), and nobody sends")
    assert "-> Did you mean {{user_name}}? Supply it from a claim (VOICEPASS_VARIABLES" in fail
    assert "\x1b" not in ended.stdout


@pytest.mark.parametrize("columns", ["30", "80", "200"])
def test_no_line_is_wider_than_the_terminal(serve: Serve, tmp_path: Path, columns: str) -> None:
    ended = run_doctor(serve, tmp_path, "--no-conversation", state=NO_USERNAME, COLUMNS=columns)

    widest = max(len(line) for line in ended.stdout.splitlines()[1:])
    longest_word = max(map(len, ended.stdout.split()))
    assert widest <= max(int(columns), 6 + longest_word)
    assert not any(line != line.rstrip() for line in ended.stdout.splitlines())


def test_json_lists_every_check_by_name(serve: Serve, tmp_path: Path) -> None:
    ended = run_doctor(
        serve, tmp_path, "--json", "--no-conversation", state=NO_USERNAME, ELEVENLABS_ENVIRONMENT="production"
    )

    answer = json.loads(ended.stdout)
    assert answer["about"].startswith(f"agent default ({AGENT_ID}, environment production) at 127.0.0.1:")
    assert (ended.returncode, ended.stderr, answer["status"]) == (1, "", "failed")
    assert [finding["name"] for finding in answer["checks"]] == list(CHECKS)
    (variables,) = [finding for finding in answer["checks"] if finding["name"] == "variables"]
    assert variables["outcome"] == "failed"
    assert variables["cause"] == "variables_missing"
    assert variables["id"] == "variables.variables_missing"
    assert {"archived.ok", "shareable_link.shareable_link"} <= {finding["id"] for finding in answer["checks"]}
    assert variables["remedy"].startswith("Did you mean {{user_name}}?")


def test_warnings_alone_exit_with_0(serve: Serve, tmp_path: Path) -> None:
    state = State(permissions=("convai_write",))

    ended = run_doctor(serve, tmp_path, "--no-conversation", state=state, ELEVENLABS_WEBHOOK_SECRET=WEBHOOK_SECRET)

    assert ended.returncode == 0
    assert "skip  archived, authentication, allowlist" in ended.stdout
    assert "0 of 24 checks failed" in ended.stdout
    assert "the key lacks convai_read" in " ".join(ended.stdout.split())


def test_a_service_that_cannot_see_conversations_end_fails_and_two_remedies_are_named(
    serve: Serve, tmp_path: Path
) -> None:
    state = State(permissions=("convai_write",))

    ended = run_doctor(serve, tmp_path, "--no-conversation", state=state)

    fail = " ".join(ended.stdout.rpartition("FAIL")[2].split())
    assert (ended.returncode, "1 of 24 checks failed" in ended.stdout) == (1, True)
    assert fail.startswith("webhook: voicepass cannot see when conversations end: the API key lacks convai_read, and")
    assert "a user who had three conversations must wait 25 minutes for the next one" in fail
    _, _, remedy = fail.partition("-> ")
    assert "'ElevenAgents: Read' (convai_read). Or set up the post-call webhook" in remedy
    assert "ELEVENLABS_WEBHOOK_SECRET" in remedy


@pytest.mark.parametrize(
    "environment",
    [
        {"VOICEPASS_JWT_SECRET": "short"},
        {"ELEVENLABS_API_KEY": ""},
        {"ELEVENLABS_AGENT_ID": "conv_01k0"},
        {"ELEVENLABS_AGENT_ID": "agent_x&conversation_signature=cvtkn_1"},
        {"VOICEPASS_JWT_ISUER": "https://login.example"},
    ],
)
def test_refused_settings_are_a_finding(serve: Serve, tmp_path: Path, environment: dict[str, str]) -> None:
    ended = run_doctor(serve, tmp_path, state=State(), **environment)

    assert ended.returncode == 1
    assert f"FAIL  settings: {next(iter(environment))} " in ended.stdout
    assert secrets_in(ended.stdout + ended.stderr) == []


@pytest.mark.parametrize(
    ("state", "arguments"),
    [
        (NO_USERNAME, ()),
        (NO_USERNAME, ("--json",)),
        (State(fault={"target": "conversation", "closing": "unauthorized"}), ()),
        (State(fault={"body": "truncated"}), ("--json",)),
        (State(fault={"status": 401, "envelope": "legacy"}), ("--json",)),
        (State(permissions=()), ()),
    ],
)
def test_no_secret_is_printed(serve: Serve, tmp_path: Path, state: State, arguments: tuple[str, ...]) -> None:
    ended = run_doctor(serve, tmp_path, *arguments, state=state, ELEVENLABS_WEBHOOK_SECRET=API_KEY)

    assert ended.returncode == 1
    assert secrets_in(ended.stdout + ended.stderr) == []


@pytest.mark.parametrize(
    ("override", "sent"),
    [
        ("textOnly", {"conversation": {"text_only": True}}),
        ("firstMessage", {"agent": {"first_message": "Hello!"}}),
        ("agent.language=de", {"agent": {"language": "de"}}),
        ("tts.speed=1.1", {"tts": {"speed": 1.1}}),
    ],
)
def test_an_override_is_sent_as_the_sdk_sends_it(
    serve: Serve, tmp_path: Path, override: str, sent: dict[str, dict[str, object]]
) -> None:
    emulator = build_emulator(NO_USERNAME)
    url = serve(emulator).url
    environment = ENVIRONMENT | {"ELEVENLABS_BASE_URL": url, "ELEVENLABS_AGENT_ID": AGENT_ID}

    run("doctor", "--override", override, cwd=tmp_path, environment=environment)

    (conversation,) = emulator.records.conversations
    empty: dict[str, dict[str, object]] = {"agent": {}, "tts": {}, "conversation": {}}
    assert conversation.initiation == {
        "type": "conversation_initiation_client_data",
        "conversation_config_override": empty | sent,
        "dynamic_variables": {"user_id": "voicepass-doctor", "user_name": "voicepass doctor"},
        "user_id": "voicepass-doctor",
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--override", "voiceId"), "give the value"),
        (("--override", "volume=3"), "no such field"),
        (("--agent", "seller"), "name one of: default"),
    ],
)
def test_a_wrong_option_is_refused_with_an_explanation(tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    ended = run("doctor", *arguments, cwd=tmp_path)

    assert ended.returncode == 2
    assert text in " ".join(ended.stderr.replace("│", "").split())


def test_explain_says_what_a_close_means_or_that_it_is_unknown(tmp_path: Path) -> None:
    pasted = "1008 Missing required dynamic variables in tools: {'item'}"

    known = run("doctor", "explain", pasted, cwd=tmp_path, environment=CLEAN)
    unknown = run("doctor", "explain", "banana", cwd=tmp_path, environment=CLEAN)

    says, remedy, *_ = known.stdout.splitlines()
    assert (known.returncode, says) == (0, "The agent needs item (in its tools), and nobody sends it.")
    assert remedy.startswith("-> Supply it from a claim")
    assert (unknown.returncode, unknown.stdout.splitlines()[0][:24]) == (1, "The doctor does not know")


def deny(permission: str) -> str:
    """Return the live service's error for a missing permission, as users quoted it."""
    return (
        '{"detail": {"type": "authentication_error", "code": "unauthorized", "message": "The API key you used is '
        f'missing the permission {permission} to execute this operation.", "status": "missing_permissions"}}}}'
    )


def write_error(status: str, code: str = "unauthorized") -> str:
    return json.dumps({"detail": {"type": "x", "code": code, "message": "vendor words", "status": status}})


KEY_IS_WRONG = "ElevenLabs does not accept the API key"


@table(
    ("body", "says", "remedy"),
    [
        (deny("convai_write"), "right, but lacks the permission convai_write.", "'ElevenAgents: Write'"),
        (deny("convai_read"), "right, but lacks the permission convai_read.", "'ElevenAgents: Read'"),
        (deny("user_read"), "lacks the permission user_read. voicepass does not need it.", "Run voicepass doctor"),
        (deny("convai_read")[:-2] + ",…}}", "right, but lacks the permission convai_read.", "'ElevenAgents: Read'"),
        (write_error("missing_permissions"), "right, but lacks the permission convai_write.", "'ElevenAgents: Write'"),
        (write_error("quota_exceeded"), "The workspace's quota at ElevenLabs is used up", "Raise the quota"),
        (write_error("detected_unusual_activity"), "for unusual activity", "paid plan"),
        (write_error("needs_authorization"), "ElevenLabs received no API key.", "xi-api-key"),
        (write_error("invalid_api_key"), KEY_IS_WRONG, "ELEVENLABS_API_KEY"),
        (write_error("unauthorized"), KEY_IS_WRONG, "ELEVENLABS_API_KEY"),
        ('{"detail": {"code": "unauthorized"}}', KEY_IS_WRONG, "ELEVENLABS_API_KEY"),
        (
            write_error("conversation_history_not_found", "conversation_not_found"),
            "no conversation with this id",
            "opened",
        ),
    ],
)
@pytest.mark.parametrize("before", ["", "HTTP "])
def test_explain_names_the_cause_of_each_error_that_the_live_service_sends(
    tmp_path: Path, before: str, body: str, says: str, remedy: str
) -> None:
    status = "404" if "conversation_" in body else "401"

    ended = run("doctor", "explain", f"{before and before + status} {body}", cwd=tmp_path, environment=CLEAN)

    text, _, advice = ended.stdout.partition("-> ")
    assert ended.returncode == 0
    assert says in " ".join(text.split())
    assert remedy in " ".join(advice.split())


@table("odd", ["null", "5", "{}", "[]", '""'])
def test_explain_accepts_an_error_whose_status_or_code_is_no_text(tmp_path: Path, odd: str) -> None:
    for body in (f'{{"detail": {{"status": {odd}, "code": "quota_exceeded"}}}}', f'{{"detail": {{"status": {odd}}}}}'):
        known = "quota_exceeded" in body

        ended = run("doctor", "explain", body, cwd=tmp_path, environment=CLEAN)

        assert ended.returncode == (0 if known else 1)
        assert ("quota at ElevenLabs is used up" in " ".join(ended.stdout.split())) == known
