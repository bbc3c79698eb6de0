"""The signing keys that an issuer publishes: fetched, cached, rotated, and outlived through an outage.

A key that the issuer takes out is refused within ten minutes; a flood of unknown key ids causes one fetch in thirty
seconds; an issuer that is down for less than an hour is not noticed by users.
"""

import asyncio
import json
from collections.abc import Collection, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import structlog

from voicepass.errors import KeysUnavailable, TokenInvalid
from voicepass.identity.keys import KeyUnusableError, VerificationKey, key_from_jwk
from voicepass.model import Clock
from voicepass.outbound import HEADERS, AnswerUnusableError, CertificateRefusedError, get, http_transport, is_safe_url

DISCOVERY_PATH: Final = "/.well-known/openid-configuration"
"""A URL that ends like this is an OpenID Connect discovery document, which says where the keys are."""

REFRESH_AHEAD_SECONDS: Final = 300  # from here on a refresh starts, and nobody waits for it
MAX_AGE_SECONDS: Final = 600  # from here on users wait for it: a withdrawn key must not serve longer
COOLDOWN_SECONDS: Final = 30  # between two fetches, whatever is asked: tokens are free, fetches are not
FAILED_START_SECONDS: Final = 5  # the same while there is no key at all and every user is refused anyway
OUTLIVED_SECONDS: Final = 3600  # how long the last good keys serve when no refresh succeeds; then they are forgotten

FETCH_SECONDS: Final = 3.0
MAX_DOCUMENT_BYTES: Final = 512 * 1024
MAX_KEYS: Final = 100

_log = structlog.get_logger("voicepass.identity.jwks")


class JwksUnusableError(Exception):
    """The document cannot be fetched, or holds no key that could be used. The message is for the log."""


