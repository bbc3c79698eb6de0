"""The verifier agrees with Wycheproof's vectors of tokens and keys. vectors/README.md lists our changes to them."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from voicepass.errors import TokenInvalid
from voicepass.identity import check_header, check_signature
from voicepass.identity.keys import (
    CURVES,
    RSA_ALGORITHMS,
    KeyUnusableError,
    VerificationKey,
    base64url_decode,
    key_from_jwk,
    key_from_secret,
    select_keys,
)
from voicepass.identity.tokens import parse

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "wycheproof_voicepass.json").read_text())["vectors"]
CONFIGURED = {"HS256"} | RSA_ALGORITHMS | CURVES.keys()


def test_the_verifier_agrees_with_every_wycheproof_vector() -> None:
    outcomes = {(vector["file"], vector["tcId"]): judge(vector["jwk"], vector["token"]) for vector in VECTORS}

    surprises = [
        f"{vector['file']} {vector['tcId']} ({vector['comment']}): {outcomes[vector['file'], vector['tcId']]}"
        for vector in VECTORS
        if vector["verifier"] not in {"either", outcomes[vector["file"], vector["tcId"]]}
    ]
    assert surprises == []
    assert len(outcomes) == 426


def test_no_wycheproof_vector_is_missing() -> None:
    counts = Counter(vector["verifier"] for vector in VECTORS)

    assert counts == {"accept": 28, "refuse": 396, "either": 2}


def judge(jwk: Mapping[str, Any], token: str) -> str:
    """Return "accept" or "refuse". An exception that is not the verifier's own fails the test."""
    try:
        header = read_header(token)
        key = choose_key(jwk, header.get("kid"))
        algorithm = key.get("alg", header.get("alg"))
        if algorithm not in CONFIGURED:
            return "refuse"
        parsed = parse(token)
        names = check_header(parsed.header, algorithm)
        check_signature(parsed, select_keys([build_key(key, algorithm)], names))
    except (TokenInvalid, KeyUnusableError):
        return "refuse"
    return "accept"


def build_key(jwk: Mapping[str, Any], algorithm: str) -> VerificationKey:
    """Build the vector's key. voicepass reads no secret from a JWK, so this function reads it."""
    if algorithm != "HS256":
        return key_from_jwk(jwk, algorithm)
    is_for_hs256 = jwk["kty"] == "oct" and jwk.get("use", "sig") == "sig" and "verify" in jwk.get("key_ops", ["verify"])
    if not is_for_hs256:
        raise KeyUnusableError("is not a secret for HS256")
    return key_from_secret(base64url_decode(jwk["k"]).decode("utf-8", "surrogateescape"), algorithm)


def read_header(token: str) -> Mapping[str, Any]:
    try:
        header = json.loads(base64url_decode(token.partition(".")[0]))
    except ValueError:
        return {}  # the verifier refuses such a token itself
    return header if isinstance(header, dict) else {}


def choose_key(jwk: Mapping[str, Any], kid: object) -> Mapping[str, Any]:
    """Return the key named `kid` of a set, or the key itself. Refuse a set with a name twice or with mixed kinds."""
    if "keys" not in jwk:
        return jwk
    keys: list[Mapping[str, Any]] = jwk["keys"]
    if len({key.get("kid") for key in keys}) < len(keys) or len({key.get("kty") == "oct" for key in keys}) > 1:
        raise KeyUnusableError("holds a kid twice, or mixes secrets with public keys")
    named = [key for key in keys if key.get("kid") == kid]
    if len(named) != 1:
        raise KeyUnusableError("does not hold the key")
    return named[0]
