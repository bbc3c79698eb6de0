"""The table of ElevenLabs' codes is consistent, and it matches the emulator and the code generated from it.

To write its part of client.js: `python -m tests.elevenlabs.test_codes`.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Literal

import httpx
import pytest
from fastapi import HTTPException

from elevenlabs_emulator import CLOSINGS, EmulatedAgent, Emulator, Fault, create_emulator
from voicepass import errors
from voicepass.doctor.explain import describe_refusal
from voicepass.elevenlabs.codes import BY_CLOSE, BY_CODE, BY_EVENT, BY_STATUS, CAUSES, find_in_text
from voicepass.elevenlabs.refusals import refusal_for

CLIENT = Path(errors.__file__).parents[1] / "api" / "client.js"
BEGIN = "// codes: written by `python -m tests.elevenlabs.test_codes` from elevenlabs/codes.toml\n"
END = "// end of codes\n"


def generate() -> str:
    """Generate the part of client.js that says what ElevenLabs' codes mean, with one row per cause."""
    shown = [cause for cause in CAUSES.values() if cause.browser]
    rows = ""
    for reported in dict.fromkeys(cause.browser["cause"] for cause in shown):
        causes = [cause for cause in shown if cause.browser["cause"] == reported]
        reasons = "|".join(write_javascript(reason) for cause in causes for reason in cause.reasons)
        names: list[str | int | None] = [cause.browser["name"] for cause in causes if "name" in cause.browser]
        names += [cause.close for cause in causes if cause.is_usual]
        pattern = f"/{reasons}/i" if reasons else "null"
        rows += f'  ["{reported}", "{causes[0].browser["sentence"]}", {pattern}, {json.dumps(names)}],\n'
    helped = sorted({cause.browser["cause"] for cause in shown if cause.new_pass_helps})
    return (
        "/**\n * Cause, sentence, close reason, and names of errors, events or close codes. The first row counts.\n"
        " * @type {[Cause, string, RegExp | null, (string | number)[]][]}\n */\n"
        f"const CAUSES = [\n{rows}];\n"
        f"const NEW_PASS_HELPS = {json.dumps(helped)};\n"
    )


def write_javascript(pattern: str) -> str:
    """Return the pattern without its named groups, which only the doctor needs."""
    return re.sub(r"\(\?P<\w+>([^()]*)\)", r"\1", pattern).replace("/", "\\/")


def replace_generated(client: str) -> str:
    before, _, rest = client.partition(BEGIN)
    return before + BEGIN + generate() + END + rest.partition(END)[2]


def test_the_clients_table_is_generated_from_the_codes() -> None:
    client = CLIENT.read_text()

    assert client == replace_generated(client)
    causes = set(re.findall(r'^  \| "(\w+)"', CLIENT.with_suffix(".d.ts").read_text(), re.MULTILINE))
    shown = [cause.browser for cause in CAUSES.values() if cause.browser]
    assert {row["cause"] for row in shown} <= causes
    assert len({(row["cause"], row["sentence"]) for row in shown}) == len({row["cause"] for row in shown})


def test_each_code_has_one_meaning() -> None:
    causes = list(CAUSES.values())

    assert len(BY_CODE) == sum(len(cause.codes) for cause in causes)
    assert len(BY_STATUS) == sum(len(cause.statuses) for cause in causes)
    assert len(BY_EVENT) == sum(len(cause.events) for cause in causes)
    assert len(BY_CLOSE) == sum(cause.is_usual for cause in causes)
    assert len({pattern for cause in causes for pattern in (*cause.reasons, *cause.lines)}) == sum(
        len(cause.reasons) + len(cause.lines) for cause in causes
    )


def test_every_refusal_of_elevenlabs_has_a_cause_and_every_cause_a_refusal_that_exists() -> None:
    codes = {kind.code for kind in errors.ElevenLabsRefusal.__subclasses__()}

    assert {cause.refusal for cause in CAUSES.values() if cause.refusal} == codes
    assert all(cause.refusal for cause in (*BY_CODE.values(), *BY_STATUS.values()))


