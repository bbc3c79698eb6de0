"""The policy: who may use which agent, which claims become variables, and how their text is cleaned."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tables import table
from voicepass.errors import AgentNotAllowed
from voicepass.model import Agent, Counted, Limit, Scalar, Scope, User
from voicepass.policy import (
    MAX_VARIABLE_CHARACTERS,
    AgentRules,
    LimitPlan,
    Policy,
    Rule,
    Variable,
    VariableType,
    claim_at,
    clean,
    clean_text,
)

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))


AGENT = Agent(alias="default", agent_id="agent_1", base_url="https://x")


def make_user(claims: dict[str, object], *, name: str | None = "Ada") -> User:
    return User(issuer="i", id="u-1", name=name, claims=claims)


def make_variables(claims: dict[str, object], *, name: str | None = "Ada", **variables: Variable) -> dict[str, object]:
    policy = Policy({"default": AgentRules(agent=AGENT, allow=(Rule({}),), variables=variables)})
    return dict(policy.variables_for(make_user(claims, name=name), AGENT))


def check_cleaned(text: str) -> None:
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


@settings(max_examples=300)
@given(ANY_TEXT)
def test_cleaned_text_has_no_control_characters_and_no_template_braces(text: str) -> None:
    check_cleaned(text)


@pytest.mark.long
@settings(max_examples=2000)
@given(ANY_TEXT)
def test_of_many_cleaned_texts_none_has_control_characters_or_template_braces(text: str) -> None:
    check_cleaned(text)


@table(
    ("text", "cleaned"),
    [
        ("Ada", "Ada"),
        ("  Ada\r\nLovelace\t", "AdaLovelace"),
        ("\u202eadA\u2066", "adA"),
        ("\ud800A\udfff", "A"),
        ("{{system__time}}", "{ {system__time} }"),
        ("{{{x}}}", "{ { {x} } }"),
        ("{{x", "{ {x"),
        ("x}}", "x} }"),
        ("a" * 300, "a" * 200),
        ("a" * 199 + " b", "a" * 199),
        ("a" * 199 + "{{", "a" * 199 + "{"),
        ("山田 太郎", "山田 太郎"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("می\u200cخواهم", "می\u200cخواهم"),
    ],
)
def test_text_is_cleaned_and_names_in_any_script_are_kept(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned


@table("claim", [None, [], {}, ["a"], {"a": 1}, float("nan"), float("inf"), 2**53, -(2**60)])
def test_a_claim_that_no_variable_can_hold_is_left_out(claim: object) -> None:
    assert clean(claim) is None
    assert "extra" not in make_variables({"extra": claim}, extra=Variable(claim="extra"))


@table("claim", [True, False, 0, -7, 2**53 - 1, 1.5, "text"])
def test_numbers_booleans_and_text_are_not_changed(claim: object) -> None:
    variables = make_variables({"extra": claim}, extra=Variable(claim="extra"))

    assert (type(variables["extra"]), variables["extra"]) == (type(claim), claim)
    json.dumps(variables, allow_nan=False)


@pytest.mark.parametrize("name", [None, "", "\u202e\x00"])
def test_the_id_replaces_a_name_that_is_missing_or_empty(name: str | None) -> None:
    assert make_variables({}, name=name) == {"user_id": "u-1", "user_name": "u-1"}


def test_no_mapped_claim_replaces_the_users_id_or_name() -> None:
    forged = Variable(claim="x")

    variables = make_variables({"x": "forged"}, user_id=forged, user_name=forged)

    assert variables == {"user_id": "u-1", "user_name": "Ada"}


@table(
    ("claims", "value"),
    [
        ({"plan": "pro"}, "pro"),
        ({}, "free"),
        ({"plan": 7}, "free"),
        ({"plan": None}, "free"),
        ({"plan": ["pro"]}, "free"),
        ({"plan": True}, "free"),
    ],
)
def test_a_variable_has_its_type_or_its_default(claims: dict[str, object], value: str) -> None:
    variables = make_variables(claims, plan=Variable(claim="plan", type="string", default="free"))

    assert variables["plan"] == value


@table(
    ("wanted", "claim", "value"),
    [
        ("boolean", True, True),
        ("boolean", 1, None),
        ("boolean", "true", None),
        ("number", 1, 1),
        ("number", 1.5, 1.5),
        ("number", True, None),
        ("number", "1", None),
    ],
)
def test_a_claim_of_another_type_sets_no_variable(wanted: VariableType, claim: object, value: object) -> None:
    variables = make_variables({"extra": claim}, extra=Variable(claim="extra", type=wanted))

    assert variables.get("extra") is value


RULE = Rule({"role": ("seller", "admin"), "app.plan": ("pro",)})


@table(
    ("rule", "claims", "admitted"),
    [
        (Rule({}), {}, True),
        (RULE, {"role": "seller", "app": {"plan": "pro"}}, True),
        (RULE, {"role": ["buyer", "admin"], "app": {"plan": "pro"}}, True),
        (RULE, {"role": "seller"}, False),
        (RULE, {"role": "Seller", "app": {"plan": "pro"}}, False),
        (RULE, {"role": "seller admin", "app": {"plan": "pro"}}, False),
        (RULE, {"role": {"seller": True}, "app": {"plan": "pro"}}, False),
        (RULE, {"role": [["seller"]], "app": {"plan": "pro"}}, False),
        (Rule({"scope": ("voice:talk",)}), {"scope": "openid voice:talk"}, True),
        (Rule({"scope": ("voice:talk",)}), {"scope": "openid voice:talker"}, False),
        (Rule({"scope": ("voice:talk",)}), {"scope": "openid\tvoice:talk"}, False),
        (Rule({"scp": ("voice:talk",)}), {"scp": ["voice:talk"]}, True),
        (Rule({"verified": (True,)}), {"verified": True}, True),
        (Rule({"verified": (True,)}), {"verified": 1}, False),
        (Rule({"verified": (True,)}), {"verified": "true"}, False),
        (Rule({"level": (1,)}), {"level": True}, False),
        (Rule({"level": (1,)}), {"level": 1.0}, True),
        (Rule({"missing": ("None",)}), {}, False),
    ],
)
def test_a_rule_admits_only_users_whose_claims_match(rule: Rule, claims: dict[str, object], *, admitted: bool) -> None:
    assert rule.admits(claims) is admitted


def test_an_agent_without_a_matching_rule_and_an_unknown_agent_get_the_same_refusal() -> None:
    policy = Policy({"closed": AgentRules(agent=AGENT, allow=()), "open": AgentRules(agent=AGENT, allow=(RULE,))})
    user = make_user({"role": "buyer"})

    refusals = []
    for alias in ("closed", "open", "missing"):
        with pytest.raises(AgentNotAllowed) as refused:
            policy.agent_for(user, alias)
        refusals.append((refused.value.code, refused.value.detail, refused.value.status))

    assert len(set(refusals)) == 1


def test_one_rule_of_several_is_enough() -> None:
    rules = AgentRules(agent=AGENT, allow=(RULE, Rule({"staff": (True,)})))

    agent = Policy({"default": rules}).agent_for(make_user({"staff": True}), "default")

    assert agent is AGENT
    assert str(rules.admitting(make_user({"staff": True}))) == "staff is true"
    assert str(RULE) == "role is seller or admin and app.plan is pro"
    assert RULE.whom == "users whose role is seller or admin and app.plan is pro"
    assert str(Rule({"role": ("Admin",)})) == "role is Admin"
    assert Rule({}).whom == "every signed-in user"


@table(
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


ROLES = {"role": ("seller", "admin")}


@pytest.mark.parametrize(
    ("covering", "covered"),
    [
        ({}, ROLES),
        (ROLES, {"role": ("admin",)}),
        (ROLES, {"role": ("admin", "seller"), "trial": (False,)}),
        ({"level": (1, 2)}, {"level": (1.0,)}),
    ],
)
def test_a_rule_covers_another_if_it_admits_all_its_users(
    covering: dict[str, tuple[Scalar, ...]], covered: dict[str, tuple[Scalar, ...]]
) -> None:
    assert Rule(covering).covers(Rule(covered))
    assert not Rule(covered).covers(Rule(covering))


def test_a_rule_does_not_cover_a_value_of_another_type_or_another_claim() -> None:
    rules = [*(Rule({"level": (value,)}) for value in (1, True, "1")), Rule({"role": ("admin",)})]

    assert not any(one.covers(other) for one in rules for other in rules if one is not other)


def test_a_value_that_no_token_can_hold_is_found() -> None:
    rule = Rule({"scope": ("a b", "c"), "scp": ("a b",), "level": (float("nan"),), "plan": ("a b",), "x": (1.5,)})

    assert rule.list_impossible() == ["scp", "level"]


def plan_of(name: str | None, *rules: Rule) -> LimitPlan:
    limit = Limit(name="user_passes", scope=Scope.USER, counted=Counted.PASSES, most=1, window_seconds=60, plan=name)
    return LimitPlan(name=name, when=rules, limits=(limit,))


NO_PLAN = plan_of(None)
PLANS = (plan_of("a", Rule({"plan": ("a",)}), Rule({"role": ("admin",)})), plan_of("b", Rule({"plan": ("a", "b")})))
WITH_PLANS = Policy({}, limits=NO_PLAN.limits, plans=PLANS)


def test_the_first_plan_that_admits_a_user_applies() -> None:
    given: list[dict[str, object]] = [{"plan": "a"}, {"plan": "b", "role": ["x", "admin"]}, {"plan": "b"}, {}]

    plans = [WITH_PLANS.plan_for(make_user(claims)) for claims in given]

    assert plans == [PLANS[0], PLANS[0], PLANS[1], NO_PLAN]


@table(("plan", "set_by"), [("a", "a"), ("b", "b"), ("gone", None), (None, None)])
def test_a_plan_has_its_own_limits_and_a_plan_that_is_gone_has_those_without_a_plan(
    plan: str | None, set_by: str | None
) -> None:
    assert [limit.plan for limit in WITH_PLANS.limits_of(plan)] == [set_by]
