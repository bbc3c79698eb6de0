"""A model of what voicepass uses of ElevenLabs: single-use URLs, statuses and the list. It counts every call."""

import asyncio
import bisect
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from tests.conftest import AGENT_ID, signed_url
from voicepass.elevenlabs import ElevenLabs
from voicepass.elevenlabs.answers import ConversationsPage
from voicepass.errors import ConversationUnknown
from voicepass.model import Agent, Credential, Settlement, Transport

URL_SECONDS: Final = 900.0
LONGEST_SECONDS: Final = 600.0
"""The agent's maximum duration, after which ElevenLabs ends the conversation."""
PAGE_ROWS: Final = 100
_INITIATED_SECONDS: Final = 1.0
"""How long the status of a conversation stays `initiated` after it was opened."""

CallKind = str
Deliver = Callable[[Settlement], Awaitable[None]]


class UrlRefusedError(Exception):
    """The URL was opened before, or is too old: close code 3000."""


@dataclass(kw_only=True, eq=False)
class Conversation:
    """One signed URL and its conversation. `user_id` is the first user to whom voicepass gave it."""

    conversation_id: str
    url: str
    expires_at: float
    user_id: str | None = None
    opened_at: float | None = None
    ended_at: float | None = None
    done_at: float = math.inf
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)

    def is_open(self) -> bool:
        return self.opened_at is not None and self.ended_at is None

    def can_be_opened(self, now: float) -> bool:
        return self.opened_at is None and now <= self.expires_at

    def seconds(self, now: float) -> float:
        """Return how long it has lasted."""
        if self.opened_at is None:
            return 0.0
        return (now if self.ended_at is None else self.ended_at) - self.opened_at

    @property
    def reported_seconds(self) -> int:
        return math.ceil(self.seconds(self.done_at))


class ElevenLabsModel(ElevenLabs):
    """The model. `clock` is the wall time. `deliver` receives the post-call webhook; None means no webhook."""

    def __init__(self, *, clock: Callable[[], float], chance: random.Random, deliver: Deliver | None) -> None:
        self.calls: Counter[CallKind] = Counter()
        self.asked_about: Counter[str] = Counter()
        """The number of lookups and of the reconciler's single calls, by the conversation's user."""
        self.conversations_by_id: dict[str, Conversation] = {}
        self._by_url: dict[str, Conversation] = {}
        self._opened: list[Conversation] = []
        self._clock = clock
        self._chance = chance
        self._deliver = deliver
        self._tasks: set[asyncio.Task[None]] = set()

    # Called by voicepass.

    async def fetch_credential(self, agent: Agent, transport: Transport, *, only_if_idle: bool = False) -> Credential:
        assert not only_if_idle
        assert (agent.agent_id, transport) == (AGENT_ID, Transport.WEBSOCKET)
        self.calls["signed URL"] += 1
        await asyncio.sleep(self._chance.uniform(0.1, 0.4))
        conversation_id = f"conv_{len(self.conversations_by_id)}"
        created = Conversation(
            conversation_id=conversation_id,
            url=signed_url(conversation_id=conversation_id),
            expires_at=self._clock() + URL_SECONDS,
        )
        self.conversations_by_id[conversation_id] = self._by_url[created.url] = created
        return Credential(secret=created.url, conversation_id=conversation_id, expires_at=created.expires_at)

    async def fetch_conversation(
        self, agent_base_url: str, conversation_id: str, *, is_lookup: bool = False
    ) -> dict[str, object]:
        assert agent_base_url
        conversation = self.conversations_by_id[conversation_id]
        self.calls["lookup" if is_lookup else "single conversation"] += 1
        self.asked_about[conversation.user_id or ""] += 1
        await asyncio.sleep(self._chance.uniform(0.1, 0.3))
        status = self._status(conversation)
        if conversation.opened_at is None and int(conversation_id.removeprefix("conv_")) % 2:
            raise ConversationUnknown  # for unopened ones ElevenLabs documents neither answer, so return both
        metadata: dict[str, object] = {"call_duration_secs": conversation.reported_seconds if status == "done" else 0}
        if conversation.opened_at is not None:
            metadata["start_time_unix_secs"] = int(conversation.opened_at)
        return {
            "conversation_id": conversation_id,
            "status": status,
            "user_id": conversation.user_id,
            "metadata": metadata,
        }

    async def list_conversations(
        self, agent_base_url: str, agent_id: str, *, since: float, until: float, cursor: str = ""
    ) -> ConversationsPage:
        assert (bool(agent_base_url), agent_id) == (True, AGENT_ID)
        self.calls["list"] += 1
        await asyncio.sleep(self._chance.uniform(0.2, 0.6))
        first = bisect.bisect_left(self._opened, since, key=_read_start)
        end = bisect.bisect_right(self._opened, until, key=_read_start)
        start = first + int(cursor or 0)
        rows = [self._row(listed) for listed in self._opened[start : min(start + PAGE_ROWS, end)]]
        next_start = start + PAGE_ROWS
        return ConversationsPage(rows, str(next_start - first) if next_start < end else "")

    # Called by simulated browsers.

    def open(self, url: str) -> Conversation:
        """Open the conversation of a signed URL. Raises UrlRefusedError."""
        opened = self._by_url[url]
        if not opened.can_be_opened(self._clock()):
            raise UrlRefusedError
        opened.opened_at = self._clock()
        self._opened.append(opened)
        self._start(self._run(opened))
        return opened

    def hang_up(self, conversation: Conversation) -> None:
        """End a conversation. A conversation that has ended does not change."""
        conversation.has_ended.set()

    def drop(self, conversation: Conversation, *, notices_after: float) -> None:
        """Disconnect without a close frame. ElevenLabs ends the conversation `notices_after` seconds later."""

        async def notice() -> None:
            await asyncio.sleep(notices_after)
            conversation.has_ended.set()

        self._start(notice())

    async def aclose(self) -> None:
        """Wait until every conversation is over and delivered."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _run(self, conversation: Conversation) -> None:
        try:
            async with asyncio.timeout(LONGEST_SECONDS):
                await conversation.has_ended.wait()
        except TimeoutError:
            conversation.has_ended.set()
        conversation.ended_at = self._clock()
        conversation.done_at = conversation.ended_at + self._chance.uniform(2, 20)
        if self._deliver is not None:
            await asyncio.sleep(conversation.done_at - self._clock() + self._chance.uniform(0.5, 5))
            await self._deliver(
                Settlement(
                    conversation_id=conversation.conversation_id,
                    seconds=conversation.reported_seconds,
                    cost=7,
                    user_id=conversation.user_id,
                    source="webhook",
                )
            )

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()

    def _status(self, conversation: Conversation) -> str:
        now = self._clock()
        if conversation.opened_at is None or now < conversation.opened_at + _INITIATED_SECONDS:
            return "initiated"
        if conversation.ended_at is None:
            return "in-progress"
        return "done" if now >= conversation.done_at else "processing"

    def _row(self, conversation: Conversation) -> dict[str, object]:
        status = self._status(conversation)
        return {
            "conversation_id": conversation.conversation_id,
            "agent_id": AGENT_ID,
            "status": status,
            "start_time_unix_secs": int(_read_start(conversation)),
            "call_duration_secs": conversation.reported_seconds if status == "done" else 0,
        }


def _read_start(conversation: Conversation) -> float:
    assert conversation.opened_at is not None
    return conversation.opened_at
