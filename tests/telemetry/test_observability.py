"""What operators read is true: the tables of events and metrics, the dashboard, the alerts and their runbook."""

import ast
import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.telemetry.test_lines import attempt
from tests.telemetry.test_metrics import Process, TurnedLedger, metrics_of
from voicepass import errors
from voicepass.model import IssuedPass
from voicepass.telemetry.attempt import Step, StepName
from voicepass.telemetry.lines import log_attempt, log_settlement
from voicepass.telemetry.logs import configure_logging

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "observability.md").read_text()
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "voicepass.json").read_text())
QUERIES = [rule["expr"] for rule in RULES] + [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())
]
FROM_PROMETHEUS = {"instance", "le"}
OF_EVERY_LINE = {"event", "level", "logger", "timestamp"}

SETTLED = IssuedPass(
    pass_id="p",
    request_id="r",
    token_issuer="i",
    user_id="u-1",
    agent_alias="default",
    agent_id="agent_1",
    transport="websocket",
    reserved_at=0.0,
    lapses_at=1.0,
    seconds=60,
    granted_at=0.0,
    conversation_id="conv_1",
    credential_sha256="0",
    opened_at=None,
    settled_at=90.0,
    settled_by="webhook",
    cost=1,
    reported_user_id="u-2",
)


def table(first: str) -> dict[str, list[str]]:
    """The cells of each row of the document's table that begins with this heading, by the first of them."""
    (body,) = re.findall(rf"^\| {first} \|.*\n\|[-| ]+\n((?:\|.*\n)+)", DOCUMENT, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
    return {row[0].strip("`"): row[1:] for row in rows}


def names(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


@dataclass(frozen=True)
class Written:
    """A line that the source writes: its event, level, and fields; `is_open` where more are added from elsewhere."""

    event: str
    level: str
    fields: frozenset[str]
    is_open: bool


def written() -> Iterator[Written]:
    for path in sorted((ROOT / "src" / "voicepass").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="_log" | "_pass_log" | "_settlement_log"), attr=level)
                    | ast.Name(id="write" as level),
                    args=[ast.Constant(value=str(event))],
                    keywords=keywords,
                ):
                    yield Written(
                        event,
                        "info, error" if level == "write" else level,
                        frozenset(keyword.arg for keyword in keywords if keyword.arg),
                        any(keyword.arg is None for keyword in keywords),
                    )
                case ast.Call(
                    func=ast.Name(id="partial"),
                    args=[ast.Attribute(value=ast.Name(id="_log"), attr=level), ast.Constant(value=str(event))],
                ):
                    yield Written(event, level, frozenset(), is_open=True)


def test_the_table_of_events_is_that_of_the_source() -> None:
    documented = table("event")

    lines = list(written())
    assert {line.event for line in lines} == set(documented)
    for line in lines:
        assert line.fields <= names(documented[line.event][1]), line
    for event, (levels, *_) in documented.items():
        assert {level for line in lines if line.event == event for level in line.level.split(", ")} == set(
            levels.split(", ")
        ), event
    for event in set(documented) - {line.event for line in lines if line.is_open}:
        together = frozenset().union(*(line.fields for line in lines if line.event == event))
        assert together == names(documented[event][1]), event


