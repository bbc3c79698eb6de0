"""The commands that read or change the ledger, on a ledger with known passes."""

import csv
import io
import json
import re
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest

from tests.cli.test_cli import CLEAN, ENVIRONMENT, run
from tests.conftest import signed_url
from voicepass.ledger.sqlite import open_sqlite
from voicepass.model import Credential, Reservation, Settlement, Transport


@dataclass
class CommandLine:
    """Runs commands in a folder with a ledger."""

    folder: Path

    def __call__(
        self, *arguments: str, code: int = 0, columns: int = 200, settings: Mapping[str, str] = ENVIRONMENT
    ) -> str:
        environment = {**settings, "VOICEPASS_DATABASE_URL": "sqlite:///ledger.db", "COLUMNS": str(columns)}
        ended = run(*arguments, cwd=self.folder, environment=environment)
        assert ended.returncode == code, ended.stderr
        return ended.stdout + ended.stderr

    def add_pass(
        self,
        user_id: str,
        *,
        number: int,
        conversation_id: str,
        issuer: str = "https://login.example",
        plan: str | None = None,
    ) -> None:
        """Write an open pass into the ledger."""

        async def write() -> None:
            reservation = Reservation(
                pass_id=f"p-{number}",
                request_id=f"r-{number}",
                token_issuer=issuer,
                user_id=user_id,
                plan=plan,
                agent_alias="default",
                agent_id="agent_1",
                transport=Transport.WEBSOCKET,
                seconds=600,
            )
            url = signed_url(conversation_id=conversation_id)
            async with open_sqlite(str(self.folder / "ledger.db"), clock=time.time) as ledger:
                await ledger.reserve(reservation, [])
                await ledger.grant(
                    reservation, Credential(secret=url, conversation_id=conversation_id, expires_at=None)
                )

        anyio.run(write)


@pytest.fixture
def command(tmp_path: Path) -> CommandLine:
    """u-1 talked for 84 seconds, u-2 has an open pass. A spreadsheet would run the user id =u-3 as a formula."""

    command = CommandLine(tmp_path)
    for number, user_id in enumerate(("u-1", "u-2", "=u-3"), start=1):
        command.add_pass(user_id, number=number, conversation_id=f"conv_{number}")

    async def settle() -> None:
        async with open_sqlite(str(tmp_path / "ledger.db"), clock=time.time) as ledger:
            settlement = Settlement(conversation_id="conv_1", seconds=84, cost=12, user_id="mallory", source="webhook")
            await ledger.settle(settlement)

    anyio.run(settle)
    return command


def test_usage_shows_who_used_most(command: CommandLine) -> None:
    rows = json.loads(command("usage", "--json"))
    table = command("usage")

    used = {row["user_id"]: (row["passes"], row["minutes"]) for row in rows}
    assert used == {"=u-3": (1, 10.0), "u-2": (1, 10.0), "u-1": (1, 1.4)}
    assert rows[-1]["user_id"] == "u-1"
    assert "https://login.example" in table


def test_usage_of_one_user_shows_each_limit(command: CommandLine) -> None:
    rows = {row["limit"]: row for row in json.loads(command("usage", "--user", "u-1", "--json"))}

    assert (rows["user_passes_per_day"]["used"], rows["user_passes_per_day"]["most"]) == (1, 200)
    assert (rows["user_minutes_per_day"]["used"], rows["user_minutes_per_day"]["unit"]) == (84, "seconds")
    assert rows["user_open_conversations"]["used"] == 0


def test_conversations_shows_the_latest_passes_and_their_states(command: CommandLine) -> None:
    everyone = json.loads(command("conversations", "--json"))
    mine = json.loads(command("conversations", "--user", "u-1", "--json"))
    table = command("conversations")

    assert [row["conversation_id"] for row in everyone] == ["conv_3", "conv_2", "conv_1"]
    assert [(row["state"], row["seconds"], row["cost"], row["identity_mismatch"]) for row in mine] == [
        ("settled", 84, 12, True)
    ]
    assert "conv_2" in table
    assert "open" in table


def test_a_narrow_terminal_shows_the_ids_of_conversations_whole(command: CommandLine) -> None:
    conversation_id = "conv_creankcqzxcta0x522wyfzd0m1kf"  # the length of a real id
    command.add_pass("6f1c2a34-9a6e-4a53-8b0e-2d6a6d1c7f10", number=4, conversation_id=conversation_id)

    table = command("conversations", columns=80)

    assert conversation_id in table
    assert max(len(line) for line in table.splitlines()) <= 80


