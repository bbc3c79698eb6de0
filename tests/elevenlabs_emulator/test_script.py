import pytest

from elevenlabs_emulator.script import ORDERS, SPOKEN_LINES, Order, answer, confirm
from tests.tables import table

EGGS = Order(item="eggs", price=2, unit="each")


def _talk(*lines: str) -> tuple[list[str], Order]:
    replies, order = list[str](), Order()
    for line in lines:
        words, order = answer(line, order)
        replies.append(words)
    return replies, order


@table(
    ("line", "expected", "repeated"),
    [
        ("I want to sell eggs for 2 dollars each", EGGS, "eggs for $2 each"),
        ("Hello, I'd like to sell some eggs at $2 each, please.", EGGS, "eggs for $2 each"),
        ("selling eggs, $2.50 per dozen", Order(item="eggs", price=2.5, unit="dozen"), "eggs for $2.50 per dozen"),
        (
            "sell 12 apples at 3 euros per kilo",
            Order(item="apples", quantity=12, price=3, currency="EUR", unit="kilo"),
            "12 apples for €3 per kilo",
        ),
        ("selling honey for 7.50 a jar", Order(item="honey", price=7.5, unit="jar"), "honey for $7.50 per jar"),
        (ORDERS[1], Order(item="honey", price=7.5, unit="jar"), "honey for $7.50 per jar"),
    ],
)
def test_the_agent_reads_an_order_from_one_sentence_and_repeats_it(line: str, expected: Order, repeated: str) -> None:
    replies, order = _talk(line)

    assert order == expected
    assert order.is_complete
    assert replies == [f"Got it: {repeated}. I am creating the product now."]


@pytest.mark.parametrize(
    ("lines", "questions"),
    [
        (("I want to sell eggs", "2 dollars each"), ["How much would you like for eggs?"]),
        (("I want to sell eggs for 2 dollars", "each"), ["$2 for eggs: is that each, per dozen, or per kilo?"]),
        (("I want to sell for $2 each", "eggs"), ["$2 for what? Which product would you like to sell?"]),
        (("I want to sell eggs", "well...", "2 each"), ["How much would you like for eggs?"] * 2),
    ],
)
def test_the_agent_asks_for_each_missing_part_of_an_order(lines: tuple[str, ...], questions: list[str]) -> None:
    replies, order = _talk(*lines)

    assert replies[:-1] == questions
    assert order == EGGS


@table(
    ("line", "reply"),
    [
        ("help", "Tell me what you want to sell"),
        ("Hi there!", "Hello!"),
        ("Thank you so much", "You are welcome!"),
        (SPOKEN_LINES[0], "Hello!"),
        (SPOKEN_LINES[1], "Tell me what you want to sell"),
        (SPOKEN_LINES[2], "Goodbye"),
        ("the weather is nice", "I did not get that."),
        ("", "I did not get that."),
    ],
)
def test_small_talk_gets_an_answer_and_changes_no_order(line: str, reply: str) -> None:
    [said], order = _talk(line)

    assert said.startswith(reply)
    assert order == Order()


def test_the_agent_confirms_a_success_of_the_tool_and_apologises_for_a_failure() -> None:
    assert confirm(EGGS, "ok", is_error=False).startswith("Done! You are now selling eggs for $2 each.")
    assert confirm(EGGS, "closed", is_error=True) == "I am sorry, I could not create eggs: closed. Please try again."


@pytest.mark.timeout(2)
@pytest.mark.parametrize("line", ["sell " * 100_000, "$" * 100_000, "1" * 100_000, "a an " * 50_000])
def test_a_hostile_line_is_answered_at_once(line: str) -> None:
    [reply], _ = _talk(line)

    assert len(reply) < 1_000
