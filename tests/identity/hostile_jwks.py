"""Key sets that no issuer should publish: by mistake, in malice, or because of a broken proxy.

`hostile_sets()` is the corpus. Each set says what a service that trusts RS256 must do with a token that names `key-1`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.identity.hostile_tokens import base64url, ec_key_of, rsa_key_of
from voicepass.errors import KeysUnavailable, Refusal, TokenInvalid

KID: Final = "key-1"
DEPTH: Final = 100_000
MAX_KEYS: Final = 100

Jwk = Mapping[str, object]
Named = Iterator[tuple[str, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostileSet:
    """`expected`: the refusal of a token that names `key-1`, while no key is cached. None: the right key serves.

    `serves_stranger`: the issuer publishes the stranger's key under that name too, so it serves as well.
    """

    name: str
    body: bytes
    expected: type[Refusal] | None
    serves_stranger: bool = False


def hostile_sets() -> list[HostileSet]:
    groups = {None: _usable(), TokenInvalid: _without_the_key(), KeysUnavailable: _useless()}
    return [
        HostileSet(name=name, body=body, expected=expected)
        for expected, bodies in groups.items()
        for name, body in bodies
    ] + [HostileSet(name=name, body=body, expected=None, serves_stranger=True) for name, body in _several_that_fit()]


# Keys ---------------------------------------------------------------------------------------------------------------


def jwk_of(
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, **members: object
) -> dict[str, object]:
    """Return the public half of `key` as a JWK with these further members; None takes a member out."""
    if isinstance(key, rsa.RSAPrivateKey):
        modulus = key.public_key().public_numbers().n
        jwk: dict[str, object] = {"kty": "RSA", "n": base64url(modulus.to_bytes(key.key_size // 8)), "e": "AQAB"}
    elif isinstance(key, ed25519.Ed25519PrivateKey):
        jwk = {"kty": "OKP", "crv": "Ed25519", "x": base64url(key.public_key().public_bytes_raw())}
    else:
        point, length = key.public_key().public_numbers(), (key.curve.key_size + 7) // 8
        x, y = base64url(point.x.to_bytes(length)), base64url(point.y.to_bytes(length))
        jwk = {"kty": "EC", "crv": f"P-{key.curve.key_size}", "x": x, "y": y}
    return {member: value for member, value in (jwk | members).items() if value is not None}


def set_of(*keys: object) -> bytes:
    return json.dumps({"keys": keys}).encode()


def right(**members: object) -> dict[str, object]:
    """The provider's own key, changed as told."""
    return jwk_of(rsa_key_of("provider"), **({"kid": KID} | members))


def stranger(**members: object) -> dict[str, object]:
    """A good key of somebody else."""
    return jwk_of(rsa_key_of("attacker"), **({"kid": "key-2"} | members))


@cache
def _short_rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505 - that is the point


def _modulus() -> int:
    return rsa_key_of("provider").public_key().public_numbers().n


def _private_exponent() -> str:
    return base64url(rsa_key_of("provider").private_numbers().d.to_bytes(256))


def _with_literal(jwk: Jwk, member: str, literal: str) -> bytes:
    """A set of one key that has a further member, spelled exactly as `literal`, which need not be JSON."""
    return b'{"keys":[' + json.dumps(jwk).encode().removesuffix(b"}") + f',"{member}":{literal}}}]}}'.encode()


# The corpus ---------------------------------------------------------------------------------------------------------


