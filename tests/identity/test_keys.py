"""Which keys are refused, and that no refusal repeats the key."""

import base64
import datetime as dt
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509 import Certificate, CertificateBuilder, Name, NameAttribute, random_serial_number
from cryptography.x509.oid import NameOID

from tests.identity.hostile_jwks import make_jwk
from tests.identity.hostile_tokens import SECRET, base64url, get_ec_key, get_ed25519_key, get_rsa_key, signer_for
from tests.tables import table
from voicepass.identity.keys import (
    ALGORITHMS,
    HMAC_ALGORITHMS,
    KeyUnusableError,
    VerificationKey,
    base64url_decode,
    base64url_encode,
    key_from_jwk,
    key_from_pem,
    key_from_secret,
)

ODD_SECRETS = {
    "32 bytes": "0123456789abcdef0123456789abcdef",
    "a JSON list": json.dumps(["a", "b", "c", "d", "e", "f", "g"]),
    "a JSON string": json.dumps("a secret that somebody put in quotes"),
    "a JSON object": json.dumps({"secret": "a secret inside of an object"}),
    "a JSON number": "1" * 40,
    "a JSON number beyond Python's limit": "1" * 5000,
    "JSON too deep to parse": "[" * 5000,
    "a JSON word": "true".ljust(40),
    "ssh-rsa in the middle": "a secret that speaks of ssh-rsa and more",
    "ssh-rsa at its end": "a secret that speaks at last of ssh-rsa",
    "dashes": "-----a secret between five dashes-----",
    "kty without quotes": "a secret that happens to say kty, no more",
    "16 two-byte characters": "ßßßßßßßßßßßßßßßß",
    "bytes that are not UTF-8": b"\xff\xfe\x80".decode("utf-8", "surrogateescape") * 12,
    "a NUL": "a secret with a NUL \0 in the midst of it",
    "spaces around": "  a secret with spaces at either end  ",
    "base64": base64.b64encode(bytes(range(48))).decode(),
    "base64 that begins like DER": "MIIB" + "A" * 60,
    "hexadecimal": bytes(range(48)).hex(),
    "4 kB": "a" * 4096,
}


@table("algorithm", sorted(HMAC_ALGORITHMS))
@table("name", ODD_SECRETS)
def test_a_secret_may_look_like_anything_and_is_used_byte_for_byte(name: str, algorithm: str) -> None:
    signer = signer_for(algorithm, secret=ODD_SECRETS[name])

    key = key_from_secret(ODD_SECRETS[name], algorithm)

    assert key.verifies(b"signing input", signer.sign(b"signing input"))
    assert not key.verifies(b"another input", signer.sign(b"signing input"))


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_a_key_verifies_what_its_owner_signed_and_nothing_else(algorithm: str) -> None:
    provider, attacker = signer_for(algorithm), signer_for(algorithm, owner="attacker")

    key = build_key(provider.published, algorithm)

    assert key.algorithm == algorithm
    assert key.verifies(b"signing input", provider.sign(b"signing input"))
    assert not key.verifies(b"another input", provider.sign(b"signing input"))
    assert not key.verifies(b"signing input", attacker.sign(b"signing input"))
    assert not key.verifies(b"signing input", b"")


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS - HMAC_ALGORITHMS))
def test_a_jwk_is_the_same_key_as_its_pem(algorithm: str) -> None:
    signer = signer_for(algorithm)

    key = key_from_jwk(
        make_provider_jwk(algorithm, kid="key-1", use="sig", alg=algorithm, key_ops=["verify"]), algorithm
    )

    assert (key.names, key.algorithm) == ({"kid": "key-1"}, algorithm)
    assert key.verifies(b"signing input", signer.sign(b"signing input"))


