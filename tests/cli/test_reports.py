"""The command line over the ledger, run as people run it, on a ledger with a known past."""

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
class Desk:
    """A folder with a ledger, and the command line in it."""

    folder: Path

    def __call__(
        self, *arguments: str, code: int = 0, columns: int = 200, settings: Mapping[str, str] = ENVIRONMENT
    ) -> str:
        environment = {**settings, "VOICEPASS_DATABASE_URL": "sqlite:///ledger.db", "COLUMNS": str(columns)}
        ended = run(*arguments, cwd=self.folder, environment=environment)
        assert ended.returncode == code, ended.stderr
        return ended.stdout + ended.stderr

    def hand_out(
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
def desk(tmp_path: Path) -> Desk:
    """u-1 talked for 84 seconds, u-2 holds an open pass, =u-3 is a user id that a spreadsheet would run."""

    desk = Desk(tmp_path)
    for number, user_id in enumerate(("u-1", "u-2", "=u-3"), start=1):
        desk.hand_out(user_id, number=number, conversation_id=f"conv_{number}")

    async def settle() -> None:
        async with open_sqlite(str(tmp_path / "ledger.db"), clock=time.time) as ledger:
            told = Settlement(conversation_id="conv_1", seconds=84, cost=12, user_id="mallory", source="webhook")
            await ledger.settle(told)

    anyio.run(settle)
    return desk


def test_usage_shows_who_used_most(desk: Desk) -> None:
    rows = json.loads(desk("usage", "--json"))
    table = desk("usage")

    used = {row["user_id"]: (row["passes"], row["minutes"]) for row in rows}
    assert used == {"=u-3": (1, 10.0), "u-2": (1, 10.0), "u-1": (1, 1.4)}
    assert rows[-1]["user_id"] == "u-1"
    assert "https://login.example" in table


def test_usage_of_one_user_shows_each_limit(desk: Desk) -> None:
    rows = {row["limit"]: row for row in json.loads(desk("usage", "--user", "u-1", "--json"))}

    assert (rows["user_passes_per_day"]["used"], rows["user_passes_per_day"]["most"]) == (1, 200)
    assert (rows["user_minutes_per_day"]["used"], rows["user_minutes_per_day"]["unit"]) == (84, "seconds")
    assert rows["user_open_conversations"]["used"] == 0


def test_conversations_shows_the_latest_passes_and_their_states(desk: Desk) -> None:
    everyone = json.loads(desk("conversations", "--json"))
    mine = json.loads(desk("conversations", "--user", "u-1", "--json"))
    table = desk("conversations")

    assert [row["conversation_id"] for row in everyone] == ["conv_3", "conv_2", "conv_1"]
    assert [(row["state"], row["seconds"], row["cost"], row["identity_mismatch"]) for row in mine] == [
        ("settled", 84, 12, True)
    ]
    assert "conv_2" in table
    assert "open" in table


def test_a_narrow_terminal_shows_the_ids_of_conversations_whole(desk: Desk) -> None:
    conversation_id = "conv_creankcqzxcta0x522wyfzd0m1kf"  # as long as ElevenLabs makes them
    desk.hand_out("6f1c2a34-9a6e-4a53-8b0e-2d6a6d1c7f10", number=4, conversation_id=conversation_id)

    table = desk("conversations", columns=80)

    assert conversation_id in table
    assert max(len(line) for line in table.splitlines()) <= 80


def test_an_export_holds_every_pass_and_no_secret(desk: Desk) -> None:
    desk("export", "all.csv")
    lines = desk("export", "-", "--format", "jsonl").splitlines()

    rows = list(csv.DictReader(io.StringIO((desk.folder / "all.csv").read_text())))
    assert [row["pass_id"] for row in rows] == [json.loads(line)["pass_id"] for line in lines] == ["p-1", "p-2", "p-3"]
    assert rows[2]["user_id"] == "'=u-3", "a spreadsheet would run it"
    assert json.loads(lines[2])["user_id"] == "=u-3"
    assert "cvtkn_" not in (desk.folder / "all.csv").read_text()


def test_an_export_goes_to_standard_output_if_no_file_is_named(desk: Desk) -> None:
    assert desk("export") == desk("export", "-") != ""
    assert desk("export", "--format", "jsonl") == desk("export", "-", "--format", "jsonl")


@pytest.mark.parametrize("option", ["--limit", "--most"])
def test_limit_and_most_give_the_number_of_rows(desk: Desk, option: str) -> None:
    assert len(json.loads(desk("usage", option, "2", "--json"))) == 2
    assert len(json.loads(desk("conversations", option, "1", "--json"))) == 1


def test_an_export_of_an_empty_ledger_has_its_header_line(desk: Desk) -> None:
    full = desk("export", "-").splitlines()
    with sqlite3.connect(desk.folder / "ledger.db") as ledger:
        ledger.execute("DELETE FROM passes")
    ledger.close()

    empty, lines = desk("export", "-").splitlines(), desk("export", "-", "--format", "jsonl")

    assert len(full) == 4
    assert (empty, lines) == (full[:1], "")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_spreadsheet_runs_a_cell_of_an_export(desk: Desk, start: str) -> None:
    desk.hand_out(f"{start}1+2", number=4, conversation_id="conv_4")

    desk("export", "all.csv")

    rows = list(csv.DictReader(io.StringIO((desk.folder / "all.csv").read_text())))
    shown = {"\t": "\\t", "\r": "\\r"}.get(start, start)
    assert rows[3]["user_id"] == f"'{shown}1+2"


def test_no_report_holds_a_character_that_steers_a_terminal(desk: Desk) -> None:
    hostile = "u\x1b[31m\x1b]0;title\x07\r\n\x00\x7f\x9b2J\u202e-\u200d4"
    desk.hand_out(hostile, number=4, conversation_id="conv_4")
    desk("block", "user", hostile)
    extended = desk("extend", "user", hostile, "--minutes", "1", "--until", "2030-12-31")

    reports = [["export", "-"], ["export", "-", "--format", "jsonl"], ["conversations"], ["usage"], ["blocks"]]
    reports += [["conversations", "--json"], ["usage", "--json"], ["blocks", "--json"]]
    reports += [["extensions"], ["unblock", "user", hostile], ["extend", "user", hostile, "--revoke"]]
    shown = [desk(*arguments).replace("\r\n", "\n") for arguments in reports] + [extended]

    steering = {character for character in hostile if not character.isprintable()} - {"\n", "\u200d"}
    assert [text for text in shown if not steering.isdisjoint(text)] == []
    assert "u\\x1b[31m" in shown[0]
    assert json.loads(shown[1].splitlines()[3])["user_id"] == hostile


def test_blocks_shows_each_block_until_it_is_removed(desk: Desk) -> None:
    desk("block", "user", "u-1", "--issuer", "https://login.example")
    desk("block", "everyone")
    blocked = json.loads(desk("blocks", "--json"))
    desk("unblock", "user", "u-1", "--issuer", "https://login.example")
    desk("unblock", "everyone")

    assert blocked == [
        {"kind": "everyone", "key": "", "token_issuer": ""},
        {"kind": "user", "key": "u-1", "token_issuer": "https://login.example"},
    ]
    assert json.loads(desk("blocks", "--json")) == []
    assert "nothing yet" in desk("blocks")


def test_block_and_unblock_each_print_one_line(desk: Desk) -> None:
    assert desk("block", "agent", "default") == "blocked: agent default\n"
    assert desk("unblock", "agent", "default") == "unblocked: agent default\n"
    assert desk("unblock", "agent", "default") == "was not blocked: agent default\n"
    assert desk("block", "user", "u-1", "--issuer", "https://i.example") == "blocked: user u-1 of https://i.example\n"
    assert (
        desk("unblock", "user", "u-1", "--issuer", "https://i.example") == "unblocked: user u-1 of https://i.example\n"
    )
    assert desk("block", "everyone") == "blocked: everyone\n"


def test_unblock_says_which_other_block_the_user_still_has(desk: Desk) -> None:
    desk("block", "user", "u-1")
    desk("block", "user", "u-1", "--issuer", "https://i.example")
    desk("block", "user", "u-2")

    assert desk("unblock", "user", "u-1", "--issuer", "https://i.example").splitlines() == [
        "unblocked: user u-1 of https://i.example",
        "still blocked: leave out --issuer",
    ]
    assert desk("unblock", "user", "u-1") == "unblocked: user u-1\n"


def test_a_user_is_extended_listed_and_revoked(desk: Desk) -> None:
    arguments = ("--minutes", "30", "--until", "2030-12-31")
    known = desk("extend", "user", "u-1", *arguments)
    unknown = desk("extend", "user", "u-7", "--issuer", "https://login.example", *arguments)
    listed = json.loads(desk("extensions", "--json"))
    revoked = [desk("extend", "user", "u-1", "--revoke") for _ in range(2)]

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


def test_an_extension_that_makes_no_sense_is_explained(desk: Desk) -> None:
    for arguments in (
        ["--minutes", "30"],
        ["--minutes", "0", "--until", "2030-12-31"],
        ["--minutes", "30", "--until", "2020-12-31"],
        ["--minutes", "30", "--until", "tomorrow"],
    ):
        desk("extend", "user", "u-1", *arguments, code=2)

    for user_id in ("", "u" * 256):  # the service could not list it
        desk("extend", "user", user_id, "--minutes", "30", "--until", "2030-12-31", code=2)

    assert json.loads(desk("extensions", "--json")) == []


def test_an_agent_that_the_policy_lacks_is_not_blocked_where_the_policy_can_be_read(desk: Desk) -> None:
    refused = desk("block", "agent", "seler", code=2)
    desk("block", "agent", "seler", settings=CLEAN)
    unblocked = desk("unblock", "agent", "seler")

    assert "name one of: default" in refused
    assert unblocked == "unblocked: agent seler\n"


@pytest.mark.parametrize("arguments", [["user"], ["everyone", "u-1"], ["agent", "a", "--issuer", "i"], ["planet", "x"]])
def test_a_block_that_makes_no_sense_is_explained(desk: Desk, arguments: list[str]) -> None:
    desk("block", *arguments, code=2)

    assert json.loads(desk("blocks", "--json")) == []


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


def test_a_report_cannot_read_a_ledger_in_memory_and_says_so(tmp_path: Path) -> None:
    ended = run("usage", cwd=tmp_path, environment=CLEAN | {"VOICEPASS_DATABASE_URL": "sqlite://"})

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("VOICEPASS_DATABASE_URL is in memory")


def test_a_ledger_that_cannot_be_opened_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "voicepass.db").write_text("not a database")

    ended = run("usage", cwd=tmp_path, environment=CLEAN)

    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("the ledger does not answer: ")


