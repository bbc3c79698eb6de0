"""What a key must be before a token is verified with it: one algorithm, enough bits, the right curve.

python-jose would take far less: a secret that is valid JSON is parsed as JSON, a one-byte secret works, kid, use and
alg of a JWK are ignored. So every key is built here, as one object for one algorithm, and python-jose only computes.
"""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    SECP521R1,
    EllipticCurve,
    EllipticCurvePublicKey,
    EllipticCurvePublicNumbers,
)
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey, RSAPublicNumbers
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_public_key
from cryptography.x509 import load_der_x509_certificate, load_pem_x509_certificate

# Not `jose.backends`: that falls back, silently, to the pure-Python `ecdsa` and its timing leak (CVE-2024-23342).
from jose.backends.cryptography_backend import CryptographyECKey, CryptographyHMACKey, CryptographyRSAKey


class Curve(NamedTuple):
    """The one curve of an ES* algorithm (RFC 7518, section 3.4)."""

    jwk_name: str
    curve: EllipticCurve


HMAC_ALGORITHMS = frozenset({"HS256", "HS384", "HS512"})
RSA_ALGORITHMS = frozenset({"RS256", "RS384", "RS512"})
CURVES = {
    "ES256": Curve("P-256", SECP256R1()),
    "ES384": Curve("P-384", SECP384R1()),
    "ES512": Curve("P-521", SECP521R1()),
}
ALGORITHMS = HMAC_ALGORITHMS | RSA_ALGORITHMS | CURVES.keys()

MIN_SECRET_BYTES = 32
MIN_RSA_BITS = 2048  # NIST SP 800-131A
MAX_RSA_BITS = 8192  # beyond, one verification takes long enough to be an attack
PEM_MARK = "-----BEGIN "

_BASE64URL = re.compile(r"[A-Za-z0-9_-]*", re.ASCII)


class KeyUnusableError(ValueError):
    """This text is no key for this algorithm. The message says why, and never holds the key."""


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """One key for one algorithm. `kid` is None where the key has no name: then it answers to any."""

    kid: str | None
    algorithm: str
    _key: CryptographyHMACKey | CryptographyRSAKey | CryptographyECKey

    def verifies(self, signing_input: bytes, signature: bytes) -> bool:
        """Whether `signature` over `signing_input` was made with this key."""
        return self._key.verify(signing_input, signature) is True  # type: ignore[no-untyped-call]


def base64url_decode(text: str) -> bytes:
    """Decode strict, canonical, unpadded base64url (RFC 7515, appendix C); anything else raises ValueError.

    Strict, because a second spelling of the same bytes would be a second token with the same signature.
    """
    if not _BASE64URL.fullmatch(text):
        raise ValueError("not base64url")
    decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64url_encode(decoded) != text:
        raise ValueError("not canonical base64url")
    return decoded