ODD_JWKS: dict[str, Any] = {
    "null for what is left out": {"use": None, "alg": None, "key_ops": None, "kid": None, "d": None},
    "padding at the end of each number": lambda text: text + "=" * (-len(text) % 4 or 4),
    "the standard alphabet": lambda text: base64.b64encode(base64url_decode(text)).decode(),
    "a zero byte in front of each number, as in ASN.1": lambda text: base64url(b"\0" + base64url_decode(text)),
}


# An Ed25519 key is no number: it always has 32 bytes.
ODD_CASES = [
    (o, a) for o in ODD_JWKS for a in ("RS256", "ES256", "ES512", "EdDSA") if (o[:6], a) != ("a zero", "EdDSA")
]


@table(("oddity", "algorithm"), ODD_CASES)
def test_a_jwk_that_an_issuer_writes_in_another_way_is_the_same_key(oddity: str, algorithm: str) -> None:
    change, jwk = ODD_JWKS[oddity], make_provider_jwk(algorithm)
    odd = jwk | (change if isinstance(change, dict) else {name: change(jwk[name]) for name in "nexy" if name in jwk})

    key = key_from_jwk(odd, algorithm)

    assert odd != jwk
    assert key.verifies(b"signing input", signer_for(algorithm).sign(b"signing input"))


def test_a_key_has_the_names_that_its_jwk_gives_it() -> None:
    names = {"kid": "key-1", "x5t": "AAAA", "x5t#S256": "BBBB"}

    assert key_from_jwk(make_provider_jwk("ES256", **names), "ES256").names == names
    unnamed = make_provider_jwk("ES256") | {"kid": None, "x5t": 7, "x5t#S256": ["BBBB"]}
    assert key_from_jwk(unnamed, "ES256").names == {}


def test_a_pem_built_by_hand_is_accepted_if_its_exponent_is_valid() -> None:
    signer = signer_for("RS256")

    key = key_from_pem(write_rsa_pem(exponent=65537), "RS256")

    assert key.verifies(b"signing input", signer.sign(b"signing input"))


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "ES384", "ES512", "EdDSA"])
def test_a_certificate_serves_as_its_public_key(algorithm: str) -> None:
    signer = signer_for(algorithm)

    key = key_from_pem(make_certificate(algorithm).public_bytes(Encoding.PEM).decode(), algorithm)

    assert key.verifies(b"signing input", signer.sign(b"signing input"))


def list_unusable_secrets() -> dict[str, tuple[str, str]]:
    pem = signer_for("RS256").published
    der = decode_pem(pem)
    pkcs1 = get_rsa_key("provider").public_key().public_bytes(Encoding.DER, PublicFormat.PKCS1)
    ssh = get_rsa_key("provider").public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    ec_ssh = get_ec_key("provider", "ES256").public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    certificate = make_certificate("RS256").public_bytes(Encoding.DER)
    jwk = make_provider_jwk("RS256", kid="key-1")
    short, blank = "must be at least 32 bytes long; this one has", "is blank; make one with: openssl rand -base64 48"
    public = "is a public key or a JWK, which anyone may hold; it cannot be an HS secret"
    return {
        "empty": ("", f"{short} 0"),
        "one byte": ("a", f"{short} 1"),
        "31 bytes": ("a" * 31, f"{short} 31"),
        "15 two-byte characters": ("ß" * 15, f"{short} 30"),
        "31 spaces": (" " * 31, f"{short} 31"),
        "spaces": (" " * 48, blank),
        "line feeds": ("\n" * 48, blank),
        "blanks of all kinds": ("\t \r\n\u00a0\u2003" * 12, blank),
        "a PEM": (pem, public),
        "a PEM with text before it": (f"our key:\n{pem}", public),
        "a PEM with \\n": (pem.replace("\n", "\\n"), public),
        "a PEM in spaces": (f"  {pem}  ", public),
        "a PEM of an EC key": (signer_for("ES256").published, public),
        "a PEM certificate": (make_certificate("RS256").public_bytes(Encoding.PEM).decode(), public),
        "a PEM private key": (write_private_pem(get_rsa_key("provider")), public),
        "an SSH key": (ssh, public),
        "an SSH key after a space": (" " + ssh, public),
        "an EC SSH key": (ec_ssh, public),
        "DER in base64": (base64.b64encode(der).decode(), public),
        "DER in base64, in lines": (base64.encodebytes(der).decode(), public),
        "DER in base64url": (base64url(der), public),
        "DER of an EC key": (base64.b64encode(decode_pem(signer_for("ES256").published)).decode(), public),
        "DER in PKCS #1": (base64.b64encode(pkcs1).decode(), public),
        "DER of a certificate, as in x5c": (base64.b64encode(certificate).decode(), public),
        "a JWK": (json.dumps(jwk), public),
        "a JWK, indented": (json.dumps(jwk, indent=2), public),
        "an EC JWK": (json.dumps(make_provider_jwk("ES256")), public),
        "a JWK that is a secret": (json.dumps({"kty": "oct", "k": base64url(SECRET.encode())}), public),
        "a JWKS": (json.dumps({"keys": [jwk]}), public),
        "a list of JWKs": (json.dumps([jwk]), public),
    }


