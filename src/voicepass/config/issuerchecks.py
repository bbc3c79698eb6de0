"""The rules for an issuer: its name, its algorithm and its one key, each checked together with the fields before it."""

import re
from contextlib import suppress
from typing import Final

from cryptography.x509 import load_der_x509_certificate
from pydantic import ValidationInfo

from voicepass.config.checks import SAFE_URL, TENANT, is_safe, read_named_secret, refuse_secret
from voicepass.identity.jwks import DISCOVERY_PATH
from voicepass.identity.keys import (
    ALGORITHMS,
    BASE64URL_TO_BASE64,
    HMAC_ALGORITHMS,
    MIN_SECRET_BYTES,
    PEM_MARK,
    KeyUnusableError,
    VerificationKey,
    decode_base64,
    key_from_pem,
    key_from_secret,
)

ENTRA_JWKS: Final = "https://login.microsoftonline.com/common/discovery/v2.0/keys"
KEYS: Final = ("secret_env", "jwks_url", "public_key")
SECRET_REMEDY: Final = "make one with: openssl rand -base64 48"  # noqa: S105
KEY_REMEDY: Final = "give your provider's key as PEM, or the URL of its JWKS"


def check_token_issuer(token_issuer: str, info: ValidationInfo) -> str:
    """Accept an issuer's name, or a template of names."""
    if not token_issuer.strip():
        raise ValueError("is not set: give the exact 'iss' of your tokens")
    if token_issuer.lower().startswith("http:") and not is_safe(token_issuer, info):
        raise ValueError(
            "must not be an http:// address: anyone on the way could publish keys in its name."
            " For a host in your private network, see VOICEPASS_PLAIN_HTTP_HOSTS"
        )
    if token_issuer.count(TENANT) > 1 or {"{", "}"} & set(token_issuer.replace(TENANT, "")):
        raise ValueError(f"may hold {TENANT} once, for the tenant, and no other braces")
    return token_issuer


def check_tenants(tenants: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    """Accept the tenants of an issuer that is a template."""
    if "issuer" not in info.data:
        return tenants
    is_template = TENANT in info.data["issuer"]
    if is_template and not tenants:
        raise ValueError(f'needs tenants for {TENANT}: write this issuer into the policy file, with tenants = ["…"]')
    if tenants and not is_template:
        raise ValueError(f"is set, but the issuer has no {TENANT}: https://login.microsoftonline.com/{TENANT}/v2.0")
    are_ids = all(re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", tenant, re.ASCII) for tenant in tenants)
    if not are_ids or {"common", "organizations", "consumers"} & set(map(str.lower, tenants)):
        raise ValueError("must be the ids of tenants, as the claim tid has them; common and organizations are none")
    return tenants


def check_algorithm(algorithm: str) -> str:
    """Accept one of the algorithms that may sign tokens."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"must be one of {', '.join(sorted(ALGORITHMS))} (voicepass verifies no PS* and no ES256K)")
    return algorithm


def check_key(value: str | None, info: ValidationInfo) -> str | None:
    """Accept the one key of an issuer: a secret for HS*, else a public key or the URL of a JWKS."""
    earlier = KEYS[: KEYS.index(info.field_name or "")]
    if not info.data.keys() >= {"algorithm", *earlier}:
        return value  # one of those was refused, and the same problem would be printed twice
    algorithm, has_url = info.data["algorithm"], info.data.get("jwks_url") is not None
    is_needed = (info.field_name == "secret_env") == (algorithm in HMAC_ALGORITHMS)
    if value is None and is_needed and not has_url and info.field_name != "jwks_url":
        remedy = SECRET_REMEDY if info.field_name == "secret_env" else KEY_REMEDY
        raise ValueError(f"is not set, and {algorithm} needs it: {remedy}")
    if value is not None and not is_needed:
        raise ValueError(f"does not go with the algorithm {algorithm}: change one of the two")
    if value is not None and has_url:
        raise ValueError("is set, and so is the URL of a JWKS: remove one of the two")
    return value


def check_secret(name: str, info: ValidationInfo) -> str:
    """Accept the variable of an HS secret, and the secret in it."""
    algorithm = info.data.get("algorithm", "")
    if algorithm in HMAC_ALGORITHMS:
        secret = read_named_secret(name, info, f", though the policy file names it: {SECRET_REMEDY}")
        try:
            if secret is not None:
                key_from_text(secret, algorithm)
        except KeyUnusableError as error:
            raise refuse_secret(name, str(error)) from None
    return name


def key_from_text(secret: str, algorithm: str) -> VerificationKey:
    """Build an HS key from its text; `base64:…` and `base64url:…` are bytes. Raises KeyUnusableError."""
    decoded = decode_secret(secret)
    if decoded != secret:
        key_from_secret(secret.partition(":")[2].ljust(MIN_SECRET_BYTES), algorithm)  # refuses a public key in base64
    return key_from_secret(decoded, algorithm)


def decode_secret(secret: str) -> str:
    """Return an HS secret with its bytes, also if they are not UTF-8 (PEP 383). Raises KeyUnusableError."""
    form, colon, digits = secret.partition(":")
    if not colon or form not in {"base64", "base64url"}:
        return secret
    try:
        key = decode_base64(digits.translate(BASE64URL_TO_BASE64) if form == "base64url" else digits)
    except ValueError:
        raise KeyUnusableError(f"begins with {form}: but has a character that {form} does not allow") from None
    return key.decode("utf-8", "surrogateescape")


def check_jwks_url(url: str, info: ValidationInfo) -> str:
    """Accept the address of an issuer's published keys."""
    if not is_safe(url, info):
        raise ValueError(SAFE_URL)
    if TENANT in info.data.get("issuer", "") and url.endswith(DISCOVERY_PATH):
        raise ValueError(f"must be a JWKS, for the keys of all tenants: {ENTRA_JWKS}")
    return url


def check_public_key(pem: str, info: ValidationInfo) -> str:
    """Return a public key as PEM."""
    pem = _complete_pem(pem.replace("\\n", "\n"))  # where a variable can hold one line only, people write \\n
    algorithm = info.data.get("algorithm", "")
    if algorithm and algorithm not in HMAC_ALGORITHMS and info.data.get("jwks_url") is None:
        key_from_pem(pem, algorithm)
    return pem


def _complete_pem(key: str) -> str:
    """Return PEM for a key without its first and last line, and for PEM that is encoded in base64."""
    digits = key.removeprefix("base64:")
    if PEM_MARK in digits:
        return digits
    label = "PUBLIC KEY"
    with suppress(ValueError):
        data = decode_base64(digits)
        if data.startswith(PEM_MARK.encode()):
            return data.decode()
        load_der_x509_certificate(data)
        label = "CERTIFICATE"
    return f"{PEM_MARK}{label}-----\n{digits}\n-----END {label}-----\n"


def check_audience(audience: str | None, info: ValidationInfo) -> str | None:
    """Accept the audience. Without one, other claims must separate these tokens from those for other services."""
    if audience is None and info.data.get("required_claims") == {}:
        raise ValueError(
            "is not set: give the 'aud' that your tokens name for this service, or in the policy file required_claims"
            ' such as { azp = ["https://app.example"] }'
        )
    return audience
