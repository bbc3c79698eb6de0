"""The files in `deploy/` fit the service: their settings start it, it answers their probes and has time to drain."""

import re
import shutil
import subprocess
from ipaddress import ip_address, ip_network
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.canaries import API_KEY, JWT_SECRET
from tests.conftest import settings_with
from voicepass.cli.service import longest_answer_seconds
from voicepass.config.build import configure
from voicepass.config.settings import Settings, load_settings
from voicepass.ledger import ANSWER_SECONDS
from voicepass.ledger.postgres import MAX_CONNECTIONS

DEPLOY = Path(__file__).parents[1] / "deploy"
SECRETS = {
    "elevenlabs_api_key": API_KEY,
    "jwt_secret": JWT_SECRET,
    "database_url": "postgresql://voicepass:pw@database/voicepass",
}


def read_manifests() -> dict[str, Any]:
    """Read the manifests; the key of each is its kind."""
    documents = [yaml.safe_load(path.read_text()) for path in (DEPLOY / "kubernetes").glob("*.yaml")]
    return {document["kind"]: document for document in documents}


COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
MANIFESTS = read_manifests()
POD = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PROBES = [CONTAINER[probe] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]


def read_compose_settings() -> dict[str, str]:
    """Read the container's settings: the env file of docs/deployment.md, and `environment`, which has priority."""
    page = (DEPLOY.parent / "docs" / "deployment.md").read_text()
    (env_file,) = re.findall(r"cat > deploy/(\S+) <<'END'\n(.*?)END\n", page, re.DOTALL)
    assert COMPOSE["voicepass"]["env_file"] == env_file[0]
    given: dict[str, str] = COMPOSE["voicepass"]["environment"]
    assert not [value for value in given.values() if "${" in value], "a value from .env needs no line here"
    return dict(line.split("=", 1) for line in env_file[1].replace("…", "1").splitlines()) | given


def read_kubernetes_settings() -> dict[str, str]:
    text = (DEPLOY / "kubernetes" / "settings.env").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines) | {entry["name"]: entry["value"] for entry in CONTAINER["env"]}


GIVEN = {"compose": read_compose_settings(), "kubernetes": read_kubernetes_settings()}
GRACE_SECONDS = {
    "compose": float(COMPOSE["voicepass"]["stop_grace_period"].removesuffix("s")),
    "kubernetes": float(POD["terminationGracePeriodSeconds"]),
}


@pytest.mark.parametrize("where", GIVEN)
def test_the_settings_in_deploy_start_the_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in GIVEN[where].items():
        path = tmp_path / Path(value).name
        if name.endswith("_FILE"):
            path.write_text(SECRETS[path.name])
        monkeypatch.setenv(name, str(path) if name.endswith("_FILE") else value)

    settings = load_settings()

    assert configure(settings).trusted
    assert settings.voicepass_database_url == SECRETS["database_url"]
    assert {name.removesuffix("_FILE").lower() for name in GIVEN[where]} <= Settings.model_fields.keys()


@pytest.mark.parametrize(("path", "most"), [("compose.yaml", 3), ("kubernetes/deployment.yaml", 5)])
def test_the_settings_that_are_commented_out_exist(path: str, most: int) -> None:
    waiting = set(re.findall(r"^ *# (?:- \{ name: )?([A-Z_]+)[:,]", (DEPLOY / path).read_text(), re.MULTILINE))

    assert len(waiting) == most
    fields = Settings.model_fields.keys()
    assert [name for name in waiting if not {name.lower(), name.removesuffix("_FILE").lower()} & fields] == []


@pytest.mark.parametrize("where", GIVEN)
def test_the_grace_period_is_long_enough_to_drain_and_to_answer(where: str) -> None:
    drain_seconds = float(GIVEN[where]["VOICEPASS_DRAIN_SECONDS"])

    assert drain_seconds + longest_answer_seconds(settings_with()) + 2 < GRACE_SECONDS[where]


def test_the_drain_lasts_until_the_readiness_probe_has_failed() -> None:
    readiness = CONTAINER["readinessProbe"]

    noticed_after = (readiness["periodSeconds"] + readiness["timeoutSeconds"]) * readiness["failureThreshold"]
    assert float(GIVEN["kubernetes"]["VOICEPASS_DRAIN_SECONDS"]) >= noticed_after
    assert readiness["timeoutSeconds"] > ANSWER_SECONDS


@pytest.mark.anyio
async def test_every_probe_is_answered(api: httpx.AsyncClient) -> None:
    answers = {probe["httpGet"]["path"]: await api.get(probe["httpGet"]["path"]) for probe in PROBES}

    assert {path: answer.status_code for path, answer in answers.items()} == {"/healthz": 200, "/readyz": 200}


