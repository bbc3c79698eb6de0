"""`voicepass forget`: what it removes, what it refuses, and what a second run still deletes."""

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from anyio.from_thread import start_blocking_portal

from elevenlabs_emulator import EmulatedAgent, Emulator, Fault, create_emulator
from elevenlabs_emulator.accounts import Account
from elevenlabs_emulator.records import RecordedConversation
from tests.canaries import API_KEY
from tests.cli.test_cli import CLEAN, ENVIRONMENT
from tests.cli.test_reports import CommandLine
from tests.servers import free_port, running
from voicepass.ledger.sqlite import open_sqlite
from voicepass.model import Settlement

AGENT = EmulatedAgent(agent_id="agent_1")
NOTHING_FOUND = "no pass of this user is left: the user was forgotten before, or the id is wrong"


@pytest.fixture
def command(tmp_path: Path) -> CommandLine:
    """u-1 had three conversations, which have ended; u-2 has an open one."""
    command = CommandLine(tmp_path)
    for number in (1, 2, 3):
        command.add_pass("u-1", number=number, conversation_id=f"conv_{number}")
    command.add_pass("u-2", number=4, conversation_id="conv_4")

    async def settle() -> None:
        async with open_sqlite(str(tmp_path / "ledger.db"), clock=time.time) as ledger:
            for number in (1, 2, 3):
                over = Settlement(
                    conversation_id=f"conv_{number}", seconds=84, cost=12, user_id="u-1", source="webhook"
                )
                await ledger.settle(over)

    anyio.run(settle)
    return command


@pytest.fixture
def emulator() -> Emulator:
    """ElevenLabs with the four conversations, and a key that may write."""
    emulator = Emulator(agents=[AGENT], api_keys={API_KEY: frozenset({"convai_write"})})
    for number in (1, 2, 3, 4):
        record = RecordedConversation(query={}, signed=True, conversation_id=f"conv_{number}")
        emulator.open_account(AGENT, record, "signed_url")
    return emulator


@pytest.fixture
def settings(emulator: Emulator) -> Iterator[dict[str, str]]:
    with running(lambda _url: create_emulator(emulator)) as url:
        yield ENVIRONMENT | {"ELEVENLABS_AGENT_ID": "agent_1", "ELEVENLABS_BASE_URL": url}


def test_after_forget_no_file_holds_the_user_even_while_the_service_runs(command: CommandLine) -> None:
    path = str(command.folder / "ledger.db")
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(open_sqlite(path, clock=time.time)) as service,
    ):
        portal.call(service.check)
        printed = command("forget", "user", "u-1", settings=CLEAN)
        files = {file.name: file.read_bytes() for file in command.folder.iterdir()}
        portal.call(service.check)

    assert printed == "forgotten: 3 passes of user u-1\n"
    assert set(files) == {"ledger.db", "ledger.db-wal", "ledger.db-shm"}
    assert [name for name, content in files.items() if b"u-1" in content] == []
    assert b"u-2" in files["ledger.db"]
    assert command("conversations", "--user", "u-1") == "nothing yet\n"
    assert command("export").count("conv_") == 4


def test_a_user_with_an_open_conversation_is_forgotten_only_with_now_which_blocks_the_user(
    command: CommandLine,
) -> None:
    refused = command("forget", "user", "u-2", code=1)
    before = command("conversations", "--user", "u-2", "--json")
    forgotten = command("forget", "user", "u-2", "--now")

    assert forgotten == "forgotten: 1 passes of user u-2\nblocked: user u-2\n"
    assert refused.startswith("a conversation is open, or may begin, until ")
    assert "conv_4" in before
    assert command("conversations", "--user", "u-2") == "nothing yet\n"
    assert '"key": "sha256:' in command("blocks", "--json")
    assert b"u-2" not in (command.folder / "ledger.db").read_bytes()
    assert command("unblock", "user", "u-2").splitlines() == [
        "was not blocked: user u-2",
        "still blocked: add --issuer https://login.example",
    ]
    assert command("unblock", "user", "u-2", "--issuer", "https://login.example").startswith("unblocked: ")


