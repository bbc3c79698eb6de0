"""The compared servers: voicepass with everything on, what users would deploy instead, and the upstream as limit."""

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.peers.machine import BUILD, HERE, START_SECONDS, CannotRunError, Subject, Upstream, execute, run_subject
from voicepass.config.limits import MAX_AMOUNT
from voicepass.config.settings import Settings

AGENT_ID: Final = "agent_7x"
ISSUER: Final = "https://login.example"
AUDIENCE: Final = "voicepass"
API_KEY: Final = "sk_benchmark"
JWT_SECRET: Final = "the-secret-of-a-benchmark-that-guards-nothing"  # noqa: S105
USERS: Final = 20_000
WARM_PASSES: Final = 64

UPSTREAM_PATH: Final = f"/v1/convai/conversation/get-signed-url?agent_id={AGENT_ID}&include_conversation_id=true"
HEADERS: Final = "Host: 127.0.0.1\r\nAuthorization: Bearer {token}\r\nAccept: application/json\r\n"
ASK: Final = f"POST /v1/signed-url HTTP/1.1\r\n{HEADERS}Content-Length: 0\r\n\r\n"
ASK_UPSTREAM: Final = f"GET {UPSTREAM_PATH} HTTP/1.1\r\n{HEADERS}xi-api-key: {API_KEY}\r\n\r\n"

# All default limits are on, but too high to be reached.
AMOUNTS: Final = "".join(
    f"{limit} = {MAX_AMOUNT}\n"
    for limit in ("passes_per_minute", "passes_per_day", "open_conversations", "minutes_per_day", "minutes_per_month")
)
POLICY: Final = f"[limits.user]\n{AMOUNTS}"
EVERY_LIMIT: Final = POLICY + f"[limits.agent]\n{AMOUNTS}[limits.all]\n{AMOUNTS}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A server to compare. `folder` holds a Node application; `{app}` in the command is where it was installed."""

    name: str
    title: str
    command: tuple[str, ...]
    folder: str = ""
    scripts: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    policy: str = ""
    """The policy file of a voicepass. Peers have none."""

    def install(self) -> None:
        """Install what it needs, once for each version; raises CannotRunError."""
        if not self.folder:
            return
        source, installed = HERE / self.folder, BUILD / self.folder
        digest = hashlib.sha256(
            b"".join(path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file())
        ).hexdigest()
        stamp = installed / ".installed"
        if stamp.exists() and stamp.read_text() == digest:
            return
        shutil.copytree(source, installed, dirs_exist_ok=True)
        execute(["npm", "install", "--no-package-lock", "--no-audit", "--no-fund"], cwd=installed)
        for script in self.scripts:
            execute(["npm", "run", script], cwd=installed)
        stamp.write_text(digest)

    @contextlib.contextmanager
    def run(self, upstream: Upstream, directory: Path) -> Iterator[Subject]:
        """Run it with that upstream; `directory` is for its files."""
        port = free_port()
        cwd = directory / self.name
        cwd.mkdir(exist_ok=True)
        command = [word.format(port=port, app=BUILD / self.folder) for word in self.command]
        peer_environment = {
            "API_KEY": API_KEY,
            "AGENT_ID": AGENT_ID,
            "UPSTREAM": upstream.url,
            "JWT_SECRET": JWT_SECRET,
            "JWT_ISSUER": ISSUER,
            "JWT_AUDIENCE": AUDIENCE,
            "PORT": str(port),
            "NODE_ENV": "production",
        }
        environment = build_settings(upstream, cwd, self.policy) if self.policy else peer_environment
        with run_subject(self.name, command, port=port, cwd=cwd, environment=environment | self.environment) as subject:
            yield subject


def build_settings(upstream: Upstream, directory: Path, limits: str = POLICY) -> dict[str, str]:
    """Return settings with everything on: limits, a ledger on disk, a log line and metrics for each pass."""
    policy = directory / "policy.toml"
    policy.write_text(limits)
    return {
        "ELEVENLABS_API_KEY": API_KEY,
        "ELEVENLABS_AGENT_ID": AGENT_ID,
        "ELEVENLABS_BASE_URL": upstream.url,
        "VOICEPASS_JWT_SECRET": JWT_SECRET,
        "VOICEPASS_JWT_ISSUER": ISSUER,
        "VOICEPASS_JWT_AUDIENCE": AUDIENCE,
        "VOICEPASS_POLICY_FILE": str(policy),
        "VOICEPASS_DATABASE_URL": f"sqlite:///{directory / 'ledger.db'}",
    }


def has_warm_store() -> bool:
    """Whether this voicepass can hold ready-made passes."""
    return "voicepass_warm_passes" in Settings.model_fields


_UVICORN: Final = (sys.executable, "-m", "uvicorn", "--app-dir", str(HERE.parent.parent), "--port", "{port}")
_QUIET: Final = ("--no-access-log", "--log-level", "warning")

