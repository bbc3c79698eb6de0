"""Key sets that an issuer publishes by mistake, that an attacker writes, or that a broken proxy sends.

`make_hostile_sets()` makes the corpus. Each set has the outcome that it causes for an RS256 token that names `key-1`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.identity.hostile_tokens import base64url, get_ec_key, get_rsa_key
from voicepass.errors import KeysUnavailable, Refusal, TokenInvalid

KID: Final = "key-1"
DEPTH: Final = 100_000
MAX_KEYS: Final = 100

Jwk = Mapping[str, object]
Named = Iterator[tuple[str, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostileSet:
    """`expected`: the refusal of a token that names `key-1`, while no key is cached. None: the right key verifies it.

    `has_other_key`: the issuer also publishes another owner's key under that name: both keys verify tokens.
    """

    name: str
    body: bytes
    expected: type[Refusal] | None
    has_other_key: bool = False


def make_hostile_sets() -> list[HostileSet]:
    groups = {None: _usable(), TokenInvalid: _without_the_key(), KeysUnavailable: _useless()}
    return [
        HostileSet(name=name, body=body, expected=expected)
        for expected, bodies in groups.items()
        for name, body in bodies
    ] + [HostileSet(name=name, body=body, expected=None, has_other_key=True) for name, body in _several_that_fit()]


# Keys ---------------------------------------------------------------------------------------------------------------


def make_jwk(
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, **members: object
) -> dict[str, object]:
    """Return the public half of `key` as a JWK with these further members; None removes a member."""
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


def make_set(*keys: object) -> bytes:
    return json.dumps({"keys": keys}).encode()


def make_right(**members: object) -> dict[str, object]:
    """Return the provider's own key with these changes."""
    return make_jwk(get_rsa_key("provider"), **({"kid": KID} | members))


def make_other(**members: object) -> dict[str, object]:
    """Return a valid key of another owner."""
    return make_jwk(get_rsa_key("attacker"), **({"kid": "key-2"} | members))


@cache
def _short_rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505 - the tests need a short key


def _modulus() -> int:
    return get_rsa_key("provider").public_key().public_numbers().n


def _private_exponent() -> str:
    return base64url(get_rsa_key("provider").private_numbers().d.to_bytes(256))


def _with_literal(jwk: Jwk, member: str, literal: str) -> bytes:
    """Return a set of one key with a further member. Its value is `literal`, which may be invalid JSON."""
    return b'{"keys":[' + json.dumps(jwk).encode().removesuffix(b"}") + f',"{member}":{literal}}}]}}'.encode()


# The corpus ---------------------------------------------------------------------------------------------------------


