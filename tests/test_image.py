"""The Dockerfile does what the documents promise. If buildah is installed, a test builds and runs the image."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.test_cli import ENVIRONMENT
from tests.servers import free_port

ROOT = Path(__file__).parents[1]
DOCKERFILE = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
INSTRUCTIONS = [tuple(line.split(maxsplit=1)) for line in DOCKERFILE.splitlines() if line.strip()]


def list_arguments(instruction: str) -> list[str]:
    return [argument for name, argument in INSTRUCTIONS if name == instruction]


def test_every_stage_starts_from_the_same_base_image() -> None:
    (base,) = list_arguments("ARG")

    minor = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    version = re.fullmatch(r"BASE_IMAGE=python:(3\.\d+)\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    assert version
    assert f"Programming Language :: Python :: {version[1]}" in minor
    assert {stage.split()[0] for stage in list_arguments("FROM")} == {"${BASE_IMAGE}"}


def test_the_image_holds_only_the_locked_packages_and_our_sources() -> None:
    install = next(run for run in list_arguments("RUN") if " install " in run)
    copied = {argument.split()[0] for argument in list_arguments("COPY") if not argument.startswith("--from=")}

    assert {"--require-hashes", "--no-deps", "--only-binary"} <= set(install.split())
    assert install.endswith("-r /requirements.lock")
    assert copied == {"requirements.lock", "src"}
    assert all((ROOT / path).exists() for path in copied)
    assert (ROOT / ".dockerignore").read_text().split() == [
        "*",
        *(f"!{path}" for path in sorted(copied)),
        "**/__pycache__",
    ]
    assert not re.search(r"(SECRET|_KEY|TOKEN|PASSWORD)\b", DOCKERFILE)


def test_the_image_runs_as_a_numeric_user_and_its_process_gets_the_signal() -> None:
    (user,), (stop,), (check,) = list_arguments("USER"), list_arguments("STOPSIGNAL"), list_arguments("HEALTHCHECK")

    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)
    assert stop == "SIGTERM"
    assert json.loads(list_arguments("ENTRYPOINT")[0]) == ["python", "-m", "voicepass"]
    assert json.loads(list_arguments("CMD")[0]) == ["serve", "--host", "0.0.0.0"]  # noqa: S104 - a container's own address
    command = json.loads(check.partition(" CMD ")[2])
    assert command[0] == "python"
    assert "/healthz" in command[-1]


def test_the_image_reads_no_env_file_in_its_working_directory() -> None:
    assert "VOICEPASS_ENV_FILE=/dev/null" in " ".join(list_arguments("ENV")).split()


def run_command(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def pull_base_image() -> str:
    """Pull the Dockerfile's base, or the image that BASE_IMAGE names, such as one of a mirror; return its name."""
    if shutil.which("buildah") is None or os.geteuid() != 0:
        pytest.skip("needs buildah and root")
    image = os.environ.get("BASE_IMAGE") or list_arguments("ARG")[0].partition("=")[2]
    try:
        run_command("buildah", "pull", "--policy", "missing", image)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{image} cannot be pulled: {error.stderr.splitlines()[-1]}")
    return image


@contextlib.contextmanager
def mount(image: str, data: Path) -> Iterator[Path]:
    """Mount the image's files read-only, with a writable /data and an empty /tmp.

    `docker run --read-only --tmpfs /tmp` does the same.
    """
    container = run_command("buildah", "from", "--pull-never", image)
    root = Path(run_command("buildah", "mount", container))
    mounts = [
        (root, ["--bind", str(root)]),
        (root, ["-o", "remount,bind,ro"]),
        (root / "proc", ["-t", "proc", "proc"]),
        (root / "tmp", ["-t", "tmpfs", "tmpfs"]),
        (root / "data", ["--bind", str(data)]),
    ]
    try:
        for where, what in mounts:
            run_command("mount", *what, str(where))
        yield root
    finally:
        run_command("umount", "--recursive", str(root))
        run_command("buildah", "rm", container)
        run_command("buildah", "rmi", image)


def enter(root: Path, config: dict[str, Any], command: Sequence[str]) -> list[str]:
    environment = dict(entry.split("=", 1) for entry in config["Env"])
    run = ["env", "-i", *(f"{name}={value}" for name, value in environment.items()), *command]
    return [
        "chroot",
        f"--userspec={config['User']}",
        str(root),
        "sh",
        "-c",
        'cd "$0" && exec "$@"',
        config["WorkingDir"],
        *run,
    ]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_image_is_built_and_runs_without_rights_on_a_read_only_root(tmp_path: Path) -> None:
    build = [
        "bud",
        "--quiet",
        "--isolation",
        "chroot",
        "--format",
        "docker",
        "--build-arg",
        f"BASE_IMAGE={pull_base_image()}",
    ]
    image = run_command("buildah", *build, str(ROOT))
    config = json.loads(json.loads(run_command("buildah", "inspect", "--type", "image", image))["Config"])["config"]
    port, data = free_port(), tmp_path / "data"
    data.mkdir()
    os.chown(data, 10001, 10001)
    given = [f"{name}={value}" for name, value in ENVIRONMENT.items() if name.startswith(("VOICEPASS_", "ELEVENLABS_"))]
    config["Env"] += [*given, f"PORT={port}"]

    with mount(image, data) as root:
        command = enter(root, config, [*config["Entrypoint"], *config["Cmd"]])
        command = ["unshare", "--pid", "--fork", "--kill-child", *command]  # it is process 1, as in a container
        first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert first.stderr is not None
        lines: list[str] = []
        while not lines or "Uvicorn running on" not in lines[-1]:
            lines.append(first.stderr.readline())
            assert lines[-1], lines
        pid = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text())
        status = Path(f"/proc/{pid}/status").read_text()
        ready = httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False)
        healthy = subprocess.run(enter(root, config, config["Healthcheck"]["Test"][1:]), check=False)
        writing = subprocess.run(enter(root, config, ["touch", "/app/x", "/venv/x", "/etc/x"]), check=False)
        begun = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        rest = first.communicate(timeout=30)[1]
        seconds = time.monotonic() - begun
        dead = subprocess.run(enter(root, config, config["Healthcheck"]["Test"][1:]), check=False, capture_output=True)

    written = sorted(path.name for path in data.iterdir())
    print(f"the image: ended {seconds:.1f} s after SIGTERM with code {first.returncode}; /data has {written}")
    assert re.search(r"^Uid:\s+10001\s+10001\s", status, re.MULTILINE)
    assert re.search(r"^NSpid:\s+\d+\s+1$", status, re.MULTILINE)
    assert (ready.status_code, healthy.returncode, dead.returncode) == (200, 0, 1)
    assert writing.returncode != 0
    assert first.returncode == 0, rest
    assert seconds < 5
    assert "voicepass.db" in written
