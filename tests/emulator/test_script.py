import pytest

from voicepass.emulator.script import CallTool, Order, OrderTaker, Say, filled

EGGS = {"item": "eggs", "price": 2, "currency": "USD", "unit": "each"}


def _heard(*lines: str) -> tuple[OrderTaker, list[str], list[dict[str, object]]]:
    taker, said, called = OrderTaker(), list[str](), list[dict[str, object]]()
    for line in lines:
        taker, actions = taker.hear(line)
        for action in actions:
            match action:
                case Say(text):
                    said.append(text)
                case CallTool("create_product", parameters):
                    called.append(dict(parameters))
    return taker, said, called


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("I want to sell eggs for 2 dollars each", EGGS),
        ("I want to sell eggs for two dollars each.", EGGS),
        ("sell eggs 2 dollars each", EGGS),
        ("Hello, I'd like to sell some eggs at $2 apiece please", EGGS),
        ("I am selling eggs, $2.50 per dozen", EGGS | {"price": 2.5, "unit": "dozen"}),
        ("sell eggs for $2.50/dozen", EGGS | {"price": 2.5, "unit": "dozen"}),
        (
            "sell 12 apples at 3 euros per kilo",
            {"item": "apples", "price": 3, "currency": "EUR", "unit": "kilo", "quantity": 12},
        ),
        ("selling honey for 7.50 a jar", {"item": "honey", "price": 7.5, "currency": "USD", "unit": "jar"}),
        ("I offer goat cheese for 4,25 € a piece", EGGS | {"item": "goat cheese", "price": 4.25, "currency": "EUR"}),
        ("selling my plums for 50 cents each", EGGS | {"item": "plums", "price": 0.5}),
        ("sell tea for £3 per pound", {"item": "tea", "price": 3, "currency": "GBP", "unit": "pound"}),
    ],
)
def test_a_whole_offer_becomes_one_tool_call(line: str, expected: dict[str, object]) -> None:
    _, said, called = _heard(line)

    assert called == [expected]
    assert len(said) == 1


def test_the_agent_repeats_item_price_and_unit() -> None:
    _, said, _ = _heard("sell 12 apples at 3.50 euros per kilo")

    assert said == ["Got it: 12 apples for €3.50 per kilo. I am creating the product now."]


@pytest.mark.parametrize(
    "lines",
    [
        ("I want to sell eggs", "2 dollars", "each"),
        ("I want to sell eggs", "2", "each"),
        ("I want to sell eggs", "2 dollars each"),
        ("eggs cost me a lot", "I want $2 each", "eggs"),
        ("I want to sell eggs for 2 dollars", "each"),
        ("I want to sell eggs", "hello", "2 dollars each"),
    ],
)
def test_what_is_missing_is_asked_for_and_remembered(lines: tuple[str, ...]) -> None:
    _, said, called = _heard(*lines)

    assert called == [EGGS]
    assert len(said) == len(lines)
    assert all(text.endswith(("?", '".')) for text in said[:-1])


def test_one_bare_word_answers_the_question_for_the_unit() -> None:
    _, said, called = _heard("selling eggs for 3 dollars", "dozen")

    assert said[0] == "$3 for eggs: is that each, per dozen, or per kilo?"
    assert called == [EGGS | {"price": 3, "unit": "dozen"}]


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("help", "Tell me what you want to sell"),
        ("Hi there!", "Hello!"),
        ("Thank you so much", "You are welcome!"),
        ("ok, bye", "Goodbye"),
        ("That is all, thank you, goodbye", "Goodbye"),
        ("the weather is nice", "I did not get that."),
        ("", "I did not get that."),
    ],
)
def test_small_talk_is_answered_without_a_tool_call(line: str, answer: str) -> None:
    _, said, called = _heard(line)

    assert said[0].startswith(answer)
    assert called == []


def test_small_talk_does_not_become_a_unit_or_an_item() -> None:
    taker, _, called = _heard("selling eggs for 3 dollars", "thanks")

    assert called == []
    assert taker.draft == Order(item="eggs", price=3.0)


def test_a_product_is_confirmed_once_the_tool_has_answered() -> None:
    taker, _, _ = _heard("sell eggs for $2 each")

    taker, actions = taker.tool_answered("ok", is_error=False)

    assert actions == (
        Say("Done! You are now selling eggs for $2 each. Is there anything else you would like to sell?"),
    )
    assert taker == OrderTaker()


def test_a_failed_tool_is_apologised_for() -> None:
    taker, _, _ = _heard("sell eggs for $2 each")

    _, actions = taker.tool_answered("the shop is closed", is_error=True)

    assert actions == (Say("I am sorry, I could not create eggs: the shop is closed. Please try again."),)


def test_a_result_nobody_waits_for_is_ignored() -> None:
    assert OrderTaker().tool_answered("ok", is_error=False) == (OrderTaker(), ())


@pytest.mark.timeout(2)
@pytest.mark.parametrize("line", ["sell " * 100_000, "$" * 100_000, "1" * 100_000, "a an " * 50_000, "\ud800 sell"])
def test_a_hostile_line_is_answered_at_once(line: str) -> None:
    _, said, _ = _heard(line)

    assert len(said[0]) < 1_000


def test_variables_are_filled_and_strangers_stay() -> None:
    text = filled("{{user_name}} {{ paid }} {{n}} {{unknown}}", {"user_name": "Ada {{n}}", "paid": True, "n": 3})

    assert text == "Ada {{n}} true 3 {{unknown}}"
