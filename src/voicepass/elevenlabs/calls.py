"""Makes one call to ElevenLabs with a workspace's API key, and raises a refusal for anything but a good answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from urllib.parse import urlsplit

import httpx

from voicepass.elevenlabs.answers import origin_of
from voicepass.elevenlabs.refusals import refusal_for
from voicepass.errors import AgentUnknown, BadAnswer, KeyRejected, Refusal, Timeout, Unavailable
from voicepass.model import Clock
from voicepass.outbound import HEADERS, Answer, AnswerUnusableError, CertificateRefusedError, get
from voicepass.telemetry.logger import Logger

MAX_ANSWER_BYTES: Final = 64 * 1024
MAX_RECORD_BYTES: Final = 4 * 1024 * 1024
"""A record of a conversation holds its whole transcript."""

NOT_UNDERSTOOD: Final = "ElevenLabs did not understand the call; is the base URL right?"

_log = Logger("voicepass.elevenlabs")


class Workspace:
    """One ElevenLabs host and the API keys of a workspace there: one key, or two while the operator replaces it."""

    def __init__(self, *, base_url: str, api_keys: Sequence[str]) -> None:
        self.base_url = base_url.rstrip("/")
        self.base = origin_of(urlsplit(base_url))
        self.keys = tuple(api_keys)
        self.preferred = 0

    def positions(self) -> list[int]:
        """Return the positions of the keys. The key that was accepted last comes first."""
        return sorted(range(len(self.keys)), key=lambda position: position != self.preferred)

    def prefer(self, position: int) -> None:
        """Remember that the key at `position` was accepted. The log names its position, never its value."""
        if position != self.preferred:
            self.preferred = position
            _log.warning("api_key.switched", host=self.base.host, position=position + 1, of=len(self.keys))


@dataclass(kw_only=True, eq=False)
class Host:
    """Calls the host of a workspace. `clock`: wall time, for a Retry-After that is a date."""

    workspace: Workspace
    transport: httpx.AsyncBaseTransport
    clock: Clock

    def __post_init__(self) -> None:
        self._build_request = lru_cache(maxsize=1024)(_build_request)

    async def fetch(self, path: str, *, unknown: Refusal | None = None, method: str = "GET") -> bytes:
        """Return the body of a good answer to the key that was accepted last, or else to the other key.

        With `unknown` the call is about a record: it may have a long answer, and to read it needs convai_read. Raises
        `unknown` if ElevenLabs says that the record does not exist.
        """
        workspace = self.workspace
        rejected: KeyRejected | None = None
        for position in workspace.positions():
            request = self._build_request(method, workspace.base_url + path, workspace.keys[position])
            status, headers, body = await self._get(request, MAX_RECORD_BYTES if unknown else MAX_ANSWER_BYTES)
            if status == httpx.codes.OK:
                if unknown is None:  # A key that may only read must not be the first to ask for passes.
                    workspace.prefer(position)
                return body
            permission = "convai_read" if unknown and method == "GET" else "convai_write"
            refusal = refusal_for(
                status, body, retry_after=headers.get("retry-after"), now=self.clock(), permission=permission
            )
            if unknown is not None and status == httpx.codes.NOT_FOUND and refusal.vendor_code:
                raise unknown
            if unknown is not None and isinstance(refusal, AgentUnknown):
                # The call named no agent, so this is a proxy's 404, or the path has changed.
                raise BadAnswer(operator_note=NOT_UNDERSTOOD) from refusal
            if not isinstance(refusal, KeyRejected):
                raise refusal
            rejected = rejected or refusal
        raise rejected or KeyRejected(operator_note="no API key is configured")

    async def _get(self, request: httpx.Request, most_bytes: int) -> Answer:
        """Return the answer, or raise the refusal that a failed connection or an unusable answer means."""
        try:
            return await get(self.transport, request, most_bytes=most_bytes)
        except AnswerUnusableError as error:
            raise BadAnswer(operator_note=f"{error}; is the base URL right?") from error
        except CertificateRefusedError as error:
            raise Unavailable(operator_note=str(error)) from error
        except httpx.TransportError as error:
            kind = Timeout if isinstance(error, httpx.TimeoutException) else Unavailable
            failed = f"{type(error).__name__} while asking {request.url.host}"
            raise kind(
                operator_note=f"{failed}; check the base URL, DNS and this network's firewall",
                # A second call is harmless: there was no answer, as on a kept connection that was closed, or a part.
                may_retry=type(error) in {httpx.ConnectError, httpx.ReadError},
            ) from error


def _build_request(method: str, url: str, api_key: str) -> httpx.Request:
    return httpx.Request(method, url, headers={**HEADERS, "xi-api-key": api_key})