def test_a_short_blank_or_mistaken_secret_is_refused() -> None:
    secrets = list_unusable_secrets()

    answers = {name: get_refusal(lambda s=secret: key_from_secret(s, "HS256")) for name, (secret, _) in secrets.items()}

    assert answers == {name: answer for name, (_, answer) in secrets.items()}
    assert [name for name, (secret, _) in secrets.items() if has_part_of(secret, answers[name])] == []


@table("algorithm", [*sorted(ALGORITHMS - HMAC_ALGORITHMS), "none", "hs256", "HS1", "PS256", ""])
def test_a_secret_is_refused_for_every_algorithm_but_hs(algorithm: str) -> None:
    answer = get_refusal(lambda: key_from_secret(SECRET, algorithm))

    assert "a secret is for HS256, HS384 or HS512" in answer
    assert SECRET not in answer


WEAK = "is malformed, or a key with which anyone can sign"


def list_unusable_pems() -> dict[str, tuple[str, str, str]]:
    pem, ec_pem = signer_for("RS256").published, signer_for("ES256").published
    private = get_rsa_key("provider")
    ssh = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    encrypted = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password"))
    ed25519_pem = write_pem(ed25519.Ed25519PrivateKey.generate().public_key())
    no_pem = "is not a PEM public key or certificate"
    private_half = "is a private key; give voicepass the public key only"
    return {
        "empty": ("", "RS256", no_pem),
        "words": ("the public key", "RS256", no_pem),
        "a lone surrogate": ("\ud800", "RS256", no_pem),
        "a PEM without its marks": (base64.b64encode(decode_pem(pem)).decode(), "RS256", no_pem),
        "a PEM cut short": (pem[: len(pem) // 2], "RS256", no_pem),
        "a PEM of rubbish": ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "RS256", no_pem),
        "a certificate of rubbish": ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "RS256", no_pem),
        "an SSH key": (ssh, "RS256", no_pem),
        "a JWK": (json.dumps(make_provider_jwk("RS256")), "RS256", no_pem),
        "a secret": (SECRET, "RS256", no_pem),
        "a private key": (write_private_pem(private), "RS256", private_half),
        "a PKCS #1 private key": (write_private_pem(private, PrivateFormat.TraditionalOpenSSL), "RS256", private_half),
        "a private key of OpenSSH": (write_private_pem(private, PrivateFormat.OpenSSH), "RS256", private_half),
        "an encrypted private key": (encrypted.decode(), "RS256", private_half),
        "a private EC key": (write_private_pem(get_ec_key("provider", "ES256")), "ES256", private_half),
        "both halves": (pem + write_private_pem(private), "RS256", private_half),
        "RSA of 1,024 bits": (make_weak_rsa_pem(), "RS256", "must have 2048 to 8192 bits; this one has 1024"),
        "RSA, exponent 0": (write_rsa_pem(exponent=0), "RS256", no_pem),
        "RSA, exponent 1": (write_rsa_pem(exponent=1), "RS256", no_pem),
        "RSA, exponent 2": (write_rsa_pem(exponent=2), "RS256", no_pem),
        "RSA, exponent 65536": (write_rsa_pem(exponent=65536), "RS256", no_pem),
        "RSA for ES256": (pem, "ES256", "is not a key for ES256"),
        "EC for RS256": (ec_pem, "RS256", "is not a key for RS256"),
        "P-256 for ES384": (ec_pem, "ES384", "is not a key for ES384"),
        "P-256 for ES512": (ec_pem, "ES512", "is not a key for ES512"),
        "P-384 for ES256": (signer_for("ES384").published, "ES256", "is not a key for ES256"),
        "secp256k1 for ES256": (
            write_pem(ec.generate_private_key(ec.SECP256K1()).public_key()),
            "ES256",
            "is not a key for ES256",
        ),
        "Ed25519 for ES256": (ed25519_pem, "ES256", "is not a key for ES256"),
        "Ed25519 for RS256": (ed25519_pem, "RS256", "is not a key for RS256"),
        "Ed448 for EdDSA": (
            write_pem(ed448.Ed448PrivateKey.generate().public_key()),
            "EdDSA",
            "is not a key for EdDSA",
        ),
        "X25519 for EdDSA": (
            write_pem(x25519.X25519PrivateKey.generate().public_key()),
            "EdDSA",
            "is not a key for EdDSA",
        ),
        "RSA for EdDSA": (pem, "EdDSA", "is not a key for EdDSA"),
        "P-256 for EdDSA": (ec_pem, "EdDSA", "is not a key for EdDSA"),
        "Ed25519 of order 1": (write_ed25519_pem(1), "EdDSA", WEAK),
        "a private Ed25519 key": (write_private_pem(get_ed25519_key("provider")), "EdDSA", private_half),
        "a certificate of another kind": (
            make_certificate("RS256").public_bytes(Encoding.PEM).decode(),
            "ES256",
            "is not a key for ES256",
        ),
        "a public key for HS256": (pem, "HS256", "is not a key for HS256"),
        "a public key for PS256": (pem, "PS256", "is not a key for PS256"),
        "a public key for none": (pem, "none", "is not a key for none"),
    }


