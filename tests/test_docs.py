"""The documents tell the truth: the README's commands are run, its tables equal the code, the map is complete."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import pytest

import voicepass
from elevenlabs_emulator import EmulatedAgent, Emulator, create_emulator
from tests.canaries import API_KEY, JWT_SECRET
from tests.cli.test_cli import CLEAN, ENVIRONMENT
from tests.servers import free_port, running, started
from voicepass import errors

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(kind: str) -> list[str]:
    """The shell blocks of the README that are marked `<!-- kind -->`, in order."""
    return re.findall(rf"<!-- {kind} -->\n```sh\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a clone after the first command: the environment in `.venv`, the example beside it."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / ".env.example").write_text((ROOT / ".env.example").read_text())
    return tmp_path


def bash(command: str) -> list[str]:
    return ["bash", "-c", command]


def test_five_minutes_to_production_work_as_printed(checkout: Path) -> None:
    copy, curl = commands("run")
    (serve,) = commands("serve")
    port = free_port()
    emulator = Emulator(agents=[EmulatedAgent(agent_id="agent_1")], api_keys={API_KEY: frozenset({"convai_write"})})

    with running(lambda _url: create_emulator(emulator)) as elevenlabs:
        subprocess.run(bash(copy), cwd=checkout, check=True)
        values = {
            "ELEVENLABS_API_KEY": API_KEY,
            "ELEVENLABS_AGENT_ID": "agent_1",
            "VOICEPASS_JWT_SECRET": JWT_SECRET,
            "VOICEPASS_JWT_ISSUER": "https://login.example",
            "VOICEPASS_JWT_AUDIENCE": "voicepass",
        }
        filled_in = (checkout / ".env").read_text()
        for name, value in values.items():
            filled_in = filled_in.replace(f"\n{name}=\n", f"\n{name}={value}\n")
        (checkout / ".env").write_text(f"{filled_in}\nELEVENLABS_BASE_URL={elevenlabs}\n")
        with started(bash(f"{serve.strip()} --port {port}"), cwd=checkout, environment=CLEAN):
            answer = subprocess.run(
                bash(curl.replace(":8000", f":{port}")),
                cwd=checkout,
                env=CLEAN,
                capture_output=True,
                text=True,
                check=True,
            ).stdout

    assert '"signed_url":"ws://127.0.0.1' in answer
    assert '"dynamic_variables":{"user_id":"u-1","user_name":"Ada"}' in answer


def test_the_demo_starts_as_printed(checkout: Path) -> None:
    (demo,) = commands("demo")
    port = free_port()
    start_demo = demo.strip().split(" && ")[-1]

    with started(bash(f"{start_demo} --port {port}"), cwd=checkout, environment=CLEAN):
        page = httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)

    assert page.status_code == 200
    assert "Start conversation" in page.text


def test_the_emulator_is_run_asked_and_controlled_as_printed(checkout: Path) -> None:
    port = free_port()
    emulator, settings, control, fix = (
        commands(kind)[0].replace("9000", str(port))
        for kind in ("emulator", "emulator-settings", "emulator-control", "emulator-fix")
    )
    base_url, key, agent_id = (line.partition("=")[2] for line in settings.split())
    signed_url = f"{base_url}/v1/convai/conversation/get-signed-url?agent_id={agent_id}"

    with started(bash(emulator.strip()), cwd=checkout, environment=CLEAN):
        before = httpx.get(signed_url, headers={"xi-api-key": key}, trust_env=False)
        told = subprocess.run(bash(f"set -e\n{control}"), env=CLEAN, capture_output=True, text=True, check=True).stdout
        after = httpx.get(signed_url, headers={"xi-api-key": key}, trust_env=False)
        subprocess.run(bash(fix), env=CLEAN, capture_output=True, check=True)
        again = httpx.get(signed_url, headers={"xi-api-key": key}, trust_env=False)

    assert (before.status_code, after.status_code, again.status_code) == (200, 503, 200)
    assert "get-signed-url" in told
    assert "detail" not in told, "a curl was refused"


def test_the_doctor_says_what_is_printed(checkout: Path) -> None:
    doctor, explain = commands("doctor")
    agent = EmulatedAgent(agent_id="agent_demo", first_message="Hi {{username}}!")

    with running(lambda _url: create_emulator(Emulator(agents=[agent]))) as elevenlabs:
        environment = ENVIRONMENT | {"ELEVENLABS_API_KEY": "sk_emulator", "ELEVENLABS_BASE_URL": elevenlabs}
        found = subprocess.run(bash(doctor), cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    explained = subprocess.run(bash(explain), cwd=checkout, env=CLEAN, capture_output=True, text=True, check=True)

    assert found.returncode == 1
    printed = re.search(r"^FAIL  variables.*?(?= …$)", README, re.DOTALL | re.MULTILINE)
    assert printed
    assert " ".join(printed[0].split()) in " ".join(found.stdout.split())
    assert explained.stdout.startswith("This message is only a consequence")


@pytest.mark.long
def test_a_fresh_clone_shows_the_demo_within_a_minute(tmp_path: Path) -> None:
    subprocess.run(bash(f"git clone -q '{ROOT}' '{tmp_path}/clone'"), check=True)
    (demo,) = commands("demo")
    port = free_port()

    with started(bash(f"{demo.strip()} --port {port}"), cwd=tmp_path / "clone", environment=CLEAN, within_seconds=60):
        page = httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)

    assert "Start conversation" in page.text


def anchors(document: Path) -> set[str]:
    """The names that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())

    for link in links:
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        assert "://" not in link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_document_is_found_from_the_readme() -> None:
    for document in DOCUMENTS:
        assert document.name == "README.md" or f"]({document.relative_to(ROOT)})" in README, document.name


