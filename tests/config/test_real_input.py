"""Settings as real environments hold them: quotes, other encodings, keys as bytes, app shells, hosts without TLS."""

import base64
import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import respx
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from tests.cli.test_cli import CLEAN, run
from tests.config.test_settings import EC_PEM, GOOD, RSA_KEY, RSA_PEM, SECRET, set_env
from tests.conftest import AUDIENCE, TOKEN_ISSUER, serving, settings_with
from tests.identity.hostile_tokens import Mint, base64url, signer_for
from tests.tables import table
from voicepass.config.build import configure
from voicepass.config.environment import SettingsRefusedError
from voicepass.config.settings import load_settings
from voicepass.errors import KeysUnavailable, TokenInvalid
from voicepass.identity import JwtAuthenticator
from voicepass.identity.tokens import explain_difference, list_differences

NOW = time.time()
KEY = bytes(range(180, 180 + 48))
"""48 bytes that are not UTF-8, with `+` and `/` in their base64."""


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith(("ELEVENLABS_", "VOICEPASS_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def make_mint(key: bytes, **changes: Any) -> Mint:
    signer = signer_for("HS256", secret=key.decode("utf-8", "surrogateescape"))
    return replace(Mint(signer=signer, token_issuer=TOKEN_ISSUER, audience=AUDIENCE, now=NOW), **changes)


def write_policy(text: str) -> str:
    Path("policy.toml").write_text(text)
    return "policy.toml"


async def authenticate(authenticator: JwtAuthenticator, token: str) -> str:
    """Return the user's id, or why the token was refused."""
    try:
        return (await authenticator.user_of(token)).id
    except TokenInvalid as refusal:
        return str(refusal.operator_note)


def build_authenticator(**settings: object) -> JwtAuthenticator:
    return JwtAuthenticator(trusted=configure(settings_with(**settings)).trusted, clock=lambda: NOW)


# Quotes and encodings -----------------------------------------------------------------------------------------------


@table("around", ['"{}"', "'{}'", " {} ", "{}\r\n", '\n "{}"\t', "\ufeff{}", "\u201c{}\u201d"])
def test_quotes_spaces_and_line_breaks_around_any_value_are_removed(
    monkeypatch: pytest.MonkeyPatch, around: str
) -> None:
    values = GOOD | {
        "VOICEPASS_JWT_ALGORITHM": "HS512",
        "VOICEPASS_MAX_CALLS": "7",
        "VOICEPASS_DOCS": "true",
        "VOICEPASS_ALLOWED_ORIGINS": "https://a.example, https://b.example",
        "VOICEPASS_DATABASE_URL": "sqlite://",
        "VOICEPASS_LOG_FORMAT": "console",
    }
    set_env(monkeypatch, values)
    expected = load_settings()
    set_env(monkeypatch, {name: around.format(value) for name, value in values.items()})

    assert load_settings() == expected


def test_a_quote_at_one_end_is_refused_with_the_variables_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GOOD.items():
        for unpaired in (f'"{value}', f"{value}'", f"\u201c{value}"):
            set_env(monkeypatch, GOOD | {name: unpaired})
            with pytest.raises(SettingsRefusedError, match=f"^{name} ") as refusal:
                configure(load_settings())
            assert value not in str(refusal.value)
    Path("secret").write_text(f'"{GOOD["VOICEPASS_JWT_SECRET"]}\n')
    set_env(monkeypatch, {**GOOD, "VOICEPASS_JWT_SECRET": "", "VOICEPASS_JWT_SECRET_FILE": "secret"})

    with pytest.raises(SettingsRefusedError, match="VOICEPASS_JWT_SECRET begins or ends with a quote"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ELEVENLABS_API_KEY", '"sk_first","sk_second"'),
        ("ELEVENLABS_WEBHOOK_SECRET", "'wsec_first-secret', 'wsec_second-secret'"),
        ("VOICEPASS_SERVICE_TOKENS", f'"{"t" * 40}","{"u" * 40}"'),
        ("VOICEPASS_ALLOWED_ORIGINS", '"https://a.example","https://b.example"'),
    ],
)
def test_quotes_around_each_entry_of_a_list_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    set_env(monkeypatch, GOOD | {name: value})

    with pytest.raises(SettingsRefusedError, match=f"^{name} "):
        configure(load_settings())


def test_a_value_of_nothing_but_quotes_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    set_env(monkeypatch, {"VOICEPASS_JWT_ISSUER": '""'})

    with pytest.raises(SettingsRefusedError, match="VOICEPASS_JWT_ISSUER is not set"):
        configure(load_settings())

    Path(".env").write_text("VOICEPASS_JWT_ISSUER=https://login.example\n")
    assert load_settings().voicepass_jwt_issuer is None


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1", "cp1252"])
def test_an_env_file_in_another_encoding_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str
) -> None:
    text = "# Schl\u00fcssel\nELEVENLABS_API_KEY=sk_canary-value\n"
    (tmp_path / ".env").write_bytes(text.encode(encoding))
    (tmp_path / "named").write_bytes(text.encode(encoding))

    with pytest.raises(SettingsRefusedError, match=r"^\.env is not UTF-8 text"):
        load_settings()
    monkeypatch.setenv("VOICEPASS_ENV_FILE", "named")
    with pytest.raises(SettingsRefusedError, match=r"^VOICEPASS_ENV_FILE names a file that is not UTF-8 text"):
        load_settings()


