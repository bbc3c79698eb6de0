"""The documents for operators match the code: tables of events and metrics, dashboard, alerts and runbook."""

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

from tests.telemetry.test_lines import make_attempt
from tests.telemetry.test_metrics import FakeLedger, Process, make_metrics
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


def read_table(first: str) -> dict[str, list[str]]:
    """Return the document's table whose first heading is `first`: the other cells of each row by its first cell."""
    (body,) = re.findall(rf"^\| {first} \|.*\n\|[-| ]+\n((?:\|.*\n)+)", DOCUMENT, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
    return {row[0].strip("`"): row[1:] for row in rows}


def find_names(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


@dataclass(frozen=True)
class LogLine:
    """A log line in the source: its event, level and fields. `is_open`: other code adds more fields."""

    event: str
    level: str
    fields: frozenset[str]
    is_open: bool


def find_log_lines() -> Iterator[LogLine]:
    for path in sorted((ROOT / "src" / "voicepass").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="_log" | "_pass_log" | "_settlement_log"), attr=level)
                    | ast.Name(id="write" as level),
                    args=[ast.Constant(value=str(event))],
                    keywords=keywords,
                ):
                    yield LogLine(
                        event,
                        "info, error" if level == "write" else level,
                        frozenset(keyword.arg for keyword in keywords if keyword.arg),
                        any(keyword.arg is None for keyword in keywords),
                    )
                case ast.Call(
                    func=ast.Name(id="partial"),
                    args=[ast.Attribute(value=ast.Name(id="_log"), attr=level), ast.Constant(value=str(event))],
                ):
                    yield LogLine(event, level, frozenset(), is_open=True)


def test_the_table_of_events_matches_the_source() -> None:
    documented = read_table("event")

    lines = list(find_log_lines())
    assert {line.event for line in lines} == set(documented)
    for line in lines:
        assert line.fields <= find_names(documented[line.event][1]), line
    for event, (levels, *_) in documented.items():
        assert {level for line in lines if line.event == event for level in line.level.split(", ")} == set(
            levels.split(", ")
        ), event
    for event in set(documented) - {line.event for line in lines if line.is_open}:
        together = frozenset().union(*(line.fields for line in lines if line.event == event))
        assert together == find_names(documented[event][1]), event