# The emulator sends these closings but does not define what they mean. Here is the cause of each.
CAUSE_OF_CLOSING = {
    "unauthorized": "not_authorized",
    "unknown_agent": "agent_unknown",
    "host_not_allowed": "host_not_allowed",
    "request_error": "request_refused",
    "invalid_message": "message_invalid",
    "first_frame_timeout": "operation_failed",
    "variables_missing": "variables_missing",
    "override_not_allowed": "override_not_allowed",
    "language_unsupported": "language_unsupported",
    "quota_exceeded": "quota_exhausted",
    "agent_misconfigured": "agent_misconfigured",
    "daily_limit": "daily_limit_reached",
    "too_many_concurrent": "concurrency_reached",
    "internal_error": "internal_error",
    "max_duration": "ended",
    "agent_ended": "ended",
}


def test_the_table_has_a_cause_for_every_close_of_the_emulator() -> None:
    assert CAUSE_OF_CLOSING.keys() == CLOSINGS.keys()
    for name, cause in CAUSE_OF_CLOSING.items():
        row = CLOSINGS[name]
        found, _ = find_in_text(row.reason) or (BY_CLOSE[row.code], {})

        assert (found.name, found.close) == (cause, row.code), name
        if row.error_type is not None:
            assert BY_EVENT[row.error_type].check == found.check, name  # Languages and other overrides have one type.


# The cause for each status that a fault of the emulator sends.
CAUSE_OF_STATUS = {
    400: "agent_unknown",
    401: "api_key_refused",
    402: "quota_exhausted",
    403: "permission_missing",
    404: "agent_unknown",
    409: "answer_unusable",
    422: "agent_unknown",
    429: "elevenlabs_busy",
    500: "elevenlabs_unavailable",
    503: "elevenlabs_unavailable",
}


@pytest.mark.anyio
@pytest.mark.parametrize("envelope", ["legacy", "live"])
async def test_the_table_has_a_cause_for_every_refusal_of_the_emulator(envelope: Literal["legacy", "live"]) -> None:
    for status, cause in CAUSE_OF_STATUS.items():
        with pytest.raises(HTTPException) as sent:
            await Fault(status=status, envelope=envelope).refuse()
        refusal = refusal_for(status, json.dumps({"detail": sent.value.detail}).encode(), retry_after=None, now=0)

        assert describe_refusal(refusal).cause == cause, status


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("key", "agent_id", "cause"),
    [("sk_wrong", "agent_a", "api_key_refused"), ("sk_reader", "agent_a", "permission_missing"),
     ("sk_writer", "agent_b", "agent_unknown")],
)  # fmt: skip
async def test_the_table_has_the_cause_of_a_missing_signed_url(key: str, agent_id: str, cause: str) -> None:
    keys = {"sk_reader": frozenset({"convai_read"}), "sk_writer": frozenset({"convai_write"})}
    emulator = create_emulator(Emulator(agents=[EmulatedAgent(agent_id="agent_a")], api_keys=keys))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(emulator), base_url="http://127.0.0.1") as client:
        path = "/v1/convai/conversation/get-signed-url"
        answer = await client.get(path, params={"agent_id": agent_id}, headers={"xi-api-key": key})

    refusal = refusal_for(answer.status_code, answer.content, retry_after=None, now=0)

    assert describe_refusal(refusal).cause == cause


def test_the_emulator_does_not_say_what_a_closing_means() -> None:
    fields = {field.name for field in dataclasses.fields(next(iter(CLOSINGS.values())))}

    assert fields == {"name", "code", "reason", "moment", "basis", "source", "error_type", "template", "record"}


if __name__ == "__main__":
    CLIENT.write_text(replace_generated(CLIENT.read_text()))
