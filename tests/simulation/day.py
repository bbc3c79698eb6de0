"""A simulated day with honest users and cheaters. It reports what they got, and compares the ledger with ElevenLabs."""

import asyncio
import random
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import Final

from tests.conftest import TOKEN_ISSUER
from tests.simulation.cheaters import TRICKS, Cheater, cheat
from tests.simulation.elevenlabs_model import Conversation, ElevenLabsModel
from tests.simulation.honest import DAY, HABITS, HOUR, Experience, Person, RefusedRequest
from tests.simulation.service import OpenLedger, Service
from tests.simulation.virtual_time import VirtualTime, run
from voicepass.model import IssuedPass

SETTLING_SECONDS: Final = HOUR
"""The time after the day in which every pass must be settled."""


@dataclass(frozen=True, kw_only=True)
class Crowd:
    """The number of users, and the length of the day."""

    honest: int
    cheaters: int
    day_seconds: float = DAY


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Counts for one habit: granted passes (including those returned again), and calls to ElevenLabs for them.

    `asked_about` counts lookups, and the reconciler's questions about single conversations.
    """

    handed_out: int
    signed_urls: int
    asked_about: int

    @property
    def per_pass(self) -> float:
        """The calls per pass without readings of the list, which serve all users."""
        return (self.signed_urls + self.asked_about) / max(1, self.handed_out)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of the day."""

    experience: dict[str, Experience]
    """By habit."""
    calls_by_habit: dict[str, Calls]
    cheaters: list[Cheater]
    calls_of_cheaters: Calls
    lists: int
    mistakes: list[str]
    """Each difference between the ledger and what happened at ElevenLabs."""

    @property
    def refused(self) -> list[RefusedRequest]:
        """Every refusal that an honest user got."""
        return [refused for each in self.experience.values() for refused in each.refused]

    @property
    def wrongly_refused(self) -> list[RefusedRequest]:
        return [refused for refused in self.refused if refused.is_wrong]

    @property
    def calls_per_pass(self) -> float:
        """The calls per pass of honest users, including every reading of the list."""
        return self._per_pass(list(self.calls_by_habit.values()))

    @property
    def calls_per_pass_with_cheaters(self) -> float:
        return self._per_pass([*self.calls_by_habit.values(), self.calls_of_cheaters])

    @property
    def beyond_limits(self) -> int:
        return sum(cheater.beyond_open + cheater.beyond_minutes for cheater in self.cheaters)

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the table: names and counts."""
        honest, cheaters = list(self.calls_by_habit.values()), self.cheaters
        everyone = [*honest, self.calls_of_cheaters]
        return [
            ("requests of honest users", f"{sum(each.requests for each in self.experience.values()):,}"),
            ("refused although no limit was reached", f"{len(self.wrongly_refused):,}"),
            (
                "refused while three passes that nobody opened were still valid",
                f"{len(self.refused) - len(self.wrongly_refused):,}",
            ),
            ("URLs that another page had opened", f"{sum(each.spent_urls for each in self.experience.values()):,}"),
            ("requests of cheaters", f"{sum(each.requests for each in cheaters):,}"),
            ("refused", f"{sum(each.refused for each in cheaters):,}"),
            ("most that a cheater had open or could open at once", f"{max(each.most_at_once for each in cheaters)}"),
            ("conversations of cheaters beyond a limit", f"{self.beyond_limits}"),
            ("passes handed out", f"{sum(each.handed_out for each in everyone):,}"),
            ("signed URLs fetched for them", f"{sum(each.signed_urls for each in everyone):,}"),
            ("conversations of honest users asked about", f"{sum(each.asked_about for each in honest):,}"),
            ("conversations of cheaters asked about", f"{self.calls_of_cheaters.asked_about:,}"),
            ("pages of the list", f"{self.lists:,}"),
            ("calls for each pass of honest users", f"{self.calls_per_pass:.2f}"),
            ("calls for each pass, cheaters too", f"{self.calls_per_pass_with_cheaters:.2f}"),
        ]

    def _per_pass(self, groups: list[Calls]) -> float:
        calls = sum(each.signed_urls + each.asked_about for each in groups) + self.lists
        return calls / sum(each.handed_out for each in groups)


def simulate(crowd: Crowd, *, seed: int, has_webhook: bool, open_ledger: OpenLedger, instances: int) -> Report:
    """Run the day in virtual time."""
    time = VirtualTime()
    service = Service(time=time, chance=random.Random(f"{seed} service"), has_webhook=has_webhook)

    async def live() -> Report:
        async with service.run_instances(open_ledger, instances=instances):
            return await _run_day(crowd, seed, service)

    return run(time, live)


async def _run_day(crowd: Crowd, seed: int, service: Service) -> Report:
    experience = {habit: Experience() for habit in HABITS}
    users: dict[str, set[str]] = {habit: set() for habit in HABITS}
    cheaters = []
    async with asyncio.TaskGroup() as group:
        for number in range(crowd.honest):
            habit = list(HABITS)[number % len(HABITS)]
            person = Person(
                f"honest-{number}",
                service=service,
                chance=random.Random(f"{seed} honest {number}"),
                experience=experience[habit],
                day_seconds=crowd.day_seconds,
            )
            users[habit].add(person.user_id)
            group.create_task(_run(HABITS[habit](person)))
        for number in range(crowd.cheaters):
            cheater = Cheater(
                f"cheater-{number}",
                service=service,
                chance=random.Random(f"{seed} cheater {number}"),
                day_seconds=crowd.day_seconds,
            )
            cheaters.append(cheater)
            group.create_task(cheat(cheater, list(TRICKS.values())[number % len(TRICKS)]))
    elevenlabs = service.elevenlabs
    lists = elevenlabs.calls["list"]
    await elevenlabs.aclose()
    await asyncio.sleep(SETTLING_SECONDS)
    return Report(
        experience=experience,
        calls_by_habit={
            habit: _count_calls(elevenlabs, users[habit], handed_out=experience[habit].granted) for habit in HABITS
        },
        cheaters=cheaters,
        calls_of_cheaters=_count_calls(
            elevenlabs,
            {cheater.user_id for cheater in cheaters},
            handed_out=sum(cheater.requests - cheater.refused for cheater in cheaters),
        ),
        lists=lists,
        mistakes=compare(
            [issued async for issued in service.instances[0].ledger.read_every_pass()],
            elevenlabs.conversations_by_id.values(),
        ),
    )


async def _run(habit: Awaitable[None]) -> None:
    await habit


def _count_calls(elevenlabs: ElevenLabsModel, user_ids: set[str], *, handed_out: int) -> Calls:
    return Calls(
        handed_out=handed_out,
        signed_urls=sum(each.user_id in user_ids for each in elevenlabs.conversations_by_id.values()),
        asked_about=sum(elevenlabs.asked_about[user_id] for user_id in user_ids),
    )


def compare(rows: Iterable[IssuedPass], conversations: Iterable[Conversation]) -> list[str]:
    """List every difference between the ledger and ElevenLabs, such as a pass that is lost or counted twice."""
    by_id: dict[str, IssuedPass] = {}
    mistakes = []
    for row in rows:
        if row.conversation_id is None or row.conversation_id in by_id:
            mistakes.append(f"the row {row.pass_id} has no conversation, or that of another row")
        else:
            by_id[row.conversation_id] = row
    for conversation in conversations:
        name, found = conversation.conversation_id, by_id.pop(conversation.conversation_id, None)
        if found is None:
            mistakes.append(f"{name} has no row")
            continue
        if (found.token_issuer, found.user_id) != (TOKEN_ISSUER, conversation.user_id):
            mistakes.append(f"{name} belongs to {conversation.user_id}, and its row to {found.user_id}")
        was_opened = conversation.opened_at is not None
        seconds = conversation.reported_seconds if was_opened else 0
        if found.seconds != seconds or (found.settled_by == "expiry") == was_opened or found.settled_at is None:
            mistakes.append(f"{name} took {seconds} s; its row: {found.seconds} s, settled by {found.settled_by}")
    return mistakes + [f"a row has the conversation {name}, which ElevenLabs does not have" for name in by_id]
