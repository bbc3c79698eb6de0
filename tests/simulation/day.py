"""A simulated day: honest users and cheaters, one report, and the ledger compared with what really happened."""

import asyncio
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tests.conftest import TOKEN_ISSUER
from tests.simulation.cheaters import TRICKS, Cheater, cheat
from tests.simulation.elevenlabs_model import Conversation
from tests.simulation.honest import DAY, HABITS, HOUR, Experience, Person
from tests.simulation.service import OpenLedger, Service
from tests.simulation.virtual_time import VirtualTime, run
from voicepass.model import IssuedPass

SETTLING_SECONDS: Final = 2 * HOUR
"""After the day: long enough for every pass to be settled."""


@dataclass(frozen=True, kw_only=True)
class Crowd:
    """How many users there are, and for how long."""

    honest: int
    cheaters: int
    day_seconds: float = DAY


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the day came to."""

    experience: Experience
    refused_by_habit: dict[str, int]
    cheaters: list[Cheater]
    passes: int
    reissued: int
    calls: dict[str, int]
    lookups_of_cheaters: int
    mistakes: list[str]
    """Where the ledger differs from what happened at ElevenLabs."""

    @property
    def calls_per_pass(self) -> float:
        return sum(self.calls.values()) / self.passes

    @property
    def beyond_limits(self) -> int:
        return sum(cheater.beyond_open + cheater.beyond_minutes for cheater in self.cheaters)

    def rows(self) -> list[tuple[str, str]]:
        """The lines of the table: what was counted, and how many."""
        calls = self.calls
        return [
            ("requests of honest users", f"{self.experience.requests:,}"),
            ("refused although no limit was reached", f"{len(self.experience.refused):,}"),
            ("URLs that did not open a conversation", f"{self.experience.dead_urls:,}"),
            ("requests of cheaters", f"{sum(each.requests for each in self.cheaters):,}"),
            ("refused", f"{sum(each.refused for each in self.cheaters):,}"),
            ("most that one cheater could have open at once", f"{max(each.most_at_once for each in self.cheaters)}"),
            ("conversations of cheaters beyond a limit", f"{self.beyond_limits}"),
            ("passes issued", f"{self.passes:,}"),
            ("passes returned again", f"{self.reissued:,}"),
            ("calls to ElevenLabs: signed URLs", f"{calls.get('signed URL', 0):,}"),
            ("lookups", f"{calls.get('lookup', 0):,}, of cheaters {self.lookups_of_cheaters:,}"),
            ("pages of the list", f"{calls.get('list', 0):,}"),
            ("single conversations", f"{calls.get('single conversation', 0):,}"),
            ("calls for each pass, all kinds together", f"{self.calls_per_pass:.2f}"),
        ]


def simulate(crowd: Crowd, *, seed: int, has_webhook: bool, open_ledger: OpenLedger, instances: int) -> Report:
    """Run the day in virtual time."""
    time = VirtualTime()
    service = Service(time=time, chance=random.Random(f"{seed} service"), has_webhook=has_webhook)

    async def live() -> Report:
        async with service.running(open_ledger, instances=instances):
            return await _live(crowd, seed, service)

    return run(time, live)


async def _live(crowd: Crowd, seed: int, service: Service) -> Report:
    experiences = {habit: Experience() for habit in HABITS}
    work = []
    for number in range(crowd.honest):
        habit = list(HABITS)[number % len(HABITS)]
        person = Person(
            f"honest-{number}",
            service=service,
            chance=random.Random(f"{seed} honest {number}"),
            experience=experiences[habit],
            day_seconds=crowd.day_seconds,
        )
        work.append(HABITS[habit](person))
    cheaters = []
    for number in range(crowd.cheaters):
        cheater = Cheater(
            f"cheater-{number}",
            service=service,
            chance=random.Random(f"{seed} cheater {number}"),
            day_seconds=crowd.day_seconds,
        )
        cheaters.append(cheater)
        work.append(cheat(cheater, list(TRICKS.values())[number % len(TRICKS)]))
    async with asyncio.TaskGroup() as group:
        for each in work:
            group.create_task(each)
    calls = dict(service.elevenlabs.calls)
    await service.elevenlabs.aclose()
    await asyncio.sleep(SETTLING_SECONDS)
    rows = [issued async for issued in service.instances[0].ledger.every_pass()]
    names = {each.user_id for each in cheaters}
    return Report(
        experience=Experience(
            requests=sum(each.requests for each in experiences.values()),
            refused=[refused for each in experiences.values() for refused in each.refused],
            dead_urls=sum(each.dead_urls for each in experiences.values()),
            expired_urls=sum(each.expired_urls for each in experiences.values()),
        ),
        refused_by_habit={habit: len(each.refused) for habit, each in experiences.items()},
        cheaters=cheaters,
        passes=service.granted,
        reissued=service.reissued,
        calls=calls,
        lookups_of_cheaters=sum(n for user, n in service.elevenlabs.lookups_of.items() if user in names),
        mistakes=compare(rows, service.elevenlabs.conversations_by_id.values()),
    )


def compare(rows: Iterable[IssuedPass], conversations: Iterable[Conversation]) -> list[str]:
    """Return every difference between the ledger and ElevenLabs: nothing lost, nothing counted twice."""
    by_id: dict[str, IssuedPass] = {}
    mistakes = []
    for row in rows:
        if row.conversation_id is None or row.conversation_id in by_id:
            mistakes.append(f"the row {row.pass_id} has no conversation of its own")
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
    return mistakes + [f"nobody knows the conversation {name} of a row" for name in by_id]