def _usable() -> Named:
    """The right key is found beside other members and in unusual encodings, and no other key verifies tokens."""
    off_curve = make_jwk(get_ec_key("provider", "ES256"), kid="ec", y="AQ")
    neighbours: dict[str, object] = {
        "an EC key": make_jwk(get_ec_key("provider", "ES256"), kid="ec"),
        "an EC key of the same name": make_jwk(get_ec_key("provider", "ES256"), kid=KID),
        "an EC key off its curve": off_curve,
        "an EC key on an unknown curve": off_curve | {"crv": "secp256k1"},
        "an OKP key": {"kty": "OKP", "crv": "Ed25519", "x": base64url(bytes(32)), "kid": "okp"},
        "a secret": {"kty": "oct", "k": base64url(bytes(48)), "kid": "oct"},
        "a secret of the same name for HS256": {"kty": "oct", "k": base64url(bytes(48)), "kid": KID, "alg": "HS256"},
        "an encryption key of the same name": make_other(kid=KID, use="enc"),
        "a key for RS512 of the same name": make_other(kid=KID, alg="RS512"),
        "a private key of the same name": make_right(d=_private_exponent()),
        "a short key of the same name": make_jwk(_short_rsa_key(), kid=KID),
        "a key without a modulus": {"kty": "RSA", "e": "AQAB", "kid": KID},
        "a key without a type": {"kid": KID},
        "a key of an unknown type": {"kty": "ML-DSA", "kid": KID},
        "a key whose type is a list": make_right(kty=["RSA"]),
        "a key whose name is a list": make_right(kid=[KID]),
        "null": None,
        "a number": 7,
        "text": KID,
        "a list": [make_right()],
        "an empty object": {},
        "a whole set": {"keys": [make_right()]},
        "a nameless key": make_other(kid=None),
        "a key of another name": make_other(),
        "a key with an empty name": make_other(kid=""),
        "a key whose name is a surrogate": make_other(kid="\ud800"),
    }
    for name, other in neighbours.items():
        yield f"before the right key: {name}", make_set(other, make_right())
    yield "after the right key: all of these", make_set(make_right(), *neighbours.values())
    yield "beside the right key: another name twice", make_set(make_other(), make_right(), make_right(kid="key-2"))
    yield (
        "100 keys, the right one last",
        make_set(*[make_other(kid=f"k{n}") for n in range(MAX_KEYS - 1)], make_right()),
    )
    yield "one key, without a name", make_set(make_right(kid=None))
    yield "one key, twice", make_set(make_right(), make_right())
    yield "one key, without a name, twice", make_set(make_right(kid=None), make_right(kid=None))
    yield (
        "null for its use, algorithm and operations",
        json.dumps({"keys": [make_right() | {"use": None, "alg": None, "key_ops": None}]}).encode(),
    )
    yield "its numbers padded", make_set(make_right(n=f"{make_right()['n']}==", e="AQAB===="))
    yield (
        "its modulus in standard base64",
        make_set(make_right(n=str(make_right()["n"]).replace("-", "+").replace("_", "/"))),
    )
    yield "its modulus after a zero byte", make_set(make_right(n=base64url(b"\0" + _modulus().to_bytes(256))))
    yield "a byte order mark", b"\xef\xbb\xbf" + make_set(make_right())
    yield "UTF-16", json.dumps({"keys": [make_right()]}).encode("utf-16")
    yield "spaces around it", b" \r\n\t" + make_set(make_right()) + b" " * 10_000
    yield "unknown members", json.dumps({"issuer": "x", "keys": [make_right(x=[{"y": None}])], "z": {}}).encode()
    yield "NaN in an unused member", _with_literal(make_right(), "x", "NaN")
    yield "an infinite number in an unused member", _with_literal(make_right(), "x", "1e999")
    yield "the set twice, the last one right", b'{"keys":[],' + make_set(make_right()).removeprefix(b"{")
    yield "a name twice, the last one right", _with_literal(make_right(kid="key-2"), "kid", f'"{KID}"')
    yield (
        "addresses of other keys",
        make_set(make_right(x5u="https://attacker.example/x", jku="https://attacker.example/j")),
    )
    yield "an invalid certificate", make_set(make_right(x5c=["AAAA"], x5t="AAAA"))


def _without_the_key() -> Named:
    """The set holds usable keys, but none with that name."""
    yield "only another name", make_set(make_other())
    yield "the name in capitals", make_set(make_right(kid=KID.upper()))
    yield "the name with a space", make_set(make_right(kid=f"{KID} "))
    yield "the name with a NUL", make_set(make_right(kid=f"{KID}\0"))
    yield "no name, and another key", make_set(make_right(kid=None), make_other())
    yield "a private key, and another key", make_set(make_right(d=_private_exponent()), make_other())
    yield "a name twice, the last one wrong", _with_literal(make_right(), "kid", '"key-2"')


def _several_that_fit() -> Named:
    """Two keys of the issuer match the token's key name: both verify tokens."""
    yield "two keys: one name, the right one first", make_set(make_right(), make_other(kid=KID))
    yield "two keys: one name, the right one last", make_set(make_other(kid=KID), make_right())
    yield "two keys: no names", make_set(make_right(kid=None), make_other(kid=None))
    yield "the name twice, and another key", make_set(make_right(), make_other(kid=KID), make_other(kid="key-3"))
    yield (
        "the name three times, and another key",
        make_set(make_right(), make_other(kid=KID), make_right(), make_other(kid="key-3")),
    )
    yield "eight keys of one name, the right one last", make_set(*[make_other(kid=KID)] * 7, make_right())