def test_an_export_holds_every_pass_and_no_secret(command: CommandLine) -> None:
    command("export", "all.csv")
    lines = command("export", "-", "--format", "jsonl").splitlines()

    rows = list(csv.DictReader(io.StringIO((command.folder / "all.csv").read_text())))
    assert [row["pass_id"] for row in rows] == [json.loads(line)["pass_id"] for line in lines] == ["p-1", "p-2", "p-3"]
    assert rows[2]["user_id"] == "'=u-3", "a spreadsheet would run it as a formula"
    assert json.loads(lines[2])["user_id"] == "=u-3"
    assert "cvtkn_" not in (command.folder / "all.csv").read_text()


def test_an_export_goes_to_standard_output_if_no_file_is_named(command: CommandLine) -> None:
    assert command("export") == command("export", "-") != ""
    assert command("export", "--format", "jsonl") == command("export", "-", "--format", "jsonl")


@pytest.mark.parametrize("option", ["--limit", "--most"])
def test_limit_and_most_give_the_number_of_rows(command: CommandLine, option: str) -> None:
    assert len(json.loads(command("usage", option, "2", "--json"))) == 2
    assert len(json.loads(command("conversations", option, "1", "--json"))) == 1


def test_an_export_of_an_empty_ledger_has_its_header_line(command: CommandLine) -> None:
    full = command("export", "-").splitlines()
    with sqlite3.connect(command.folder / "ledger.db") as ledger:
        ledger.execute("DELETE FROM passes")
    ledger.close()

    empty, lines = command("export", "-").splitlines(), command("export", "-", "--format", "jsonl")

    assert len(full) == 4
    assert (empty, lines) == (full[:1], "")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_spreadsheet_runs_a_cell_of_an_export(command: CommandLine, start: str) -> None:
    command.add_pass(f"{start}1+2", number=4, conversation_id="conv_4")

    command("export", "all.csv")

    rows = list(csv.DictReader(io.StringIO((command.folder / "all.csv").read_text())))
    shown = {"\t": "\\t", "\r": "\\r"}.get(start, start)
    assert rows[3]["user_id"] == f"'{shown}1+2"


def test_no_report_holds_a_control_character_of_a_terminal(command: CommandLine) -> None:
    hostile = "u\x1b[31m\x1b]0;title\x07\r\n\x00\x7f\x9b2J\u202e-\u200d4"
    command.add_pass(hostile, number=4, conversation_id="conv_4")
    command("block", "user", hostile)
    extended = command("extend", "user", hostile, "--minutes", "1", "--until", "2030-12-31")

    reports = [["export", "-"], ["export", "-", "--format", "jsonl"], ["conversations"], ["usage"], ["blocks"]]
    reports += [["conversations", "--json"], ["usage", "--json"], ["blocks", "--json"]]
    reports += [["extensions"], ["unblock", "user", hostile], ["extend", "user", hostile, "--revoke"]]
    shown = [command(*arguments).replace("\r\n", "\n") for arguments in reports] + [extended]

    controls = {character for character in hostile if not character.isprintable()} - {"\n", "\u200d"}
    assert [text for text in shown if not controls.isdisjoint(text)] == []
    assert "u\\x1b[31m" in shown[0]
    assert json.loads(shown[1].splitlines()[3])["user_id"] == hostile


def test_blocks_shows_each_block_until_it_is_removed(command: CommandLine) -> None:
    command("block", "user", "u-1", "--issuer", "https://login.example")
    command("block", "everyone")
    blocked = json.loads(command("blocks", "--json"))
    command("unblock", "user", "u-1", "--issuer", "https://login.example")
    command("unblock", "everyone")

    assert blocked == [
        {"kind": "everyone", "key": "", "token_issuer": ""},
        {"kind": "user", "key": "u-1", "token_issuer": "https://login.example"},
    ]
    assert json.loads(command("blocks", "--json")) == []
    assert "nothing yet" in command("blocks")


def test_block_and_unblock_each_print_one_line(command: CommandLine) -> None:
    assert command("block", "agent", "default") == "blocked: agent default\n"
    assert command("unblock", "agent", "default") == "unblocked: agent default\n"
    assert command("unblock", "agent", "default") == "was not blocked: agent default\n"
    assert (
        command("block", "user", "u-1", "--issuer", "https://i.example") == "blocked: user u-1 of https://i.example\n"
    )
    assert (
        command("unblock", "user", "u-1", "--issuer", "https://i.example")
        == "unblocked: user u-1 of https://i.example\n"
    )
    assert command("block", "everyone") == "blocked: everyone\n"


