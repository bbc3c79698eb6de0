"""What is told of a conversation: when somebody asks, and by a signed webhook once it is over."""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import httpx

from elevenlabs_emulator.faults import Fault
from elevenlabs_emulator.records import RecordedConversation

_CREDITS_PER_SECOND = 10  # made up: the price depends on the plan and the model
_DELIVERY_SECONDS = 10
_SUCCESS = {"done": "success", "failed": "failure"}
WEBHOOK_ID = "wh_emulated"

Status = Literal["initiated", "in-progress", "processing", "done", "failed"]


@dataclass(kw_only=True)
class Account:
    """One conversation. `seconds` is None until it ends; from `done_at` on, it is no longer `processing`."""

    agent_id: str
    record: RecordedConversation
    started_at: float
    authorization_method: Literal["signed_url", "livekit_token", "public"]
    seconds: int | None = None
    done_at: float = 0

    def end(self, *, seconds: int, done_at: float) -> None:
        """Note how long the conversation lasted, and when its processing is over."""
        self.done_at = done_at
        self.seconds = seconds  # last: a reader in another thread takes it as the end

    def status(self, now: float) -> Status:
        """Return the status at this time of the emulator's clock."""
        if self.seconds is None:
            return "in-progress" if self.record.initiation else "initiated"
        if now < self.done_at:
            return "processing"
        # Anything else ends "done", with its error in the metadata.
        return "failed" if self.record.close_code == 1011 else "done"  # noqa: PLR2004

    def shown(self, now: float) -> dict[str, object]:
        """Return it in the shape of the vendor's conversation model, without what nobody reads here."""
        record = self.record
        refused = record.closed_by == "emulator"
        return {
            "status": self.status(now),
            "agent_id": self.agent_id,
            "conversation_id": record.conversation_id,
            "user_id": record.initiation.get("user_id") if isinstance(record.initiation, dict) else None,
            "transcript": [],
            "metadata": {
                "start_time_unix_secs": int(self.started_at),
                "call_duration_secs": self.seconds or 0,
                "cost": self._cost,
                "authorization_method": self.authorization_method,
                "termination_reason": self._termination_reason,
                "error": {"code": record.close_code, "reason": record.close_reason} if refused else None,
            },
        }

    def summary(self, now: float) -> dict[str, object]:
        """Return it as a row of the list, in the shape of the vendor's summary model."""
        status = self.status(now)
        return {
            "agent_id": self.agent_id,
            "conversation_id": self.record.conversation_id,
            "start_time_unix_secs": int(self.started_at),
            "call_duration_secs": self.seconds or 0,
            "cost": self._cost,
            "message_count": 0,  # the emulator keeps no transcript
            "status": status,
            "termination_reason": self._termination_reason,
            "call_successful": _SUCCESS.get(status, "unknown"),
        }

    @property
    def _cost(self) -> int:
        return (self.seconds or 0) * _CREDITS_PER_SECOND

    @property
    def _termination_reason(self) -> str | None:
        if self.record.closed_by == "client":
            return f"Client disconnected: {self.record.close_code}"
        return self.record.close_reason


class Webhooks:
    """Sends post-call webhooks to `url`, signed like the real ones; each once, as the real default is.

    Without `url` none is sent, nor while it `is_disabled`. `statuses` are the answers so far, 0 where there was none.
    The signature's time is that of `clock`, however far the emulator was advanced: the receiver's clock was not.
    """

    def __init__(self, *, url: str | None, secret: str, clock: Callable[[], float]) -> None:
        self.url, self.secret = url, secret
        self.auth_type, self.is_disabled = "hmac", False
        self.statuses: list[int] = []
        self._clock = clock
        self._held_back: list[bytes] = []

    def shown(self) -> list[dict[str, object]]:
        """Return the workspace's webhooks in the shape of the vendor's model: this one, or none."""
        if self.url is None:
            return []
        flags = {"is_disabled": self.is_disabled, "is_auto_disabled": False, "auth_type": self.auth_type}
        return [{"name": "post-call", "webhook_id": WEBHOOK_ID, "webhook_url": self.url, **flags}]

    @property
    def are_sent(self) -> bool:
        """Whether the end of a conversation is reported at all."""
        return self.url is not None and not self.is_disabled

    async def send(self, data: Mapping[str, object], fault: Fault) -> None:
        """Report a conversation that is done, in the way `fault` says."""
        if self.url is None or self.is_disabled:
            return
        event = {"type": "post_call_transcription", "event_timestamp": int(self._clock()), "data": data}
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
