"""Build verification keys: one object per key and algorithm, with enough bits and on the right curve.

python-jose accepts far more: it parses a secret that is JSON, takes a secret of one byte, and ignores kid, use and alg
of a JWK. So this file builds each key itself, and python-jose only computes. `cryptography` verifies EdDSA, which
python-jose does not implement.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_public_key
from cryptography.x509 import load_der_x509_certificate, load_pem_x509_certificate

# Not `jose.backends`: without a message it falls back to the Python package `ecdsa`, which leaks time (CVE-2024-23342).
from jose.backends.cryptography_backend import CryptographyECKey, CryptographyHMACKey, CryptographyRSAKey

HMAC_ALGORITHMS = frozenset({"HS256", "HS384", "HS512"})
RSA_ALGORITHMS = frozenset({"RS256", "RS384", "RS512"})
# The one curve of each ES* algorithm (RFC 7518, section 3.4). A JWK calls it `P-` and its size.
CURVES: Final[Mapping[str, ec.EllipticCurve]] = {
    "ES256": ec.SECP256R1(),
    "ES384": ec.SECP384R1(),
    "ES512": ec.SECP521R1(),
}
EDDSA = "EdDSA"  # with Ed25519 (RFC 8037), and no other curve
ALGORITHMS = HMAC_ALGORITHMS | RSA_ALGORITHMS | CURVES.keys() | {EDDSA}

# The members by which a token's header can name its key (RFC 7515, section 4.1).
KEY_NAMES = ("kid", "x5t", "x5t#S256")

MIN_SECRET_BYTES = 32
MIN_RSA_BITS = 2048  # NIST SP 800-131A
MAX_RSA_BITS = 8192  # an attacker could use a longer key to slow the service down
PEM_MARK = "-----BEGIN "

BASE64URL_TO_BASE64 = str.maketrans("-_", "+/")
_TO_BASE64URL = str.maketrans("+/", "-_")

_ED25519_FIELD: Final = 2**255 - 19
_ED25519_ORDER_8: Final = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
# The y of the points of order 1, 2, 4 and 8: with such a public key, anyone can sign.
_ED25519_WEAK: Final = frozenset({0, 1, _ED25519_FIELD - 1, _ED25519_ORDER_8, _ED25519_FIELD - _ED25519_ORDER_8})


class KeyUnusableError(ValueError):
    """This text is no key for this algorithm. The message says why, and never holds the key."""


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """One key for one algorithm. `names`: what a token's header may call it, by member of KEY_NAMES."""

    algorithm: str
    _verify: Callable[[bytes, bytes], object] = field(repr=False)
    names: Mapping[str, str] = field(default_factory=dict)

    def verifies(self, signing_input: bytes, signature: bytes) -> bool:
        """Whether `signature` over `signing_input` was made with this key."""
        return self._verify(signing_input, signature) is True


def select_keys(keys: Sequence[VerificationKey], names: Mapping[str, str]) -> Sequence[VerificationKey]:
    """Return the keys that match one of `names`, the names in a token's header. There may be several, or none.

    If no key has a name of these kinds, `names` cannot tell the keys apart: then return all of them.
    """
    if not any(key.names.keys() & names.keys() for key in keys):
        return keys
    return [key for key in keys if key.names.items() & names.items()]


def base64url_decode(text: str) -> bytes:
    """Decode canonical base64url without padding (RFC 7515, appendix C), or raise ValueError.

    A second spelling of the same bytes would be a second token with the same signature.
    """
    decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64url_encode(decoded) != text:  # other characters are skipped above, and missing here
        raise ValueError("not canonical base64url")
    return decoded