def base64url_encode(data: bytes) -> str:
    """Encode as base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def key_from_secret(secret: str, algorithm: str, *, kid: str | None = None) -> VerificationKey:
    """Build an HS* key. Raises KeyUnusableError for a short, blank or mistaken secret."""
    if algorithm not in HMAC_ALGORITHMS:
        raise KeyUnusableError(f"a secret is for HS256, HS384 or HS512, not for {algorithm}")
    key = secret.encode("utf-8", "surrogateescape")
    if len(key) < MIN_SECRET_BYTES:
        raise KeyUnusableError(f"must be at least {MIN_SECRET_BYTES} bytes long; this one has {len(key)}")
    if not secret.strip():
        raise KeyUnusableError("is blank; make one with: openssl rand -base64 48")
    if _is_public_key_text(secret.strip()):
        raise KeyUnusableError("is a public key or a JWK, which anyone may hold; it cannot be an HS secret")
    return _hmac_key(key, algorithm, kid)


def _is_public_key_text(secret: str) -> bool:
    if PEM_MARK in secret or '"kty"' in secret or secret.startswith(("ssh-", "ecdsa-sha2-")):
        return True
    # DER in base64 or base64url, in one line or many: a PEM without its marks, or an entry of a JWK's x5c.
    digits = "".join(secret.split()).translate(str.maketrans("-_", "+/"))
    for load in (load_der_public_key, load_der_x509_certificate):
        try:
            load(base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True))
        except (ValueError, UnsupportedAlgorithm):
            continue
        return True
    return False


def _hmac_key(secret: bytes, algorithm: str, kid: str | None) -> VerificationKey:
    # Through a JWK and never as text: CryptographyHMACKey refuses some text secrets for what they look like.
    return VerificationKey(
        kid, algorithm, CryptographyHMACKey({"kty": "oct", "k": base64url_encode(secret)}, algorithm)
    )


def key_from_pem(pem: str, algorithm: str, *, kid: str | None = None) -> VerificationKey:
    """Build an RS* or ES* key from a PEM public key or certificate. Raises KeyUnusableError."""
    if "PRIVATE KEY-----" in pem:
        raise KeyUnusableError("is a private key; voicepass needs, and should hold, the public half only")
    try:
        is_certificate = "BEGIN CERTIFICATE" in pem
        key: object = (
            load_pem_x509_certificate(pem.encode()).public_key()
            if is_certificate
            else load_pem_public_key(pem.encode())
        )
    except (ValueError, UnsupportedAlgorithm):
        raise KeyUnusableError("is not a PEM public key or certificate") from None
    return _public_key(key, algorithm, kid)


def key_from_jwk(jwk: object, algorithm: str) -> VerificationKey:
    """Build a key from one JWK (RFC 7517), used for `algorithm` alone. Raises KeyUnusableError."""
    if not isinstance(jwk, Mapping):
        raise KeyUnusableError("is not a JSON object")
    kid = jwk.get("kid")
    if kid is not None and not isinstance(kid, str):
        raise KeyUnusableError("has a kid that is not text")
    if jwk.get("use", "sig") != "sig" or not _may_verify(jwk.get("key_ops")):
        raise KeyUnusableError("is not meant for verifying signatures (use, key_ops)")
    if jwk.get("alg", algorithm) != algorithm:
        raise KeyUnusableError(f"is meant for another algorithm than {algorithm}")
    if algorithm in HMAC_ALGORITHMS:
        secret = _member_bytes(jwk, "oct", "k")
        if len(secret) < MIN_SECRET_BYTES:
            raise KeyUnusableError(f"must be at least {MIN_SECRET_BYTES} bytes long")
        return _hmac_key(secret, algorithm, kid)
    if "d" in jwk:
        raise KeyUnusableError("is a private key, published; treat it as stolen")
    return _public_key(_numbers_to_key(jwk, algorithm), algorithm, kid)


def _numbers_to_key(jwk: Mapping[str, object], algorithm: str) -> object:
    try:
        if algorithm in RSA_ALGORITHMS:
            n, e = (int.from_bytes(_member_bytes(jwk, "RSA", member)) for member in ("n", "e"))
            return RSAPublicNumbers(e, n).public_key()
        if algorithm in CURVES and jwk.get("crv") == CURVES[algorithm].jwk_name:
            x, y = (int.from_bytes(_member_bytes(jwk, "EC", member)) for member in ("x", "y"))
            return EllipticCurvePublicNumbers(x, y, CURVES[algorithm].curve).public_key()
    except KeyUnusableError:
        raise
    except (ValueError, UnsupportedAlgorithm) as error:  # a point off its curve, an exponent of 1
        raise KeyUnusableError("is malformed") from error
    raise KeyUnusableError(f"is not a key for {algorithm}")


def _may_verify(key_ops: object) -> bool:
    return key_ops is None or (isinstance(key_ops, list) and "verify" in key_ops)


def _member_bytes(jwk: Mapping[str, object], key_type: str, member: str) -> bytes:
    value = jwk.get(member)
    if jwk.get("kty") != key_type or not isinstance(value, str) or not value:
        raise KeyUnusableError(f"is no {key_type} key with a member '{member}'")
    try:
        return base64url_decode(value)
    except ValueError:
        raise KeyUnusableError(f"has a malformed member '{member}'") from None


def _public_key(key: object, algorithm: str, kid: str | None) -> VerificationKey:
    if algorithm in RSA_ALGORITHMS:
        if not isinstance(key, RSAPublicKey):
            raise KeyUnusableError(f"is not an RSA key, which {algorithm} needs")
        if not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
            raise KeyUnusableError(f"must have {MIN_RSA_BITS} to {MAX_RSA_BITS} bits; this one has {key.key_size}")
        exponent = key.public_numbers().e
        if exponent < 3 or exponent % 2 == 0:  # noqa: PLR2004 - 1 would make every text its own signature
            raise KeyUnusableError("has an unusable public exponent")
        return VerificationKey(kid, algorithm, CryptographyRSAKey(key, algorithm))
    if algorithm in CURVES:
        if not isinstance(key, EllipticCurvePublicKey) or key.curve.name != CURVES[algorithm].curve.name:
            raise KeyUnusableError(f"is not a key on curve {CURVES[algorithm].jwk_name}, which {algorithm} needs")
        return VerificationKey(kid, algorithm, CryptographyECKey(key, algorithm))
    raise KeyUnusableError(f"cannot serve {algorithm}")