class PublishedKeys:
    """The keys at one URL, for one issuer and its one algorithm. `clock` is monotonic seconds."""

    def __init__(
        self,
        *,
        url: str,
        token_issuer: str,
        algorithm: str,
        clock: Clock,
        fetch_seconds: float = FETCH_SECONDS,
        plain_http_hosts: Collection[str] = (),
    ) -> None:
        self._url = url
        self._token_issuer = token_issuer
        self._algorithm = algorithm
        self._clock = clock
        self._fetch_seconds = fetch_seconds
        self._plain_http_hosts = plain_http_hosts
        self._keys: Mapping[str | None, VerificationKey] = {}
        self._fetched_at = float("-inf")
        self._tried_at = float("-inf")
        self._refresh: asyncio.Task[None] | None = None
        self._failure = "not asked yet"

    async def key_for(self, kid: str | None) -> VerificationKey:
        """Return the key with this id; a token without one is served where there is one key alone.

        Raises TokenInvalid where the issuer has no such key, KeysUnavailable where its keys cannot be had.
        """
        await self._renew()
        key = self._find(kid)
        if key is None:
            await self._refreshed()
            key = self._find(kid)
        if not self._keys:
            raise self._unavailable()
        if key is None:
            raise TokenInvalid(operator_note=f"token refused: {self._token_issuer} publishes no key with this kid")
        return key

    async def check(self) -> None:
        """Raise KeysUnavailable unless there are keys. They are fetched as for a token: never more often."""
        await self._renew()
        if not self._keys:
            raise self._unavailable()

    async def _renew(self) -> None:
        age = self._clock() - self._fetched_at
        if age >= OUTLIVED_SECONDS:
            self._keys = {}  # as at a cold start: users wait for the next try, and it is five seconds away, not thirty
        if age >= MAX_AGE_SECONDS and not self._is_failing():
            await self._refreshed()
        elif age >= REFRESH_AHEAD_SECONDS:
            self._start_refresh()

    def _unavailable(self) -> KeysUnavailable:
        return KeysUnavailable(operator_note=f"no keys from {self._url} ({self._failure})")

    async def aclose(self) -> None:
        """Give up a refresh that is under way."""
        if self._refresh is not None:
            self._refresh.cancel()
            await asyncio.gather(self._refresh, return_exceptions=True)

    def _find(self, kid: str | None) -> VerificationKey | None:
        if kid is None or None in self._keys:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(kid)

    def _is_failing(self) -> bool:
        # The last try brought nothing, but there are keys: they serve, and the next try costs no user a wait. A failure
        # of long ago says nothing, though: after a quiet time somebody waits, or a withdrawn key would serve once more.
        is_recent = self._clock() - self._tried_at < MAX_AGE_SECONDS
        return bool(self._keys) and self._tried_at > self._fetched_at and is_recent

    async def _refreshed(self) -> None:
        self._start_refresh()
        if self._refresh is not None:
            await asyncio.shield(self._refresh)  # one fetch for all who wait, and none of them can cancel it

    def _start_refresh(self) -> None:
        cooldown = COOLDOWN_SECONDS if self._keys else FAILED_START_SECONDS
        if self._refresh is None and self._clock() - self._tried_at >= cooldown:
            self._refresh = asyncio.create_task(self._fetch_and_keep())

    async def _fetch_and_keep(self) -> None:
        begun_at = self._clock()
        try:
            async with asyncio.timeout(self._fetch_seconds):
                self._keys = usable_keys(await self._fetch_set(), self._algorithm)
            self._fetched_at = self._tried_at = begun_at
            _log.info("keys.refreshed", url=self._url, count=len(self._keys))
        except (JwksUnusableError, TimeoutError, httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            self._tried_at = self._clock()
            explains_itself = isinstance(error, (JwksUnusableError, CertificateRefusedError))
            self._failure = str(error) if explains_itself else type(error).__name__
            _log.error("keys.refresh_failed", url=self._url, cause=type(error).__name__, note=str(error))
        finally:
            self._refresh = None

    async def _fetch_set(self) -> Mapping[str, Any]:
        if not self._url.endswith(DISCOVERY_PATH):
            return await _fetch(self._url)
        configuration = await _fetch(self._url)
        if configuration.get("issuer") != self._token_issuer:
            raise JwksUnusableError("the discovery document is another issuer's")
        jwks_uri = configuration.get("jwks_uri")
        if not isinstance(jwks_uri, str) or not is_safe_url(jwks_uri, plain_http_hosts=self._plain_http_hosts):
            raise JwksUnusableError("the discovery document names no https:// jwks_uri")
        if urlsplit(self._url).scheme == "https" and urlsplit(jwks_uri).scheme != "https":
            raise JwksUnusableError("the discovery document leads from https:// to http://")
        return await _fetch(jwks_uri)


def usable_keys(document: Mapping[str, Any], algorithm: str) -> Mapping[str | None, VerificationKey]:
    """Return the keys of a JWKS (RFC 7517) that may verify `algorithm`, by id. Raises JwksUnusableError if none can.

    Keys for other ends are common and skipped. An id that stands twice is ambiguous, so neither key is used; a key
    without an id is used where it stands alone.
    """
    entries = document.get("keys")
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        raise JwksUnusableError(f"the document is no JWKS of at most {MAX_KEYS} keys")
    keys: dict[str | None, VerificationKey] = {}
    ambiguous: set[str | None] = set()
    for entry in entries:
        try:
            key = key_from_jwk(entry, algorithm)
        except KeyUnusableError:
            continue
        if key.kid in keys:
            ambiguous.add(key.kid)
        keys[key.kid] = key
    for kid in ambiguous:
        del keys[kid]
    if len(keys) > 1:
        keys.pop(None, None)
    if not keys:
        raise JwksUnusableError(f"the document holds no key for {algorithm}")
    return keys


async def _fetch(url: str) -> Mapping[str, Any]:
    # A transport of its own: fetches are rare, and keep no connection.
    async with http_transport(connect_seconds=FETCH_SECONDS) as transport:
        request = httpx.Request("GET", url, headers=HEADERS)
        try:
            status, _headers, body = await get(transport, request, most_bytes=MAX_DOCUMENT_BYTES)
        except AnswerUnusableError as error:
            raise JwksUnusableError(str(error)) from error
    if status != httpx.codes.OK:
        raise JwksUnusableError(f"HTTP {status}")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise JwksUnusableError("the document is not JSON") from error
    if not isinstance(document, dict):
        raise JwksUnusableError("the document is not a JSON object")
    return document
