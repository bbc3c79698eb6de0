"""Installs the npm packages of an example."""

import json
import shutil
from pathlib import Path

from tests.examples.conftest import CLIENT, EXAMPLES
from tests.test_frontends import install


def install_example(folder: Path, *, client_in: str) -> None:
    """Install the packages of an example's copy, and copy the client as its README says."""
    wanted = (EXAMPLES / folder.name / "package.json").read_text()
    package = json.loads(wanted)
    install(folder, package["dependencies"] | package["devDependencies"])
    (folder / "package.json").write_text(wanted)
    client = folder / client_in / "voicepass"
    client.mkdir()
    for name in ("client.js", "client.d.ts"):
        shutil.copy(CLIENT / name, client)
