"""The README's snippet opens a conversation that stays open."""

import re
from pathlib import Path

import pytest

from tests.browser.conftest import Demo

pytestmark = pytest.mark.browser

README = Path(__file__).parents[2] / "README.md"


def test_the_snippet_of_the_readme_opens_a_conversation(demo: Demo) -> None:
    found = re.search(r"<!-- javascript -->\n```js\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    snippet = (
        found[1]
        .replace('import { Conversation } from "@elevenlabs/client";', "const { Conversation } = ElevenLabsClient;")
        .replace(
            'import { connect } from "./voicepass/client.js";', 'const { connect } = await import("/v1/client.js");'
        )
        .replace('"http://127.0.0.1:8000"', '""')
        .replace("token: freshJwt,", "token: freshJwt, session: { textOnly: true },")  # no microphone here
        .replace("export ", "")
    )
    script = f"""async () => {{
        {snippet}
        const signIn = {{ method: "POST", body: JSON.stringify({{ name: "Ada" }}) }};
        const {{ token }} = await (await fetch("/demo/sign-in", signIn)).json();
        const connection = talk(() => token);
        const conversation = await connection.connected;
        const seen = {{ id: conversation.getId(), open: conversation.isOpen() }};
        await connection.end();
        const refused = await talk(() => "not a token").ended;
        return {{ ...seen, refused: refused.error.code }};
    }}"""

    seen = demo.page.evaluate(script)

    assert seen["open"] is True
    assert seen["id"].startswith("conv_")
    assert seen["refused"] == "token_invalid"
    assert "info: ended You ended the conversation." in demo.console