def test_the_lines_of_a_pass_have_the_fields_that_the_table_lists(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(log_format="json", level="info")

    log_attempt(attempt())
    log_attempt(attempt(outcome="internal_error", cause=ValueError()))
    log_settlement(SETTLED)

    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert set(line) - OF_EVERY_LINE == names(table("event")[line["event"]][1])


def test_every_line_that_names_a_user_names_the_token_issuer() -> None:
    naming = [cells[1] for cells in table("event").values() if {"user_id", "key"} & names(cells[1])]

    assert len(naming) >= 7
    assert all("token_issuer" in names(fields) for fields in naming)


@pytest.fixture
async def exposed() -> dict[str, tuple[str, set[str]]]:
    """Every metric of the code by the name that Prometheus gives it: its type and its labels."""
    metrics = metrics_of(Process(), TurnedLedger())
    metrics.count_attempt(attempt(conversation_id=None, steps=[Step(StepName.VERIFY)], is_reissued=True))
    metrics.count_settlement(SETTLED)
    metrics.count_bypass("public")
    labels: dict[str, set[str]] = defaultdict(set)
    types = {}
    for family in text_string_to_metric_families((await metrics.render()).decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        if family.name.endswith("_created"):
            continue
        types[name] = family.type
        for sample in family.samples:
            labels[name] |= set(sample.labels) - {"le"}
    return {name: (type_, labels[name]) for name, type_ in types.items()}


async def test_the_table_of_metrics_is_that_of_the_code(exposed: dict[str, tuple[str, set[str]]]) -> None:
    assert {name: (cells[0], names(cells[1])) for name, cells in table("metric").items()} == exposed
    assert all(f"`{step}`" in DOCUMENT for step in StepName)


async def test_dashboard_and_alerts_ask_for_nothing_that_is_not_there(
    exposed: dict[str, tuple[str, set[str]]],
) -> None:
    outcomes = {r.code for r in vars(errors).values() if isinstance(r, type) and hasattr(r, "code")}
    values: dict[str, set[str]] = {"outcome": outcomes | {"granted", "cancelled"}, "step": set(StepName)}
    asked = set()

    for query in QUERIES:
        in_query = set()
        for name, matchers in re.findall(r"(voicepass_\w+)(?:\{([^}]*)\})?", query):
            metric = re.sub(r"_(bucket|count|sum)$", "", name)
            assert metric in exposed, query
            in_query |= exposed[metric][1] | FROM_PROMETHEUS
            asked.add(metric)
            for label, value in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
                assert label in exposed[metric][1] | FROM_PROMETHEUS, query
                assert label not in values or set(value.split("|")) <= values[label], query
        for grouped in re.findall(r"by \(([^)]*)\)", query):
            assert set(grouped.split(", ")) <= in_query, query
    unused = {
        "voicepass_settlements_total",
        "voicepass_build_info",
        "voicepass_calls_under_way",
    }  # the last is deprecated
    assert asked == set(exposed) - unused, "what is worth counting is worth showing"


def test_the_alert_about_what_someone_must_fix_names_every_such_refusal() -> None:
    theirs = {
        refusal.code
        for refusal in vars(errors).values()
        if isinstance(refusal, type) and getattr(refusal, "is_operators_fault", False) and hasattr(refusal, "code")
    }

    (named,) = [re.search(r'outcome=~"([^"]*)"', rule["expr"]) for rule in RULES if rule["alert"] == "VoicepassFailing"]

    assert named is not None
    assert set(named[1].split("|")) == theirs
    assert any(named[1] in query for query in QUERIES if "$instance" in query), "the dashboard says the same"


def test_every_alert_has_its_section_in_the_runbook_and_leads_to_it() -> None:
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL))

    assert list(sections) == [rule["alert"] for rule in RULES]
    for rule in RULES:
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in {"page", "ticket"}
    for text in sections.values():
        assert re.findall(r"^\*\*(\w+)\*\*: ", text, re.MULTILINE) == ["Means", "See", "Do"]


def test_the_runbook_names_only_what_there_is() -> None:
    events = set(table("event"))
    codes = {
        refusal.code for refusal in vars(errors).values() if isinstance(refusal, type) and hasattr(refusal, "code")
    }

    assert set(re.findall(r'\.event == "([^"]+)"', RUNBOOK + DOCUMENT)) <= events
    assert set(re.findall(r'\.code == "([^"]+)"', RUNBOOK)) <= codes
    assert set(re.findall(r"`((?:elevenlabs|ledger|keys)_\w+)`", RUNBOOK)) <= codes
    assert {re.sub(r"_bucket$", "", name) for name in re.findall(r"voicepass_\w+", RUNBOOK)} <= set(table("metric"))


def test_the_dashboard_is_one_that_grafana_draws() -> None:
    panels = DASHBOARD["panels"]
    boxes = [panel["gridPos"] for panel in panels]

    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(box["x"] + box["w"] <= 24 for box in boxes)
    cells = [(x, y) for b in boxes for x in range(b["x"], b["x"] + b["w"]) for y in range(b["y"], b["y"] + b["h"])]
    assert len(cells) == len(set(cells)), "no panel lies on another"


PROMTOOL = shutil.which("promtool")


@pytest.mark.long
@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian: apt-get install prometheus)")
@pytest.mark.parametrize(
    "command", [["check", "rules", "deploy/prometheus/alerts.yaml"], ["test", "rules", "tests/alerts.yaml"]]
)
def test_prometheus_takes_the_rules_and_they_fire_when_they_should(command: list[str]) -> None:
    ended = subprocess.run([str(PROMTOOL), *command], cwd=ROOT, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.long
@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian: apt-get install prometheus)")
def test_prometheus_understands_every_query_of_the_dashboard(tmp_path: Path) -> None:
    queries = [query.replace("$__rate_interval", "5m") for query in QUERIES]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))

    ended = subprocess.run(
        [str(PROMTOOL), "check", "rules", "--lint=none", str(tmp_path / "queries.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
