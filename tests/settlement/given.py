"""What the tests of settlement share: a granted pass, a fake provider, and the emulator over real sockets."""

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from typing import Any

from elevenlabs_emulator import EmulatedAgent, Emulator, create_emulator
from tests.canaries import API_KEY
from tests.conftest import AGENT_ID, NOW, TOKEN_ISSUER
from tests.servers import running
from voicepass.elevenlabs import ElevenLabs, Workspace
from voicepass.elevenlabs.answers import ConversationsPage
from voicepass.ledger import Ledger
from voicepass.model import Clock, Credential, Reservation, Transport
from voicepass.outbound import http_transport
from voicepass.settlement import Bypasses, Observer, Settlements
from voicepass.telemetry.lines import notify

HERE = "https://here"


async def grant(ledger: Ledger, conversation_id: str = "conv_1", *, agent_id: str = AGENT_ID) -> None:
    reservation = Reservation(
        pass_id=f"pass of {conversation_id}",
        request_id="r-1",
        token_issuer=TOKEN_ISSUER,
        user_id="u-1",
        agent_alias="default",
        agent_id=agent_id,
        transport=Transport.WEBSOCKET,
        seconds=600,
    )
    await ledger.reserve(reservation, [])
    await ledger.grant(reservation, Credential(secret="s", conversation_id=conversation_id, expires_at=None))


def make_settlements(
    ledger: Ledger, clock: Clock, *observers: Observer, bypasses: list[str] | None = None
) -> Settlements:
    """Make the settlements. `bypasses` collects the reason of each conversation without a pass."""
    count = ([] if bypasses is None else bypasses).append
    return Settlements(
        ledger=ledger,
        observe=partial(notify, observers),
        bypasses=Bypasses(agent_ids=[AGENT_ID], count=count),
        clock=clock,
    )


def make_record(status: str, **metadata: object) -> dict[str, object]:
    return {"status": status, "user_id": "u-1", "metadata": metadata}


def make_row(
    conversation_id: str, status: str, seconds: object = 0, *, began: float = NOW, **facts: Any
) -> dict[str, Any]:
    """Make a row of the list of conversations, as ElevenLabs sends it."""
    known = {"agent_id": AGENT_ID, "start_time_unix_secs": int(began), "message_count": 2, "cost": 7}
    return {"conversation_id": conversation_id, "status": status, "call_duration_secs": seconds} | known | facts


class FakeProvider(ElevenLabs):
    """A provider that returns the given records and pages, raises a record that is an exception, and lists each call.

    `pages` are the pages of the list of conversations, which is empty by default.
    """

    def __init__(
        self,
        accounts: Mapping[str, object] | None = None,
        *,
        default: object = None,
        pages: list[list[dict[str, Any]]] | None = None,
        listing: Exception | None = None,
    ) -> None:
        self.asked_about: list[str] = []
        self.asked_by_lookups: list[str] = []
        self.listed: list[tuple[float, float]] = []
        self._accounts = accounts or {}
        self._default = default if default is not None else {"status": "in-progress"}
        self.pages: list[list[dict[str, Any]]] = pages or [[]]
        self._listing = listing

    async def fetch_conversation(
        self, agent_base_url: str, conversation_id: str, *, is_lookup: bool = False
    ) -> dict[str, object]:
        assert agent_base_url
        self.asked_about.append(conversation_id)
        if is_lookup:
            self.asked_by_lookups.append(conversation_id)
        answer = self._accounts.get(conversation_id, self._accounts.get(agent_base_url, self._default))
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, dict)
        return answer

    async def list_conversations(
        self, agent_base_url: str, agent_id: str, *, since: float, until: float, cursor: str = ""
    ) -> ConversationsPage:
        assert agent_base_url
        assert agent_id
        self.listed.append((since, until))
        if self._listing is not None:
            raise self._listing
        number = int(cursor or 0)
        is_last = number == len(self.pages) - 1
        return ConversationsPage(list(self.pages[number]), "" if is_last else str(number + 1))


@contextlib.contextmanager
def run_emulator(*permissions: str) -> Iterator[tuple[Emulator, str]]:
    """Run the emulator over real sockets, with one key that may write and has these permissions."""
    emulator = Emulator(
        agents=[EmulatedAgent(agent_id=AGENT_ID)], api_keys={API_KEY: frozenset({"convai_write", *permissions})}
    )
    with running(lambda _url: create_emulator(emulator)) as url:
        yield emulator, url


@contextlib.asynccontextmanager
async def open_provider(url: str, clock: Clock, *api_keys: str) -> AsyncIterator[ElevenLabs]:
    async with http_transport(connect_seconds=4) as transport:
        workspace = Workspace(base_url=url, api_keys=api_keys or (API_KEY,))
        provider = ElevenLabs(transport=transport, workspaces=[workspace], deadline_seconds=4, max_calls=8, clock=clock)
        yield provider
        await provider.aclose()