def test_a_byte_order_mark_before_a_utf8_file_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("ELEVENLABS_AGENT_ID=agent_7\n", encoding="utf-8-sig")
    (tmp_path / "policy.toml").write_text("[limits]\nconversation_minutes = 7\n", encoding="utf-8-sig")
    set_env(monkeypatch, {"ELEVENLABS_AGENT_ID": None, "VOICEPASS_POLICY_FILE": "policy.toml"})

    policy = configure(load_settings()).policy

    assert (policy.agents["default"].agent.agent_id, policy.conversation_seconds) == ("agent_7", 420)


# Keys ---------------------------------------------------------------------------------------------------------------


def _bare_certificate() -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "login.example")])
    begin, end = datetime(2026, 1, 1, tzinfo=UTC), datetime(2036, 1, 1, tzinfo=UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(RSA_KEY.public_key())
    builder = builder.serial_number(1).not_valid_before(begin).not_valid_after(end)
    return base64.b64encode(builder.sign(RSA_KEY, SHA256()).public_bytes(Encoding.DER)).decode()


RSA_DER = RSA_KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
RS256: dict[str, str | None] = {"VOICEPASS_JWT_ALGORITHM": "RS256", "VOICEPASS_JWT_SECRET": None}
BARE = {
    "one line, as Keycloak shows it": base64.b64encode(RSA_DER).decode(),
    "lines of 64": "\n".join(RSA_PEM.splitlines()[1:-1]),
    "lines joined with \\n": "\\n".join(RSA_PEM.splitlines()[1:-1]),
    "without padding": base64.b64encode(RSA_DER).decode().rstrip("="),
    "a certificate": _bare_certificate(),
    "PEM in base64": base64.b64encode(RSA_PEM.encode()).decode(),
    "PEM in base64, with a prefix": f"base64:{base64.b64encode(RSA_PEM.encode()).decode()}",
    "PEM in quotes": f'"{RSA_PEM}"',
}


@table("form", BARE)
def test_a_public_key_may_come_without_its_first_and_last_line(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    set_env(monkeypatch, RS256 | {"VOICEPASS_JWT_PUBLIC_KEY": BARE[form]})
    Path("policy.toml").write_text(
        '[[issuers]]\nissuer = "i"\nalgorithm = "RS512"\naudience = "a"\n'
        f"public_key = '''{BARE[form].strip(chr(34))}'''"
    )
    monkeypatch.setenv("VOICEPASS_POLICY_FILE", "policy.toml")

    assert [trusted.algorithm for trusted in configure(load_settings()).trusted] == ["RS512", "RS256"]


NOT_A_KEY = {
    "another curve": "".join(EC_PEM.splitlines()[1:-1]),
    "half of a key": base64.b64encode(RSA_DER).decode()[:200],
    "prose": "canary-value",
}


@pytest.mark.parametrize("kind", NOT_A_KEY)
def test_the_service_does_not_start_with_a_text_that_is_no_public_key(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    set_env(monkeypatch, RS256 | {"VOICEPASS_JWT_PUBLIC_KEY": NOT_A_KEY[kind]})

    with pytest.raises(SettingsRefusedError, match=r"^VOICEPASS_JWT_PUBLIC_KEY is not a"):
        configure(load_settings())


STANDARD, URL_SAFE = base64.b64encode(KEY).decode(), base64.urlsafe_b64encode(KEY).decode()
SECRET_TEXTS = {
    f"base64:{STANDARD}": KEY,
    f"base64:{STANDARD.rstrip('=')}": KEY,
    f"base64:{STANDARD[:20]}\n{STANDARD[20:]}": KEY,
    f"base64url:{URL_SAFE}": KEY,
    f"base64url:{URL_SAFE.rstrip('=')}": KEY,
    f'"base64:{STANDARD}"': KEY,
    STANDARD: STANDARD.encode(),
}


@pytest.mark.anyio
@pytest.mark.parametrize("text", SECRET_TEXTS)
async def test_a_secret_may_be_bytes_in_a_variable_a_file_or_a_variable_that_the_policy_file_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    other = '[[issuers]]\nissuer = "https://o.example"\nalgorithm = "HS256"\naudience = "a"\nsecret_env = "OTHER"\n'
    monkeypatch.setenv("OTHER", text)
    (tmp_path / "secret").write_text(text)
    tokens = [
        make_mint(SECRET_TEXTS[text]).token(),
        make_mint(SECRET_TEXTS[text], token_issuer="https://o.example", audience="a").token(),
    ]
    changes = {"VOICEPASS_POLICY_FILE": write_policy(other), "VOICEPASS_JWT_ISSUER": TOKEN_ISSUER}

    for place in ({"VOICEPASS_JWT_SECRET": text}, {"VOICEPASS_JWT_SECRET_FILE": str(tmp_path / "secret")}):
        with monkeypatch.context() as patch:
            set_env(patch, {"VOICEPASS_JWT_SECRET": None} | changes | place)
            authenticator = JwtAuthenticator(trusted=configure(load_settings()).trusted, clock=lambda: NOW)
            assert [await authenticate(authenticator, token) for token in tokens] == ["u-1", "u-1"]


SECRET_FILES: dict[str, tuple[bytes, bytes]] = {
    "bytes": (KEY, KEY),
    "bytes that end like a line": (KEY + b"\n", KEY + b"\n"),
    "text with a byte order mark": (b"\xef\xbb\xbf" + SECRET.encode(), SECRET.encode()),
    "text and two line breaks": (SECRET.encode() + b"\n\n", SECRET.encode()),
    "text and two line breaks of Windows": (SECRET.encode() + b"\r\n\r\n", SECRET.encode()),
    "text beyond ASCII": (("\u00fc" * 32).encode(), ("\u00fc" * 32).encode()),
}


@pytest.mark.anyio
@pytest.mark.parametrize("form", SECRET_FILES)
async def test_a_secret_file_may_hold_bytes_or_text_with_line_breaks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str
) -> None:
    data, key = SECRET_FILES[form]
    (tmp_path / "secret").write_bytes(data)
    set_env(monkeypatch, {"VOICEPASS_JWT_SECRET": None, "VOICEPASS_JWT_SECRET_FILE": "secret"})

    authenticator = JwtAuthenticator(trusted=configure(load_settings()).trusted, clock=lambda: NOW)

    assert await authenticate(authenticator, make_mint(key).token()) == "u-1"
    assert run("token", "--user", "u-1", cwd=tmp_path, environment=dict(os.environ)).returncode == 0


REFUSED_SECRETS: dict[str, tuple[bytes, str]] = {
    "UTF-16 of PowerShell": (SECRET.encode("utf-16"), "VOICEPASS_JWT_SECRET_FILE names a file that is not UTF-8 text"),
    "UTF-16 without its mark": (SECRET.encode("utf-16-be"), "VOICEPASS_JWT_SECRET_FILE names a file that is not"),
    "few bytes": (KEY[:31], "VOICEPASS_JWT_SECRET must be at least 32 bytes long; this one has 31"),
    "few bytes in base64": (b"base64:AAAA", "VOICEPASS_JWT_SECRET must be at least 32 bytes long; this one has 3"),
    "no base64": (b"base64:" + SECRET.encode(), "VOICEPASS_JWT_SECRET begins with base64: but has a character"),
    "no base64url": (
        b"base64url:%" + SECRET.encode(),
        "VOICEPASS_JWT_SECRET begins with base64url: but has a character",
    ),
    "a public key in base64": (b"base64:" + base64.b64encode(RSA_DER), "VOICEPASS_JWT_SECRET is a public key"),
    "a public key as DER": (RSA_DER, "VOICEPASS_JWT_SECRET is a public key"),
    "a PEM in base64": (b"base64:" + base64.b64encode(RSA_PEM.encode()), "VOICEPASS_JWT_SECRET is a public key"),
    "a certificate in base64": (b"base64:" + _bare_certificate().encode(), "VOICEPASS_JWT_SECRET is a public key"),
}


@table("kind", REFUSED_SECRETS)
def test_an_unusable_secret_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    data, expected = REFUSED_SECRETS[kind]
    (tmp_path / "secret").write_bytes(data)
    set_env(monkeypatch, {"VOICEPASS_JWT_SECRET": None, "VOICEPASS_JWT_SECRET_FILE": "secret"})

    with pytest.raises(SettingsRefusedError) as refused:
        configure(load_settings())

    (problem,) = refused.value.problems
    assert problem.startswith(expected)
    assert "canary" not in problem


@pytest.mark.parametrize("name", ["ELEVENLABS_API_KEY", "ELEVENLABS_WEBHOOK_SECRET", "VOICEPASS_SERVICE_TOKENS"])
def test_bytes_are_refused_for_a_setting_that_must_be_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    (tmp_path / "bytes").write_bytes(KEY)
    set_env(monkeypatch, {name: None, f"{name}_FILE": "bytes"})

    with pytest.raises(SettingsRefusedError, match=f"^{name}_FILE names a file that is not UTF-8 text"):
        load_settings()


# Origins ------------------------------------------------------------------------------------------------------------

LISTED = [
    "capacitor://localhost",
    "tauri://localhost",
    "ionic://localhost",
    "chrome-extension://abcdefghijklmnopabcdefghijklmnop",
    "moz-extension://0c1b2d3e-0000-4000-8000-123456789abc",
    "http://localhost:5173",
    "http://[::1]:5173",
    "https://xn--mnchen-3ya.example",
]
NOT_LISTED = {
    "null": "* and null are refused",
    "*": "* and null are refused",
    "chrome-extension://*": "* and null are refused",
    "capacitor://": "must list exact origins",
    "capacitor://localhost/": "write capacitor://localhost",
    "Tauri://localhost": "in lower case and without a path; * and null are refused; write tauri://localhost",
    "https://App.example": "write https://app.example",
    "https://a.example https://b.example": "must list exact origins",
    "https://a.example;https://b.example": "must list exact origins",
    "file://host": "must list exact origins",
    "file://localhost": "must list exact origins",
    "https://app.example:443": "write https://app.example",
    "http://app.example:80": "write http://app.example",
    "https://user@app.example": "write https://app.example",
    "https://m\u00fcnchen.example": "write https://xn--mnchen-3ya.example",
    "https://stra\u00dfe.example:8443": "write https://xn--strae-oqa.example:8443",
    "capacitor://\u0434\u043e\u043c": "write capacitor://xn--d1aqf",
    "https://\u2665.example": "write https://xn--g6h.example",
}


def test_the_origin_of_an_app_shell_may_be_listed_also_with_a_cookie(monkeypatch: pytest.MonkeyPatch) -> None:
    set_env(monkeypatch, {"VOICEPASS_ALLOWED_ORIGINS": ",".join(LISTED), "VOICEPASS_SESSION_COOKIE": "__Host-session"})

    settings = load_settings()
    configure(settings)

    assert settings.voicepass_allowed_origins == LISTED


@table("origin", NOT_LISTED)
def test_an_origin_that_no_browser_sends_is_refused_with_the_form_to_write(
    monkeypatch: pytest.MonkeyPatch, origin: str
) -> None:
    set_env(monkeypatch, {"VOICEPASS_ALLOWED_ORIGINS": origin})

    with pytest.raises(SettingsRefusedError) as refused:
        load_settings()

    (problem,) = refused.value.problems
    assert problem.startswith("VOICEPASS_ALLOWED_ORIGINS ")
    assert NOT_LISTED[origin] in problem


# Hosts without TLS --------------------------------------------------------------------------------------------------

KEYCLOAK = (
    '[[issuers]]\nissuer = "http://keycloak:8080/realms/a"\nalgorithm = "RS256"\naudience = "a"\n'
    'jwks_url = "http://keycloak:8080/realms/a/certs"\n'
)
IN_COMPOSE: dict[str, tuple[dict[str, str], list[str]]] = {
    "the emulator": ({"ELEVENLABS_BASE_URL": "http://emulator:9000"}, ["ELEVENLABS_BASE_URL must be https://"]),
    "an address": ({"ELEVENLABS_BASE_URL": "http://10.0.0.7:9000"}, ["ELEVENLABS_BASE_URL must be https://"]),
    "Keycloak in the policy file": (
        {"VOICEPASS_POLICY_FILE": "policy.toml"},
        [
            "VOICEPASS_POLICY_FILE issuers.0.issuer: must not be an http:// address",
            "VOICEPASS_POLICY_FILE issuers.0.jwks_url: must be https://",
        ],
    ),
    "Keycloak in the environment": (
        {
            "VOICEPASS_JWT_ALGORITHM": "RS256",
            "VOICEPASS_JWT_SECRET": "",
            "VOICEPASS_JWT_ISSUER": "http://keycloak:8080/realms/a",
            "VOICEPASS_JWKS_URL": "http://keycloak:8080/realms/a/certs",
        },
        ["VOICEPASS_JWT_ISSUER must not be an http:// address", "VOICEPASS_JWKS_URL must be https://"],
    ),
}


@pytest.mark.parametrize("case", IN_COMPOSE)
def test_only_a_listed_host_may_be_called_without_tls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    changes, expected = IN_COMPOSE[case]
    write_policy(KEYCLOAK)
    set_env(monkeypatch, changes)

    for hosts in ("", "other,localhost,login.example"):
        monkeypatch.setenv("VOICEPASS_PLAIN_HTTP_HOSTS", hosts)
        with pytest.raises(SettingsRefusedError) as refused:
            configure(load_settings())
        assert [p[: len(s)] for p, s in zip(refused.value.problems, expected, strict=True)] == expected
    monkeypatch.setenv("VOICEPASS_PLAIN_HTTP_HOSTS", "Keycloak, emulator,10.0.0.7")
    configure(load_settings())
    assert run("policy", "check", "policy.toml", cwd=tmp_path, environment=dict(os.environ)).returncode == 0


@table(
    "hosts",
    ["*", "keycloak,*", "*.internal", "http://keycloak", "keycloak:8080", "10.0.0.0/8", "a b", "key\u00e9"],
)
def test_a_host_without_tls_must_be_listed_by_its_exact_name(monkeypatch: pytest.MonkeyPatch, hosts: str) -> None:
    set_env(monkeypatch, {"VOICEPASS_PLAIN_HTTP_HOSTS": hosts})

    with pytest.raises(SettingsRefusedError, match=r"^VOICEPASS_PLAIN_HTTP_HOSTS must name each host alone"):
        load_settings()


@pytest.mark.anyio
async def test_each_host_without_tls_is_a_warning_at_start(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(voicepass_plain_http_hosts="keycloak,emulator"):
        pass

    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    warned = [(line["level"], line["host"]) for line in lines if line["event"] == "plain_http.allowed"]
    assert warned == [("warning", "keycloak"), ("warning", "emulator")]


def make_jwks(key: rsa.RSAPrivateKey) -> dict[str, object]:
    numbers = key.public_key().public_numbers()
    return {"keys": [{"kty": "RSA", "n": base64url(numbers.n.to_bytes(256)), "e": base64url(numbers.e.to_bytes(3))}]}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("jwks_uri", "expected"),
    [
        ("http://keycloak:8080/realms/a/certs", "fetched"),
        ("http://login:8080/realms/a/certs", "the discovery document names no https:// jwks_uri"),
        ("http://keycloak.attacker.example/certs", "the discovery document names no https:// jwks_uri"),
    ],
)
async def test_a_discovery_document_may_name_an_http_url_of_a_listed_host_only(jwks_uri: str, expected: str) -> None:
    discovery = "http://keycloak:8080/realms/a/.well-known/openid-configuration"
    text = KEYCLOAK.replace("http://keycloak:8080/realms/a/certs", discovery)
    settings = settings_with(
        voicepass_policy_file=write_policy(text), voicepass_plain_http_hosts="keycloak", **NO_ISSUER
    )
    (trusted,) = configure(settings).trusted

    with respx.mock(assert_all_called=False, using="voicepass") as router:
        router.get(discovery).respond(json={"issuer": trusted.token_issuer, "jwks_uri": jwks_uri})
        router.get(jwks_uri).respond(json=make_jwks(RSA_KEY))
        try:
            await trusted.keys.check()
            note = "fetched"
        except KeysUnavailable as refusal:
            note = str(refusal.operator_note)

    assert expected in note


# Issuers ------------------------------------------------------------------------------------------------------------


def block(issuer: str, algorithm: str, key: str, *lines: str) -> str:
    head = f'[[issuers]]\nissuer = "{issuer}"\nalgorithm = "{algorithm}"\naudience = "{AUDIENCE}"'
    return "\n".join([head, key, *lines, ""])


MOVES = [("HS256", "ES256"), ("HS512", "RS256"), ("RS256", "ES384"), ("HS256", "HS384")]


@pytest.mark.anyio
@pytest.mark.parametrize(("before", "after"), MOVES)
async def test_an_issuer_that_moves_to_another_algorithm_has_a_block_for_each(
    monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    signers = {name: signer_for(name, secret=f"canary-of-{name}-0123456789-0123456789") for name in (before, after)}

    def write_key_line(name: str) -> str:
        if not name.startswith("HS"):
            return f"public_key = '''{signers[name].published}'''"
        monkeypatch.setenv(f"SECRET_{name}", signers[name].published)
        return f'secret_env = "SECRET_{name}"'

    text = "".join(block(TOKEN_ISSUER, name, write_key_line(name)) for name in signers)
    nothing = {"voicepass_jwt_issuer": None, "voicepass_jwt_secret": None, "voicepass_jwt_audience": None}
    authenticator = build_authenticator(voicepass_policy_file=write_policy(text), **nothing)

    def sign_token(claimed: str, signed_by: str, *, key: str | None = None) -> str:
        """Return a token that claims one algorithm. The key of a block signs it, or `key` as a secret does."""
        signer = signers[signed_by] if key is None else signer_for("HS" + claimed[2:], secret=key)
        mint = Mint(signer=signer, token_issuer=TOKEN_ISSUER, audience=AUDIENCE, now=NOW)
        return mint.token(header={"alg": claimed, "typ": "JWT"})

    accepted = [await authenticate(authenticator, sign_token(name, name)) for name in signers]
    crossed = [
        await authenticate(authenticator, sign_token(one, other)) for one, other in ((before, after), (after, before))
    ]
    confused = [
        await authenticate(authenticator, sign_token(claimed, claimed, key=signers[other].published))
        for claimed in signers
        for other in signers
        if claimed != other and claimed.startswith("HS")
    ]
    unknown = await authenticate(authenticator, sign_token("ES512", before))

    assert accepted == ["u-1", "u-1"]
    assert all("the signature does not hold" in note for note in crossed + confused)
    assert unknown == f"token refused: alg is not {' or '.join(sorted(signers))}"


TENANTS = ("11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222")
TEMPLATE = "https://login.microsoftonline.com/{tid}/v2.0"
SIGNER = signer_for("RS256")
ENTRA_KEY = f"public_key = '''{SIGNER.published}'''"
NO_ISSUER: Mapping[str, object] = {"voicepass_jwt_issuer": None, "voicepass_jwt_secret": None}
OTHER_TENANT = "33333333-3333-4333-8333-333333333333"
# What a token's `iss` has for {tid}, its claim `tid`, and whether voicepass accepts it.
ENTRA_TOKENS = [
    (TENANTS[0], TENANTS[0], True),
    (TENANTS[1], TENANTS[1], True),
    (OTHER_TENANT, OTHER_TENANT, False),
    (TENANTS[0], TENANTS[1], False),
    (TENANTS[0], None, False),
    (TENANTS[0][:-1], TENANTS[0], False),
    ("{tid}", TENANTS[0], False),
    ("common", TENANTS[0], False),
    ("", TENANTS[0], False),
    (f"{TENANTS[0]}/v2.0/{TENANTS[1]}", TENANTS[0], False),
]


@pytest.mark.anyio
@pytest.mark.parametrize("template", [TEMPLATE, "https://sts.windows.net/{tid}/", "https://{tid}.ciamlogin.com/v2.0"])
async def test_a_template_accepts_exactly_the_listed_tenants(template: str) -> None:
    text = block(template, "RS256", ENTRA_KEY, f"tenants = {list(TENANTS)}")
    authenticator = build_authenticator(voicepass_policy_file=write_policy(text), **NO_ISSUER)

    for in_issuer, tid, is_accepted in ENTRA_TOKENS:
        name = template.replace("{tid}", in_issuer)
        mint = Mint(signer=SIGNER, token_issuer=name, audience=AUDIENCE, now=NOW)
        claims = {key: value for key, value in mint.claims(tid=tid).items() if value is not None}
        result = await authenticate(authenticator, mint.token(claims=claims))
        assert (result == "u-1") == is_accepted, (in_issuer, tid, result)


ENTRA_MISTAKES: dict[str, tuple[str, str]] = {
    "no tenants": (block(TEMPLATE, "RS256", ENTRA_KEY), "issuers.0.tenants: needs tenants for {tid}"),
    "tenants without a template": (
        block("https://login.example", "RS256", ENTRA_KEY, 'tenants = ["a"]'),
        "issuers.0.tenants: is set, but the issuer has no {tid}",
    ),
    "every tenant": (block(TEMPLATE, "RS256", ENTRA_KEY, 'tenants = ["*"]'), "issuers.0.tenants: must be the ids of"),
    "common": (block(TEMPLATE, "RS256", ENTRA_KEY, 'tenants = ["common"]'), "issuers.0.tenants: must be the ids of"),
    "Common": (block(TEMPLATE, "RS256", ENTRA_KEY, 'tenants = ["Common"]'), "issuers.0.tenants: must be the ids of"),
    "a path": (block(TEMPLATE, "RS256", ENTRA_KEY, 'tenants = ["a/b"]'), "issuers.0.tenants: must be the ids of"),
    "another placeholder": (
        block("https://login.microsoftonline.com/{tenantid}/v2.0", "RS256", ENTRA_KEY),
        "issuers.0.issuer: may hold {tid} once",
    ),
    "two placeholders": (
        block(TEMPLATE + "/{tid}", "RS256", ENTRA_KEY, 'tenants = ["a"]'),
        "issuers.0.issuer: may hold {tid} once",
    ),
    "a discovery document": (
        block(
            TEMPLATE,
            "RS256",
            'jwks_url = "https://login.microsoftonline.com/common/v2.0/.well-known/openid-configuration"',
            'tenants = ["a"]',
        ),
        "issuers.0.jwks_url: must be a JWKS, for the keys of all tenants",
    ),
}


@table("case", ENTRA_MISTAKES)
def test_a_template_without_exact_tenants_stops_the_start(case: str) -> None:
    text, expected = ENTRA_MISTAKES[case]

    with pytest.raises(SettingsRefusedError) as refused:
        configure(settings_with(voicepass_policy_file=write_policy(text), **NO_ISSUER))

    (problem,) = refused.value.problems
    assert problem.startswith(f"VOICEPASS_POLICY_FILE {expected}")


def test_a_template_in_the_environment_is_refused_because_it_needs_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    set_env(monkeypatch, {"VOICEPASS_JWT_ISSUER": TEMPLATE})

    with pytest.raises(SettingsRefusedError, match=r"^VOICEPASS_JWT_ISSUER needs tenants for"):
        configure(load_settings())


# Names that nearly match --------------------------------------------------------------------------------------------

NEARLY: list[tuple[object, str]] = [
    ("https://login.example/", "; the only difference is a final slash"),
    ("https://Login.Example", "; the only difference is upper and lower case"),
    ('"https://login.example"', "; the only difference is quotes or spaces"),
    (["x", "https://login.example/"], "; the only difference is a final slash"),
    (
        '"HTTPS://login.example/"',
        "; it differs only in such things as a final slash, upper and lower case, quotes or spaces",
    ),
    ("https://login.example.attacker", ""),
    ("https://login.exampl", ""),
    (["https://login.example", 7], ""),
    (7, ""),
    (None, ""),
]


@table(("found", "note"), NEARLY)
def test_a_note_says_how_a_name_differs_if_only_its_spelling_differs(found: object, note: str) -> None:
    assert explain_difference(found, ["https://login.example"]) == note


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({"iss": "https://a", "aud": "b"}, ["aud in the token: 'b'; configured: 'a'"]),
        ({"iss": "https://c", "aud": "x"}, []),
        ({"iss": "https://d", "aud": "a"}, ["iss in the token: 'https://d'; configured: 'https://a', 'https://c'"]),
        ({"iss": "https://a", "aud": ["x", "a"]}, []),
        ({"iss": "https://a", "aud": "ab"}, ["aud in the token: 'ab'; configured: 'a'"]),
        ({"iss": "https://a"}, ["aud in the token: None; configured: 'a'"]),
    ],
)
def test_explain_compares_with_the_blocks_of_the_tokens_own_issuer(claims: dict[str, Any], expected: list[str]) -> None:
    token = make_mint(SECRET.encode()).token(claims=claims)

    assert list_differences(token, [("https://a", "a"), ("https://c", None)]) == expected


@pytest.mark.parametrize(
    ("claim", "value", "note"),
    [
        ("iss", f"{TOKEN_ISSUER}/", "iss is no configured issuer; the only difference is a final slash"),
        ("aud", "Voicepass", "aud does not name the configured audience; the only difference is upper and lower case"),
        ("aud", '"voicepass"', "aud does not name the configured audience; the only difference is quotes or spaces"),
        ("aud", "another", "aud does not name the configured audience"),
    ],
)
def test_explain_prints_both_values_and_its_note_says_only_how_they_differ(
    tmp_path: Path, claim: str, value: str, note: str
) -> None:
    environment = CLEAN | GOOD | {"VOICEPASS_JWT_ISSUER": TOKEN_ISSUER}
    token = make_mint(SECRET.encode()).token(claims=make_mint(SECRET.encode()).claims(**{claim: value}))

    ended = run("policy", "explain", token, cwd=tmp_path, environment=environment)

    configured = {"iss": TOKEN_ISSUER, "aud": AUDIENCE}[claim]
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [
        f"refused: token_invalid: token refused: {note}",
        f"{claim} in the token: {value!r}; configured: {configured!r}",
    ]
