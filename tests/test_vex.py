"""The VEX statement names the packages that python-jose installs but voicepass never loads, and it is true."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

from tests.cli.test_cli import ENVIRONMENT
from tests.identity.hostile_tokens import signer_for
from tests.tables import table

STATEMENTS = json.loads((Path(__file__).parents[1] / "deploy" / "voicepass.openvex.json").read_text())["statements"]
STATED = {
    component["@id"].removeprefix("pkg:pypi/")
    for statement in STATEMENTS
    for product in statement["products"]
    for component in product["subcomponents"]
}

# Serves one request and verifies one signature of each kind, then names what it has imported.
SERVE = """
import asyncio, json, sys
import httpx
import voicepass.cli
from voicepass.app import create_app
from voicepass.identity.keys import HMAC_ALGORITHMS, key_from_pem, key_from_secret

async def serve():
    app = create_app()
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        await client.post("/v1/signed-url", headers={"Authorization": "Bearer a.b.c"})

asyncio.run(serve())
for algorithm, published in json.load(sys.stdin).items():
    build = key_from_secret if algorithm in HMAC_ALGORITHMS else key_from_pem
    build(published, algorithm).verifies(b"signed", b"signature")
print(json.dumps(sorted(sys.modules)))
"""


def list_loaded_modules(*, tmp_path: Path) -> set[str]:
    keys = {algorithm: signer_for(algorithm).published for algorithm in ("HS256", "RS256", "ES256")}
    environment = {**os.environ, **ENVIRONMENT, "VOICEPASS_DATABASE_URL": "sqlite://"}
    ended = subprocess.run(
        [sys.executable, "-c", SERVE],
        input=json.dumps(keys),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    return {module.partition(".")[0] for module in json.loads(ended.stdout.splitlines()[-1])}


@pytest.mark.long
def test_a_running_service_imports_none_of_the_packages_that_the_vex_statement_names(tmp_path: Path) -> None:
    modules = list_loaded_modules(tmp_path=tmp_path)

    assert {"jose", "cryptography"} <= modules
    assert STATED.isdisjoint(modules)


def test_the_statement_names_every_package_that_python_jose_requires() -> None:
    required = {re.split(r"[^\w-]", entry)[0] for entry in requires("python-jose") or () if "extra ==" not in entry}

    assert required == STATED


@table("statement", STATEMENTS)
def test_each_statement_has_the_fields_that_openvex_requires(statement: dict[str, object]) -> None:
    assert statement.keys() >= {"vulnerability", "products", "status", "justification", "impact_statement"}
    assert (statement["status"], statement["justification"]) == ("not_affected", "vulnerable_code_not_in_execute_path")
