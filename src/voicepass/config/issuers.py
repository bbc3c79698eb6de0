"""`[[issuers]]` of the policy file: whose tokens voicepass accepts, with one algorithm and its one key."""

import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Annotated, Final, Self

from cryptography.x509 import load_der_x509_certificate
from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from voicepass.config.checks import ENVIRONMENT_NAME, SAFE_URL, Conditions, Entry
from voicepass.identity import keys
from voicepass.identity.jwks import DISCOVERY_PATH
from voicepass.outbound import is_safe_url
from voicepass.policy import Rule

TENANT: Final = "{tid}"
ENTRA_JWKS: Final = "https://login.microsoftonline.com/common/discovery/v2.0/keys"
PLAIN_NAME: Final = "must not be an http:// address, where others could publish keys: see VOICEPASS_PLAIN_HTTP_HOSTS"
SECRET_REMEDY: Final = "make one with: openssl rand -base64 48"  # noqa: S105
KEY_REMEDY: Final = "give your provider's key as PEM, or the URL of its JWKS"

Problem = tuple[str, str]
"""The key of the table that is wrong, and a sentence about it."""


def complete_pem(key: str) -> str:
    """Return PEM for a key without its first and last line, and for PEM that is encoded in base64."""
    digits = key.replace("\\n", "\n").removeprefix("base64:")  # where a value has one line only, people write \\n
    if keys.PEM_MARK in digits:
        return digits
    label = "PUBLIC KEY"
    with suppress(ValueError):
        data = keys.decode_base64(digits)
        if data.startswith(keys.PEM_MARK.encode()):
            return data.decode()
        load_der_x509_certificate(data)
        label = "CERTIFICATE"
    return f"{keys.PEM_MARK}{label}-----\n{digits}\n-----END {label}-----\n"


class IssuerEntry(Entry):
    """An issuer whose tokens voicepass accepts, with one algorithm and the key for it."""

    issuer: str = ""
    tenants: tuple[str, ...] = ()
    algorithm: str = ""
    secret_env: Annotated[str, ENVIRONMENT_NAME] | None = None
    jwks_url: str | None = None
    public_key: Annotated[str, AfterValidator(complete_pem)] | None = None
    required_claims: Conditions = Field({})
    audience: str | None = None
    user_id_claim: str = "sub"
    user_name_claim: str = "name"

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        hosts: Collection[str] = info.context or ()
        problems = [*_check_name(self, hosts), *_check_key(self, hosts)]
        if self.audience is None and not self.required_claims:
            # Without an audience, other claims must separate these tokens from those for other services.
            advice = "give the 'aud' that your tokens name for this service, or in the policy file required_claims"
            problems.append(("audience", f'is not set: {advice} such as {{ azp = ["https://app.example"] }}'))
        if problems:
            errors = [
                InitErrorDetails(type=PydanticCustomError("issuer", "{text}", {"text": text}), loc=(key,), input=None)
                for key, text in problems
            ]
            raise ValidationError.from_exception_data("issuers", errors, hide_input=True)
        return self

    @property
    def token_issuers(self) -> dict[str, Rule]:
        """Return every exact `iss`, with the claims that its tokens must hold."""
        if not self.tenants:
            return {self.issuer: Rule(self.required_claims)}
        return {
            self.issuer.replace(TENANT, tenant): Rule({**self.required_claims, "tid": (tenant,)})
            for tenant in self.tenants
        }


def _check_name(entry: IssuerEntry, hosts: Collection[str]) -> Iterator[Problem]:
    name = entry.issuer
    if not name.strip():
        yield "issuer", "is not set: give the exact 'iss' of your tokens"
    if name.lower().startswith("http:") and not is_safe_url(name, plain_http_hosts=hosts):
        yield "issuer", PLAIN_NAME
    if name.count(TENANT) > 1 or {"{", "}"} & set(name.replace(TENANT, "")):
        yield "issuer", f"may hold {TENANT} once, for the tenant, and no other braces"
    if TENANT in name and not entry.tenants:
        yield "tenants", f'needs tenants for {TENANT}: write this issuer into the policy file, with tenants = ["…"]'
    if entry.tenants and TENANT not in name:
        yield "tenants", f"is set, but the issuer has no {TENANT}: https://login.microsoftonline.com/{TENANT}/v2.0"
    are_ids = all(re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", tenant) for tenant in entry.tenants)
    if not are_ids or {"common", "organizations", "consumers"} & set(map(str.lower, entry.tenants)):
        yield "tenants", "must be the ids of tenants, as the claim tid has them; common and organizations are none"


def _check_key(entry: IssuerEntry, hosts: Collection[str]) -> Iterator[Problem]:
    algorithm = entry.algorithm
    if algorithm not in keys.ALGORITHMS:
        names = ", ".join(sorted(keys.ALGORITHMS))
        yield "algorithm", f"must be one of {names} (voicepass verifies no PS* and no ES256K)"
        return
    is_secret = algorithm in keys.HMAC_ALGORITHMS
    used = {key for key in ("secret_env", "jwks_url", "public_key") if getattr(entry, key) is not None}
    wrong = used & ({"jwks_url", "public_key"} if is_secret else {"secret_env"})
    for key in sorted(wrong):
        yield key, f"does not go with the algorithm {algorithm}: change one of the two"
    if not used:
        key, remedy = ("secret_env", SECRET_REMEDY) if is_secret else ("public_key", KEY_REMEDY)
        yield key, f"is not set, and {algorithm} needs it: {remedy}"
    elif used == {"jwks_url", "public_key"}:
        yield "public_key", "is set, and so is the URL of a JWKS: remove one of the two"
    elif entry.jwks_url is not None and not is_safe_url(entry.jwks_url, plain_http_hosts=hosts):
        yield "jwks_url", SAFE_URL
    elif TENANT in entry.issuer and (entry.jwks_url or "").endswith(DISCOVERY_PATH):
        yield "jwks_url", f"must be a JWKS, for the keys of all tenants: {ENTRA_JWKS}"
    elif entry.public_key is not None and not is_secret:
        try:
            keys.key_from_pem(entry.public_key, algorithm)
        except keys.KeyUnusableError as error:
            yield "public_key", str(error)


def build_hmac_key(secret: str, algorithm: str) -> keys.VerificationKey:
    """Build an HS key from its text; `base64:…` and `base64url:…` are bytes. Raises KeyUnusableError."""
    decoded = decode_secret(secret)
    if decoded != secret:
        # This refuses a public key in base64. Spaces make any other text long enough, because only its bytes count.
        keys.key_from_secret(secret.partition(":")[2].ljust(keys.MIN_SECRET_BYTES), algorithm)
    return keys.key_from_secret(decoded, algorithm)


def decode_secret(secret: str) -> str:
    """Return an HS secret with its bytes, also if they are not UTF-8 (PEP 383). Raises KeyUnusableError."""
    form, colon, digits = secret.partition(":")
    if not colon or form not in {"base64", "base64url"}:
        return secret
    try:
        key = keys.decode_base64(digits.translate(keys.BASE64URL_TO_BASE64) if form == "base64url" else digits)
    except ValueError:
        raise keys.KeyUnusableError(f"begins with {form}: but has a character that {form} does not allow") from None
    return key.decode("utf-8", "surrogateescape")
