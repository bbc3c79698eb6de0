"""The documents are correct: their commands run, their tables equal the code, and the map is complete.

To write docs/openapi.json and the table of docs/errors.md: `python -m tests.test_docs`.
"""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

import voicepass
from elevenlabs_emulator import EmulatedAgent, Emulator, create_emulator
from tests.canaries import API_KEY, JWT_SECRET
from tests.cli.test_cli import CLEAN, ENVIRONMENT
from tests.conftest import MakeToken, settings_with
from tests.servers import free_port, running, started
from voicepass import errors
from voicepass.api.schemas import list_refusals
from voicepass.app import create_app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md")] + sorted(DOCS.glob("*.md"))
MOST_WORDS = 18_400
MOST_WORDS_OF_THE_README = 900
OPENAPI = DOCS / "openapi.json"
ERRORS = DOCS / "errors.md"
SERVICE_TOKEN = "canary-service-token-of-the-docs-5d0c7e21"
WEBHOOK_SECRET = "canary-webhook-secret-of-the-docs-84af"


def list_commands(kind: str, document: str = "README.md") -> list[str]:
    """List the shell blocks of a document that are marked `<!-- kind -->`, in order."""
    return re.findall(rf"<!-- {kind} -->\n```sh\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a clone after the first command: it has `.venv` and `.env.example`."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / ".env.example").write_text((ROOT / ".env.example").read_text())
    return tmp_path


def bash(command: str) -> list[str]:
    return ["bash", "-c", command]


@pytest.mark.long
def test_the_commands_of_the_readme_for_production_work_as_printed(checkout: Path) -> None:
    copy, curl = list_commands("run")
    (serve,) = list_commands("serve")
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
    (demo,) = list_commands("demo")
    port = free_port()
    start_demo = demo.strip().split(" && ")[-1]

    with started(bash(f"{start_demo} --port {port}"), cwd=checkout, environment=CLEAN):
        page = httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)

    assert page.status_code == 200
    assert "Start conversation" in page.text


@pytest.mark.long
def test_the_commands_of_the_emulator_page_work_as_printed(checkout: Path) -> None:
    port = free_port()
    emulator, settings, control, repair = (
        list_commands(kind, "docs/emulator.md")[0].replace("9000", str(port))
        for kind in ("emulator", "emulator-settings", "emulator-control", "emulator-repair")
    )
    base_url, key, agent_id = (line.partition("=")[2] for line in settings.split())
    signed_url = f"{base_url}/v1/convai/conversation/get-signed-url?agent_id={agent_id}"

    with started(bash(emulator.strip()), cwd=checkout, environment=CLEAN):
        before = httpx.get(signed_url, headers={"xi-api-key": key}, trust_env=False)
        requests = subprocess.run(
            bash(f"set -e\n{control}"), env=CLEAN, capture_output=True, text=True, check=True
        ).stdout
        after = httpx.get(signed_url, headers={"xi-api-key": key}, trust_env=False)
        subprocess.run(bash(repair), env=CLEAN, capture_output=True, check=True)
        again = httpx.get(signed_url, headers={"xi-api-key": key}, trust_env=False)

    assert (before.status_code, after.status_code, again.status_code) == (200, 503, 200)
    assert "get-signed-url" in requests
    assert "detail" not in requests, "a curl was refused"