_SERVE: Final = (sys.executable, "-m", "voicepass", "serve", "--port", "{port}")
VOICEPASS: Final = Candidate("voicepass", "voicepass", _SERVE, policy=POLICY)
AGAIN: Final = Candidate("voicepass-again", "voicepass again: the null experiment", _SERVE, policy=POLICY)
ALL_LIMITS: Final = Candidate(
    "voicepass-all-limits", "voicepass, every limit of every scope", _SERVE, policy=EVERY_LIMIT
)
CANDIDATES: Final = (
    VOICEPASS,
    AGAIN,
    Candidate(
        "fastapi-per-request",
        "FastAPI, an httpx client per request",
        (*_UVICORN, *_QUIET, "benchmarks.peers.fastapi_app:per_request"),
    ),
    Candidate(
        "fastapi-shared",
        "FastAPI, one shared httpx client",
        (*_UVICORN, *_QUIET, "benchmarks.peers.fastapi_app:shared"),
    ),
    Candidate("bare", "uvicorn, aiohttp and SQLite, bare", (*_UVICORN, *_QUIET, "benchmarks.peers.bare:app")),
    Candidate("express", "Express, `fetch`", ("node", "{app}/server.js"), "express"),
    Candidate(
        "express-key",
        "Express, `fetch`, the key built once",
        ("node", "{app}/server.js"),
        "express",
        environment={"KEY_BUILT_ONCE": "yes"},
    ),
    Candidate("fastify", "Fastify, undici", ("node", "{app}/server.js"), "fastify"),
    Candidate(
        "next",
        "Next.js route handler, production build",
        ("node", "{app}/node_modules/next/dist/bin/next", "start", "{app}", "-p", "{port}", "-H", "127.0.0.1"),
        "next",
        scripts=("build",),
        environment={"NEXT_TELEMETRY_DISABLED": "1"},
    ),
)


def voicepass_of(checkout: Path) -> Candidate:
    """Return the voicepass of another checkout, such as the one before a change. Its `.venv` must have voicepass."""
    command = (str(checkout / ".venv/bin/python"), *_SERVE[1:])
    return replace(
        VOICEPASS, name=f"voicepass-{checkout.name}", title=f"voicepass of `{checkout.name}`", command=command
    )


def sign_token(user: int = 0, *, secret: str = JWT_SECRET, **claims: object) -> str:
    """Sign a token for one of the users; keyword arguments change its claims."""
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": f"user-{user}", "name": "Ada", "exp": int(time.time()) + 86400}
    segments = ({"alg": "HS256", "typ": "JWT"}, {k: v for k, v in (good | claims).items() if v is not None})
    signing_input = b".".join(_base64url(json.dumps(segment).encode()) for segment in segments)
    return b".".join((signing_input, _base64url(hmac.digest(secret.encode(), signing_input, hashlib.sha256)))).decode()


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def write_tokens(path: Path, users: int = USERS) -> Path:
    """Write one token a line for each user: too many for a cache of tokens to help."""
    path.write_text("".join(f"{sign_token(user)}\n" for user in range(users)))
    return path


def ask_for_pass(port: int, bearer: str) -> tuple[int, dict[str, Any]]:
    """Ask for a pass as a browser would; return the status and the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)
    try:
        connection.request("POST", "/v1/signed-url", headers={"Authorization": f"Bearer {bearer}"})
        answer = connection.getresponse()
        return answer.status, json.load(answer)
    finally:
        connection.close()


def wait_for_first_pass(subject: Subject, begun: float) -> float:
    """Wait for the first pass; return the seconds since `begun`, on the monotonic clock."""
    while subject.process.poll() is None and time.monotonic() < begun + START_SECONDS:
        with contextlib.suppress(OSError):
            status, answer = ask_for_pass(subject.port, sign_token())
            if status == http.client.OK:
                return time.monotonic() - begun
            raise CannotRunError(f"{subject.name} answered {status}: {answer}")
        time.sleep(0.005)
    raise CannotRunError(f"{subject.name} does not start: {subject.last_line()}")


def check(subject: Subject) -> None:
    """Raise CannotRunError unless the subject does the whole task: else the comparison is unfair."""
    answers = [ask_for_pass(subject.port, sign_token(user=7)) for _ in range(2)]
    urls = {answer["signed_url"] for _, answer in answers}
    variables = [answer["dynamic_variables"] for _, answer in answers]
    if len(urls) < len(answers) or variables != [{"user_id": "user-7", "user_name": "Ada"}] * len(answers):
        raise CannotRunError(f"{subject.name} does not give the user two new passes: {answers}")
    bad: dict[str, dict[str, Any]] = {
        "iss": {"iss": "https://other.example"},
        "aud": {"aud": "other"},
        "exp": {"exp": int(time.time()) - 3600},
        "no exp": {"exp": None},
        "no sub": {"sub": None},
        "signature": {"secret": JWT_SECRET[::-1]},
    }
    for flaw, change in bad.items():
        status, _ = ask_for_pass(subject.port, sign_token(**change))
        if status != http.client.UNAUTHORIZED:
            raise CannotRunError(f"{subject.name} answered {status} to a token with a bad {flaw}")


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