def test_a_pem_that_is_no_public_key_for_the_algorithm_is_refused() -> None:
    pems = list_unusable_pems()

    answers = {name: get_refusal(lambda p=pem, a=alg: key_from_pem(p, a)) for name, (pem, alg, _) in pems.items()}

    assert answers == {name: answer for name, (_, _, answer) in pems.items()}
    assert [name for name, (pem, _, _) in pems.items() if has_part_of(pem, answers[name])] == []


def list_unusable_jwks() -> dict[str, tuple[object, str, str]]:
    rsa_jwk, ec_jwk = make_provider_jwk("RS256"), make_provider_jwk("ES256")
    oct_jwk = {"kty": "oct", "k": base64url(SECRET.encode())}
    numbers = get_rsa_key("provider").private_numbers()
    d = base64url(numbers.d.to_bytes(256))
    ec_d = base64url(get_ec_key("provider", "ES256").private_numbers().private_value.to_bytes(32))
    modulus = numbers.public_numbers.n
    y = int.from_bytes(base64url_decode(ec_jwk["y"]))
    other_y = base64url((y ^ 1).to_bytes(32))
    ed_jwk = make_provider_jwk("EdDSA")
    not_meant, malformed = "is not meant for verifying signatures (use, key_ops)", "is malformed"
    another, private = "is meant for another algorithm than RS256", "is a private key, published; treat it as stolen"
    no_rsa, no_ec, no_okp = (f"is no {kind} key with a member" for kind in ("RSA", "EC", "OKP"))
    size = "must have 2048 to 8192 bits; this one has"
    return {
        "null": (None, "RS256", "is not a JSON object"),
        "a list": ([rsa_jwk], "RS256", "is not a JSON object"),
        "text": (json.dumps(rsa_jwk), "RS256", "is not a JSON object"),
        "an empty object": ({}, "RS256", f"{no_rsa} 'n'"),
        "a key set": ({"keys": [rsa_jwk]}, "RS256", f"{no_rsa} 'n'"),
        "use: enc": (rsa_jwk | {"use": "enc"}, "RS256", not_meant),
        "use: empty": (rsa_jwk | {"use": ""}, "RS256", not_meant),
        "use: a list": (rsa_jwk | {"use": ["sig"]}, "RS256", not_meant),
        "key_ops: only sign": (rsa_jwk | {"key_ops": ["sign"]}, "RS256", not_meant),
        "key_ops: encrypt": (rsa_jwk | {"key_ops": ["encrypt", "wrapKey"]}, "RS256", not_meant),
        "key_ops: empty": (rsa_jwk | {"key_ops": []}, "RS256", not_meant),
        "key_ops: text": (rsa_jwk | {"key_ops": "verify"}, "RS256", not_meant),
        "key_ops: an object": (rsa_jwk | {"key_ops": {"verify": True}}, "RS256", not_meant),
        "alg: RS384": (rsa_jwk | {"alg": "RS384"}, "RS256", another),
        "alg: RSA-OAEP": (rsa_jwk | {"alg": "RSA-OAEP"}, "RS256", another),
        "alg: empty": (rsa_jwk | {"alg": ""}, "RS256", another),
        "alg: Ed25519 for EdDSA": (ed_jwk | {"alg": "Ed25519"}, "EdDSA", "is meant for another algorithm than EdDSA"),
        "alg: a list": (rsa_jwk | {"alg": ["RS256"]}, "RS256", another),
        "alg: in small letters": (rsa_jwk | {"alg": "rs256"}, "RS256", another),
        "kid: a number": (rsa_jwk | {"kid": 1}, "RS256", "has a kid that is not text"),
        "kid: a list": (rsa_jwk | {"kid": ["key-1"]}, "RS256", "has a kid that is not text"),
        "kid: false": (rsa_jwk | {"kid": False}, "RS256", "has a kid that is not text"),
        "a secret for HS256": (oct_jwk, "HS256", "is not a key for HS256"),
        "a secret for RS256": (oct_jwk, "RS256", f"{no_rsa} 'n'"),
        "a secret for ES256": (oct_jwk | {"crv": "P-256"}, "ES256", f"{no_ec} 'x'"),
        "RSA for ES256": (rsa_jwk, "ES256", "is not a key for ES256"),
        "RSA for ES256, with a crv": (rsa_jwk | {"crv": "P-256"}, "ES256", f"{no_ec} 'x'"),
        "RSA for PS256": (rsa_jwk, "PS256", "is not a key for PS256"),
        "RSA for none": (rsa_jwk, "none", "is not a key for none"),
        "EC for RS256": (ec_jwk, "RS256", f"{no_rsa} 'n'"),
        "EC, P-256 for ES384": (ec_jwk, "ES384", "is not a key for ES384"),
        "EC, P-256 called P-384": (ec_jwk | {"crv": "P-384"}, "ES384", malformed),
        "EC, an unknown curve": (ec_jwk | {"crv": "secp256k1"}, "ES256", "is not a key for ES256"),
        "EC, a curve in a list": (ec_jwk | {"crv": ["P-256"]}, "ES256", "is not a key for ES256"),
        "EC, no curve": ({k: v for k, v in ec_jwk.items() if k != "crv"}, "ES256", "is not a key for ES256"),
        "EC, no y": ({k: v for k, v in ec_jwk.items() if k != "y"}, "ES256", f"{no_ec} 'y'"),
        "EC, a point off the curve": (ec_jwk | {"y": other_y}, "ES256", malformed),
        "EC, the origin": (ec_jwk | {"x": "AA", "y": "AA"}, "ES256", malformed),
        "EC, beyond the field": (ec_jwk | {"x": base64url(b"\xff" * 32)}, "ES256", malformed),
        "EC, far beyond the field": (ec_jwk | {"x": base64url(b"\xff" * 3000)}, "ES256", malformed),
        "EC, x a number": (ec_jwk | {"x": y}, "ES256", f"{no_ec} 'x'"),
        "EC, x with a space": (ec_jwk | {"x": ec_jwk["x"] + " "}, "ES256", malformed),
        "OKP for ES256": (ed_jwk, "ES256", "is not a key for ES256"),
        "OKP for ES256, called P-256": (ed_jwk | {"crv": "P-256"}, "ES256", f"{no_ec} 'x'"),
        "RSA for EdDSA": (rsa_jwk, "EdDSA", "is not a key for EdDSA"),
        "RSA for EdDSA, with a crv": (rsa_jwk | {"crv": "Ed25519"}, "EdDSA", f"{no_okp} 'x'"),
        "EC for EdDSA": (ec_jwk, "EdDSA", "is not a key for EdDSA"),
        "EC for EdDSA, called Ed25519": (ec_jwk | {"crv": "Ed25519"}, "EdDSA", f"{no_okp} 'x'"),
        "a secret for EdDSA": (oct_jwk | {"crv": "Ed25519"}, "EdDSA", f"{no_okp} 'x'"),
        "OKP, X25519": (ed_jwk | {"crv": "X25519"}, "EdDSA", "is not a key for EdDSA"),
        "OKP, Ed448": (ed_jwk | {"crv": "Ed448", "x": base64url(b"x" * 57)}, "EdDSA", "is not a key for EdDSA"),
        "OKP, no curve": ({k: v for k, v in ed_jwk.items() if k != "crv"}, "EdDSA", "is not a key for EdDSA"),
        "OKP, no x": ({k: v for k, v in ed_jwk.items() if k != "x"}, "EdDSA", f"{no_okp} 'x'"),
        "OKP, x a number": (ed_jwk | {"x": 7}, "EdDSA", f"{no_okp} 'x'"),
        "OKP, 31 bytes": (ed_jwk | {"x": base64url(b"x" * 31)}, "EdDSA", malformed),
        "OKP, 33 bytes": (ed_jwk | {"x": base64url(b"\0" + base64url_decode(ed_jwk["x"]))}, "EdDSA", malformed),
        "OKP, published private key": (ed_jwk | {"d": base64url(bytes(32))}, "EdDSA", private),
        **{f"OKP, a weak point: {name}": (ed_jwk | {"x": x}, "EdDSA", WEAK) for name, x in weak_points().items()},
        "a published private RSA key": (rsa_jwk | {"d": d}, "RS256", private),
        "a published private EC key": (ec_jwk | {"d": ec_d}, "ES256", private),
        "a private key, its d empty": (rsa_jwk | {"d": ""}, "RS256", private),
        "RSA of 1,024 bits": (rsa_jwk | {"n": base64url(b"\xff" * 128)}, "RS256", f"{size} 1024"),
        "RSA of 2,047 bits": (rsa_jwk | {"n": base64url((modulus >> 1 | 1).to_bytes(256))}, "RS256", f"{size} 2047"),
        "RSA of 16,384 bits": (rsa_jwk | {"n": base64url(b"\xff" * 2048)}, "RS256", f"{size} 16384"),
        "RSA, exponent 0": (rsa_jwk | {"e": "AA"}, "RS256", malformed),
        "RSA, exponent 1": (rsa_jwk | {"e": "AQ"}, "RS256", malformed),
        "RSA, exponent 2": (rsa_jwk | {"e": "Ag"}, "RS256", malformed),
        "RSA, exponent 65536": (rsa_jwk | {"e": "AQAA"}, "RS256", malformed),
        "RSA, the exponent the modulus": (rsa_jwk | {"e": rsa_jwk["n"]}, "RS256", malformed),
        "RSA, no exponent": ({k: v for k, v in rsa_jwk.items() if k != "e"}, "RS256", f"{no_rsa} 'e'"),
        "RSA, the exponent a number": (rsa_jwk | {"e": 65537}, "RS256", f"{no_rsa} 'e'"),
        "RSA, modulus zero": (rsa_jwk | {"n": "AA"}, "RS256", malformed),
        "RSA, modulus with padding within": (rsa_jwk | {"n": "AA==" + rsa_jwk["n"]}, "RS256", malformed),
        "RSA, modulus of padding": (rsa_jwk | {"n": "===="}, "RS256", "is malformed"),
        "RSA, modulus with a line break": (rsa_jwk | {"n": rsa_jwk["n"] + "\n"}, "RS256", malformed),
        "RSA, modulus with spare bits": (rsa_jwk | {"n": rsa_jwk["n"][:-1] + "B"}, "RS256", malformed),
    }