@pytest.mark.long
def test_the_doctor_prints_what_the_documents_show(checkout: Path) -> None:
    (doctor,) = list_commands("doctor")
    (explain,) = list_commands("doctor", "docs/faq.md")
    agent = EmulatedAgent(agent_id="agent_demo", first_message="Hi {{username}}!")

    with running(lambda _url: create_emulator(Emulator(agents=[agent]))) as elevenlabs:
        environment = ENVIRONMENT | {"ELEVENLABS_API_KEY": "sk_emulator", "ELEVENLABS_BASE_URL": elevenlabs}
        found = subprocess.run(bash(doctor), cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    explained = subprocess.run(bash(explain), cwd=checkout, env=CLEAN, capture_output=True, text=True, check=True)

    assert found.returncode == 1
    example = re.search(
        r"^FAIL  variables.*?(?= …$)", (DOCS / "troubleshooting.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert example
    assert " ".join(example[0].split()) in " ".join(found.stdout.split())
    assert "closeCode" in explained.stdout


def read_sections() -> dict[tuple[str, str], str]:
    """Read the sections of docs/api.md, by method and path."""
    found = re.findall(
        r"^## (GET|POST) (\S+)\n(.*?)(?=^## |\Z)", (DOCS / "api.md").read_text(), re.DOTALL | re.MULTILINE
    )
    return {(method.lower(), path): text for method, path, text in found}


def is_shown(shown: Any, real: Any) -> bool:
    """Tell whether a real answer has every member that the documents show."""
    if isinstance(shown, dict) and isinstance(real, dict):
        return all(key in real and is_shown(value, real[key]) for key, value in shown.items())
    if isinstance(shown, list) and isinstance(real, list):
        return not shown or any(is_shown(shown[0], one) for one in real)
    return True


@pytest.fixture
def api_url() -> Iterator[str]:
    """The URL of a service with the default limits, in front of an emulator."""
    agent = EmulatedAgent(agent_id="agent_7x")
    permissions = {API_KEY: frozenset({"convai_write", "convai_read"})}
    with running(lambda _url: create_emulator(Emulator(agents=[agent], api_keys=permissions))) as elevenlabs:
        settings = settings_with(
            elevenlabs_base_url=elevenlabs,
            elevenlabs_webhook_secret=SecretStr(WEBHOOK_SECRET),
            voicepass_policy_file=None,
            voicepass_service_tokens=SERVICE_TOKEN,
        )
        with running(lambda _url: create_app(settings)) as address:
            yield address


def test_every_example_of_the_api_page_gets_the_answer_that_the_page_shows(
    api_url: str, make_token: MakeToken, tmp_path: Path
) -> None:
    environment = CLEAN | {
        "VOICEPASS": api_url,
        "TOKEN": make_token(),
        "SERVICE_TOKEN": SERVICE_TOKEN,
        "SECRET": WEBHOOK_SECRET,
    }
    for text in read_sections().values():
        examples = re.findall(r"<!-- example -->\n```sh\n(.*?)```\n(?:\n```json\n(.*?)```)?", text, re.DOTALL)
        assert examples
        for command, shown in examples:
            script = f'set -e\ncurl() {{ command curl --fail-with-body "$@"; }}\n{command}'
            sent = subprocess.run(
                bash(script), env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
            )
            assert sent.returncode == 0, f"{command}{sent.stdout}{sent.stderr}"
            if shown:
                answer = json.loads(sent.stdout)
                assert is_shown(json.loads(shown), answer), sent.stdout
                environment |= {
                    "CONVERSATION_ID": answer.get("conversation_id") or environment.get("CONVERSATION_ID", "")
                }


def openapi() -> dict[str, Any]:
    return create_app(settings_with()).openapi()


def test_the_committed_openapi_document_equals_the_apps() -> None:
    assert json.loads(OPENAPI.read_text()) == openapi(), "run: python -m tests.test_docs"


def test_the_api_page_has_every_route_with_its_refusals() -> None:
    pages = read_sections()
    anywhere = {refusal.code for refusal in list_refusals("any")}
    # One section describes all methods of a path, such as a GET that equals the POST, and the DELETE of blocks.
    for path, methods in openapi()["paths"].items():
        method = "post" if "post" in methods else "get"
        answers = methods[method]["responses"].values()
        possible = {code for answer in answers for code in re.findall(r"`(\w+)`", answer["description"])}
        listed = re.search(r"\*\*Refusals\*\*: (.*?)[.;]", pages[method, path], re.DOTALL)
        if listed is None:
            assert possible <= anywhere or "the refusals are as for" in " ".join(pages[method, path].split())
            continue
        codes = set(re.findall(r"`(\w+)`", listed[1]))
        assert codes <= possible, path
        assert possible - codes - anywhere <= {"conversation_unknown"}, path


@pytest.mark.long
@pytest.mark.alone
def test_a_fresh_clone_shows_the_demo_within_a_minute(tmp_path: Path) -> None:
    subprocess.run(bash(f"git clone -q '{ROOT}' '{tmp_path}/clone'"), check=True)
    (demo,) = list_commands("demo")
    port = free_port()

    with started(bash(f"{demo.strip()} --port {port}"), cwd=tmp_path / "clone", environment=CLEAN, within_seconds=60):
        page = httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)

    assert "Start conversation" in page.text


def list_anchors(document: Path) -> set[str]:
    """List the anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "llms.txt"], ids=lambda document: document.name)
def test_every_link_has_a_target(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())

    for link in links:
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        assert "://" not in link
        assert target.exists(), link
        assert not anchor or anchor in list_anchors(target), link


def test_the_readme_and_llms_txt_link_to_every_document() -> None:
    for_models = (ROOT / "llms.txt").read_text()
    for document in DOCUMENTS:
        link = f"]({document.relative_to(ROOT)})"
        assert document.name == "README.md" or link in README, document.name
        assert document.name == "CONTRIBUTING.md" or link in for_models, document.name


def list_refusal_classes() -> list[type[errors.Refusal]]:
    return [
        refusal
        for refusal in vars(errors).values()
        if isinstance(refusal, type) and issubclass(refusal, errors.Refusal) and hasattr(refusal, "code")
    ]


def rebuild_table(document: str) -> str:
    """Rebuild the page's table from the code, sorted by status; keep the column about the operator."""
    remedies = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", document, re.MULTILINE))
    rows = [
        f"| `{refusal.code}` | {refusal.status} | {escape(refusal.detail, quote=False)} "
        f"| {remedies.get(refusal.code, '')} |"
        for refusal in sorted(list_refusal_classes(), key=lambda refusal: refusal.status)
    ]
    head = "| code | status | what the user sees (`detail`) | what the operator does |\n|---|---|---|---|\n"
    table = "<!-- errors -->\n" + head + "\n".join(rows) + "\n<!-- end of errors -->"
    return re.sub(r"<!-- errors -->.*<!-- end of errors -->", lambda _: table, document, flags=re.DOTALL)


def test_the_errors_page_has_every_code_with_a_remedy() -> None:
    document = ERRORS.read_text()

    assert document == rebuild_table(document), "run: python -m tests.test_docs"
    assert "|  |" not in document, "say what the operator does"
    for refusal in list_refusal_classes():
        assert f"{refusal.__name__} {refusal.status}" in (errors.__doc__ or "")


def test_every_refusal_has_a_row_in_the_table_and_every_row_a_class() -> None:
    rows = tomllib.loads(Path(errors.__file__).with_name("refusals.toml").read_text())
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.Refusal)]

    assert [kind.__name__ for kind in kinds if not {*kind.__subclasses__()} & {*kinds}] == list(rows)
    assert {name for row in rows.values() for name in row} <= {*dir(errors.Refusal), "code", "status", "title"}