def test_the_lines_of_a_pass_have_the_fields_that_the_table_lists(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(log_format="json", level="info")

    log_attempt(make_attempt())
    log_attempt(make_attempt(outcome="internal_error", cause=ValueError()))
    log_settlement(SETTLED)

    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert set(line) - OF_EVERY_LINE == find_names(read_table("event")[line["event"]][1])


def test_every_line_that_names_a_user_names_the_token_issuer() -> None:
    naming = [cells[1] for cells in read_table("event").values() if {"user_id", "key"} & find_names(cells[1])]

    assert len(naming) >= 7
    assert all("token_issuer" in find_names(fields) for fields in naming)


@pytest.fixture
async def code_metrics() -> dict[str, tuple[str, set[str]]]:
    """Every metric of the code by the name that Prometheus gives it: its type and its labels."""
    metrics = make_metrics(Process(), FakeLedger())
    metrics.count_attempt(make_attempt(conversation_id=None, steps=[Step(StepName.VERIFY)], is_reissued=True))
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


async def test_the_table_of_metrics_matches_the_code(code_metrics: dict[str, tuple[str, set[str]]]) -> None:
    assert {name: (cells[0], find_names(cells[1])) for name, cells in read_table("metric").items()} == code_metrics
    assert all(f"`{step}`" in DOCUMENT for step in StepName)


async def test_dashboard_and_alerts_query_only_metrics_and_labels_that_exist(
    code_metrics: dict[str, tuple[str, set[str]]],
) -> None:
    outcomes = {r.code for r in vars(errors).values() if isinstance(r, type) and hasattr(r, "code")}
    values: dict[str, set[str]] = {"outcome": outcomes | {"granted", "cancelled"}, "step": set(StepName)}
    asked = set()

    for query in QUERIES:
        in_query = set()
        for name, matchers in re.findall(r"(voicepass_\w+)(?:\{([^}]*)\})?", query):
            metric = re.sub(r"_(bucket|count|sum)$", "", name)
            assert metric in code_metrics, query
            in_query |= code_metrics[metric][1] | FROM_PROMETHEUS
            asked.add(metric)
            for label, value in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
                assert label in code_metrics[metric][1] | FROM_PROMETHEUS, query
                assert label not in values or set(value.split("|")) <= values[label], query
        for grouped in re.findall(r"by \(([^)]*)\)", query):
            assert set(grouped.split(", ")) <= in_query, query
    unused = {
        "voicepass_settlements_total",
        "voicepass_build_info",
        "voicepass_calls_under_way",
    }  # the last is deprecated
    assert asked == set(code_metrics) - unused, "every other metric is in a query"


def test_the_alert_voicepass_failing_names_every_refusal_that_the_operator_must_fix() -> None:
    operator_codes = {
        refusal.code
        for refusal in vars(errors).values()
        if isinstance(refusal, type) and getattr(refusal, "is_operators_fault", False) and hasattr(refusal, "code")
    }

    (named,) = [re.search(r'outcome=~"([^"]*)"', rule["expr"]) for rule in RULES if rule["alert"] == "VoicepassFailing"]

    assert named is not None
    assert set(named[1].split("|")) == operator_codes
    assert any(named[1] in query for query in QUERIES if "$instance" in query), "the dashboard names the same refusals"


def test_every_alert_has_its_section_in_the_runbook_and_links_to_it() -> None:
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL))

    assert list(sections) == [rule["alert"] for rule in RULES]
    for rule in RULES:
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in {"page", "ticket"}
    for text in sections.values():
        assert re.findall(r"^\*\*(\w+)\*\*: ", text, re.MULTILINE) == ["Means", "See", "Do"]


def test_the_runbook_names_only_events_codes_and_metrics_that_exist() -> None:
    events = set(read_table("event"))
    codes = {
        refusal.code for refusal in vars(errors).values() if isinstance(refusal, type) and hasattr(refusal, "code")
    }

    assert set(re.findall(r'\.event == "([^"]+)"', RUNBOOK + DOCUMENT)) <= events
    assert set(re.findall(r'\.code == "([^"]+)"', RUNBOOK)) <= codes
    assert set(re.findall(r"`((?:elevenlabs|ledger|keys)_\w+)`", RUNBOOK)) <= codes
    assert {re.sub(r"_bucket$", "", name) for name in re.findall(r"voicepass_\w+", RUNBOOK)} <= set(
        read_table("metric")
    )


def test_each_panel_of_the_dashboard_has_its_own_id_and_place() -> None:
    panels = DASHBOARD["panels"]
    boxes = [panel["gridPos"] for panel in panels]

    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(box["x"] + box["w"] <= 24 for box in boxes)
    cells = [(x, y) for b in boxes for x in range(b["x"], b["x"] + b["w"]) for y in range(b["y"], b["y"] + b["h"])]
    assert len(cells) == len(set(cells)), "no panel overlaps another"


PROMTOOL = shutil.which("promtool")


@pytest.mark.long
@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian: apt-get install prometheus)")
@pytest.mark.parametrize(
    "command", [["check", "rules", "deploy/prometheus/alerts.yaml"], ["test", "rules", "tests/alerts.yaml"]]
)
def test_prometheus_accepts_the_rules_and_they_fire_in_their_cases(command: list[str]) -> None:
    ended = subprocess.run([str(PROMTOOL), *command], cwd=ROOT, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.long
@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian: apt-get install prometheus)")
def test_prometheus_parses_every_query_of_the_dashboard(tmp_path: Path) -> None:
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