def test_unblock_says_which_other_block_the_user_still_has(command: CommandLine) -> None:
    command("block", "user", "u-1")
    command("block", "user", "u-1", "--issuer", "https://i.example")
    command("block", "user", "u-2")

    assert command("unblock", "user", "u-1", "--issuer", "https://i.example").splitlines() == [
        "unblocked: user u-1 of https://i.example",
        "still blocked: leave out --issuer",
    ]
    assert command("unblock", "user", "u-1") == "unblocked: user u-1\n"


def test_a_user_is_extended_listed_and_revoked(command: CommandLine) -> None:
    arguments = ("--minutes", "30", "--until", "2030-12-31")
    known = command("extend", "user", "u-1", *arguments)
    unknown = command("extend", "user", "u-7", "--issuer", "https://login.example", *arguments)
    listed = json.loads(command("extensions", "--json"))
    revoked = [command("extend", "user", "u-1", "--revoke") for _ in range(2)]

    assert known == "extended: user u-1 by 30 minutes until 2030-12-31T23:59:59Z\n"
    assert unknown.splitlines() == [
        "extended: user u-7 of https://login.example by 30 minutes until 2030-12-31T23:59:59Z",
        "user u-7 of https://login.example has never had a pass: check the id",
    ]
    end = {"minutes": 30, "ends_at": "2030-12-31T23:59:59Z"}
    assert listed == [
        {"user_id": "u-1", "token_issuer": ""} | end,
        {"user_id": "u-7", "token_issuer": "https://login.example"} | end,
    ]
    assert revoked == ["revoked the extension of user u-1\n", "there was no extension of user u-1\n"]


def test_an_invalid_extension_is_refused(command: CommandLine) -> None:
    for arguments in (
        ["--minutes", "30"],
        ["--minutes", "0", "--until", "2030-12-31"],
        ["--minutes", "30", "--until", "2020-12-31"],
        ["--minutes", "30", "--until", "tomorrow"],
    ):
        command("extend", "user", "u-1", *arguments, code=2)

    for user_id in ("", "u" * 256):  # the service could not list it
        command("extend", "user", user_id, "--minutes", "30", "--until", "2030-12-31", code=2)

    assert json.loads(command("extensions", "--json")) == []


def test_an_agent_that_the_policy_lacks_is_not_blocked_if_the_policy_can_be_read(command: CommandLine) -> None:
    refused = command("block", "agent", "seler", code=2)
    command("block", "agent", "seler", settings=CLEAN)
    unblocked = command("unblock", "agent", "seler")

    assert "name one of: default" in refused
    assert unblocked == "unblocked: agent seler\n"


@pytest.mark.parametrize("arguments", [["user"], ["everyone", "u-1"], ["agent", "a", "--issuer", "i"], ["planet", "x"]])
def test_an_invalid_block_is_refused(command: CommandLine, arguments: list[str]) -> None:
    command("block", *arguments, code=2)

    assert json.loads(command("blocks", "--json")) == []


@pytest.mark.parametrize(
    ("url", "file"), [("", "{folder}/voicepass.db"), ("sqlite:////nowhere/ledger.db", "/nowhere/ledger.db")]
)
def test_a_report_before_the_first_start_says_where_it_looked_for_the_ledger(
    tmp_path: Path, url: str, file: str
) -> None:
    ended = run("usage", cwd=tmp_path, environment=CLEAN | {"VOICEPASS_DATABASE_URL": url})

    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [
        f"there is no ledger yet at {file.format(folder=tmp_path)}: `voicepass serve` creates it",
        "if the service already runs elsewhere, set VOICEPASS_DATABASE_URL as the service has it",
    ]


def test_a_report_on_a_ledger_in_memory_is_refused_with_the_reason(tmp_path: Path) -> None:
    ended = run("usage", cwd=tmp_path, environment=CLEAN | {"VOICEPASS_DATABASE_URL": "sqlite://"})

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("VOICEPASS_DATABASE_URL is in memory")


def test_a_ledger_that_cannot_be_opened_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "voicepass.db").write_text("not a database")

    ended = run("usage", cwd=tmp_path, environment=CLEAN)

    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("the ledger does not answer: ")


