"""Honest users with ten habits. None of them reaches a limit, so every refusal by a limit is wrong."""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from tests.simulation.elevenlabs_model import LONGEST_SECONDS, Conversation, UrlRefusedError
from tests.simulation.service import Service
from voicepass.errors import LimitReached

MINUTE: Final = 60.0
HOUR: Final = 3600.0
DAY: Final = 24 * HOUR

# The limits of a user, as the policy file sets them by default.
OPEN_CONVERSATIONS: Final = 3
DAY_SECONDS: Final = 60 * MINUTE
PASSES_PER_MINUTE: Final = 10
PASSES_PER_DAY: Final = 200

# The values of client.js.
RETRIES: Final = 5
PATIENCE_SECONDS: Final = 60.0


@dataclass(frozen=True, kw_only=True)
class RefusedRequest:
    """A request of an honest user that a limit refused, and the user's real use at that time."""

    user_id: str
    at: float
    limit_name: str
    retry_after_seconds: int
    open_conversations: int
    usable_urls: int
    """Passes that nobody has opened and that can still be opened."""
    used_seconds: int

    @property
    def is_wrong(self) -> bool:
        """Whether the user was below the limit. Honest users can reach it only with passes that they never opened."""
        is_of_open = self.limit_name == "user_open_conversations"
        return not is_of_open or self.open_conversations + self.usable_urls < OPEN_CONVERSATIONS


@dataclass
class Experience:
    """What happened to honest users."""

    requests: int = 0
    granted: int = 0
    refused: list[RefusedRequest] = field(default_factory=list)
    """Each refusal that the user saw, after the retries of client.js."""
    spent_urls: int = 0
    """URLs that another page of the same user had opened."""


class Person:
    """One honest user. `day_seconds` is the length of the simulated day."""

    def __init__(
        self, user_id: str, *, service: Service, chance: random.Random, experience: Experience, day_seconds: float
    ) -> None:
        self.user_id = user_id
        self.chance = chance
        self.experience = experience
        self._service = service
        self._day_seconds = day_seconds
        self._asked_at: deque[float] = deque()
        self._asked = 0
        self._conversations: dict[str, Conversation] = {}

    async def ask(self) -> Conversation | None:
        """Ask for a pass; if it is refused, record that and return None.

        Retries as client.js does: five times, and in total no longer than its time limit.
        """
        began = self._service.time.now
        for attempt in range(1, RETRIES + 2):
            await self._wait_for_rate_limit()
            self._check_honesty()
            self.experience.requests += 1
            try:
                given = await self._service.ask(self.user_id)
            except LimitReached as refusal:
                wait_seconds = refusal.retry_after_seconds or 0
                if attempt > RETRIES or self._service.time.now + wait_seconds > began + PATIENCE_SECONDS:
                    self._note(refusal)
                    break
                await asyncio.sleep(wait_seconds)
            else:
                self.experience.granted += 1
                self._conversations[given.conversation_id] = given
                return given
        return None

    async def ask_and_open(self) -> Conversation | None:
        """Ask for a pass and open it at once, as a page does; return None if that fails."""
        given = await self.ask()
        return None if given is None else await self.open(given)

    async def open(self, given: Conversation) -> Conversation | None:
        """Open a pass; return None if ElevenLabs no longer accepts its URL."""
        await self.wait(0.1, 0.5)
        try:
            return self._service.elevenlabs.open(given.url)
        except UrlRefusedError:
            self.experience.spent_urls += given.opened_at is not None
            return None

    async def talk(self, seconds: float, given: Conversation | None = None) -> None:
        """Have a conversation and end it, with the `given` pass or a new one."""
        opened = await (self.ask_and_open() if given is None else self.open(given))
        if opened is not None:
            await self._listen(opened, seconds)
            self._service.elevenlabs.hang_up(opened)

    async def talk_until_drop(self, seconds: float, *, notices_after: float) -> None:
        """Have a conversation whose connection breaks. ElevenLabs ends it `notices_after` seconds later."""
        opened = await self.ask_and_open()
        if opened is not None:
            await self._listen(opened, seconds)
            self._service.elevenlabs.drop(opened, notices_after=notices_after)

    async def wait(self, least: float, most: float) -> None:
        await asyncio.sleep(self.chance.uniform(least, most))

    async def wait_until(self, second_of_day: float) -> None:
        await asyncio.sleep(max(0.0, second_of_day - self._service.time.now))

    def choose_times(self, count: int) -> list[float]:
        """Choose times of the day, most of them near its peaks."""
        peaks = [(9.5, 1.0), (13.5, 1.5), (20.0, 2.0)]  # in hours: the middle and the width of each peak
        last = self._day_seconds - min(2 * HOUR, self._day_seconds / 2)
        chosen = [self.chance.gauss(*self.chance.choice(peaks)) / 24 * self._day_seconds for _ in range(count)]
        return sorted(min(max(0.0, time), last) for time in chosen)

    @property
    def is_day_over(self) -> bool:
        return self._service.time.now > self._day_seconds

    async def _listen(self, opened: Conversation, seconds: float) -> None:
        """Stay in the conversation for `seconds`, or until ElevenLabs ends it."""
        if seconds < LONGEST_SECONDS:
            await asyncio.sleep(seconds)
        else:
            await opened.has_ended.wait()

    async def _wait_for_rate_limit(self) -> None:
        while len(self._asked_at) == PASSES_PER_MINUTE - 1:
            if self._service.time.now - self._asked_at[0] > MINUTE + 1:
                self._asked_at.popleft()
            else:
                await asyncio.sleep(1)
        self._asked_at.append(self._service.time.now)

    def _check_honesty(self) -> None:
        """Fail if this user is about to reach a limit, because then the model is wrong."""
        self._asked += 1
        assert self._asked < PASSES_PER_DAY
        open_now = self._open_conversations()
        assert open_now < OPEN_CONVERSATIONS
        assert self._used_seconds() + open_now * LONGEST_SECONDS < DAY_SECONDS

    def _open_conversations(self) -> int:
        return sum(conversation.is_open() for conversation in self._conversations.values())

    def _used_seconds(self) -> float:
        return sum(conversation.seconds(self._service.clock()) for conversation in self._conversations.values())

    def _note(self, refusal: LimitReached) -> None:
        now = self._service.clock()
        self.experience.refused.append(
            RefusedRequest(
                user_id=self.user_id,
                at=self._service.time.now,
                limit_name=refusal.limit_name,
                retry_after_seconds=refusal.retry_after_seconds or 0,
                open_conversations=self._open_conversations(),
                usable_urls=sum(given.can_be_opened(now) for given in self._conversations.values()),
                used_seconds=int(self._used_seconds()),
            )
        )