def test_a_jwk_that_is_no_key_for_the_algorithm_is_refused() -> None:
    jwks = list_unusable_jwks()

    answers = {name: get_refusal(lambda j=jwk, a=alg: key_from_jwk(j, a)) for name, (jwk, alg, _) in jwks.items()}

    assert answers == {name: answer for name, (_, _, answer) in jwks.items()}
    assert [name for name, (jwk, _, _) in jwks.items() if has_part_of(json.dumps(jwk), answers[name])] == []


@table(
    "members",
    [
        {"n": base64url(b"\xff" * 256)},
        {"n": base64url(b"\xff" * 1024)},
        {"e": "AAAX"},  # base64 ends in an X, which is no padding
    ],
)
def test_an_rsa_jwk_of_2048_or_8192_bits_or_with_a_rare_exponent_is_a_key(members: dict[str, object]) -> None:
    assert get_refusal(lambda: key_from_jwk(make_provider_jwk("RS256", **members), "RS256")) == "accepted"


def test_an_ed25519_key_that_is_no_point_of_the_curve_verifies_nothing() -> None:
    key = key_from_jwk(make_provider_jwk("EdDSA", x=base64url((2).to_bytes(32, "little"))), "EdDSA")
    signatures = [signer_for("EdDSA").sign(b"text"), bytes(64), (1).to_bytes(32, "little") + bytes(32)]

    assert [key.verifies(b"text", signature) for signature in signatures] == [False] * 3


