"""The pure rules: which claims become variables, and what is taken out of them on the way."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voicepass.errors import TokenInvalid
from voicepass.model import User, claim_at
from voicepass.policy import MAX_VARIABLE_CHARACTERS, Policy, clean, clean_text

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))


def variables_of(claims: dict[str, object], *, user_id: str = "u-1", **mapped: str) -> dict[str, object]:
    policy = Policy(agents={}, user_name_claim="name", variables=mapped)
    return dict(policy.variables_for(User(issuer="i", id=user_id, claims=claims)))


@settings(max_examples=2000)
@given(ANY_TEXT)
def test_no_text_keeps_what_could_steer_a_terminal_a_reader_or_a_template(text: str) -> None:
    cleaned = clean_text(text)

    assert len(cleaned) <= MAX_VARIABLE_CHARACTERS
    assert not any(unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} for c in cleaned)
    assert not any(
        unicodedata.bidirectional(c) in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"} for c in cleaned
    )
    assert "{{" not in cleaned
    assert "}}" not in cleaned
    assert clean_text(cleaned) == cleaned
    cleaned.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Ada", "Ada"),
        ("  Ada\r\nLovelace\t", "AdaLovelace"),
        ("\u202eadA\u2066", "adA"),
        ("\ud800A\udfff", "A"),
        ("{{system__time}}", "{ {system__time} }"),
        ("{{{x}}}", "{ { {x} } }"),
        ("a" * 300, "a" * 200),
        ("a" * 199 + "{{", "a" * 199 + "{"),
        ("山田 太郎", "山田 太郎"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("می\u200cخواهم", "می\u200cخواهم"),
    ],
)
def test_text_is_cleaned_and_names_of_all_scripts_survive(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned


@pytest.mark.parametrize("claim", [None, [], {}, ["a"], {"a": 1}, float("nan"), float("inf"), 2**53, -(2**60)])
def test_a_claim_that_no_variable_can_hold_is_left_out(claim: object) -> None:
    assert clean(claim) is None
    assert "extra" not in variables_of({"extra": claim}, extra="extra")


@pytest.mark.parametrize("claim", [True, False, 0, -7, 2**53 - 1, 1.5, "text"])
def test_numbers_booleans_and_text_pass_as_they_are(claim: object) -> None:
    variables = variables_of({"extra": claim}, extra="extra")

    assert (type(variables["extra"]), variables["extra"]) == (type(claim), claim)
    json.dumps(variables, allow_nan=False)


@pytest.mark.parametrize("name", [None, "", "\u202e\x00", ["Ada"], {"first": "Ada"}])
def test_a_user_without_a_usable_name_is_called_by_their_id(name: object) -> None:
    assert variables_of({"name": name}) == {"user_id": "u-1", "user_name": "u-1"}


def test_a_name_that_is_a_number_is_still_a_name() -> None:
    assert variables_of({"name": 7})["user_name"] == "7"


def test_no_mapped_claim_replaces_the_users_id_or_name() -> None:
    variables = variables_of({"name": "Ada", "x": "forged"}, user_name="x")

    assert variables == {"user_id": "u-1", "user_name": "Ada"}


def test_an_id_without_a_printable_character_is_refused() -> None:
    with pytest.raises(TokenInvalid):
        variables_of({}, user_id="\u202e\u2066")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("plan", "pro"),
        ("app.shop", "eggs"),
        ("app.deep.er", 1),
        ("https://x.example/plan", "namespaced"),
        ("app.none", None),
        ("plan.x", None),
        ("none", None),
        ("", None),
    ],
)
def test_a_claim_is_found_by_its_exact_name_or_by_its_path(path: str, found: object) -> None:
    claims = {"plan": "pro", "app": {"shop": "eggs", "deep": {"er": 1}}, "https://x.example/plan": "namespaced"}

    assert claim_at(claims, path) == found
