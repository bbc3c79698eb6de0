"""Cheaters: five tricks to get more than three conversations at a time, or more than 60 minutes a day."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final

from tests.simulation.elevenlabs_model import LONGEST_SECONDS, URL_SECONDS, Conversation, UrlRefusedError
from tests.simulation.honest import DAY, DAY_SECONDS, HOUR, MINUTE, OPEN_CONVERSATIONS
from tests.simulation.service import Service
from voicepass.errors import LimitReached


class Cheater:
    """One cheater. It counts how often it gets more than the limits allow."""

    def __init__(self, user_id: str, *, service: Service, chance: random.Random, day_seconds: float) -> None:
        self.user_id = user_id
        self.chance = chance
        self.requests = self.refused = 0
        self.most_at_once = 0
        """The most open conversations and URLs that can still be opened, together."""
        self.beyond_open = 0
        self.beyond_minutes = 0
        """The number of new passes that it got although the minutes of the day were used up."""
        self.day_seconds = day_seconds
        self._service = service
        self._conversations: dict[str, Conversation] = {}

    @property
    def now(self) -> float:
        return self._service.time.now

    async def ask(self, instance: int | None = None) -> Conversation | None:
        self.requests += 1
        used_before = self._ended_seconds()
        try:
            given = await self._service.ask(self.user_id, instance=instance)
        except LimitReached:
            self.refused += 1
            return None
        if given.conversation_id not in self._conversations:
            self.beyond_minutes += used_before >= DAY_SECONDS
            self._conversations[given.conversation_id] = given
        self._count()
        return given

    async def ask_at_once(self, requests: int) -> list[Conversation]:
        """Send requests in parallel; return the different conversations that they get."""
        answers = await asyncio.gather(*(self.ask() for _ in range(requests)))
        return list({given.conversation_id: given for given in answers if given is not None}.values())

    def open(self, given: Conversation) -> None:
        try:
            self._service.elevenlabs.open(given.url)
        except UrlRefusedError:
            return
        self._count()

    def hang_up(self, given: Conversation) -> None:
        self._service.elevenlabs.hang_up(given)

    async def wait(self, least: float, most: float) -> None:
        await asyncio.sleep(self.chance.uniform(least, most))

    def _ended_seconds(self) -> float:
        now = self._service.clock()
        return sum(
            conversation.seconds(now)
            for conversation in self._conversations.values()
            if not conversation.is_open() and now - conversation.expires_at + URL_SECONDS < DAY
        )

    def _count(self) -> None:
        """Count what this user has open or can open now. Only a new pass or an opening can raise the count."""
        now = self._service.clock()
        at_once = sum(given.is_open() or given.can_be_opened(now) for given in self._conversations.values())
        self.most_at_once = max(self.most_at_once, at_once)
        self.beyond_open += at_once > OPEN_CONVERSATIONS


async def hoard_urls(cheater: Cheater) -> None:
    """Collect URLs for a quarter of an hour, then open all of them."""
    hoard: dict[str, Conversation] = {}
    began = cheater.now
    while cheater.now < began + URL_SECONDS + 2 * MINUTE:
        given = await cheater.ask()
        if given is not None:
            hoard[given.conversation_id] = given
        await cheater.wait(20, 90)
    for given in hoard.values():
        cheater.open(given)


async def send_parallel_requests(cheater: Cheater) -> None:
    """Send 40 requests at once, open every conversation, end none, and repeat this shortly after."""
    for _ in range(2):
        for given in await cheater.ask_at_once(40):
            cheater.open(given)
        await cheater.wait(0.1, 5)


async def never_end(cheater: Cheater) -> None:
    """Open each pass at once, end none, and ask for more."""
    for _ in range(25):
        given = await cheater.ask()
        if given is not None:
            cheater.open(given)
        await cheater.wait(5, 60)


async def alternate_tabs_and_instances(cheater: Cheater) -> None:
    """Ask the instances in turn, open at once, and end some while the next request is in flight."""
    earlier: list[Conversation] = []
    for turn in range(20):
        instance = turn % 2
        asking = asyncio.create_task(cheater.ask(instance))
        if earlier and turn % 3 == 0:
            cheater.hang_up(earlier.pop(0))
        given = await asking
        if given is not None:
            cheater.open(given)
            earlier.append(given)
        await cheater.wait(0, 20)


async def open_at_last_second(cheater: Cheater) -> None:
    """Open each URL just before it expires, never end, and ask again when voicepass releases unopened passes."""
    hoard = await cheater.ask_at_once(5)
    await asyncio.sleep(URL_SECONDS - 1 - cheater.chance.uniform(0, 1))
    for given in hoard:
        cheater.open(given)
    for seconds in (1, 2, 20, 10, 5, LONGEST_SECONDS - 40, 1, 5, 10, 60):
        await asyncio.sleep(seconds)
        for given in await cheater.ask_at_once(4):
            cheater.open(given)


TRICKS: Final[dict[str, Callable[[Cheater], Awaitable[None]]]] = {
    "hoards URLs": hoard_urls,
    "sends parallel requests": send_parallel_requests,
    "never ends": never_end,
    "alternates tabs and instances": alternate_tabs_and_instances,
    "opens at the last second": open_at_last_second,
}


async def cheat(cheater: Cheater, trick: Callable[[Cheater], Awaitable[None]]) -> None:
    """Repeat the trick a few times in the day."""
    while cheater.now < cheater.day_seconds - HOUR:
        await trick(cheater)
        await cheater.wait(10 * MINUTE, 6 * HOUR)