async def have_short_conversations(person: Person) -> None:
    for time in person.choose_times(3):
        await person.wait_until(time)
        for _ in range(person.chance.randint(5, 12)):
            await person.talk(person.chance.uniform(1, 60))
            await person.wait(2, 20)


async def refresh_before_opening(person: Person) -> None:
    """Use a page that gets a pass while it loads: load it one to four times, and then talk or not."""
    for time in person.choose_times(3):
        await person.wait_until(time)
        for _ in range(person.chance.choice([1, 1, 2])):
            given = None
            for _ in range(person.chance.randint(1, 4)):
                given = await person.ask()
                await person.wait(1, 30)
            if given is not None and person.chance.random() < 0.7:
                await person.talk(person.chance.uniform(30, 240), given)
            await person.wait(MINUTE, 30 * MINUTE)


async def use_two_tabs(person: Person) -> None:
    async def use_tab() -> None:
        for _ in range(person.chance.randint(1, 3)):
            await person.wait(0, 20)
            await person.talk(person.chance.uniform(20, 180))

    for time in person.choose_times(3):
        await person.wait_until(time)
        await asyncio.gather(use_tab(), use_tab())


async def refuse_microphone_at_first(person: Person) -> None:
    """Use a page that gets the pass before it asks for the microphone. (client.js asks for the microphone first.)"""
    for time in person.choose_times(4):
        await person.wait_until(time)
        for _ in range(person.chance.randint(1, 2)):
            await person.ask()  # and refuse the microphone
            await person.wait(3, 30)
        await person.talk(person.chance.uniform(30, 480))


async def lose_connection(person: Person) -> None:
    for time in person.choose_times(2):
        await person.wait_until(time)
        for _ in range(person.chance.randint(5, 11)):
            await person.talk_until_drop(2 * MINUTE, notices_after=person.chance.uniform(2, 20))
            await person.wait(1, 4)  # client.js gets the next pass itself


async def let_phone_sleep(person: Person) -> None:
    for time in person.choose_times(3):
        await person.wait_until(time)
        if person.chance.random() < 0.3:  # the phone sleeps before the page opens its pass
            given = await person.ask()
            await asyncio.sleep(20 * MINUTE)
            if given is not None:
                await person.open(given)
        else:
            await person.talk_until_drop(person.chance.uniform(20, 240), notices_after=person.chance.uniform(10, 60))
            await asyncio.sleep(20 * MINUTE)
        await person.talk(person.chance.uniform(20, 240))


async def have_long_conversation(person: Person) -> None:
    for time in person.choose_times(1):
        await person.wait_until(time)
        for _ in range(person.chance.choice([1, 1, 1, 5])):
            await person.talk(LONGEST_SECONDS)
            await person.wait(1, 60)
        await person.talk(person.chance.uniform(30, 420))


async def mount_twice(person: Person) -> None:
    """Use a React page with its own code, which gets two passes at the same moment and opens one."""
    for time in person.choose_times(2):
        await person.wait_until(time)
        for _ in range(person.chance.randint(1, 6)):
            _, second = await asyncio.gather(person.ask(), person.ask())
            if second is not None:
                await person.talk(person.chance.uniform(10, 240), second)
            await person.wait(5, 20 * MINUTE)


async def come_back_every_hour(person: Person) -> None:
    for hour in range(8, 22):
        await person.wait_until(hour * HOUR + person.chance.uniform(0, 10 * MINUTE))
        if person.is_day_over:
            return
        await person.talk(person.chance.uniform(20, 220))


async def press_five_times(person: Person) -> None:
    """Press a button of a page with its own code: each press gets a pass, and the page opens the last one."""
    for time in person.choose_times(4):
        await person.wait_until(time)
        await asyncio.gather(person.ask(), person.ask())
        await person.wait(0.1, 1)
        await person.ask()
        await person.wait(0.1, 1)
        _, last = await asyncio.gather(person.ask(), person.ask())
        if last is not None:
            await person.talk(person.chance.uniform(20, 300), last)


HABITS: Final[dict[str, Callable[[Person], Awaitable[None]]]] = {
    "short conversations in a row": have_short_conversations,
    "a refresh before anything opens": refresh_before_opening,
    "two tabs": use_two_tabs,
    "a microphone refused at first": refuse_microphone_at_first,
    "a drop every two minutes": lose_connection,
    "a phone that sleeps for 20 minutes": let_phone_sleep,
    "one long conversation": have_long_conversation,
    "a React page that mounts twice": mount_twice,
    "comes back every hour": come_back_every_hour,
    "presses the button five times": press_five_times,
}