def test_a_block_in_the_wrong_folder_says_so_and_makes_no_ledger_there(tmp_path: Path) -> None:
    ended = run("block", "user", "u-1", cwd=tmp_path, environment=CLEAN)

    assert ended.returncode == 1
    assert "set VOICEPASS_DATABASE_URL as the service has it" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_id_that_looks_like_markup_is_shown_as_it_is(desk: Desk) -> None:
    desk("block", "user", "a[/b]")

    assert "a[/b]" in desk("blocks")


def test_usage_is_readable_at_80_columns_and_cuts_no_id(desk: Desk) -> None:
    ids = ["6f1c2a34-9a6e-4a53-8b0e-2d6a6d1c7f10", "auth0|" + "x" * 90]
    for number, user_id in enumerate(ids, start=4):
        desk.hand_out(user_id, number=number, conversation_id=f"conv_{number}")

    shown = desk("usage", columns=80)

    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith(f"{ids[0]} ") for line in lines)
    assert ids[1] in "".join(line.split("  ")[0].strip() for line in lines)


def test_usage_shows_the_limits_of_the_plan_that_this_users_latest_pass_had(desk: Desk) -> None:
    plan = '[[limits.plan]]\nname = "pro"\nwhen = { plan = "pro" }\nminutes_per_day = 90\n'
    (desk.folder / "policy.toml").write_text(plan)
    settings = {**ENVIRONMENT, "VOICEPASS_POLICY_FILE": "policy.toml"}
    desk.hand_out("u-2", number=4, conversation_id="conv_4", plan="pro")
    desk.hand_out("u-2", number=5, conversation_id="conv_5", issuer="https://other.example")

    limits = json.loads(desk("usage", "--user", "u-2", "--json", settings=settings))

    assert next(each["most"] for each in limits if each["limit"] == "user_minutes_per_day") == 90 * 60