def test_the_text_of_a_key_object_never_holds_the_key() -> None:
    key = replace(key_from_secret(SECRET, "HS256"), names={"kid": "key-1"})

    shown = f"{key} {key!r}"

    assert "key-1" in shown
    assert not has_part_of(SECRET, shown)


@pytest.mark.long
def test_the_pure_python_ecdsa_is_never_imported() -> None:
    program = "import sys, voicepass.identity.keys; print('jose' in sys.modules, 'ecdsa' in sys.modules)"

    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert result.stdout.split() == ["True", "False"]


@table("data", [b"", b"f", b"fo", b"foo", bytes(range(256)), b"\xfb\xff\xbf", b"ends in X\0\0\x17"])
def test_base64url_decodes_what_it_encoded(data: bytes) -> None:
    text = base64url_encode(data)

    assert base64url_decode(text) == data
    assert not set(text) & set("+/=")


@table(
    "text",
    ["A", "AAAAA", "AA==", "AAA=", "=", "Zh", "Zm9", "+A", "/A", "A A", "AA\n", "AA\0", "ÄÄ", "\uff21A", "\ud800"],
)
def test_base64url_refuses_every_other_encoding_of_a_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"base64|padding|ASCII"):
        base64url_decode(text)


# Keys and answers ---------------------------------------------------------------------------------------------------


