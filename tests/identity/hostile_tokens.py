"""Tokens that voicepass must refuse, and valid ones, for any algorithm, issuer and clock.

`make_hostile_tokens(mint)` and `make_valid_tokens(mint)` are the corpus. Every hostile token has one fault only. It has
a valid signature if an attacker could make one, so that only the check of that fault can refuse it.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from voicepass.errors import HeadersTooLarge, Refusal, TokenExpired, TokenInvalid

SECRET: Final = "a-secret-of-the-tests-that-is-48-characters-long"
DEPTH: Final = 1500
MAX_CHARACTERS: Final = 8192

Sign = Callable[[bytes], bytes]
Named = Iterator[tuple[str, str]]
Owner = Literal["provider", "attacker"]

_HASHES: Final = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}
_CURVES: Final = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
_P256_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """A key owner that signs. A service verifies with `published`: the secret for HS*, else a PEM."""

    algorithm: str
    published: str
    sign: Sign


@dataclass(frozen=True, slots=True, kw_only=True)
class Hostile:
    """`expected` is the only correct refusal of the token."""

    name: str
    token: str
    expected: type[Refusal]

    @property
    def fits_a_header(self) -> bool:
        """Whether an HTTP header can hold the token; tests pass the others to the verifier directly."""
        return self.token.isascii() and self.token.isprintable()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mint:
    """Makes tokens for one service. `kid` is the name that the service has for the key, if it has one."""

    signer: Signer
    token_issuer: str
    audience: str
    now: float
    leeway_seconds: int = 60
    kid: str | None = None

    def header(self, **changes: object) -> dict[str, object]:
        return {"alg": self.signer.algorithm, "typ": "JWT"} | changes

    def claims(self, **changes: object) -> dict[str, object]:
        good = {"iss": self.token_issuer, "aud": self.audience, "sub": "u-1", "exp": int(self.now) + 600}
        return good | changes

    def token(
        self,
        *,
        header: Mapping[str, object] | bytes | None = None,
        claims: Mapping[str, object] | bytes | None = None,
        sign: Sign | None = None,
    ) -> str:
        """Return a token of these parts (mappings become JSON, bytes stay), signed by the signer or with `sign`."""
        return self.signed(
            _segment(self.header() if header is None else header),
            _segment(self.claims() if claims is None else claims),
            sign=sign,
        )

    def signed(self, header_segment: str, payload_segment: str, *, sign: Sign | None = None) -> str:
        """Sign two segments unchanged, whatever their encoding."""
        signing_input = f"{header_segment}.{payload_segment}"
        return f"{signing_input}.{base64url((sign or self.signer.sign)(signing_input.encode('utf-8')))}"


def make_hostile_tokens(mint: Mint) -> list[Hostile]:
    """Return every hostile token for the service that `mint` is made for."""
    refused = {TokenInvalid: _invalid(mint), TokenExpired: _expired(mint), HeadersTooLarge: _too_long(mint)}
    return [
        Hostile(name=name, token=token, expected=expected)
        for expected, tokens in refused.items()
        for name, token in tokens
    ]


def _invalid(mint: Mint) -> Named:
    yield from _framing(mint)
    yield from _spelling(mint)
    yield from _spelling_around(mint)
    yield from _algorithms(mint)
    yield from _confused_keys(mint)
    yield from _extensions(mint)
    yield from _types_and_kids(mint)
    yield from _keys_in_headers(mint)
    yield from _strict_json(mint)
    yield from _instants(mint)
    yield from _issuers(mint)
    yield from _audiences(mint)
    yield from _subjects(mint)
    yield from _signatures(mint)
    yield from _signatures_of_the_kind(mint)


# Signers ------------------------------------------------------------------------------------------------------------


def signer_for(algorithm: str, *, owner: Owner = "provider", secret: str = SECRET) -> Signer:
    """Return a signer for any of the ten algorithms. Each key pair is made once and shared."""
    if algorithm.startswith("HS"):
        key = secret if owner == "provider" else "attacker's " + secret
        return Signer(algorithm=algorithm, published=key, sign=_mac(key.encode("utf-8", "surrogateescape"), algorithm))
    if algorithm.startswith("RS"):
        rsa_key = get_rsa_key(owner)
        return Signer(algorithm=algorithm, published=_pem(rsa_key), sign=_rsa(rsa_key, algorithm))
    if algorithm == "EdDSA":
        ed_key = get_ed25519_key(owner)
        return Signer(algorithm=algorithm, published=_pem(ed_key), sign=ed_key.sign)
    ec_key = get_ec_key(owner, algorithm)
    return Signer(algorithm=algorithm, published=_pem(ec_key), sign=ecdsa(ec_key, algorithm))


@cache
def get_rsa_key(owner: Owner) -> rsa.RSAPrivateKey:
    del owner  # only part of the cache's key: each owner has one RSA key
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@cache
def get_ec_key(owner: Owner, algorithm: str) -> ec.EllipticCurvePrivateKey:
    del owner
    return ec.generate_private_key(_CURVES[algorithm])


@cache
def get_ed25519_key(owner: Owner) -> ed25519.Ed25519PrivateKey:
    del owner
    return ed25519.Ed25519PrivateKey.generate()


def _pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")


def _mac(key: bytes, algorithm: str) -> Sign:
    return lambda signing_input: hmac.digest(key, signing_input, "sha" + algorithm[2:])


def _rsa(key: rsa.RSAPrivateKey, algorithm: str) -> Sign:
    return lambda signing_input: key.sign(signing_input, padding.PKCS1v15(), _HASHES[algorithm[2:]])


def ecdsa(key: ec.EllipticCurvePrivateKey, algorithm: str) -> Sign:
    length = (key.curve.key_size + 7) // 8

    def sign(signing_input: bytes) -> bytes:
        r, s = decode_dss_signature(key.sign(signing_input, ec.ECDSA(_HASHES[algorithm[2:]])))
        return r.to_bytes(length) + s.to_bytes(length)

    return sign


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _bytes_of(segment: str) -> bytes:
    return base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("utf-8")


def _segment(part: Mapping[str, object] | bytes) -> str:
    return base64url(part if isinstance(part, bytes) else _json(part))


def _with_literal(members: Mapping[str, object], name: str, literal: str) -> bytes:
    """Return `members` as JSON. The value of `name` is `literal`, which may be invalid JSON."""
    others = _json({member: value for member, value in members.items() if member != name})
    return others.removesuffix(b"}") + f',"{name}":{literal}}}'.encode()


def _without(members: Mapping[str, object], name: str) -> dict[str, object]:
    return {member: value for member, value in members.items() if member != name}


# Form ---------------------------------------------------------------------------------------------------------------


def _framing(mint: Mint) -> Named:
    good = mint.token()
    header, payload, signature = good.split(".")
    for name, segments in {
        "one segment": [header],
        "no signature segment": [header, payload],
        "no header segment": [payload, signature],
        "empty header": ["", payload, signature],
        "empty payload": [header, "", signature],
        "empty signature": [header, payload, ""],
        "only dots": ["", "", ""],
        "only a dot": ["", ""],
        "only a signature": ["", "", signature],
        "leading dot": ["", header, payload, signature],
        "trailing dot": [header, payload, signature, ""],
        "a fourth segment": [header, payload, signature, "foo"],
        "the signature twice": [header, payload, signature, signature],
        "five segments, like a JWE": [header, payload, payload, payload, signature],
        "doubled dot": [header, "", payload, signature],
        "segments in another order": [payload, header, signature],
        "two tokens in one": [header, payload, signature, header, payload, signature],
        "four thousand segments": ["a"] * 4000,
    }.items():
        yield f"framing: {name}", ".".join(segments)
    yield "framing: an empty payload, signed", mint.token(claims=b"")
    yield "framing: an empty header, signed", mint.token(header=b"")
    flattened = {"protected": header, "payload": payload, "signature": signature}
    general = {"payload": payload, "signatures": [{"protected": header, "signature": signature}]}
    for name, text in {
        "flattened JSON serialization": json.dumps(flattened, separators=(",", ":")),
        "general JSON serialization": json.dumps(general, separators=(",", ":")),
        "JSON array of segments": json.dumps([header, payload, signature], separators=(",", ":")),
        "JSON serialization with dots": json.dumps(flattened | {"x": ".."}, separators=(",", ":")),
        "quoted": f'"{good}"',
        "in angle brackets": f"<{good}>",
        "scheme twice": f"Bearer {good}",
        "as a parameter": f"token={good}",
        "a comma after it": f"{good},",
        "two tokens in a list": f"{good},{good}",
        "two tokens after each other": f"{good} {good}",
        "percent-encoded dots": good.replace(".", "%2E"),
        "fullwidth dots": good.replace(".", "\uff0e"),
        "base64 of a token": base64url(good.encode()),
        "reversed": good[::-1],
        "the names of the segments": "header.payload.signature",
        "question marks": "?.?.?",
        "a token within the token": mint.token(claims=good.encode()),
    }.items():
        yield f"framing: {name}", text
    encrypted = {"alg": "dir", "enc": "A256GCM"}
    yield "framing: a JWE", ".".join((_segment(encrypted), "", base64url(b"i" * 12), payload, base64url(b"t" * 16)))


def _spelling(mint: Mint) -> Named:
    """The same bytes in another encoding. The signature covers header and payload as they are encoded."""
    # Spaces pad the JSON until both segments end with unused bits. The alphabets differ in the characters of `x`.
    header_bytes = _json(mint.header(x="~~~???>>>")).ljust(55)
    payload_bytes = _json(mint.claims(x="~~~???>>>"))
    payload_bytes = payload_bytes.ljust(len(payload_bytes) + (1 - len(payload_bytes)) % 3)
    header, payload = _segment(header_bytes), _segment(payload_bytes)
    signature = mint.signed(header, payload).rpartition(".")[2]

    def respell(place: int, change: Callable[[str], str]) -> str:
        segments = [header, payload, signature]
        segments[place] = change(segments[place])
        changed = mint.signed(segments[0], segments[1])
        return changed if place < 2 else ".".join(segments)

    middles = {
        "a space": " ",
        "a tab": "\t",
        "a line feed": "\n",
        "a carriage return": "\r",
        "a NUL": "\0",
        "a no-break space": "\u00a0",
        "a zero-width space": "\u200b",
        "a byte order mark": "\ufeff",
        "an umlaut": "ä",
        "a percent sign": "%",
        "an asterisk": "*",
        "padding": "=",
        "a cyrillic letter": "\u0430",
    }
    for place, part in enumerate(("header", "payload", "signature")):
        for name, text in middles.items():
            yield f"spelling: {name} within the {part}", respell(place, lambda s, t=text: s[:8] + t + s[8:])  # type: ignore[misc]
        for name, change in {
            "padded": lambda s: s + "=" * (-len(s) % 4 or 4),
            "padded too much": lambda s: s + "====",
            "padded in front": lambda s: "=" + s,
            "length of 4n + 1": lambda s: s + "A" * ((1 - len(s)) % 4),
            "first digit fullwidth": lambda s: chr(ord(s[0]) + 0xFEE0) + s[1:],
            "a line feed at its end": lambda s: s + "\n",
            "a NUL at its end": lambda s: s + "\0",
        }.items():
            yield f"spelling: {part}, {name}", respell(place, change)
    for place, part in enumerate(("header", "payload")):
        yield f"spelling: {part} in the other alphabet", respell(place, lambda s: s.translate(_OTHER_ALPHABET))
        yield f"spelling: {part} in hexadecimal", respell(place, lambda s: _bytes_of(s).hex())
        yield f"spelling: {part} as plain text", respell(place, lambda s: _bytes_of(s).decode())
        for spare in _list_noncanonical((header, payload)[place]):
            yield f"spelling: {part} with spare bits set ({spare[-1]})", respell(place, lambda _, s=spare: s)  # type: ignore[misc]
    for spare in _list_noncanonical(signature):
        yield f"spelling: signature with spare bits set ({spare[-1]})", f"{header}.{payload}.{spare}"


def _spelling_around(mint: Mint) -> Named:
    for name, space in {
        "tab": "\t",
        "line feed": "\n",
        "NUL": "\0",
        "no-break space": "\u00a0",
        "BOM": "\ufeff",
    }.items():
        yield f"spelling: {name} before the token", space + mint.token()
        yield f"spelling: {name} after the token", mint.token() + space
    # The alphabets differ in `-` and `_` only. Nearly every signature has one of them, but perhaps not the first.
    tokens = (mint.token(claims=mint.claims(jti=str(number))) for number in range(1000))
    parts = (token.rpartition(".") for token in tokens)
    signing_input, _, signature = next(part for part in parts if part[2] != part[2].translate(_OTHER_ALPHABET))
    yield "spelling: signature in the other alphabet", f"{signing_input}.{signature.translate(_OTHER_ALPHABET)}"


_OTHER_ALPHABET: Final = str.maketrans("-_", "+/")
_DIGITS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def _list_noncanonical(segment: str) -> list[str]:
    """Return all other encodings of the bytes of `segment`: they set unused bits of its last character."""
    spare = {0: 1, 2: 16, 3: 4}[len(segment) % 4]
    last = _DIGITS.index(segment[-1])
    return [segment[:-1] + _DIGITS[last + extra] for extra in range(1, spare)]


# Algorithm and key --------------------------------------------------------------------------------------------------


def _algorithms(mint: Mint) -> Named:
    configured = mint.signer.algorithm
    for none in ("none", "None", "NONE", "nOnE", "none ", "", "null", "no\u0000ne", "\uff4eone"):
        yield f"alg: {none!r} without a signature", mint.token(header=mint.header(alg=none), sign=lambda _: b"")
        yield f"alg: {none!r} with a good signature", mint.token(header=mint.header(alg=none))
    others = ["HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256"]
    others += [
        "EdDSA",
        "Ed25519",
        "Ed448",
        "ES256K",
        "RSA1_5",
        "dir",
        "A256KW",
        "HS1",
        configured.lower(),
        configured.title(),
        configured + " ",
    ]
    others += [" " + configured, configured + "\0", configured + "\n", configured[:-1], configured + "6", "*", "any"]
    others += [configured.replace("S", "\uff33"), f"{configured},none", "SHA256", "HMAC", "../" + configured]
    for other in others:
        if other != configured:
            yield f"alg: {other!r}", mint.token(header=mint.header(alg=other))
    for value in (None, True, False, 0, 256, 1.5, [], [configured], ["none", configured], {}, {"alg": configured}):
        yield f"alg: {value!r}", mint.token(header=mint.header(alg=value))
    yield "alg: missing", mint.token(header={"typ": "JWT"})
    yield "alg: missing, without a signature", mint.token(header={"typ": "JWT"}, sign=lambda _: b"")
    yield "alg: called ALG", mint.token(header={"ALG": configured})
    yield "alg: in the payload", mint.token(header={"typ": "JWT"}, claims=mint.claims(alg=configured))


def _confused_keys(mint: Mint) -> Named:
    """Signatures with the keys that an attacker has: published keys, guesses and own keys."""
    configured = mint.signer.algorithm
    published = mint.signer.published.encode("utf-8", "surrogateescape")
    for name, key in _symmetric_guesses(mint.signer).items():
        for algorithm in ("HS256", "HS384", "HS512"):
            mac = _mac(key, algorithm)
            if algorithm != configured:
                yield f"key: {name}, as {algorithm}", mint.token(header=mint.header(alg=algorithm), sign=mac)
            if key != published:
                yield f"key: {name}, {algorithm} under alg {configured}", mint.token(sign=mac)
    for algorithm in ("HS256", "HS512", "RS256", "RS512", "ES256", "ES384", "EdDSA"):
        attacker = signer_for(algorithm, owner="attacker")
        if algorithm != configured:
            yield f"key: attacker's, {algorithm}", mint.token(header=mint.header(alg=algorithm), sign=attacker.sign)
        yield f"key: attacker's, {algorithm} under alg {configured}", mint.token(sign=attacker.sign)


def _symmetric_guesses(signer: Signer) -> dict[str, bytes]:
    text = signer.published
    if signer.algorithm.startswith("HS"):
        return {
            "empty": b"",
            "a guess": b"secret",
            "the secret's beginning": text[:32].encode(),
            "the secret and a line feed": f"{text}\n".encode(),
            "the secret in capitals": text.upper().encode(),
            "the secret in base64": base64.b64encode(text.encode()),
            "the secret in hexadecimal": text.encode().hex().encode(),
            "the secret as JSON": json.dumps(text).encode(),
            "the secret's hash": hashlib.sha256(text.encode()).digest(),
        }
    der = base64.b64decode("".join(text.splitlines()[1:-1]))
    return {
        "empty": b"",
        "a guess": b"secret",
        "the PEM": text.encode(),
        "the PEM without its last line break": text.strip().encode(),
        "the PEM with CRLF": text.replace("\n", "\r\n").encode(),
        "the PEM in one line": text.replace("\n", "").encode(),
        "the PEM with \\n": text.replace("\n", "\\n").encode(),
        "the DER": der,
        "the DER in base64": base64.b64encode(der),
    }


def _extensions(mint: Mint) -> Named:
    extensions: dict[str, Iterable[object]] = {
        "crit": ([], ["exp"], ["b64"], ["alg"], ["x-unknown"], "exp", None, True, {}, 0),
        "b64": (False, True, None, "false"),
        "zip": ("DEF", "GZ", "", None),
        "cty": ("JWT", "json", "", None),
    }
    for name, values in extensions.items():
        for value in values:
            yield f"{name}: {value!r}", mint.token(header=mint.header(**{name: value}))
    yield "crit: b64, which is false", mint.token(header=mint.header(crit=["b64"], b64=False))
    yield "crit: exp, which is there", mint.token(header=mint.header(crit=["exp"], exp=int(mint.now) + 600))
    payload = json.dumps(mint.claims(), separators=(",", ":")).replace(".", "\\u002e")
    yield "b64: false, the payload in plain text", mint.signed(_segment(mint.header(crit=["b64"], b64=False)), payload)
    yield "enc: an encrypted token's header", mint.token(header=mint.header(enc="A256GCM", zip="DEF"))


def _types_and_kids(mint: Mint) -> Named:
    for typ in (
        *("", "JWE", "JOSE", "JOSE+JSON", "JWT ", " JWT", "JW", "JWTT", "JWT,at+jwt", "at+jws", "at+jwt;v=1"),
        *("application/json", "text/plain", "secevent+jwt", "logout+jwt", "dpop+jwt", "token-introspection+jwt"),
        *("kb+jwt", "oauth-authz-req+jwt", "\u017fWT", "\uff2aWT", None, True, 0, 1.5, [], ["JWT"], {}, {"typ": "JWT"}),
    ):
        yield f"typ: {typ!r}", mint.token(header=mint.header(typ=typ))
    for kid in (0, 1, 1.5, True, False, [], ["k"], {}, {"kid": "k"}):
        yield f"kid: {kid!r}", mint.token(header=mint.header(kid=kid))
    if mint.kid is not None:
        others = ["", "other", mint.kid.upper(), mint.kid + " ", mint.kid[:-1], mint.kid + "\0", f"../{mint.kid}"]
        others += ["/dev/null", "' OR '1'='1", "https://attacker.example/key"]
        for other in others:
            yield f"kid: names another key, {other!r}", mint.token(header=mint.header(kid=other))


def _keys_in_headers(mint: Mint) -> Named:
    """Tokens that bring or name the key to verify them with."""
    algorithm = mint.signer.algorithm
    attacker = signer_for(algorithm, owner="attacker")
    der = b"" if algorithm.startswith("HS") else base64.b64decode("".join(attacker.published.splitlines()[1:-1]))
    for name, value in {
        "jwk": _jwk(attacker),
        "jku": "https://attacker.example/jwks.json",
        "x5u": "https://attacker.example/chain.pem",
        "x5c": [base64.b64encode(der).decode()],
        "x5t": base64url(hashlib.sha1(der).digest()),  # noqa: S324 - RFC 7515 says SHA-1
        "x5t#S256": base64url(hashlib.sha256(der).digest()),
        "iss": "https://attacker.example",
        "key": attacker.published,
        "p2c": 2**40,
    }.items():
        yield f"brings its key: {name}", mint.token(header=mint.header(**{name: value}), sign=attacker.sign)
    everything = mint.header(jwk=_jwk(attacker), jku="https://attacker.example", x5u="https://attacker.example")
    yield "brings its key: jwk, jku and x5u", mint.token(header=everything, sign=attacker.sign)
    yield "brings its key: as the payload", mint.token(claims=mint.claims(jwk=_jwk(attacker)), sign=attacker.sign)
    yield "brings its key: an attacker's issuer", mint.token(claims=mint.claims(iss="https://attacker.example"))


def _jwk(signer: Signer) -> dict[str, object]:
    algorithm = signer.algorithm
    if algorithm.startswith("HS"):
        return {"kty": "oct", "alg": algorithm, "k": base64url(signer.published.encode())}
    if algorithm.startswith("RS"):
        numbers = get_rsa_key("attacker").public_key().public_numbers()
        return {"kty": "RSA", "alg": algorithm, "n": base64url(numbers.n.to_bytes(256)), "e": "AQAB"}
    if algorithm == "EdDSA":
        x = base64url(get_ed25519_key("attacker").public_key().public_bytes_raw())
        return {"kty": "OKP", "alg": algorithm, "crv": "Ed25519", "x": x}
    key = get_ec_key("attacker", algorithm)
    point = key.public_key().public_numbers()
    length = (key.curve.key_size + 7) // 8
    x, y = base64url(point.x.to_bytes(length)), base64url(point.y.to_bytes(length))
    return {"kty": "EC", "alg": algorithm, "crv": f"P-{key.curve.key_size}", "x": x, "y": y}


# JSON ---------------------------------------------------------------------------------------------------------------


def _strict_json(mint: Mint) -> Named:
    parts: dict[str, tuple[dict[str, object], Callable[[bytes], str]]] = {
        "header": (mint.header(), lambda data: mint.token(header=data)),
        "payload": (mint.claims(), lambda data: mint.token(claims=data)),
    }
    for part, (members, token) in parts.items():
        for name, data in _bad_json(members).items():
            yield f"{part}: {name}", token(data)
    for name, data in _duplicates(mint).items():
        yield f"duplicate: {name}", mint.token(claims=data)
    alg = mint.signer.algorithm
    for name, text in {
        "alg, the same twice": f'{{"alg":"{alg}","alg":"{alg}"}}',
        "alg, none first": f'{{"alg":"none","alg":"{alg}"}}',
        "alg, none last": f'{{"alg":"{alg}","alg":"none"}}',
        "alg, the second escaped": f'{{"alg":"{alg}","\\u0061lg":"none"}}',
        "kid": f'{{"alg":"{alg}","kid":"a","kid":"b"}}',
        "typ": f'{{"alg":"{alg}","typ":"JWT","typ":"at+jwt"}}',
        "a member of a member": f'{{"alg":"{alg}","x":{{"y":1,"y":1}}}}',
    }.items():
        yield f"duplicate: {name} (header)", mint.token(header=text.encode())


def _bad_json(members: Mapping[str, object]) -> dict[str, bytes]:
    good = _json(members)
    text = good.decode()
    return {
        "an array": _json([dict(members)]),
        "an array of pairs": _json(list(members.items())),
        "null": b"null",
        "true": b"true",
        "a number": b"1",
        "a string": b'"text"',
        "JSON within a string": _json(text),
        "no JSON": b"foo",
        "an empty object": b"{}",
        "blank": b" ",
        "cut short": good[:-1],
        "a second closing brace": good + b"}",
        "two objects": good + good,
        "two objects on two lines": good + b"\n" + good,
        "a trailing comma": good[:-1] + b",}",
        "single quotes": text.replace('"', "'").encode(),
        "a name without quotes": b"{x:1," + good[1:],
        "a comment": good + b"//",
        "a comment within": b"{/**/" + good[1:],
        "a byte order mark": b"\xef\xbb\xbf" + good,
        "UTF-16": text.encode("utf-16"),
        "UTF-16 LE": text.encode("utf-16-le"),
        "UTF-16 BE": text.encode("utf-16-be"),
        "UTF-32": text.encode("utf-32"),
        "a NUL before it": b"\0" + good,
        "a NUL after it": good + b"\0",
        "a no-break space after it": good + b"\xc2\xa0",
        "a form feed after it": good + b"\x0c",
        "a byte that is not UTF-8": _with_literal(members, "x", '"@"').replace(b"@", b"\xff"),
        "latin-1": _with_literal(members, "x", '"@"').replace(b"@", b"\xe9"),
        "an overlong NUL": _with_literal(members, "x", '"@"').replace(b"@", b"\xc0\x80"),
        "a surrogate in UTF-8": _with_literal(members, "x", '"@"').replace(b"@", b"\xed\xa0\x80"),
        "a raw NUL within a string": _with_literal(members, "x", '"\0"'),
        "a raw line feed within a string": _with_literal(members, "x", '"\n"'),
        "a bad escape": _with_literal(members, "x", r'"\x41"'),
        "half an escape": _with_literal(members, "x", r'"\u00"'),
        "NaN": _with_literal(members, "x", "NaN"),
        "Infinity": _with_literal(members, "x", "Infinity"),
        "-Infinity": _with_literal(members, "x", "-Infinity"),
        "nan": _with_literal(members, "x", "nan"),
        "1e999": _with_literal(members, "x", "1e999"),
        "-1e999": _with_literal(members, "x", "-1e999"),
        "1e999 deep inside": _with_literal(members, "x", '[{"y":[1e999]}]'),
        "an integer of 21 digits": _with_literal(members, "x", "1" * 21),
        "an integer of 5,000 digits": _with_literal(members, "x", "1" * 5000),
        "a leading zero": _with_literal(members, "x", "01"),
        "a plus sign": _with_literal(members, "x", "+1"),
        "a hexadecimal number": _with_literal(members, "x", "0x1"),
        "a number that ends with a dot": _with_literal(members, "x", "1."),
        "a number that begins with a dot": _with_literal(members, "x", ".1"),
        "an underscore in a number": _with_literal(members, "x", "1_000"),
        "Arabic digits": _with_literal(members, "x", "\u0661\u0662"),
        "undefined": _with_literal(members, "x", "undefined"),
        "brackets, 1,500 deep": b"[" * DEPTH,
        "brackets, 1,500 deep and closed": b"[" * DEPTH + b"]" * DEPTH,
        "brackets, 5,000 deep": b"[" * 5000,
        "objects, 1,100 deep": b'{"":' * 1100,
        "a member with brackets 1,500 deep": _with_literal(members, "x", "[" * DEPTH),
    }


def _duplicates(mint: Mint) -> dict[str, bytes]:
    good = _json(mint.claims())[:-1]
    later = int(mint.now) + 6000
    return {
        "exp": good + f',"exp":{later}}}'.encode(),
        "exp, escaped": good + f',"\\u0065xp":{later}}}'.encode(),
        "sub": good + b',"sub":"admin"}',
        "sub, the same": good + b',"sub":"u-1"}',
        "sub, three times": good + b',"sub":"u-1","sub":"u-1"}',
        "iss": good + b',"iss":"https://attacker.example"}',
        "aud": good + b',"aud":"other"}',
        "an unknown claim": good + b',"x":1,"x":2}',
        "a member of a claim": good + b',"x":{"y":1,"y":2}}',
        "a member deep in a claim": good + b',"x":[[{"y":{"z":1,"z":1}}]]}',
    }


# Claims -------------------------------------------------------------------------------------------------------------


def _instants(mint: Mint) -> Named:
    later = int(mint.now) + 600
    arabic = str(later).translate(str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩"))
    not_numbers: Iterable[object] = (
        *(None, True, False, "", "soon", str(later), f" {later} ", f"+{later}", f"{later}.0", "9_999_999_999", "1e10"),
        *("0x2540BE3FF", arabic, "2999-01-01T00:00:00Z", "Infinity", [], [later], {}, {"$gt": 0}, {"exp": later}),
    )
    for claim in ("exp", "nbf", "iat"):
        for value in not_numbers:
            shown = "Arabic digits" if value is arabic else repr(value).replace(str(later), "later")
            yield f"{claim}: {shown}", mint.token(claims=mint.claims(**{claim: value}))
        for literal in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 21, "-" + "9" * 21, "0" + str(later)):
            name = f"{claim}: {literal.replace(str(later), 'later')}, a bare word"
            yield name, mint.token(claims=_with_literal(mint.claims(), claim, literal))
    yield "exp: missing", mint.token(claims=_without(mint.claims(), "exp"))
    yield "exp: in the header", mint.token(header=mint.header(exp=later), claims=_without(mint.claims(), "exp"))
    yield "exp: called EXP", mint.token(claims=_without(mint.claims(EXP=later), "exp"))
    yield "exp: nested", mint.token(claims=_without(mint.claims(x={"exp": later}), "exp"))
    future = int(mint.now) + mint.leeway_seconds
    for claim in ("nbf", "iat"):
        for name, value in {
            "a minute too early": future + 60,
            "an hour too early": future + 3600,
            "in milliseconds": int(mint.now) * 1000,
            "a fraction too early": future + 45.5,  # long enough for a real clock on a slow machine
            "the largest float": 1.7e308,
            "twenty digits": 10**19,
        }.items():
            yield f"{claim}: {name}", mint.token(claims=mint.claims(**{claim: value}))


def _expired(mint: Mint) -> Named:
    end = int(mint.now) - mint.leeway_seconds
    for name, value in {
        "now, after all leeway": end,
        "a second ago": end - 1,
        "half a second ago": end - 0.5,
        "an hour ago": end - 3600,
        "the epoch": 0,
        "minus zero": -0.0,
        "before the epoch": -1,
        "in hours": int(mint.now) // 3600,
        "a small fraction": 1e-300,
        "the smallest float": -1.7e308,
        "minus twenty digits": -(10**18),
    }.items():
        yield f"exp: {name}", mint.token(claims=mint.claims(exp=value))
    yield "exp: past, nbf and iat too", mint.token(claims=mint.claims(exp=end - 60, nbf=end - 120, iat=end - 120))


def _lookalikes(text: str) -> dict[str, str]:
    """Texts that a careless comparison treats as equal to `text`."""
    lookalikes = {
        "empty": "",
        "a prefix": text[:-1],
        "a suffix": text[1:],
        "extended": text + "x",
        "with a slash": text + "/",
        "with a dot": text + ".",
        "in capitals": text.upper(),
        "in title case": text.title(),
        "a space before": " " + text,
        "a space after": text + " ",
        "a line feed after": text + "\n",
        "a NUL after": text + "\0",
        "a NUL and more after": text + "\0.attacker.example",
        "a zero-width space": text[:3] + "\u200b" + text[3:],
        "a soft hyphen": text[:3] + "\u00ad" + text[3:],
        "a lone surrogate after": text + "\ud800",
        "cyrillic": text.replace("e", "\u0435").replace("o", "\u043e").replace("p", "\u0440"),
        "fullwidth": "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
        "in quotes": f'"{text}"',
        "a list in text": json.dumps([text]),
        "of a subdomain": text + ".attacker.example",
        "any": "*",
        "a pattern": ".*",
        "twice": text + text,
        "with a comma": text + ",other",
        "with another": text + " other",
    }
    return {name: lookalike for name, lookalike in lookalikes.items() if lookalike != text}


def _issuers(mint: Mint) -> Named:
    issuer = mint.token_issuer
    yield "iss: missing", mint.token(claims=_without(mint.claims(), "iss"))
    yield "iss: in the header", mint.token(header=mint.header(iss=issuer), claims=_without(mint.claims(), "iss"))
    not_texts: Iterable[object] = (None, True, 0, 1.5, [], {})
    for value in not_texts:
        yield f"iss: {value!r}", mint.token(claims=mint.claims(iss=value))
    yield "iss: a list of it", mint.token(claims=mint.claims(iss=[issuer]))
    yield "iss: an object of it", mint.token(claims=mint.claims(iss={"iss": issuer}))
    for name, text in _lookalikes(issuer).items():
        yield f"iss: {name}", mint.token(claims=mint.claims(iss=text))
    yield "iss: without https", mint.token(claims=mint.claims(iss="http" + issuer.removeprefix("https")))
    yield "iss: as user info", mint.token(claims=mint.claims(iss=issuer + "@attacker.example"))


def _audiences(mint: Mint) -> Named:
    audience = mint.audience
    yield "aud: missing", mint.token(claims=_without(mint.claims(), "aud"))
    yield "aud: in the header", mint.token(header=mint.header(aud=audience), claims=_without(mint.claims(), "aud"))
    others: dict[str, object] = {
        "null": None,
        "true": True,
        "a number": 0,
        "an object": {},
        "an object of it": {audience: True},
        "an empty list": [],
        "a list of nothing": [""],
        "a list of null": [None],
        "a list of others": ["other", "another"],
        "a list within a list": [[audience]],
        "a list with a number": [audience, 1],
        "a list with null": [audience, None],
        "a list with true": [True, audience],
        "a list with a list": [audience, [audience]],
        "a list with an object": [audience, {}],
        "its letters": list(audience),
        "another": "other",
    }
    for name, value in others.items():
        yield f"aud: {name}", mint.token(claims=mint.claims(aud=value))
    for name, text in _lookalikes(audience).items():
        yield f"aud: {name}", mint.token(claims=mint.claims(aud=text))
        yield f"aud: a list, {name}", mint.token(claims=mint.claims(aud=["other", text]))


def _subjects(mint: Mint) -> Named:
    yield "sub: missing", mint.token(claims=_without(mint.claims(), "sub"))
    yield "sub: in the header", mint.token(header=mint.header(sub="u-1"), claims=_without(mint.claims(), "sub"))
    others: dict[str, object] = {
        "null": None,
        "true": True,
        "false": False,
        "zero and an invisible character": "0\u200b",
        "a fraction": 7.5,
        "a whole number as a fraction": 7.0,
        "an empty list": [],
        "a list": ["u-1"],
        "a list of a number": [7],
        "an object": {"id": "u-1"},
        "empty": "",
        "256 characters": "u" * 256,
        "4,000 characters": "u" * 4000,
        "a high surrogate": "\ud800",
        "a low surrogate": "u\udfff",
        "a surrogate that Python escapes bytes with": "\udc80u",
        "surrogates in the wrong order": "\udc00\ud800",
    }
    for name, value in others.items():
        yield f"sub: {name}", mint.token(claims=mint.claims(sub=value))


# Signature and size -------------------------------------------------------------------------------------------------


def _signatures(mint: Mint) -> Named:
    good = mint.token()
    header, payload, tail = good.split(".")
    signature = _bytes_of(tail)
    other = mint.token(claims=mint.claims(sub="u-2"))
    admin = _segment(mint.claims(sub="admin"))
    for name, forged in {
        "one byte": signature[:1],
        "the first half": signature[: len(signature) // 2],
        "the second half": signature[len(signature) // 2 :],
        "its last byte cut off": signature[:-1],
        "its first byte cut off": signature[1:],
        "its last two bytes cut off": signature[:-2],
        "a zero after it": signature + b"\0",
        "a zero before it": b"\0" + signature,
        "a byte after it": signature + b"\x17",
        "twice": signature + signature,
        "zeros": bytes(len(signature)),
        "ones": b"\xff" * len(signature),
        "a number one": bytes(len(signature) - 1) + b"\1",
        "reversed": signature[::-1],
        "inverted": bytes(byte ^ 0xFF for byte in signature),
        "first bit flipped": bytes([signature[0] ^ 0x80]) + signature[1:],
        "last bit flipped": signature[:-1] + bytes([signature[-1] ^ 1]),
        "middle bit flipped": signature[:16] + bytes([signature[16] ^ 8]) + signature[17:],
        "in hexadecimal": signature.hex().encode(),
        "in base64": base64.b64encode(signature),
        "the signing input": f"{header}.{payload}".encode(),
        "a hash of the signing input": hashlib.sha256(f"{header}.{payload}".encode()).digest(),
        "of another token": _bytes_of(other.rpartition(".")[2]),
        "of the header": mint.signer.sign(header.encode()),
        "of the payload": mint.signer.sign(payload.encode()),
        "of the decoded parts": mint.signer.sign(_json(mint.header()) + b"." + _json(mint.claims())),
        "of the parts without a dot": mint.signer.sign((header + payload).encode()),
        "of the parts and a dot": mint.signer.sign(f"{header}.{payload}.".encode()),
        "of nothing": mint.signer.sign(b""),
        "text": b"signature",
        "3,000 bytes": b"\xa5" * 3000,
    }.items():
        yield f"signature: {name}", f"{header}.{payload}.{base64url(forged)}"
    yield "signature: of another payload", f"{header}.{admin}.{tail}"
    yield "signature: of another header", f"{_segment(mint.header(x=1))}.{payload}.{tail}"
    yield "signature: of the same header, spaced", f"{_segment(json.dumps(mint.header()).encode())}.{payload}.{tail}"
    yield "signature: of a header without typ", f"{_segment(_without(mint.header(), 'typ'))}.{payload}.{tail}"


def _signatures_of_the_kind(mint: Mint) -> Named:
    match mint.signer.algorithm:
        case "RS256":
            key = get_rsa_key("provider")
            pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)
            for name, sign in {
                "RSA-PSS": lambda data: key.sign(data, pss, hashes.SHA256()),
                "RSA with SHA-1": lambda data: key.sign(data, padding.PKCS1v15(), hashes.SHA1()),  # noqa: S303
                "RSA with SHA-512": lambda data: key.sign(data, padding.PKCS1v15(), hashes.SHA512()),
                "RSA plus the modulus": lambda data: _plus_modulus(_rsa(key, "RS256")(data), key),
                "RSA of the modulus": lambda _: key.public_key().public_numbers().n.to_bytes(256),
                "RSA of the modulus less one": lambda _: (key.public_key().public_numbers().n - 1).to_bytes(256),
            }.items():
                yield f"signature: {name}", mint.token(sign=sign)
        case "ES256":
            ec_key = get_ec_key("provider", "ES256")
            good = ecdsa(ec_key, "ES256")
            order = _P256_ORDER.to_bytes(32)
            for name, sign in {
                "ECDSA in DER": lambda data: ec_key.sign(data, ec.ECDSA(hashes.SHA256())),
                "ECDSA with SHA-384": ecdsa(ec_key, "ES384"),
                "ECDSA, r and s swapped": lambda data: good(data)[32:] + good(data)[:32],
                "ECDSA, r zero": lambda data: bytes(32) + good(data)[32:],
                "ECDSA, s zero": lambda data: good(data)[:32] + bytes(32),
                "ECDSA, r the order": lambda data: order + good(data)[32:],
                "ECDSA, s the order": lambda data: good(data)[:32] + order,
                "ECDSA, both the order": lambda _: order + order,
                "ECDSA, both one": lambda _: (bytes(31) + b"\1") * 2,
                "ECDSA, numbers of 33 bytes": lambda data: b"\0" + good(data)[:32] + b"\0" + good(data)[32:],
                "ECDSA, numbers of 66 bytes": lambda data: bytes(34) + good(data)[:32] + bytes(34) + good(data)[32:],
            }.items():
                yield f"signature: {name}", mint.token(sign=sign)
        case "EdDSA":
            yield from _ed25519_signatures(mint)
        case "HS256":
            key_bytes = mint.signer.published.encode("utf-8", "surrogateescape")
            for name, sign in {
                "HMAC with SHA-384": _mac(key_bytes, "HS384"),
                "HMAC with SHA-512": _mac(key_bytes, "HS512"),
                "HMAC with SHA-512, cut to size": lambda data: _mac(key_bytes, "HS512")(data)[:32],
                "HMAC with SHA-1": lambda data: hmac.digest(key_bytes, data, "sha1"),
                "a hash of secret and input": lambda data: hashlib.sha256(key_bytes + data).digest(),
            }.items():
                yield f"signature: {name}", mint.token(sign=sign)


_ED25519_ORDER: Final = 2**252 + 27742317777372353535851937790883648493
_ED25519_IDENTITY: Final = (1).to_bytes(32, "little")
_ED25519_FIELD: Final = 2**255 - 19


def _ed25519_signatures(mint: Mint) -> Named:
    """Signatures that only a lenient verifier accepts (RFC 8032, section 5.1.7), and those of similar algorithms."""
    key = get_ed25519_key("provider")

    def with_s(signature: bytes, change: Callable[[int], int]) -> bytes:
        return signature[:32] + (change(int.from_bytes(signature[32:], "little")) % 2**256).to_bytes(32, "little")

    for name, sign in {
        "s plus the order": lambda data: with_s(key.sign(data), lambda s: s + _ED25519_ORDER),
        "s plus eight times the order": lambda data: with_s(key.sign(data), lambda s: s + 8 * _ED25519_ORDER),
        "s negated": lambda data: with_s(key.sign(data), lambda s: _ED25519_ORDER - s),
        "s zero": lambda data: with_s(key.sign(data), lambda _: 0),
        "s the order": lambda data: with_s(key.sign(data), lambda _: _ED25519_ORDER),
        "s with its highest bit set": lambda data: with_s(key.sign(data), lambda s: s | 1 << 255),
        "R the identity, s zero": lambda _: _ED25519_IDENTITY + bytes(32),
        "R the identity, not canonical": lambda _: (_ED25519_FIELD + 1).to_bytes(32, "little") + bytes(32),
        "R of order 2, s zero": lambda _: (_ED25519_FIELD - 1).to_bytes(32, "little") + bytes(32),
        "R the public key, s zero": lambda _: key.public_key().public_bytes_raw() + bytes(32),
        "R negated": lambda data: _flip(key.sign(data), 31, 0x80),
        "R and s swapped": lambda data: key.sign(data)[32:] + key.sign(data)[:32],
        "Ed25519 of a hash": lambda data: key.sign(hashlib.sha512(data).digest()),
        "Ed25519ph": lambda data: key.sign(_dom2(1, b"") + hashlib.sha512(data).digest()),
        "Ed25519ctx": lambda data: key.sign(_dom2(0, b"JWT") + data),
        "Ed25519 of the hexadecimal input": lambda data: key.sign(data.hex().encode()),
        "an ECDSA signature": signer_for("ES256").sign,
        "an HMAC with the public key": _mac(key.public_key().public_bytes_raw(), "HS512"),
        "an HMAC with the PEM": _mac(mint.signer.published.encode(), "HS512"),
    }.items():
        yield f"signature: {name}", mint.token(sign=sign)


def _dom2(flag: int, context: bytes) -> bytes:
    """Return the bytes that the two variants of Ed25519 sign before the message (RFC 8032, section 2)."""
    return b"SigEd25519 no Ed25519 collisions" + bytes([flag, len(context)]) + context


def _flip(data: bytes, place: int, bits: int) -> bytes:
    return data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]


def _plus_modulus(signature: bytes, key: rsa.RSAPrivateKey) -> bytes:
    """Return the signature plus n: an equal number modulo n, perhaps one byte longer. Both must be refused."""
    total = int.from_bytes(signature) + key.public_key().public_numbers().n
    return total.to_bytes((total.bit_length() + 7) // 8)


def _too_long(mint: Mint) -> Named:
    yield "size: a good token, one character too long", make_token_of_length(mint, MAX_CHARACTERS + 1)
    yield "size: a good token of 12,000 characters", make_token_of_length(mint, 12_000)
    yield "size: a good token with 9,000 spaces in its JSON", mint.token(claims=_json(mint.claims()).ljust(9000))
    yield "size: 8,193 letters", "a" * (MAX_CHARACTERS + 1)
    yield "size: 8,193 dots", "." * (MAX_CHARACTERS + 1)
    yield "size: brackets, 7,000 deep", mint.token(header=b"[" * 7000)


def make_token_of_length(mint: Mint, characters: int) -> str:
    """Return a valid token of exactly this many characters."""
    bare = len(mint.token(header=_json(mint.header())))
    for header_spaces in range(3):  # base64 grows in steps, so one segment alone cannot reach every length
        header = _json(mint.header()) + b" " * header_spaces
        about = max(0, (characters - bare) * 3 // 4 - 4)
        for length in range(about, about + 8):
            token = mint.token(header=header, claims=_json(mint.claims()) + b" " * length)
            if len(token) == characters:
                return token
    raise AssertionError(f"no token of {characters} characters")


# Good tokens --------------------------------------------------------------------------------------------------------


def make_valid_tokens(mint: Mint) -> dict[str, str]:
    """Return tokens that must be accepted, by name; each one is for the user `u-1`."""
    now, later = int(mint.now), int(mint.now) + 600
    claims, header = mint.claims, mint.header
    spaced = json.dumps(mint.claims(), indent=2).encode()
    good = {
        "plain": mint.token(),
        "no typ": mint.token(header=_without(header(), "typ")),
        "typ in small letters": mint.token(header=header(typ="jwt")),
        "an access token": mint.token(header=header(typ="at+jwt")),
        "an access token in capitals": mint.token(header=header(typ="AT+JWT")),
        "an access token, with application/": mint.token(header=header(typ="application/at+jwt")),
        "kid null": mint.token(header=header(kid=None)),
        "kid": mint.token(header=header(kid=mint.kid or "any name will do")),
        "a header that names addresses": mint.token(header=header(jku="https://attacker.example", x5t="AAAA")),
        "aud a list": mint.token(claims=claims(aud=[mint.audience])),
        "aud a list of several": mint.token(claims=claims(aud=["https://api.example", mint.audience, "account"])),
        "exp a float": mint.token(claims=claims(exp=later + 0.5)),
        "exp with an exponent": mint.token(claims=_with_literal(claims(), "exp", "1.0E12")),
        "exp far away": mint.token(claims=claims(exp=10**19)),
        "exp past, within leeway": mint.token(claims=claims(exp=now - mint.leeway_seconds + 5)),
        "nbf and iat now": mint.token(claims=claims(nbf=now, iat=now)),
        "nbf and iat within leeway": mint.token(
            claims=claims(nbf=now + mint.leeway_seconds - 5, iat=now + mint.leeway_seconds - 5)
        ),
        "nbf and iat floats": mint.token(claims=claims(nbf=now - 0.25, iat=now - 0.75)),
        "nbf and iat long ago": mint.token(claims=claims(nbf=0, iat=-1)),
        "extra claims": mint.token(
            claims=claims(name="Ada", roles=["a", "b"], app_metadata={"plan": None, "n": 1.5}, x=True, jti="")
        ),
        "an id_token": mint.token(
            claims=claims(at_hash="77QmUPtjPfzWtF2AnpK9RQ", c_hash="LDktKdoQak3Pk0cnXxCltA", nonce="n-0S6", azp="app")
        ),
        "spaces and lines in the JSON": mint.token(claims=spaced, header=b' \r\n\t{ "alg" : "%s" } ' % _alg(mint)),
        "escapes in the JSON": mint.token(claims=_json(claims()).replace(b'"sub":"u-1"', rb'"\u0073ub":"\u0075-1"')),
        "alg last": mint.token(header={"typ": "JWT", "alg": mint.signer.algorithm}),
        "one name on two levels": mint.token(claims=claims(x={"sub": "u-2", "exp": 1, "x": {"sub": "u-3"}})),
        "characters beyond ASCII": mint.token(claims=json.dumps(claims(name="Ağça 🎙"), ensure_ascii=False).encode()),
        "a pair of surrogates, escaped": mint.token(claims=claims(name="🎙")),
        "numbers at their limits": mint.token(claims=claims(a=10**20 - 1, b=1.7e308, c=-0.0, d=5e-324)),
        "twenty levels": mint.token(claims=_with_literal(claims(), "x", "[" * 20 + "]" * 20)),
        "8,192 characters": make_token_of_length(mint, MAX_CHARACTERS),
        "many claims": mint.token(claims=claims(**{f"claim_{i}": i for i in range(200)})),
    }
    without_now = {"exp past, within leeway", "nbf and iat within leeway"} if mint.leeway_seconds < 10 else set()
    return {name: token for name, token in good.items() if name not in without_now}


def _alg(mint: Mint) -> bytes:
    return mint.signer.algorithm.encode()


def make_deep_token(mint: Mint) -> str:
    """Return a valid token with a claim 1,500 levels deep: some versions of Python can parse it, others cannot."""
    return mint.token(claims=_with_literal(mint.claims(), "x", "[" * DEPTH + "]" * DEPTH))