def _useless() -> Named:
    """No key in the document can be used."""
    good = make_set(make_right())
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
        "a list of keys": json.dumps([make_right()]).encode(),
        "an empty object": b"{}",
        "a key by itself": json.dumps(make_right()).encode(),
        "keys in capitals": good.replace(b'"keys"', b'"KEYS"'),
        "a number of 5,000 digits": _with_literal(make_right(), "x", "9" * 5000),
        "lists 100,000 deep": b"[" * DEPTH + b"]" * DEPTH,
        "objects 50,000 deep": b'{"keys":' * (DEPTH // 2) + b"[]" + b"}" * (DEPTH // 2),
        "lists 100,000 deep within a key": _with_literal(make_right(), "x", "[" * DEPTH + "]" * DEPTH),
        "the set twice, the last one empty": good.removesuffix(b"}") + b',"keys":[]}',
    }.items():
        yield f"document: {name}", body
    no_keys: dict[str, object] = {
        "null": None,
        "a number": 7,
        "text": KID,
        "an object by name": {KID: make_right()},
        "a key": make_right(),
        "an empty list": [],
        "things that are no keys": [None, True, 7, 1.5, "key", [], {}, [[]]],
        "a list in a list": [[make_right()]],
        "101 of them": [make_right(), *(make_other(kid=f"k{n}") for n in range(MAX_KEYS))],
        "10,000 that are null": [None] * 10_000,
    }
    for name, keys in no_keys.items():
        yield f"keys: {name}", json.dumps({"keys": keys}).encode()
    for name, jwk in _useless_keys().items():
        yield f"one key: {name}", make_set(jwk)


def _useless_keys() -> dict[str, Jwk]:
    return {
        "its name a number": make_right(kid=1),
        "its name a boolean": make_right(kid=True),
        "its name an object": make_right(kid={KID: KID}),
        "private": make_right(d=_private_exponent()),
        "for RS384": make_right(alg="RS384"),
        "for HS256": make_right(alg="HS256"),
        "for a list of algorithms": make_right(alg=["RS256"]),
        "for encryption": make_right(use="enc"),
        "for a list of uses": make_right(use=["sig"]),
        "for signing only": make_right(key_ops=["sign"]),
        "for no operation": make_right(key_ops=[]),
        "for operations in text": make_right(key_ops="verify"),
        "1,024 bits": make_jwk(_short_rsa_key(), kid=KID),
        "a modulus of 3 million bits": make_right(n=base64url(b"\xff" * 375_000)),
        "a modulus of zero": make_right(n="AA"),
        "an exponent of 1": make_right(e="AQ"),
        "an even exponent": make_right(e="AQAA"),
        "an exponent beyond the modulus": make_right(e=base64url((_modulus() + 2).to_bytes(256))),
        "an exponent of 3 million bits": make_right(e=base64url(b"\xff" * 375_000)),
        "its type in small letters": make_right(kty="rsa"),
        "its type missing": make_right(kty=None),
        "its modulus missing": make_right(n=None),
        "its exponent missing": make_right(e=None),
        "its exponent a number": make_right(e=65537),
        "its modulus padded in front": make_right(n=f"=={make_right()['n']}"),
        "its modulus padded within": make_right(n=f"{make_right()['n']}==AA"),
        "its modulus with a line break": make_right(n=f"{make_right()['n']}\n"),
        "its modulus beyond ASCII": make_right(n="\u00e9" * 342),
        "its modulus a surrogate": make_right(n="\ud800"),
        "only a certificate": make_right(n=None, e=None, x5c=["AAAA"]),
        "an EC key that says RS256": make_jwk(get_ec_key("provider", "ES256"), kid=KID, alg="RS256"),
        "an EC key off its curve": make_jwk(get_ec_key("provider", "ES256"), kid=KID, y="AQ"),
        "a secret that says RS256": {"kty": "oct", "k": base64url(bytes(48)), "kid": KID, "alg": "RS256"},
        "an OKP key": {"kty": "OKP", "crv": "Ed25519", "x": base64url(bytes(32)), "kid": KID},
    }