def test_usage_draws_a_month_and_shows_how_near_each_is_to_a_limit(desk: Desk) -> None:
    (desk.folder / "policy.toml").write_text(
        "[limits.agent]\nminutes_per_day = 30\n[limits.all]\npasses_per_day = 12\n"
    )
    settings = {**ENVIRONMENT, "VOICEPASS_POLICY_FILE": "policy.toml"}

    lines = desk("usage", columns=80, settings=settings).splitlines()
    without_settings = desk("usage", columns=80, settings=CLEAN)

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


def test_usage_prints_csv_with_the_columns_of_the_json(desk: Desk) -> None:
    rows = json.loads(desk("usage", "--json"))
    lines = list(csv.DictReader(io.StringIO(desk("usage", "--csv"))))

    assert [set(row) for row in lines] == [set(row) for row in rows]
    assert [row["user_id"] for row in lines] == [
        "'=u-3" if row["user_id"] == "=u-3" else row["user_id"] for row in rows
    ]
    assert desk("usage", "--user", "u-1", "--csv").startswith("limit,used,most,unit,resets_at\nuser_")


def test_usage_and_an_export_show_what_conversations_cost_in_dollars(desk: Desk) -> None:
    desk.hand_out("u-1", number=4, conversation_id="conv_4")

    async def settle() -> None:
        async with open_sqlite(str(desk.folder / "ledger.db"), clock=time.time) as ledger:
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

    costs = {row["user_id"]: row["cost_fiat"] for row in json.loads(desk("usage", "--json"))}
    exported = [json.loads(line)["cost_fiat"] for line in desk("export", "--format", "jsonl").splitlines()]
    assert costs == {"u-1": 0.126, "u-2": None, "=u-3": None}
    assert exported == [None, None, None, 0.126]
    assert "0.126" in desk("usage")