class AccountsThenOutage(dict[str, Account]):
    """The emulator's conversations. After the first deletion, ElevenLabs answers 503."""

    def __init__(self, emulator: Emulator) -> None:
        super().__init__(emulator.accounts)
        self._emulator = emulator

    def __delitem__(self, conversation_id: str) -> None:
        super().__delitem__(conversation_id)
        self._emulator.faults["account"] = Fault(target="account", status=503)


def test_conversations_are_deleted_at_elevenlabs_also_after_an_outage_in_the_middle(
    command: CommandLine, emulator: Emulator, settings: dict[str, str]
) -> None:
    def forget_at_elevenlabs(code: int, **more: str) -> list[str]:
        arguments = ("forget", "user", "u-1", "--at-elevenlabs")
        return command(*arguments, code=code, settings=settings | more).splitlines()

    emulator.accounts = AccountsThenOutage(emulator)
    outage = forget_at_elevenlabs(1)
    unreachable = forget_at_elevenlabs(1, ELEVENLABS_BASE_URL=f"http://127.0.0.1:{free_port()}")
    other_agent = forget_at_elevenlabs(1, ELEVENLABS_AGENT_ID="agent_2")
    emulator.faults.clear()
    emulator.accounts = {"conv_2": emulator.accounts["conv_2"], "conv_4": emulator.accounts["conv_4"]}
    done = forget_at_elevenlabs(0)

    left = [line.split(": ", 1) for line in outage if line.startswith("conv_")]
    assert outage[0] == "forgotten: 3 passes of user u-1"
    assert [line[0] for line in left] == ["conv_2", "conv_3"]
    assert "503" in left[0][1]
    assert [line[:7] for line in unreachable if "while asking 127.0.0.1" in line] == ["conv_2:", "conv_3:"]
    assert other_agent[-2:] == [f"conv_{number}: the policy has no agent agent_1" for number in (2, 3)]
    assert done == ["forgotten: 0 passes of user u-1", NOTHING_FOUND]
    assert set(emulator.accounts) == {"conv_4"}, "conv_3 was gone before; the last run deleted conv_2"


def test_a_mistyped_id_is_not_taken_for_a_forgotten_user(command: CommandLine) -> None:
    printed = command("forget", "user", "u-l", settings=CLEAN)

    assert printed.splitlines() == ["forgotten: 0 passes of user u-l", NOTHING_FOUND]


def test_a_conversation_that_may_be_open_is_left_for_a_later_run(
    command: CommandLine, emulator: Emulator, settings: dict[str, str]
) -> None:
    printed = command("forget", "user", "u-2", "--now", "--at-elevenlabs", code=1, settings=settings)

    assert printed.splitlines()[-1] == "conv_4: it is open, or may still begin"
    assert "conv_4" in emulator.accounts


def test_a_mistake_in_the_settings_stops_the_command_before_it_forgets(command: CommandLine) -> None:
    command("forget", "user", "u-1", "--at-elevenlabs", code=1, settings=CLEAN)

    assert "conv_1" in command("conversations", "--user", "u-1")


def test_a_key_without_the_permission_is_named(
    command: CommandLine, emulator: Emulator, settings: dict[str, str]
) -> None:
    emulator.api_keys[API_KEY] = frozenset({"convai_read"})

    printed = command("forget", "user", "u-1", "--at-elevenlabs", code=1, settings=settings)

    assert "convai_write" in printed


def test_an_empty_user_id_is_refused_because_all_forgotten_users_have_it(command: CommandLine) -> None:
    command("forget", "user", "u-1")

    assert "1 to 255 characters" in command("forget", "user", "", code=2)


def test_one_of_several_users_with_the_same_id_must_be_named(command: CommandLine) -> None:
    with sqlite3.connect(command.folder / "ledger.db") as ledger:
        ledger.execute("UPDATE passes SET token_issuer = 'https://other.example' WHERE pass_id = 'p-1'")
    ledger.close()

    refused = command("forget", "user", "u-1", code=2)
    command("forget", "user", "u-1", "--issuer", "https://other.example")
    again = command(
        "forget", "user", "u-1", code=2, settings=ENVIRONMENT | {"VOICEPASS_JWT_ISSUER": "https://other.example"}
    )

    assert "https://login.example, https://other.example" in refused
    assert "https://login.example, https://other.example" in again
    assert command("conversations", "--user", "u-1").count("conv_") == 2