def base64url_encode(data: bytes) -> str:
    """Encode as base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def decode_base64(text: str) -> bytes:
    """Decode base64 in one line or many, with padding or without, or raise ValueError."""
    digits = "".join(text.split()).rstrip("=")
    return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)


def key_from_secret(secret: str, algorithm: str) -> VerificationKey:
    """Build an HS* key. Raises KeyUnusableError for a short or blank secret, and for a public key."""
    if algorithm not in HMAC_ALGORITHMS:
        raise KeyUnusableError(f"a secret is for HS256, HS384 or HS512, not for {algorithm}")
    key = secret.encode("utf-8", "surrogateescape")
    if len(key) < MIN_SECRET_BYTES:
        raise KeyUnusableError(f"must be at least {MIN_SECRET_BYTES} bytes long; this one has {len(key)}")
    if not secret.strip():
        raise KeyUnusableError("is blank; make one with: openssl rand -base64 48")
    if _is_public_key_text(secret.strip()):
        raise KeyUnusableError("is a public key or a JWK, which anyone may hold; it cannot be an HS secret")
    # Through a JWK and not as text: CryptographyHMACKey refuses texts that look like a public key.
    jose_key = CryptographyHMACKey({"kty": "oct", "k": base64url_encode(key)}, algorithm)
    return VerificationKey(algorithm, jose_key.verify)


def _is_public_key_text(secret: str) -> bool:
    if PEM_MARK in secret or '"kty"' in secret or secret.startswith(("ssh-", "ecdsa-sha2-")):
        return True
    # DER in base64 or base64url, in one line or many: a PEM without its marks, or an entry of a JWK's x5c.
    for load in (load_der_public_key, load_der_x509_certificate):
        with suppress(ValueError, UnsupportedAlgorithm):
            load(decode_base64(secret.translate(BASE64URL_TO_BASE64)))
            return True
    return False


def key_from_pem(pem: str, algorithm: str) -> VerificationKey:
    """Build an RS*, ES* or EdDSA key from a PEM public key or certificate. Raises KeyUnusableError."""
    if "PRIVATE KEY-----" in pem:
        raise KeyUnusableError("is a private key; give voicepass the public key only")
    key: object
    try:
        if "BEGIN CERTIFICATE" in pem:
            key = load_pem_x509_certificate(pem.encode()).public_key()
        else:
            key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise KeyUnusableError("is not a PEM public key or certificate") from None
    return _build_key(key, algorithm, names={})


def key_from_jwk(jwk: object, algorithm: str) -> VerificationKey:
    """Build an RS*, ES* or EdDSA key from one JWK (RFC 7517). Raises KeyUnusableError.

    An HS secret never comes from a JWK: nobody may publish one.
    """
    if not isinstance(jwk, Mapping):
        raise KeyUnusableError("is not a JSON object")
    # Some issuers write null for a member that they leave out.
    members = {member: value for member, value in jwk.items() if value is not None}
    names = {member: value for member in KEY_NAMES if isinstance(value := members.get(member), str)}
    if "kid" in members and "kid" not in names:
        raise KeyUnusableError("has a kid that is not text")
    key_ops = members.get("key_ops", ["verify"])
    if members.get("use", "sig") != "sig" or not isinstance(key_ops, list) or "verify" not in key_ops:
        raise KeyUnusableError("is not meant for verifying signatures (use, key_ops)")
    if members.get("alg", algorithm) != algorithm:
        raise KeyUnusableError(f"is meant for another algorithm than {algorithm}")
    if "d" in members:
        raise KeyUnusableError("is a private key, published; treat it as stolen")
    return _build_key(_load_jwk(members, algorithm), algorithm, names=names)


def _load_jwk(jwk: Mapping[str, object], algorithm: str) -> object:
    try:
        if algorithm in RSA_ALGORITHMS:
            n, e = (int.from_bytes(_member_bytes(jwk, "RSA", member)) for member in ("n", "e"))
            return rsa.RSAPublicNumbers(e, n).public_key()
        if algorithm in CURVES and jwk.get("crv") == f"P-{CURVES[algorithm].key_size}":
            x, y = (int.from_bytes(_member_bytes(jwk, "EC", member)) for member in ("x", "y"))
            return ec.EllipticCurvePublicNumbers(x, y, CURVES[algorithm]).public_key()
        if algorithm == EDDSA and jwk.get("crv") == "Ed25519":
            return Ed25519PublicKey.from_public_bytes(_member_bytes(jwk, "OKP", "x"))
    except KeyUnusableError:
        raise
    except (ValueError, UnsupportedAlgorithm) as error:  # no base64, a point off its curve, an exponent of 1
        raise KeyUnusableError("is malformed") from error
    raise KeyUnusableError(f"is not a key for {algorithm}")


def _member_bytes(jwk: Mapping[str, object], key_type: str, member: str) -> bytes:
    value = jwk.get(member)
    if jwk.get("kty") != key_type or not isinstance(value, str) or not value:
        raise KeyUnusableError(f"is no {key_type} key with a member '{member}'")
    # Some issuers write standard base64, or padding. In a key, unlike a token, a second spelling does no harm.
    return base64url_decode(value.rstrip("=").translate(_TO_BASE64URL))


def _build_key(key: object, algorithm: str, *, names: Mapping[str, str]) -> VerificationKey:
    match key:
        case rsa.RSAPublicKey() if algorithm in RSA_ALGORITHMS:
            # `cryptography` builds no key with an exponent that is even or below 3; tests say so.
            if not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
                raise KeyUnusableError(f"must have {MIN_RSA_BITS} to {MAX_RSA_BITS} bits; this one has {key.key_size}")
            return VerificationKey(algorithm, CryptographyRSAKey(key, algorithm).verify, names)
        case ec.EllipticCurvePublicKey() if algorithm in CURVES and key.curve.name == CURVES[algorithm].name:
            return VerificationKey(algorithm, CryptographyECKey(key, algorithm).verify, names)
        case Ed25519PublicKey() if algorithm == EDDSA:
            y = int.from_bytes(key.public_bytes_raw(), "little") % 2**255  # the highest bit is the sign of x
            if y >= _ED25519_FIELD or y in _ED25519_WEAK:
                raise KeyUnusableError("is malformed, or a key with which anyone can sign")
            return VerificationKey(algorithm, partial(_verify_ed25519, key), names)
    raise KeyUnusableError(f"is not a key for {algorithm}")


def _verify_ed25519(key: Ed25519PublicKey, signing_input: bytes, signature: bytes) -> bool:
    try:
        key.verify(signature, signing_input)
    except InvalidSignature:
        return False
    return True
