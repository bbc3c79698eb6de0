"""The agent that takes orders: hears a line, says a line, and calls `create_product` once it knows enough.

Pure: no clock, no socket. It stands in for a language model, so it understands only plain sentences about selling.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

TOOL_NAME = "create_product"
PLACEHOLDER = re.compile(r"\{\{\s*([\w.-]+)\s*\}\}")

_LINE_LIMIT = 500  # characters that are listened to; the patterns below never meet more
_RESULT_LIMIT = 200  # characters of a tool's own words that are repeated
_EXAMPLE = "I want to sell eggs for 2 dollars each"

_SYMBOLS = {"USD": "$", "EUR": "€", "GBP": "£"}
_CURRENCIES = {"$": "USD", "dollar": "USD", "buck": "USD", "usd": "USD", "€": "EUR", "euro": "EUR", "eur": "EUR"}
_CURRENCIES |= {"£": "GBP", "pound": "GBP", "gbp": "GBP"}
_NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
_NUMBERS |= {"ten": 10, "eleven": 11, "twelve": 12, "fifteen": 15, "twenty": 20, "fifty": 50}

_NUMBER = r"\d{1,6}(?:[.,]\d{1,2})?(?!\d)"
_WORD = r"(?:dollar|buck|euro|pound|cent)s?\b|(?:usd|eur|gbp)\b"
_BEFORE = r"\b(?:for|at|costs?|price is)\s+"
_PRICE = re.compile(
    rf"(?:{_BEFORE})?(?:(?P<symbol>[$€£])\s?(?P<after>{_NUMBER})(?:\s?(?:{_WORD}))?"
    rf"|(?P<before>{_NUMBER})\s?(?P<word>[$€£]|{_WORD}))"
    rf"|{_BEFORE}(?P<bare>{_NUMBER})"
)
_UNIT = re.compile(r"\s*(?:(?P<each>each|apiece|a piece)\b|(?:(?:per|for a|a|an)\s+|/\s*)(?P<unit>[a-z]+))")
_SALE = re.compile(r"\b(?:sell|selling|offer|offering)\b\s*")
_ITEM_END = re.compile(r"\s(?:for|at|that|which|costs?|each|per|and the)\b|[,.;!?@]")
_LEADING = re.compile(r"^(?:(?:some|my|the|our|a|an|of)\s+)+")
_QUANTITY = re.compile(r"^(\d{1,6})\s+")

_HELP = re.compile(r"\b(?:help|what can you do|how does this work)\b")
_BYE = re.compile(r"\b(?:bye|goodbye|see you|that is all|that's all)\b")
_THANKS = re.compile(r"\b(?:thanks|thank you|cheers)\b")
_HELLO = re.compile(r"\b(?:hello|hi|hey|good (?:morning|afternoon|evening))\b")
_ANSWERS = {
    _HELP: f'Tell me what you want to sell, for how much, and per what. For example: "{_EXAMPLE}".',
    _BYE: "Goodbye, and good luck with your sales!",
    _THANKS: "You are welcome! Is there anything else you would like to sell?",
    _HELLO: "Hello! What would you like to sell?",
}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is known of an offer so far."""

    item: str | None = None
    quantity: int | None = None
    price: float | None = None
    currency: str = "USD"
    unit: str | None = None

    @property
    def parameters(self) -> dict[str, object]:
        """The arguments of `create_product`. `quantity` is there only if the user said one."""
        price = int(self.price) if self.price and self.price.is_integer() else self.price
        known: dict[str, object] = {"item": self.item, "price": price, "currency": self.currency, "unit": self.unit}
        return known if self.quantity is None else known | {"quantity": self.quantity}

    @property
    def spoken_price(self) -> str:
        """The price with its currency, such as `$2.50`."""
        price = self.price or 0.0
        return _SYMBOLS[self.currency] + (f"{price:.0f}" if price.is_integer() else f"{price:.2f}")

    @property
    def spoken(self) -> str:
        """The offer in words, such as `12 apples for €3 per kilo`."""
        count = "" if self.quantity is None else f"{self.quantity} "
        return f"{count}{self.item} for {self.spoken_price} {'each' if self.unit == 'each' else f'per {self.unit}'}"

    @property
    def question(self) -> str | None:
        """What to ask next; None once nothing is missing."""
        if self.item is None:
            return f"{self.spoken_price} for what? Which product would you like to sell?"
        if self.price is None:
            return f"How much would you like for {self.item}?"
        if self.unit is None:
            return f"{self.spoken_price} for {self.item}: is that each, per dozen, or per kilo?"
        return None


