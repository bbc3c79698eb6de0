"""The React hook of the example in a browser, in React's StrictMode, with a service that counts its passes."""

import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.browser.conftest import World
from tests.browser.laboratory import Laboratory
from tests.test_frontends import CLIENT, REACT, install

pytestmark = [pytest.mark.browser, pytest.mark.long, pytest.mark.timeout(240)]

PACKAGES = {"esbuild": "0.28.2", "react": "19.3.1", "react-dom": "19.3.1"}
SDK = "export const { Conversation } = ElevenLabsClient;\n"
PAGE = """
import { StrictMode, useEffect } from "react";
import { createRoot } from "react-dom/client";
import { useVoice } from "./useVoice.js";

window.mounts = 0;

function Page({ options, onMount }) {
  const { session, ...where } = options;
  const { state, start: begin, end } = useVoice(where);
  const start = () => begin(session);
  useEffect(() => { window.mounts += 1; }, []);
  useEffect(() => { if (onMount) { start(); return end; } }, []);
  return <p><button onClick={start}>Start</button><button onClick={end}>Stop</button><b>{state?.status}</b></p>;
}

window.mount = (props) => {
  const place = document.body.appendChild(document.createElement("div"));
  place.id = "react";
  const root = createRoot(place);
  root.render(<StrictMode><Page {...props} /></StrictMode>);
  return root;
};
"""
# Waits until the component shows this state.
SHOWN = """
    const shown = async (status) => {
      while (document.querySelector("#react b")?.textContent !== status) {
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
    };
    const options = (textOnly) => ({ service: location.origin, token: () => lab.token, session: { textOnly } });
    const press = (name) => [...document.querySelectorAll("#react button")].find((b) => b.textContent === name).click();
"""


@pytest.fixture(scope="module")
def page_script(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The script of a page with the example's hook, bundled for development."""
    folder = tmp_path_factory.mktemp("react")
    install(folder, PACKAGES)
    (folder / "src" / "voicepass").mkdir(parents=True)
    shutil.copy(CLIENT / "client.js", folder / "src" / "voicepass")
    shutil.copy(REACT / "useVoice.ts", folder / "src")
    (folder / "src" / "page.jsx").write_text(PAGE)
    (folder / "src" / "sdk.js").write_text(SDK)
    options = ["--bundle", "--format=esm", "--jsx=automatic", '--define:process.env.NODE_ENV="development"']
    alias = "--alias:@elevenlabs/client=./src/sdk.js"
    command = ["node", "node_modules/esbuild/bin/esbuild", "src/page.jsx", *options, alias, "--outfile=page.js"]
    subprocess.run(command, cwd=folder, check=True, timeout=110, capture_output=True)
    return (folder / "page.js").read_text()


@pytest.fixture
def react(lab: Laboratory, page_script: str, playwright_thread: ThreadPoolExecutor) -> Iterator[Laboratory]:
    playwright_thread.submit(lab.page.add_script_tag, content=page_script, type="module").result()
    yield lab
    playwright_thread.submit(lab.page.evaluate, "() => document.querySelector('#react')?.remove()").result()


@pytest.mark.parametrize("text_only", [True, False])
def test_a_component_that_is_mounted_twice_uses_one_pass(react: Laboratory, world: World, *, text_only: bool) -> None:
    mounts = react.begin(f"""{SHOWN}
        const root = mount({{ options: options({str(text_only).lower()}), onMount: true }});
        await shown("connected");
        root.unmount();
        return mounts""")

    assert mounts == 2
    assert world.passes_asked_for == 1


def test_five_presses_use_one_pass_and_a_press_after_the_end_uses_the_next(react: Laboratory, world: World) -> None:
    react.begin(f"""{SHOWN}
        window.root = mount({{ options: options(true) }});
        while (mounts < 2) await new Promise((resolve) => setTimeout(resolve, 5)); // StrictMode ends the first mount
        for (let presses = 0; presses < 5; presses += 1) {{
          press("Start");
          await new Promise((resolve) => setTimeout(resolve));
        }}
        await shown("connected");""")
    passes_after_five_presses = world.passes_asked_for
    react.go_on(f"""{SHOWN}
        press("Stop");
        await shown("ended");
        press("Start");
        await shown("connected");
        root.unmount()""")

    assert passes_after_five_presses == 1
    assert world.passes_asked_for == 2


def test_a_component_that_unmounts_at_once_uses_no_pass(react: Laboratory, world: World) -> None:
    react.begin(f"""{SHOWN}
        let tokens = 0;
        const root = mount({{ options: {{ ...options(true), token: () => `${{(tokens += 1)}}` }} }});
        while (!document.querySelector("#react button")) await new Promise((resolve) => setTimeout(resolve, 5));
        press("Start");
        root.unmount();
        await new Promise((resolve) => setTimeout(resolve));
        if (tokens) throw new Error("a token was asked for")""")

    assert world.passes_asked_for == 0
