"""Encrypts a credential under its workspace's API key: the ledger keeps it, and readers of the ledger cannot use it."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from voicepass.elevenlabs import Workspace
from voicepass.model import Agent, Credential

_PURPOSE: Final = b"voicepass: an unopened pass, version 1"
_NONCE_BYTES: Final = 12  # AES-GCM's own size. A random nonce is safe for far fewer than 2^32 passes under one key.


class SealBrokenError(Exception):
    """The sealed value was changed, belongs to another row, or was sealed under another API key."""


class Seals:
    """Seals and unseals credentials. The holder of the API key can also get such credentials from ElevenLabs."""

    def __init__(self, workspaces: Iterable[Workspace]) -> None:
        self._ciphers = {
            workspace.base_url: [AESGCM(_derive_key(api_key)) for api_key in workspace.keys] for workspace in workspaces
        }

    def seal(self, agent: Agent, pass_id: str, credential: Credential) -> bytes | None:
        """Return the sealed credential, bound to its row. Returns None if it has no conversation id or no expiry."""
        if credential.conversation_id is None or credential.expires_at is None:
            return None
        text = json.dumps([credential.secret, credential.conversation_id, credential.expires_at]).encode()
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._ciphers[agent.base_url][0].encrypt(nonce, text, pass_id.encode())

    def unseal(self, agent: Agent, pass_id: str, sealed: bytes) -> Credential:
        """Return the credential. Raises SealBrokenError, also if the ledger's value is not of bytes."""
        for cipher in self._ciphers[agent.base_url]:  # There are two while the API key is replaced.
            with suppress(InvalidTag, TypeError, ValueError):
                text = cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], pass_id.encode())
                secret, conversation_id, expires_at = json.loads(text)
                return Credential(secret=secret, conversation_id=conversation_id, expires_at=expires_at)
        raise SealBrokenError


def _derive_key(api_key: str) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=_PURPOSE).derive(api_key.encode())
