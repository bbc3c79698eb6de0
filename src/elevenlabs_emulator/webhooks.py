"""The workspace's post-call webhook."""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable, Mapping

import httpx

from elevenlabs_emulator.faults import Fault

WEBHOOK_ID = "wh_emulated"
_DELIVERY_SECONDS = 10


class Webhooks:
    """Sends post-call webhooks to `url`, signed like the vendor's; each once, which is the vendor's default.

    It sends none without `url`, or while it `is_disabled`. `statuses` are the HTTP answers so far, 0 for no answer.
    The signature has the time of `clock` even after the emulator was advanced: receivers refuse any other time.
    """

    def __init__(self, *, url: str | None, secret: str, clock: Callable[[], float]) -> None:
        self.url, self.secret = url, secret
        self.auth_type, self.is_disabled = "hmac", False
        self.statuses: list[int] = []
        self._clock = clock
        self._held_back: list[bytes] = []

    def as_json(self) -> list[dict[str, object]]:
        """Return the workspace's webhooks in the shape of the vendor's model: this one, or none."""
        if self.url is None:
            return []
        flags = {"is_disabled": self.is_disabled, "is_auto_disabled": False, "auth_type": self.auth_type}
        return [{"name": "post-call", "webhook_id": WEBHOOK_ID, "webhook_url": self.url, "created_at_unix": 0, **flags}]

    @property
    def are_sent(self) -> bool:
        """Whether the end of a conversation is reported."""
        return self.url is not None and not self.is_disabled

    async def send(self, conversation: Mapping[str, object], *, now: float, fault: Fault) -> None:
        """Report a conversation that is done, in the way `fault` says."""
        if self.url is None or self.is_disabled:
            return
        event = {"type": "post_call_transcription", "event_timestamp": int(now), "data": conversation}
        body = json.dumps(event).encode()
        await asyncio.sleep(fault.latency_seconds)
        if fault.delivery == "held_back":
            self._held_back.append(body)
        if fault.delivery in {"held_back", "lost"}:
            return
        bodies, self._held_back = [body, *self._held_back], []
        async with httpx.AsyncClient(timeout=_DELIVERY_SECONDS, trust_env=False) as client:
            for each in bodies * (2 if fault.delivery == "twice" else 1):
                self.statuses.append(await self._post(client, self.url, each))

    async def _post(self, client: httpx.AsyncClient, url: str, body: bytes) -> int:
        signed_at = str(int(self._clock()))
        mac = hmac.new(self.secret.encode(), f"{signed_at}.".encode() + body, hashlib.sha256).hexdigest()
        headers = {"ElevenLabs-Signature": f"t={signed_at},v0={mac}", "Content-Type": "application/json"}
        try:
            return (await client.post(url, content=body, headers=headers)).status_code
        except httpx.HTTPError:
            return 0