def get_refusal(build: Any) -> str:
    """Return the text of the refusal, or "accepted". Any other exception fails the test."""
    try:
        build()
    except KeyUnusableError as error:
        return str(error)
    return "accepted"


def has_part_of(key: str, message: str) -> bool:
    """Whether `message` holds any 12 characters of `key`."""
    return any(key[start : start + 12] in message for start in range(len(key) - 11))


def build_key(published: str, algorithm: str) -> VerificationKey:
    return (key_from_secret if algorithm in HMAC_ALGORITHMS else key_from_pem)(published, algorithm)


def make_provider_jwk(algorithm: str, **members: object) -> dict[str, Any]:
    """Return the provider's JWK for `algorithm`."""
    return {**make_jwk(get_provider_key(algorithm), **members)}


def get_provider_key(algorithm: str) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey:
    if algorithm == "EdDSA":
        return get_ed25519_key("provider")
    return get_rsa_key("provider") if algorithm.startswith("RS") else get_ec_key("provider", algorithm)


@cache
def make_certificate(algorithm: str) -> Certificate:
    key = get_provider_key(algorithm)
    name = Name([NameAttribute(NameOID.COMMON_NAME, "login.example")])
    today = dt.datetime.now(tz=dt.UTC)
    return (
        CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(random_serial_number())
        .not_valid_before(today)
        .not_valid_after(today + dt.timedelta(days=1))
        .sign(key, None if algorithm == "EdDSA" else hashes.SHA256())
    )