def test_the_documents_are_short() -> None:
    words = {document: len(document.read_text().split()) for document in DOCUMENTS}

    assert words[ROOT / "README.md"] <= MOST_WORDS_OF_THE_README
    assert sum(words.values()) - words[ROOT / "CONTRIBUTING.md"] <= MOST_WORDS
    assert len((ROOT / "SECURITY.md").read_text().splitlines()) <= 30


def test_every_page_about_the_client_says_that_the_origin_must_be_allowed() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        assert "client.js" not in text or "VOICEPASS_ALLOWED_ORIGINS" in text, document.name


def test_the_map_names_every_module_and_no_other() -> None:
    listed = re.findall(r"^    (\w+) {2,}\S", voicepass.__doc__ or "", re.MULTILINE)

    package = ROOT / "src" / "voicepass"
    modules = {path.stem for path in package.glob("*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    assert set(listed) == modules - {"__init__", "__main__"}
    assert len(listed) == len(set(listed))


def test_every_test_that_a_promise_names_exists() -> None:
    table = (DOCS / "proofs.md").read_text()

    named: list[tuple[str, str]] = []
    for promise in table.split("\n- "):
        file = ""
        for new_file, name in re.findall(r"`((?:\w+/)?(?:test_\w+|conftest)\.py)?(?:::(\w+))?`", promise):
            file = new_file or file
            if file:
                named.append((file, name))

    assert len(named) > 70
    for file, name in named:
        text = (ROOT / "tests" / file).read_text()
        assert not name or f"def {name}(" in text, f"{file}::{name}"


def test_the_lock_pins_every_dependency_and_names_no_index() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    pinned = set(re.findall(r"^([a-z0-9-]+)==", lock, re.MULTILINE))
    required = {re.split(r"[\[><=]", dependency)[0] for dependency in project["dependencies"]}
    assert required <= pinned
    assert "http:" not in lock
    assert "https:" not in lock
    for pin in re.split(r"\n(?=[a-z])", lock.strip()):
        assert "--hash=sha256:" in pin


@pytest.mark.long
def test_the_steps_of_the_dockerfile_give_a_service_that_starts(tmp_path: Path) -> None:
    """Run the Dockerfile's steps in a fresh environment, because a test machine may have no container engine."""
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


if __name__ == "__main__":
    OPENAPI.write_text(json.dumps(openapi(), indent=1, ensure_ascii=False) + "\n")
    ERRORS.write_text(rebuild_table(ERRORS.read_text()))