@dataclass(frozen=True)
class Say:
    """The agent says this."""

    text: str


@dataclass(frozen=True)
class CallTool:
    """The agent calls a client tool and waits for its result."""

    name: str
    parameters: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class OrderTaker:
    """The agent's memory between two lines. Each method returns the next memory and what to do now."""

    draft: Order = Order()
    placed: Order | None = None

    def hear(self, line: str) -> tuple["OrderTaker", tuple[Say | CallTool, ...]]:
        """Answer what the user said or typed."""
        text = _plain(line)
        order = _understood(text, self.draft)
        if order == self.draft:
            return self, (Say(self._small_talk(text)),)
        if question := order.question:
            return replace(self, draft=order), (Say(question),)
        promise = Say(f"Got it: {order.spoken}. I am creating the product now.")
        return OrderTaker(placed=order), (promise, CallTool(TOOL_NAME, order.parameters))

    def tool_answered(self, result: str, *, is_error: bool) -> tuple["OrderTaker", tuple[Say, ...]]:
        """Confirm the product that was asked for last, or apologise for it."""
        if self.placed is None:
            return self, ()
        words = f"Done! You are now selling {self.placed.spoken}. Is there anything else you would like to sell?"
        if is_error:
            words = f"I am sorry, I could not create {self.placed.item}: {result[:_RESULT_LIMIT]}. Please try again."
        return replace(self, placed=None), (Say(words),)

    def _small_talk(self, text: str) -> str:
        for pattern, answer in _ANSWERS.items():
            if pattern.search(text):
                return answer
        question = None if self.draft == Order() else self.draft.question
        return question or f'I did not get that. You could say: "{_EXAMPLE}".'


def filled(template: str, variables: Mapping[str, object]) -> str:
    """Put the variables into the `{{ name }}` placeholders; booleans as JSON writes them."""

    def shown(match: re.Match[str]) -> str:
        value = variables.get(match[1], match[0])
        return str(value).lower() if isinstance(value, bool) else str(value)

    return PLACEHOLDER.sub(shown, template)


def _understood(text: str, draft: Order) -> Order:
    """Add to the draft what this line says; the draft itself if it says nothing of use."""
    order, price, sale = draft, _PRICE.search(text), _SALE.search(text)
    small_talk = any(pattern.search(text) for pattern in _ANSWERS)
    if price:
        order = _priced(order, price)
    elif draft.item and draft.price is None and re.fullmatch(_NUMBER, text):
        order = replace(order, price=_figure(text))
    if sale:
        behind = text[sale.end() :]
        order = _with_item(order, text[sale.end() : price.start()] if price and price.start() > sale.end() else behind)
    elif draft.price is not None and draft.item is None and not price and not small_talk:
        order = _with_item(order, text)
    if order.price is not None and (unit := _UNIT.match(text[price.end() :] if price else text)):
        order = replace(order, unit="each" if unit["each"] else unit["unit"])
    elif draft.item and draft.price is not None and re.fullmatch(r"[a-z]+", text) and not small_talk:
        order = replace(order, unit=text)  # "each, per dozen, or per kilo?" is often answered with one bare word
    return order


def _priced(order: Order, match: re.Match[str]) -> Order:
    figure = _figure(match["after"] or match["before"] or match["bare"])
    name = (match["symbol"] or match["word"] or "$").rstrip("s")
    if name == "cent":
        return replace(order, price=figure / 100, currency="USD")
    return replace(order, price=figure, currency=_CURRENCIES[name])


def _with_item(order: Order, words: str) -> Order:
    phrase = _LEADING.sub("", _ITEM_END.split(words, maxsplit=1)[0].strip())
    quantity = _QUANTITY.match(phrase)
    item = _LEADING.sub("", _QUANTITY.sub("", phrase)).strip()
    if not item or re.fullmatch(_NUMBER, item):
        return order
    return replace(order, item=item, quantity=int(quantity[1]) if quantity else None)


def _plain(line: str) -> str:
    text = " ".join(line[:_LINE_LIMIT].lower().split()).rstrip(" .!?")
    return re.sub(rf"\b(?:{'|'.join(_NUMBERS)})\b", lambda match: str(_NUMBERS[match[0]]), text)


def _figure(number: str) -> float:
    return float(number.replace(",", "."))