@cache
def make_weak_rsa_pem() -> str:
    return write_pem(rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key())  # noqa: S505


def write_rsa_pem(*, exponent: int) -> str:
    """Return the provider's key with another exponent, built by hand because no library writes such a key."""
    modulus = get_rsa_key("provider").public_key().public_numbers().n
    numbers = encode_der(0x30, *(encode_der(0x02, n.to_bytes(n.bit_length() // 8 + 1)) for n in (modulus, exponent)))
    rsa_encryption = encode_der(0x30, bytes.fromhex("06092a864886f70d0101010500"))
    der = encode_der(0x30, rsa_encryption, encode_der(0x03, b"\0", numbers))
    return f"-----BEGIN PUBLIC KEY-----\n{base64.encodebytes(der).decode()}-----END PUBLIC KEY-----\n"


def encode_der(tag: int, *contents: bytes) -> bytes:
    content = b"".join(contents)
    length = len(content)
    sized = bytes([length]) if length < 0x80 else b"\x82" + length.to_bytes(2)
    return bytes([tag]) + sized + content


def weak_points() -> dict[str, str]:
    """Ed25519 keys of order 1, 2, 4 and 8, and numbers beyond the field: libsodium and RFC 8032 refuse them too."""
    field, order_8 = 2**255 - 19, bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a")
    numbers = {
        "order 1": 1,
        "order 2": field - 1,
        "order 4": 0,
        "order 8": int.from_bytes(order_8, "little"),
        "order 8, negated": field - int.from_bytes(order_8, "little"),
        "order 4, not canonical": field,
        "order 1, not canonical": field + 1,
        "the largest number": 2**255 - 1,
    }
    signed = numbers | {f"{name}, x odd": number | 1 << 255 for name, number in numbers.items()}
    return {name: base64url(number.to_bytes(32, "little")) for name, number in signed.items()}


def write_ed25519_pem(number: int) -> str:
    return write_pem(ed25519.Ed25519PublicKey.from_public_bytes(number.to_bytes(32, "little")))


def write_pem(key: PublicKeyTypes) -> str:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def write_private_pem(key: PrivateKeyTypes, style: PrivateFormat = PrivateFormat.PKCS8) -> str:
    return key.private_bytes(Encoding.PEM, style, NoEncryption()).decode()


def decode_pem(pem: str) -> bytes:
    return base64.b64decode("".join(pem.splitlines()[1:-1]))
