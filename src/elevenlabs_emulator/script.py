"""The agent that takes orders: what it understands of a line, and what it answers.

It replaces a language model, so it understands only plain sentences about selling.
"""

import re
from dataclasses import asdict, dataclass, replace

from elevenlabs_emulator.failures import read_table

_TEXTS = read_table("script.toml")
SPOKEN_LINES: tuple[str, ...] = tuple(_TEXTS["spoken_lines"])
ORDERS: tuple[str, ...] = tuple(_TEXTS["orders"])
SMALL_TALK: dict[str, str] = _TEXTS["small_talk"]
GOODBYE = SMALL_TALK["bye|goodbye"]

_MAX_LINE_CHARACTERS = 500  # the patterns match no longer text

_CURRENCIES = {"$": "USD", "dollar": "USD", "€": "EUR", "euro": "EUR", "£": "GBP", "pound": "GBP"}
_SYMBOLS = {"USD": "$", "EUR": "€", "GBP": "£"}

# "sell 12 apples", up to the price. Single spaces, as `answer` makes them: to skip runs of them would be quadratic.
_SALE = re.compile(
    r"\bsell(?:ing)? (?:(?:some|my|the) )?(?:(?P<quantity>\d{1,6}) )?"
    r"(?!for\b|at\b)(?P<item>[^\d$€£,.]+?)(?= (?:for|at)\b| ?[\d$€£,.]|$)"
)
# "$2.50", "3 euros", "7.50"
_PRICE = re.compile(
    r"(?P<symbol>[$€£])?\s?\b(?P<figure>\d{1,6}(?:[.,]\d{1,2})?)\b\s?(?P<word>[$€£]|dollar|euro|pound)?"
)
# "each", "per dozen", "a jar"
_UNIT = re.compile(r"\beach\b|\b(?:per|an?)\s+(?P<measure>\w+)")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the user has said about an offer so far."""

    item: str | None = None
    quantity: int | None = None
    price: float | None = None
    currency: str = "USD"
    unit: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the product can be created."""
        return None not in {self.item, self.price, self.unit}

    @property
    def parameters(self) -> dict[str, object]:
        """Return the arguments of the client tool, without those that the user did not mention."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def words(self) -> str:
        """Return a complete offer in words, such as `12 apples for €3 per kilo`."""
        count = "" if self.quantity is None else f"{self.quantity} "
        return f"{count}{self.item} for {self.price_in_words} {'each' if self.unit == 'each' else f'per {self.unit}'}"

    @property
    def price_in_words(self) -> str:
        """Return the price with its currency, such as `$2.50`."""
        return _SYMBOLS[self.currency] + f"{self.price or 0:.2f}".removesuffix(".00")


def answer(line: str, draft: Order) -> tuple[str, Order]:
    """Answer what the user said or typed; returns the agent's words and the order so far."""
    text = " ".join(line[:_MAX_LINE_CHARACTERS].lower().split()).strip(" .!?")
    order = _parse_order(text, draft)
    if order == draft:
        for words, reply in SMALL_TALK.items():
            if re.search(rf"\b(?:{words})\b", text):
                return reply, draft
        if text and draft.price is not None:  # a short answer to "for what?" or "per what?"
            order = replace(draft, unit=text.rsplit(maxsplit=1)[-1]) if draft.item else replace(draft, item=text)
    return _ask_for_rest(order), order


def confirm(order: Order, result: str, *, is_error: bool) -> str:
    """Confirm the product that the client tool has created, or apologise for it."""
    if is_error:
        return f"I am sorry, I could not create {order.item}: {result}. Please try again."
    return f"Done! You are now selling {order.words}. Is there anything else you would like to sell?"


def _parse_order(text: str, draft: Order) -> Order:
    order, rest = draft, text
    if sale := _SALE.search(rest):
        order = replace(order, item=sale["item"], quantity=int(sale["quantity"]) if sale["quantity"] else None)
        rest = rest[sale.end() :]
    if price := _PRICE.search(rest):
        currency = _CURRENCIES[price["symbol"] or price["word"] or "$"]
        order = replace(order, price=float(price["figure"].replace(",", ".")), currency=currency)
        rest = rest[price.end() :]
    if order.price is not None and (unit := _UNIT.search(rest)):
        order = replace(order, unit=unit["measure"] or "each")
    return order


def _ask_for_rest(order: Order) -> str:
    if order == Order():
        return str(_TEXTS["not_understood"])
    for part, question in _TEXTS["questions"].items():
        if getattr(order, part) is None:
            return str(question.format(item=order.item, price=order.price_in_words))
    return f"Got it: {order.words}. I am creating the product now."