def _usable() -> Named:
    """The right key is found beside odd members and in odd spellings, and is the only one that serves."""
    off_curve = jwk_of(ec_key_of("provider", "ES256"), kid="ec", y="AQ")
    company: dict[str, object] = {
        "an EC key": jwk_of(ec_key_of("provider", "ES256"), kid="ec"),
        "an EC key of the same name": jwk_of(ec_key_of("provider", "ES256"), kid=KID),
        "an EC key off its curve": off_curve,
        "an EC key on an unknown curve": off_curve | {"crv": "secp256k1"},
        "an OKP key": {"kty": "OKP", "crv": "Ed25519", "x": base64url(bytes(32)), "kid": "okp"},
        "a secret": {"kty": "oct", "k": base64url(bytes(48)), "kid": "oct"},
        "a secret of the same name for HS256": {"kty": "oct", "k": base64url(bytes(48)), "kid": KID, "alg": "HS256"},
        "an encryption key of the same name": stranger(kid=KID, use="enc"),
        "a key for RS512 of the same name": stranger(kid=KID, alg="RS512"),
        "a private key of the same name": right(d=_private_exponent()),
        "a short key of the same name": jwk_of(_short_rsa_key(), kid=KID),
        "a key without a modulus": {"kty": "RSA", "e": "AQAB", "kid": KID},
        "a key without a type": {"kid": KID},
        "a key of an unknown type": {"kty": "ML-DSA", "kid": KID},
        "a key whose type is a list": right(kty=["RSA"]),
        "a key whose name is a list": right(kid=[KID]),
        "null": None,
        "a number": 7,
        "text": KID,
        "a list": [right()],
        "an empty object": {},
        "a whole set": {"keys": [right()]},
        "a nameless key": stranger(kid=None),
        "a key of another name": stranger(),
        "a key with an empty name": stranger(kid=""),
        "a key whose name is a surrogate": stranger(kid="\ud800"),
    }
    for name, other in company.items():
        yield f"before the right key: {name}", set_of(other, right())
    yield "after the right key: all of these", set_of(right(), *company.values())
    yield "beside the right key: another name twice", set_of(stranger(), right(), right(kid="key-2"))
    yield "100 keys, the right one last", set_of(*[stranger(kid=f"k{n}") for n in range(MAX_KEYS - 1)], right())
    yield "one key, without a name", set_of(right(kid=None))
    yield "one key, twice", set_of(right(), right())
    yield "one key, without a name, twice", set_of(right(kid=None), right(kid=None))
    yield (
        "null for its use, algorithm and operations",
        json.dumps({"keys": [right() | {"use": None, "alg": None, "key_ops": None}]}).encode(),
    )
    yield "its numbers padded", set_of(right(n=f"{right()['n']}==", e="AQAB===="))
    yield "its modulus in standard base64", set_of(right(n=str(right()["n"]).replace("-", "+").replace("_", "/")))
    yield "its modulus after a zero byte", set_of(right(n=base64url(b"\0" + _modulus().to_bytes(256))))
    yield "a byte order mark", b"\xef\xbb\xbf" + set_of(right())
    yield "UTF-16", json.dumps({"keys": [right()]}).encode("utf-16")
    yield "spaces around it", b" \r\n\t" + set_of(right()) + b" " * 10_000
    yield "members that nobody knows", json.dumps({"issuer": "x", "keys": [right(x=[{"y": None}])], "z": {}}).encode()
    yield "NaN in a member that nobody reads", _with_literal(right(), "x", "NaN")
    yield "an infinite number in a member that nobody reads", _with_literal(right(), "x", "1e999")
    yield "the set twice, the last one right", b'{"keys":[],' + set_of(right()).removeprefix(b"{")
    yield "a name twice, the last one right", _with_literal(right(kid="key-2"), "kid", f'"{KID}"')
    yield "addresses of other keys", set_of(right(x5u="https://attacker.example/x", jku="https://attacker.example/j"))
    yield "a certificate that is none", set_of(right(x5c=["AAAA"], x5t="AAAA"))


def _without_the_key() -> Named:
    """There are keys, but none may go by that name."""
    yield "only another name", set_of(stranger())
    yield "the name in capitals", set_of(right(kid=KID.upper()))
    yield "the name with a space", set_of(right(kid=f"{KID} "))
    yield "the name with a NUL", set_of(right(kid=f"{KID}\0"))
    yield "no name, and another key", set_of(right(kid=None), stranger())
    yield "a private key, and another key", set_of(right(d=_private_exponent()), stranger())
    yield "a name twice, the last one wrong", _with_literal(right(), "kid", '"key-2"')


def _several_that_fit() -> Named:
    """The token's key name fits two keys of the issuer: both serve."""
    yield "two keys: one name, the right one first", set_of(right(), stranger(kid=KID))
    yield "two keys: one name, the right one last", set_of(stranger(kid=KID), right())
    yield "two keys: no names", set_of(right(kid=None), stranger(kid=None))
    yield "the name twice, and another key", set_of(right(), stranger(kid=KID), stranger(kid="key-3"))
    yield "the name thrice, and another key", set_of(right(), stranger(kid=KID), right(), stranger(kid="key-3"))
    yield "eight keys of one name, the right one last", set_of(*[stranger(kid=KID)] * 7, right())