def test_the_readme_lists_every_refusal() -> None:
    listed = dict(re.findall(r"^\| `([a-z_]+)` \| (\d{3}) \|", README, re.MULTILINE))

    refusals = [
        refusal
        for refusal in vars(errors).values()
        if isinstance(refusal, type) and issubclass(refusal, errors.Refusal) and hasattr(refusal, "code")
    ]
    assert listed == {refusal.code: str(refusal.status) for refusal in refusals}
    assert list(listed.values()) == sorted(listed.values())
    tree = errors.__doc__ or ""
    for refusal in refusals:
        assert f"{refusal.__name__} {refusal.status}" in tree


def test_the_map_names_every_module_and_no_other() -> None:
    listed = re.findall(r"^    (\w+) {2,}\S", voicepass.__doc__ or "", re.MULTILINE)

    package = ROOT / "src" / "voicepass"
    modules = {path.stem for path in package.glob("*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    assert set(listed) == modules - {"__init__", "__main__"}
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(("document", "at_least"), [("SECURITY.md", 40), ("docs/threat-model.md", 30)])
def test_every_test_that_a_promise_names_is_there(document: str, at_least: int) -> None:
    table = (ROOT / document).read_text()

    named: list[tuple[str, str]] = []
    for row in table.splitlines():
        file = ""
        for new_file, name in re.findall(r"`((?:\w+/)?(?:test_\w+|conftest)\.py)?(?:::(\w+))?`", row):
            file = new_file or file
            if file:
                named.append((file, name))

    assert len(named) > at_least
    for file, name in named:
        text = (ROOT / "tests" / file).read_text()
        assert not name or f"def {name}(" in text, f"{file}::{name}"


def test_the_lock_pins_what_the_project_asks_for_and_names_no_index() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    pinned = set(re.findall(r"^([a-z0-9-]+)==", lock, re.MULTILINE))
    asked = {re.split(r"[\[><=]", dependency)[0] for dependency in project["dependencies"]}
    assert asked <= pinned
    assert "http:" not in lock
    assert "https:" not in lock
    for pin in re.split(r"\n(?=[a-z])", lock.strip()):
        assert "--hash=sha256:" in pin


@pytest.mark.long
def test_the_image_would_hold_a_service_that_starts(tmp_path: Path) -> None:
    """No container engine is needed: these are the Dockerfile's steps, run in a fresh environment."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    install = ["pip", "install", "-q", "--require-hashes", "--no-deps", "--only-binary", ":all:"]
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", *install, "-r", str(ROOT / "requirements.lock")], check=True)
    port = free_port()
    environment = CLEAN | {
        "PYTHONPATH": str(ROOT / "src"),
        "PORT": str(port),
        "ELEVENLABS_API_KEY": API_KEY,
        "ELEVENLABS_AGENT_ID": "agent_1",
        "VOICEPASS_JWT_SECRET": JWT_SECRET,
        "VOICEPASS_JWT_ISSUER": "i",
        "VOICEPASS_JWT_AUDIENCE": "a",
    }

    with started([python, "-m", "voicepass", "serve"], cwd=tmp_path, environment=environment):
        health = httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False)

    assert health.status_code == 200