def test_every_port_is_the_one_that_the_image_uses() -> None:
    (port,) = re.findall(r"PORT=(\d+)", (DEPLOY.parent / "Dockerfile").read_text())
    container_ports = {entry["name"]: str(entry["containerPort"]) for entry in CONTAINER["ports"]}
    arguments = dict(pairwise(CONTAINER["args"]))
    annotations = MANIFESTS["Deployment"]["spec"]["template"]["metadata"]["annotations"]

    assert container_ports == {"http": port, "admin": arguments["--admin-port"]}
    assert annotations["prometheus.io/port"] == arguments["--admin-port"]
    assert {probe["httpGet"]["port"] for probe in PROBES} == {"http"}
    assert [entry["targetPort"] for entry in MANIFESTS["Service"]["spec"]["ports"]] == ["http"]
    assert [(list_namespaces(rule), rule["ports"]) for rule in MANIFESTS["NetworkPolicy"]["spec"]["ingress"]] == [
        (["ingress-nginx"], [{"port": "http"}]),
        (["monitoring"], [{"port": "admin"}]),
    ]
    assert COMPOSE["voicepass"]["ports"] == [f"127.0.0.1:{port}:{port}"]


def list_namespaces(rule: dict[str, Any]) -> list[str]:
    """List the namespaces that a rule of the network policy lets in."""
    return [peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for peer in rule["from"]]


def test_nothing_has_more_rights_than_it_needs() -> None:
    service, database = COMPOSE["voicepass"], COMPOSE["database"]

    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["securityContext"]["runAsNonRoot"]
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not POD["automountServiceAccountToken"]
    assert (service["read_only"], service["cap_drop"], database["read_only"]) == (True, ["ALL"], True)
    assert "ports" not in database
    assert all(re.search(r":\d", entry["image"]) for entry in COMPOSE.values())


def test_the_network_policy_opens_no_port_to_everyone_inside_and_none_to_the_metadata_service() -> None:
    policy = MANIFESTS["NetworkPolicy"]["spec"]
    blocks = [peer["ipBlock"] for rule in policy["egress"] for peer in rule["to"] if "ipBlock" in peer]
    allowed = [ip_network(block["cidr"]) for block in blocks]
    excepted = [ip_network(cidr) for block in blocks for cidr in block.get("except", ())]

    assert all(rule.get("from") for rule in policy["ingress"])
    assert all(rule.get("to") for rule in policy["egress"])
    assert all(
        peer.get("namespaceSelector", {}).get("matchLabels") for rule in policy["ingress"] for peer in rule["from"]
    )
    for address in map(ip_address, ("169.254.169.254", "192.168.0.1", "172.16.0.1", "fd00:ec2::254")):
        assert any(address in network for network in allowed)
        assert any(address in network for network in excepted)


def test_no_whole_private_network_is_trusted_as_a_proxy() -> None:
    networks = [ip_network(text) for text in GIVEN["kubernetes"]["VOICEPASS_TRUSTED_PROXIES"].split(",")]

    assert min(network.prefixlen for network in networks) >= 16


def test_every_container_has_limits_of_memory_and_of_processes_or_storage() -> None:
    resources = CONTAINER["resources"]

    assert {"memory", "ephemeral-storage"} <= resources["limits"].keys() & resources["requests"].keys()
    assert all({"mem_limit", "pids_limit"} <= service.keys() for service in COMPOSE.values())


def test_all_instances_together_fit_into_the_default_connections_of_postgresql() -> None:
    surge = MANIFESTS["Deployment"]["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
    most = MANIFESTS["HorizontalPodAutoscaler"]["spec"]["maxReplicas"] + surge

    assert most * MAX_CONNECTIONS <= 100 - 3, "PostgreSQL keeps three connections for its superuser"


def test_prometheus_scrapes_the_instances_of_the_proxy_files_and_loads_the_alerts() -> None:
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())

    (job,) = prometheus["scrape_configs"]
    for target in job["static_configs"][0]["targets"]:
        assert all(target in (DEPLOY / file).read_text() for file in ("nginx.conf", "Caddyfile"))
    assert [(DEPLOY / "prometheus" / file).exists() for file in prometheus["rule_files"]] == [True]


def test_kustomize_lists_every_manifest() -> None:
    files = {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}

    assert set(MANIFESTS["Kustomization"]["resources"]) == files


@pytest.mark.long
def test_the_manifests_match_the_schemas_of_kubernetes() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="comes with the extra 'dev'")
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl, which contains kustomize")
    command = [kubectl, "kustomize", str(DEPLOY / "kubernetes")]
    built = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    documents = list(yaml.safe_load_all(built))

    for document in documents:
        kubernetes_validate.validate(document, "1.34", strict=True)
    selected = {"app.kubernetes.io/name": "voicepass"}
    by_kind = {document["kind"]: document["spec"] for document in documents if "spec" in document}
    assert by_kind["Deployment"]["template"]["metadata"]["labels"] == selected
    assert by_kind["Service"]["selector"] == selected
    assert by_kind["PodDisruptionBudget"]["selector"]["matchLabels"] == selected
    assert by_kind["NetworkPolicy"]["podSelector"]["matchLabels"] == selected
