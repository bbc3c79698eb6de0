"""Makes one call to ElevenLabs with a workspace's API key, and raises a refusal for anything but a good answer."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NoReturn
from urllib.parse import urlsplit

import httpx

from voicepass.elevenlabs.answers import origin_of
from voicepass.elevenlabs.refusals import SYSTEM_BUSY, read_retry_after, refusal_for, vendor_error
from voicepass.elevenlabs.resilience import FailedCallError
from voicepass.errors import BadAnswer, ElevenLabsRefusal, KeyRejected, Refusal, Timeout, Unavailable
from voicepass.model import Clock
from voicepass.outbound import HEADERS, Answer, AnswerUnusableError, CertificateRefusedError, get
from voicepass.telemetry.logger import Logger

MAX_ANSWER_BYTES: Final = 64 * 1024
MAX_RECORD_BYTES: Final = 4 * 1024 * 1024
"""A record of a conversation holds its whole transcript."""

_OUTAGES_TO_RETRY: Final = {502, 503, 504}

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


class Calls:
    """Makes calls without guards. `clock`: wall time, for a Retry-After that is a date."""

    def __init__(self, *, transport: httpx.AsyncBaseTransport, clock: Clock) -> None:
        self._transport = transport
        self._clock = clock
        self._build_request = lru_cache(maxsize=1024)(_build_request)

    async def fetch(
        self, workspace: Workspace, path: str, *, unknown: Refusal | None = None, method: str = "GET"
    ) -> bytes:
        """Return the body of a good answer to the key that was accepted last, or else to the other key.

        With `unknown` the call is about a record: it may have a long answer, and to read it needs convai_read.
        """
        rejected: KeyRejected | None = None
        for position in workspace.positions():
            request = self._build_request(method, workspace.base_url + path, workspace.keys[position])
            answer = await self._get(request, most_bytes=MAX_RECORD_BYTES if unknown else MAX_ANSWER_BYTES)
            if answer.status == httpx.codes.OK:
                if unknown is None:  # A key that may only read must not be the first to ask for passes.
                    workspace.prefer(position)
                return answer.body
            try:
                self._refuse(
                    answer, unknown, permission="convai_read" if unknown and method == "GET" else "convai_write"
                )
            except KeyRejected as refusal:
                rejected = rejected or refusal
        raise rejected or KeyRejected(operator_note="no API key is configured")

    def _refuse(self, answer: Answer, unknown: Refusal | None, *, permission: str) -> NoReturn:
        """Raise the refusal of an error answer, or `unknown`, or FailedCallError if a second try may succeed."""
        status, headers, body = answer
        code = vendor_error(body)[0]
        if unknown is not None and status == httpx.codes.NOT_FOUND and code:
            raise unknown
        retry_after, now = headers.get("retry-after"), self._clock()
        refusal = refusal_for(status, body, retry_after=retry_after, now=now, permission=permission)
        is_outage = isinstance(refusal, Unavailable)
        if is_outage or code == SYSTEM_BUSY:
            raise FailedCallError(
                refusal,
                is_outage=is_outage,
                may_retry=status in _OUTAGES_TO_RETRY or code == SYSTEM_BUSY,
                retry_after_seconds=read_retry_after(retry_after, now=now) or 0.0,
            )
        raise refusal

    async def _get(self, request: httpx.Request, *, most_bytes: int) -> Answer:
        """Return the answer, or raise the refusal or FailedCallError for a failed connection."""
        try:
            return await get(self._transport, request, most_bytes=most_bytes)
        except AnswerUnusableError as error:
            raise BadAnswer(operator_note=str(error)) from error
        except httpx.DecodingError as error:
            raise BadAnswer(operator_note="the answer is no whole HTTP answer; is the base URL right?") from error
        except httpx.TransportError as error:
            note = f"{type(error).__name__} while asking {request.url.host}"
            refusal: ElevenLabsRefusal
            if isinstance(error, httpx.TimeoutException):
                refusal = Timeout(operator_note=f"{note}: it cannot be reached, or answers too slowly")
            elif isinstance(error, CertificateRefusedError):
                refusal = Unavailable(operator_note=str(error))
            else:
                note += "; check the base URL, DNS and this network's firewall"
                refusal = Unavailable(operator_note=note)
            # A second call is harmless: there was no answer, as on a kept connection that was closed, or part of one.
            may_retry = type(error) in {httpx.ConnectError, httpx.ReadError}
            raise FailedCallError(refusal, is_outage=True, may_retry=may_retry) from error


def _build_request(method: str, url: str, api_key: str) -> httpx.Request:
    return httpx.Request(method, url, headers={**HEADERS, "xi-api-key": api_key})
