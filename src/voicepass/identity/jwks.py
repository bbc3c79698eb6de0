"""Fetch, cache and renew the signing keys that an issuer publishes, and survive an hour of its outage.

voicepass refuses a key at most ten minutes after the issuer removes it. However many unknown key ids arrive, voicepass
fetches at most once in thirty seconds. While an issuer is down for less than an hour, users notice nothing.
"""

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from voicepass.errors import KeysUnavailable
from voicepass.identity.keys import KeyUnusableError, VerificationKey, key_from_jwk, select_keys
from voicepass.model import Clock
from voicepass.outbound import HEADERS, AnswerUnusableError, get, http_transport, is_safe_url
from voicepass.telemetry.logger import Logger

# A URL that ends like this is an OpenID Connect discovery document, which names the address of the keys.
DISCOVERY_PATH: Final = "/.well-known/openid-configuration"

REFRESH_AHEAD_SECONDS: Final = 300  # voicepass refreshes keys of this age in the background
MAX_AGE_SECONDS: Final = 600  # users wait for the refresh of older keys: a withdrawn key must not serve longer
COOLDOWN_SECONDS: Final = 30  # between two fetches: anyone can make unknown key ids without end
FAILED_START_SECONDS: Final = 5  # the same while there is no key at all and every user is refused anyway
OUTAGE_SECONDS: Final = 3600  # how long the last good keys serve while every refresh fails

FETCH_SECONDS: Final = 3.0
MAX_DOCUMENT_BYTES: Final = 512 * 1024
MAX_KEYS: Final = 100

_log = Logger("voicepass.identity.jwks")


@dataclass(kw_only=True, eq=False)
class PublishedKeys:
    """The keys at one URL, for one issuer and its one algorithm. `clock` is monotonic seconds."""

    url: str
    token_issuer: str
    algorithm: str
    clock: Clock
    fetch_seconds: float = FETCH_SECONDS
    plain_http_hosts: Collection[str] = ()
    _keys: Sequence[VerificationKey] = field(default=(), init=False)
    _skipped: Collection[tuple[str | None, str]] = field(default=(), init=False)
    _fetched_at: float = field(default=float("-inf"), init=False)
    _tried_at: float = field(default=float("-inf"), init=False)
    _refresh: asyncio.Task[None] | None = field(default=None, init=False)
    _failure: str = field(default="not fetched yet", init=False)

    async def keys_for(self, names: Mapping[str, str]) -> Sequence[VerificationKey]:
        """Return the keys that `names`, the key names in a token's header, allow; none if the issuer has no such key.

        Raises KeysUnavailable if there are no keys at all.
        """
        await self.check()
        if not select_keys(self._keys, names):
            await self._wait_for_refresh()
        return select_keys(self._keys, names)

    async def check(self) -> None:
        """Raise KeysUnavailable unless there are keys. This fetches them as a token does, and no more often."""
        age = self.clock() - self._fetched_at
        if age >= OUTAGE_SECONDS:
            self._keys = ()  # as at a cold start: users wait for the next try, in at most five seconds
        if age >= MAX_AGE_SECONDS and not self._is_failing():
            await self._wait_for_refresh()
        elif age >= REFRESH_AHEAD_SECONDS:
            self._start_refresh()
        if not self._keys:
            raise KeysUnavailable(operator_note=f"no keys from {self.url} ({self._failure})")

    async def aclose(self) -> None:
        """Cancel a refresh in flight."""
        if self._refresh is not None:
            self._refresh.cancel()
            await asyncio.gather(self._refresh, return_exceptions=True)

    def _is_failing(self) -> bool:
        # If the last try failed and there are keys, those keys serve, and no user waits for the next try. A failure of
        # long ago does not count: after a quiet time a user waits, because a withdrawn key would serve otherwise.
        is_recent = self.clock() - self._tried_at < MAX_AGE_SECONDS
        return bool(self._keys) and self._tried_at > self._fetched_at and is_recent

    async def _wait_for_refresh(self) -> None:
        self._start_refresh()
        if self._refresh is not None:
            await asyncio.shield(self._refresh)  # all who wait share one fetch, so none of them may cancel it

    def _start_refresh(self) -> None:
        cooldown = COOLDOWN_SECONDS if self._keys else FAILED_START_SECONDS
        if self._refresh is None and self.clock() - self._tried_at >= cooldown:
            self._refresh = asyncio.create_task(self._fetch_and_keep())

    async def _fetch_and_keep(self) -> None:
        started_at = self.clock()
        try:
            async with asyncio.timeout(self.fetch_seconds):
                document = await self._fetch_set()
            self._keys = self._read_keys(document)
            self._fetched_at = self._tried_at = started_at
            _log.info("keys.refreshed", url=self.url, count=len(self._keys))
        except (AnswerUnusableError, TimeoutError, httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            self._tried_at = self.clock()
            self._failure = str(error) or type(error).__name__
            _log.error("keys.refresh_failed", url=self.url, cause=type(error).__name__, note=self._failure)
        finally:
            self._refresh = None

    async def _fetch_set(self) -> Mapping[str, Any]:
        if not self.url.endswith(DISCOVERY_PATH):
            return await _fetch(self.url)
        configuration = await _fetch(self.url)
        if configuration.get("issuer") != self.token_issuer:
            raise AnswerUnusableError("the discovery document is another issuer's")
        jwks_uri = configuration.get("jwks_uri")
        if not isinstance(jwks_uri, str) or not is_safe_url(jwks_uri, plain_http_hosts=self.plain_http_hosts):
            raise AnswerUnusableError("the discovery document names no https:// jwks_uri")
        if urlsplit(self.url).scheme == "https" and urlsplit(jwks_uri).scheme != "https":
            raise AnswerUnusableError("the discovery document leads from https:// to http://")
        return await _fetch(jwks_uri)

    def _read_keys(self, document: Mapping[str, Any]) -> Sequence[VerificationKey]:
        """Return the keys of a JWKS (RFC 7517) that can verify the algorithm. Keys for other purposes are common."""
        members = document.get("keys")
        if not isinstance(members, list) or len(members) > MAX_KEYS:
            raise AnswerUnusableError(f"the document is no JWKS of at most {MAX_KEYS} keys")
        keys: list[VerificationKey] = []
        skipped: dict[tuple[str | None, str], None] = {}
        for member in members:
            try:
                keys.append(key_from_jwk(member, self.algorithm))
            except KeyUnusableError as error:
                kid = member.get("kid") if isinstance(member, Mapping) else None
                skipped[kid if isinstance(kid, str) else None, str(error)] = None
        for kid, reason in skipped:
            if (kid, reason) not in self._skipped:  # once, not at every refresh
                _log.info("keys.skipped", url=self.url, kid=kid, note=reason)
        self._skipped = skipped
        if not keys:
            reasons = ", ".join(dict.fromkeys(reason for _, reason in skipped)) or "it is empty"
            raise AnswerUnusableError(f"the document holds no key for {self.algorithm}: {reasons}")
        return keys


async def _fetch(url: str) -> Mapping[str, Any]:
    # A new transport for each fetch: fetches are rare, so nothing would use a kept connection.
    async with http_transport(connect_seconds=FETCH_SECONDS) as transport:
        request = httpx.Request("GET", url, headers=HEADERS)
        status, _headers, body = await get(transport, request, most_bytes=MAX_DOCUMENT_BYTES)
    if status != httpx.codes.OK:
        raise AnswerUnusableError(f"HTTP {status}")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise AnswerUnusableError("the document is not a JSON object")
    return document
