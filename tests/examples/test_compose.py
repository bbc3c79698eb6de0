"""The Compose file matches its README, and its commands also work without containers."""

import json
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Browser, BrowserContext

from tests.cli.test_cli import CLEAN
from tests.examples.conftest import (
    EMULATOR,
    EXAMPLES,
    ROOT,
    SERVICE,
    SETTINGS,
    SHOP,
    Street,
    open_window,
    read_environment,
)
from tests.examples.journey import end_the_conversation, sign_in, write_a_message
from tests.servers import free_port, started

COMPOSE: dict[str, Any] = yaml.safe_load((EXAMPLES / "compose" / "compose.yaml").read_text())["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_the_browser_and_voicepass_reach_the_emulator_at_the_same_address() -> None:
    settings = read_environment(SETTINGS)
    published = {port.removesuffix(f":{port.rpartition(':')[2]}") for port in COMPOSE["emulator"]["ports"]}

    assert published == {SERVICE, SHOP, EMULATOR}
    assert settings["ELEVENLABS_BASE_URL"] == f"http://{EMULATOR}"
    assert {COMPOSE[name]["network_mode"] for name in ("voicepass", "page")} == {"service:emulator"}
    assert not any("ports" in COMPOSE[name] for name in ("voicepass", "page"))


def test_each_container_waits_for_one_with_a_health_check() -> None:
    first_to_last = ["emulator", "voicepass", "page"]
    waits = {name: list(COMPOSE[name].get("depends_on", {})) for name in first_to_last}

    assert waits == {"emulator": [], "voicepass": ["emulator"], "page": ["voicepass"]}
    assert "HEALTHCHECK" in DOCKERFILE
    assert "healthcheck" in COMPOSE["emulator"]  # the image's own check calls the port of voicepass
    assert {service["image"] for service in COMPOSE.values()} == {"voicepass:0.1.0"}
    assert (EXAMPLES / "compose" / COMPOSE["emulator"]["build"]).resolve() == ROOT
    assert (EXAMPLES / "compose" / COMPOSE["voicepass"]["env_file"]).resolve() == EXAMPLES / "shop.env"


def read_arguments(instruction: str) -> list[str]:
    (arguments,) = re.findall(rf"^{instruction} (\[.*\])$", DOCKERFILE, re.MULTILINE)
    return [str(argument) for argument in json.loads(arguments)]


@pytest.mark.browser
@pytest.mark.long
def test_with_the_commands_of_the_containers_a_shopper_can_talk(
    chromium: Browser, contexts: list[BrowserContext], tmp_path: Path
) -> None:
    addresses = {address: f"127.0.0.1:{free_port()}" for address in (SERVICE, SHOP, EMULATOR)}
    street = Street(addresses)
    page = street.copy("plain-html", tmp_path)
    image = [sys.executable, *read_arguments("ENTRYPOINT")[1:]]
    emulator = [*image, *map(street.translate, COMPOSE["emulator"]["command"]), "--port", street.port(EMULATOR)]
    paths = {
        "python": sys.executable,
        "/examples/shop.py": str(EXAMPLES / "shop.py"),
        "/examples/plain-html": str(page),
    }
    shop = [paths[part] for part in COMPOSE["page"]["entrypoint"]]

    with ExitStack() as stack:
        for command, environment in (
            (emulator, CLEAN),
            ([*image, *read_arguments("CMD")], street.environment | {"PORT": street.port(SERVICE)}),
            (shop, street.environment | COMPOSE["page"]["environment"] | {"PORT": street.port(SHOP)}),
        ):
            stack.enter_context(started(command, cwd=tmp_path, environment=environment))
        shopper = open_window(chromium, contexts)
        shopper.page.goto(street.url(SHOP))
        sign_in(shopper.page, "Cleo")
        write_a_message(shopper.page, "Cleo")
        end_the_conversation(shopper.page)

    assert shopper.errors == []
