"""How long a user may still talk, from the reservation of a conversation to its settlement."""

import pytest

from tests.ledger.given import START, TurnedClock, grant_pass, limit, reservation, settlement
from voicepass.errors import ConversationUnknown
from voicepass.ledger import Ledger
from voicepass.model import Counted, Scope

pytestmark = pytest.mark.anyio

DAY = limit(1000, counted=Counted.SECONDS, window_seconds=86_400)
MONTH = limit(5000, counted=Counted.SECONDS, window_seconds=30 * 86_400)
OTHERS = [limit(0), limit(1, counted=Counted.SECONDS, scope=Scope.ALL), limit(1, counted=Counted.CONVERSATIONS)]


async def test_the_unused_part_of_a_reservation_is_left_to_its_user(ledger: Ledger, clock: TurnedClock) -> None:
    limits = [*OTHERS, MONTH, DAY]
    await ledger.settle(settlement(await grant_pass(ledger), seconds=100))
    conversation_id = await grant_pass(ledger)
    left = {"granted": await ledger.read_seconds_left(limits, conversation_id=conversation_id)}
    clock.now = START + 60
    left["a minute later"] = await ledger.read_seconds_left(limits, conversation_id=conversation_id)
    await ledger.note_opened(conversation_id, 10)
    left["opened ten seconds ago"] = await ledger.read_seconds_left(limits, conversation_id=conversation_id)
    clock.now = START + 5000
    left["longer than reserved"] = await ledger.read_seconds_left(limits, conversation_id=conversation_id)
    await ledger.settle(settlement(conversation_id, seconds=950))
    left["settled"] = await ledger.read_seconds_left(limits, conversation_id=conversation_id)
    clock.now = START + 86_401
    left["a day later"] = await ledger.read_seconds_left(limits, conversation_id=conversation_id)

    assert left == {
        "granted": 900,
        "a minute later": 840,
        "opened ten seconds ago": 890,
        "longer than reserved": 300,
        "settled": 0,
        "a day later": 1000,
    }
    assert await ledger.read_seconds_left(OTHERS, conversation_id=conversation_id) is None


async def test_a_pass_without_a_conversation_id_has_its_seconds_left_too(ledger: Ledger) -> None:
    reserved = reservation()
    await ledger.reserve(reserved, [])

    assert await ledger.read_seconds_left([DAY], conversation_id=None, pass_id=reserved.pass_id) == 1000
    with pytest.raises(ConversationUnknown):
        await ledger.read_seconds_left([DAY], conversation_id="conv_x")
