"""The README's snippet, as it is printed, opens a conversation that stays open."""

import re
from pathlib import Path

import pytest

from tests.browser.conftest import Demo

pytestmark = pytest.mark.browser

README = Path(__file__).parents[2] / "README.md"


def test_the_snippet_of_the_readme_opens_a_conversation(demo: Demo) -> None:
    found = re.search(r"<!-- javascript -->\n```js\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    snippet = found[1].replace('import { Conversation } from "@elevenlabs/client";', "").replace("export ", "")
    script = f"""async () => {{
        const {{ Conversation }} = ElevenLabsClient;
        {snippet}
        const signIn = {{ method: "POST", body: JSON.stringify({{ name: "Ada" }}) }};
        const {{ token }} = await (await fetch("/demo/sign-in", signIn)).json();
        const conversation = await startConversation(token);
        const seen = {{ id: conversation.getId(), open: conversation.isOpen() }};
        await conversation.endSession();
        const refused = await startConversation("not a token").catch((error) => error.message);
        return {{ ...seen, refused }};
    }}"""

    seen = demo.page.evaluate(script)

    assert seen["open"] is True
    assert seen["id"].startswith("conv_")
    assert seen["refused"].startswith("token_invalid: ")