def test_block_in_a_folder_without_a_ledger_fails_and_creates_none(tmp_path: Path) -> None:
    ended = run("block", "user", "u-1", cwd=tmp_path, environment=CLEAN)

    assert ended.returncode == 1
    assert "set VOICEPASS_DATABASE_URL as the service has it" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_id_that_looks_like_markup_is_shown_as_it_is(command: CommandLine) -> None:
    command("block", "user", "a[/b]")

    assert "a[/b]" in command("blocks")


def test_usage_is_readable_at_80_columns_and_cuts_no_id(command: CommandLine) -> None:
    ids = ["6f1c2a34-9a6e-4a53-8b0e-2d6a6d1c7f10", "auth0|" + "x" * 90]
    for number, user_id in enumerate(ids, start=4):
        command.add_pass(user_id, number=number, conversation_id=f"conv_{number}")

    shown = command("usage", columns=80)

    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith(f"{ids[0]} ") for line in lines)
    assert ids[1] in "".join(line.split("  ")[0].strip() for line in lines)


def test_usage_shows_the_limits_of_the_plan_that_this_users_latest_pass_had(command: CommandLine) -> None:
    plan = '[[limits.plan]]\nname = "pro"\nwhen = { plan = "pro" }\nminutes_per_day = 90\n'
    (command.folder / "policy.toml").write_text(plan)
    settings = {**ENVIRONMENT, "VOICEPASS_POLICY_FILE": "policy.toml"}
    command.add_pass("u-2", number=4, conversation_id="conv_4", plan="pro")
    command.add_pass("u-2", number=5, conversation_id="conv_5", issuer="https://other.example")

    limits = json.loads(command("usage", "--user", "u-2", "--json", settings=settings))

    assert next(each["most"] for each in limits if each["limit"] == "user_minutes_per_day") == 90 * 60


def test_usage_draws_30_days_and_shows_the_nearest_limit_of_each_user_and_agent(command: CommandLine) -> None:
    (command.folder / "policy.toml").write_text(
        "[limits.agent]\nminutes_per_day = 30\n[limits.all]\npasses_per_day = 12\n"
    )
    settings = {**ENVIRONMENT, "VOICEPASS_POLICY_FILE": "policy.toml"}

    lines = command("usage", columns=80, settings=settings).splitlines()
    without_settings = command("usage", columns=80, settings=CLEAN)

    today = datetime.now(UTC).date()
    days = {line[:10]: line[10:].split() for line in lines if re.match(r"20\d\d-", line)}
    assert list(days) == [str(today - timedelta(days=ago)) for ago in range(29, -1, -1)]
    assert days[str(today)] == ["21.4", "█" * 58]
    assert [days[str(today - timedelta(days=ago))] for ago in (1, 29)] == [["0.0"], ["0.0"]]
    near = {line.split()[0]: " ".join(line.split()[-2:]) for line in lines if "%" in line and "u-1" not in line}
    assert near == {
        "all": "25% passes_per_day",
        "default": "71% minutes_per_day",
        "u-2": "33% open_conversations",
        "=u-3": "33% open_conversations",
    }
    assert "u-2" in without_settings
    assert "%" not in without_settings


def test_usage_prints_csv_with_the_columns_of_the_json(command: CommandLine) -> None:
    rows = json.loads(command("usage", "--json"))
    lines = list(csv.DictReader(io.StringIO(command("usage", "--csv"))))

    assert [set(row) for row in lines] == [set(row) for row in rows]
    assert [row["user_id"] for row in lines] == [
        "'=u-3" if row["user_id"] == "=u-3" else row["user_id"] for row in rows
    ]
    assert command("usage", "--user", "u-1", "--csv").startswith("limit,used,most,unit,resets_at\nuser_")


def test_usage_and_an_export_show_what_conversations_cost_in_dollars(command: CommandLine) -> None:
    command.add_pass("u-1", number=4, conversation_id="conv_4")

    async def settle() -> None:
        async with open_sqlite(str(command.folder / "ledger.db"), clock=time.time) as ledger:
            for number, dollars in ((1, None), (4, 0.126)):
                await ledger.settle(
                    Settlement(
                        conversation_id=f"conv_{number}",
                        seconds=84,
                        cost=1,
                        user_id="u-1",
                        source="webhook",
                        cost_fiat=dollars,
                    )
                )

    anyio.run(settle)

    costs = {row["user_id"]: row["cost_fiat"] for row in json.loads(command("usage", "--json"))}
    exported = [json.loads(line)["cost_fiat"] for line in command("export", "--format", "jsonl").splitlines()]
    assert costs == {"u-1": 0.126, "u-2": None, "=u-3": None}
    assert exported == [None, None, None, 0.126]
    assert "0.126" in command("usage")
