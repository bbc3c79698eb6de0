"""TypeScript checks that the client's types match its code, and that the frontends match the real packages."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLIENT = ROOT / "src" / "voicepass" / "api"
DOCUMENT = (ROOT / "docs" / "frontends.md").read_text()
REACT = ROOT / "examples" / "vite-react" / "src"
REACT_FILES = ("useVoice.ts", "useMinutes.ts", "Assistant.tsx", "minutes.js", "sentences.js")

PACKAGES = {
    "@elevenlabs/client": "1.25.0",
    "@elevenlabs/react": "1.15.2",
    "@types/react": "19.3.0",
    "react": "19.3.1",
    "typescript": "5.9.3",
}

# The types that TypeScript infers from the JavaScript must match the declared types.
COMPARISON = """
import * as declared from "./client.js";
import * as written from "./written.js";
export const asDeclared: typeof declared = written;
"""
# The code that docs/frontends.md describes for the components of @elevenlabs/react.
TALK_BUTTON = """
import { useConversation } from "@elevenlabs/react";
import { asSession, explain, fetchPass, type PassOptions } from "./voicepass/client.js";

export function useTalk({ service, token }: PassOptions, show: (sentence: string) => void) {
  const { startSession } = useConversation({ onDisconnect: (details) => show(explain(details).sentence) });
  return async () => {
    try {
      startSession(asSession(await fetchPass({ service, token })));
    } catch (error) {
      show(explain(error).sentence);
    }
  };
}
"""


def read_documented_files() -> dict[str, str]:
    """Read the code blocks of the document that begin with a file's path; remove the indentation of lists."""
    blocks = re.findall(r"^( *)```(?:js|tsx?)\n(.*?)^ *```", DOCUMENT, re.DOTALL | re.MULTILINE)
    texts = [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in blocks]
    return {text.split("\n")[0].removeprefix("// "): text for text in texts}


def test_the_document_the_types_and_the_code_name_the_same_causes() -> None:
    union = re.search(r"export type Cause =\n(.*?);", (CLIENT / "client.d.ts").read_text(), re.DOTALL)
    assert union is not None
    declared = re.findall(r'"(\w+)"', union[1])
    section = DOCUMENT.split("## Why it ended")[1]

    assert re.findall(r"^- `(\w+)`: ", section, re.MULTILINE) == declared
    code = (CLIENT / "client.js").read_text()
    assert [cause for cause in declared if f'"{cause}"' not in code] == []


def install(folder: Path, packages: dict[str, str]) -> None:
    """Install these packages of npm into the folder."""
    if shutil.which("npm") is None:
        missing = "this test needs npm (and Node.js), which is not installed"
        if "REQUIRE_NPM" in os.environ:
            pytest.fail(missing)
        pytest.skip(missing)
    (folder / "package.json").write_text(json.dumps({"type": "module", "private": True, "dependencies": packages}))
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
    subprocess.run(command, cwd=folder, check=True, timeout=110)


@pytest.fixture
def npm_folder(tmp_path: Path) -> Path:
    """A folder with the real packages, at exact versions."""
    install(tmp_path, PACKAGES)
    return tmp_path


OPTIONS = {
    "strict": True,
    "noEmit": True,
    "allowJs": True,
    "checkJs": True,
    "target": "es2022",
    "lib": ["es2023", "dom", "dom.iterable"],
    "module": "esnext",
    "moduleResolution": "bundler",
    "jsx": "react-jsx",
    "types": [],
    "paths": {"https://voice.example/v1/client.js": ["./src/client.d.ts"]},
}


def list_type_errors(folder: Path) -> list[str]:
    """List the errors that TypeScript reports about the files in `folder`, without those in installed packages."""
    (folder / "tsconfig.json").write_text(json.dumps({"compilerOptions": OPTIONS, "include": ["src", "*.js", "*.mjs"]}))
    command = ["node", "node_modules/typescript/bin/tsc", "--pretty", "false"]
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=110).stdout
    return [line for line in output.splitlines() if ": error " in line and not line.startswith("node_modules/")]


@pytest.mark.long
@pytest.mark.timeout(240)
def test_the_client_matches_its_types_and_the_frontends_compile_with_it(npm_folder: Path) -> None:
    source = npm_folder / "src"
    for folder in (source, source / "voicepass"):
        folder.mkdir()
        for name in ("client.js", "client.d.ts"):
            shutil.copy(CLIENT / name, folder)
    shutil.copy(CLIENT / "client.js", source / "written.js")
    (source / "comparison.ts").write_text(COMPARISON)
    (source / "talkButton.ts").write_text(TALK_BUTTON)
    for name in REACT_FILES:
        shutil.copy(REACT / name, source)
    for name, text in read_documented_files().items():
        (npm_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (npm_folder / name).write_text(text)
    assert list(read_documented_files()) == ["talk.js", "widget.js"]

    assert list_type_errors(npm_folder) == []

    # TypeScript must report a mistake in each of the two.
    with_mistake = (source / "Assistant.tsx").read_text().replace("state.conversation", "state.dialogue")
    (source / "Assistant.tsx").write_text(with_mistake)
    (source / "written.js").write_text(
        (source / "written.js").read_text().replace("end: async () =>", "stop: async () =>")
    )
    reported = "\n".join(list_type_errors(npm_folder))
    assert "src/Assistant.tsx" in reported
    assert "dialogue" in reported
    assert "src/written.js" in reported