def _useless() -> Named:
    """Nothing in here can be used at all."""
    good = set_of(right())
    for name, body in {
        "nothing": b"",
        "spaces": b"   ",
        "HTML": b"<!doctype html><title>Sign in</title>",
        "a PEM": b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        "cut off": good[:-2],
        "rubbish after it": good + b"x",
        "two documents": good + good,
        "single quotes": good.replace(b'"', b"'"),
        "bytes that are no text": b'{"keys":["\xff\xfe"]}',
        "bare NaN": b"NaN",
        "null": b"null",
        "true": b"true",
        "a number": b"7",
        "text": json.dumps(good.decode()).encode(),
        "an empty list": b"[]",
        "a list of keys": json.dumps([right()]).encode(),
        "an empty object": b"{}",
        "a key by itself": json.dumps(right()).encode(),
        "keys in capitals": good.replace(b'"keys"', b'"KEYS"'),
        "a number of 5,000 digits": _with_literal(right(), "x", "9" * 5000),
        "lists 100,000 deep": b"[" * DEPTH + b"]" * DEPTH,
        "objects 50,000 deep": b'{"keys":' * (DEPTH // 2) + b"[]" + b"}" * (DEPTH // 2),
        "lists 100,000 deep within a key": _with_literal(right(), "x", "[" * DEPTH + "]" * DEPTH),
        "the set twice, the last one empty": good.removesuffix(b"}") + b',"keys":[]}',
    }.items():
        yield f"document: {name}", body
    no_keys: dict[str, object] = {
        "null": None,
        "a number": 7,
        "text": KID,
        "an object by name": {KID: right()},
        "a key": right(),
        "an empty list": [],
        "things that are no keys": [None, True, 7, 1.5, "key", [], {}, [[]]],
        "a list in a list": [[right()]],
        "101 of them": [right(), *(stranger(kid=f"k{n}") for n in range(MAX_KEYS))],
        "10,000 that are null": [None] * 10_000,
    }
    for name, keys in no_keys.items():
        yield f"keys: {name}", json.dumps({"keys": keys}).encode()
    for name, jwk in _useless_keys().items():
        yield f"one key: {name}", set_of(jwk)


def _useless_keys() -> dict[str, Jwk]:
    return {
        "its name a number": right(kid=1),
        "its name a boolean": right(kid=True),
        "its name an object": right(kid={KID: KID}),
        "private": right(d=_private_exponent()),
        "for RS384": right(alg="RS384"),
        "for HS256": right(alg="HS256"),
        "for a list of algorithms": right(alg=["RS256"]),
        "for encryption": right(use="enc"),
        "for a list of uses": right(use=["sig"]),
        "for signing only": right(key_ops=["sign"]),
        "for no operation": right(key_ops=[]),
        "for operations in text": right(key_ops="verify"),
        "1,024 bits": jwk_of(_short_rsa_key(), kid=KID),
        "a modulus of 3 million bits": right(n=base64url(b"\xff" * 375_000)),
        "a modulus of zero": right(n="AA"),
        "an exponent of 1": right(e="AQ"),
        "an even exponent": right(e="AQAA"),
        "an exponent beyond the modulus": right(e=base64url((_modulus() + 2).to_bytes(256))),
        "an exponent of 3 million bits": right(e=base64url(b"\xff" * 375_000)),
        "its type in small letters": right(kty="rsa"),
        "its type missing": right(kty=None),
        "its modulus missing": right(n=None),
        "its exponent missing": right(e=None),
        "its exponent a number": right(e=65537),
        "its modulus padded in front": right(n=f"=={right()['n']}"),
        "its modulus padded within": right(n=f"{right()['n']}==AA"),
        "its modulus with a line break": right(n=f"{right()['n']}\n"),
        "its modulus beyond ASCII": right(n="\u00e9" * 342),
        "its modulus a surrogate": right(n="\ud800"),
        "only a certificate": right(n=None, e=None, x5c=["AAAA"]),
        "an EC key that says RS256": jwk_of(ec_key_of("provider", "ES256"), kid=KID, alg="RS256"),
        "an EC key off its curve": jwk_of(ec_key_of("provider", "ES256"), kid=KID, y="AQ"),
        "a secret that says RS256": {"kty": "oct", "k": base64url(bytes(48)), "kid": KID, "alg": "RS256"},
        "an OKP key": {"kty": "OKP", "crv": "Ed25519", "x": base64url(bytes(32)), "kid": KID},
    }
