"""The wheel and the sdist contain only what they need, and the workflows build them."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.cli.test_cli import CLEAN
from tests.servers import free_port, started

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def list_sources() -> set[str]:
    """List the files below `src` that belong to the packages."""
    ignored = re.compile(r"__pycache__|\.egg-info")
    files = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*") if path.is_file()}
    return {file for file in files if not ignored.search(file)}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_demo_runs_from_the_wheel_alone_and_the_packages_contain_only_the_sources(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "install", "-q", "--no-compile", "--target", str(tmp_path / "build"), "build"], check=True)
    build = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, env=CLEAN | {"PYTHONPATH": str(tmp_path / "build")}, check=True, capture_output=True)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "empty")], check=True)
    subprocess.run([*pip, "--python", str(tmp_path / "empty"), "install", "-q", "--no-compile", str(wheel)], check=True)
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    command = [str(tmp_path / "empty" / "bin" / "voicepass"), "demo", "--port", str(port)]
    with started(command, cwd=tmp_path, environment=CLEAN, within_seconds=60), httpx.Client(trust_env=False) as client:
        page = client.get(url)
        token = client.post(f"{url}/demo/sign-in", json={"name": "Ada"}).json()["token"]
        answer = client.post(f"{url}/v1/signed-url", headers={"Authorization": f"Bearer {token}"})
        module = client.get(f"{url}/v1/client.js")

    assert (page.status_code, answer.status_code, module.status_code) == (200, 200, 200)
    assert answer.json()["signed_url"].startswith(f"ws://127.0.0.1:{port}/")
    with zipfile.ZipFile(wheel) as packed:
        files = {name for name in packed.namelist() if ".dist-info/" not in name}
    assert files == list_sources()
    with tarfile.open(sdist) as packed_sources:
        names = {member.name.partition("/")[2] for member in packed_sources.getmembers()}
    beside = {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", ".gitignore", "PKG-INFO"}
    assert names == {f"src/{file}" for file in list_sources()} | beside


def list_steps(workflow: str, job: str) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = WORKFLOWS[workflow]["jobs"][job]["steps"]
    return steps


def test_ci_runs_the_same_check_on_each_python_that_the_package_names() -> None:
    named = [entry.rpartition(" ")[2] for entry in PROJECT["classifiers"] if "Python ::" in entry]
    (check,) = WORKFLOWS["ci"]["jobs"].values()

    assert check["strategy"]["matrix"]["python"] == named == ["3.11", "3.12", "3.13", "3.14"]
    scripts = [step["run"] for step in check["steps"] if step.get("run", "").startswith(".")]
    assert scripts == [".ci/run"]
    assert os.access(ROOT / scripts[0], os.X_OK)
    assert WORKFLOWS["ci"]["permissions"] == {"contents": "read"}


def test_a_release_is_checked_before_it_is_published_and_each_job_has_only_the_rights_that_it_needs() -> None:
    release = WORKFLOWS["release"]
    jobs = release["jobs"]
    builds = [step["run"] for step in list_steps("release", "build") if "run" in step]
    image = list_steps("release", "image")[-1]["with"]

    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML parses the key `on` as true
    assert release["permissions"] == {}
    assert {name: job["permissions"] for name, job in jobs.items()} == {
        "build": {"contents": "read"},
        "publish": {"id-token": "write"},
        "image": {"contents": "read", "packages": "write"},
    }
    assert (jobs["publish"]["needs"], jobs["image"]["needs"], jobs["publish"]["environment"]) == (
        "build",
        "publish",
        "pypi",
    )
    assert builds.index("python -m build") < builds.index("python -m twine check --strict dist/*")
    assert (image["platforms"], image["sbom"], image["provenance"]) == ("linux/amd64,linux/arm64", True, "mode=max")


def test_every_action_has_a_version() -> None:
    uses = [
        step["uses"]
        for workflow in WORKFLOWS.values()
        for job in workflow["jobs"].values()
        for step in job["steps"]
        if "uses" in step
    ]

    assert uses
    assert [use for use in uses if not re.search(r"@(v\d+|release/v\d+|[0-9a-f]{40})$", use)] == []


def test_the_readme_says_that_pip_install_works_only_once_released() -> None:
    for line in (ROOT / "README.md").read_text().splitlines():
        assert "pip install voicepass" not in line or "once released" in line.lower(), line


def test_the_changelog_has_the_form_of_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    kinds = re.findall(r"^### (.*)$", text, re.MULTILINE)

    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[0] == "[Unreleased]"
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert len(kinds) == len(set(kinds))
