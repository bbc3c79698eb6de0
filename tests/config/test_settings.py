"""The environment: which settings start the service, which do not, and that no message holds a value."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tests.config import settings_reference
from tests.config.settings_reference import SECTIONS, WRITERS
from tests.identity.hostile_tokens import get_rsa_key
from tests.tables import table
from voicepass.config.build import configure
from voicepass.config.environment import SettingsRefusedError
from voicepass.config.settings import Settings, load_settings
from voicepass.identity.keys import ALGORITHMS

ROOT = Path(__file__).parents[2]
SECRET = "canary-value-0123456789-0123456789-0123456789"
GOOD = {
    "ELEVENLABS_API_KEY": "sk_canary-value",
    "ELEVENLABS_AGENT_ID": "agent_1",
    "VOICEPASS_JWT_SECRET": SECRET,
    "VOICEPASS_JWT_ISSUER": "https://login.example",
    "VOICEPASS_JWT_AUDIENCE": "voicepass",
}


def _public_pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


RSA_KEY = get_rsa_key("provider")
RSA_PEM = _public_pem(RSA_KEY)
RSA_PRIVATE_PEM = RSA_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
SMALL_RSA_PEM = _public_pem(rsa.generate_private_key(65537, 1024))  # noqa: S505 - a test needs a small key
EC_PEM = _public_pem(ec.generate_private_key(ec.SECP256R1()))

WITHOUT = None
BAD: dict[str, tuple[dict[str, str | None], str]] = {
    "no API key": ({"ELEVENLABS_API_KEY": WITHOUT}, "ELEVENLABS_API_KEY"),
    "an empty API key": ({"ELEVENLABS_API_KEY": ""}, "ELEVENLABS_API_KEY"),
    "an API key with a space": ({"ELEVENLABS_API_KEY": "sk canary-value"}, "ELEVENLABS_API_KEY"),
    "an API key beyond ASCII": ({"ELEVENLABS_API_KEY": "sk_canary-valué"}, "ELEVENLABS_API_KEY"),
    "an API key with a line break inside": ({"ELEVENLABS_API_KEY": "sk\ncanary-value"}, "ELEVENLABS_API_KEY"),
    "no agent": ({"ELEVENLABS_AGENT_ID": WITHOUT}, "ELEVENLABS_AGENT_ID"),
    "an agent id with a signature": (
        {"ELEVENLABS_AGENT_ID": "a&conversation_signature=x"},
        "ELEVENLABS_AGENT_ID",
    ),
    "a conversation for an agent": ({"ELEVENLABS_AGENT_ID": "conv_1"}, "ELEVENLABS_AGENT_ID"),
    "a plain base URL": ({"ELEVENLABS_BASE_URL": "http://api.elevenlabs.io"}, "ELEVENLABS_BASE_URL"),
    "a base URL with a user": ({"ELEVENLABS_BASE_URL": "https://u:p@api.elevenlabs.io"}, "ELEVENLABS_BASE_URL"),
    "a base URL with a path": ({"ELEVENLABS_BASE_URL": "https://api.elevenlabs.io/v1"}, "ELEVENLABS_BASE_URL"),
    "a base URL with a query": ({"ELEVENLABS_BASE_URL": "https://api.elevenlabs.io?x=1"}, "ELEVENLABS_BASE_URL"),
    "no key to verify tokens with": ({"VOICEPASS_JWT_SECRET": WITHOUT}, "VOICEPASS_JWT_SECRET"),
    "a short secret": ({"VOICEPASS_JWT_SECRET": "canary-value"}, "VOICEPASS_JWT_SECRET"),
    "a blank secret": ({"VOICEPASS_JWT_SECRET": " " * 40}, "VOICEPASS_JWT_SECRET"),
    "a PEM for a secret": ({"VOICEPASS_JWT_SECRET": RSA_PEM}, "VOICEPASS_JWT_SECRET"),
    "an unknown algorithm": ({"VOICEPASS_JWT_ALGORITHM": "none"}, "VOICEPASS_JWT_ALGORITHM"),
    "an algorithm python-jose lacks": ({"VOICEPASS_JWT_ALGORITHM": "PS256"}, "VOICEPASS_JWT_ALGORITHM"),
    "a secret for RS256": ({"VOICEPASS_JWT_ALGORITHM": "RS256"}, "VOICEPASS_JWT_SECRET"),
    "a secret and a public key": ({"VOICEPASS_JWT_PUBLIC_KEY": RSA_PEM}, "VOICEPASS_JWT_PUBLIC_KEY"),
    "no public key for RS256": (
        {"VOICEPASS_JWT_ALGORITHM": "RS256", "VOICEPASS_JWT_SECRET": WITHOUT},
        "VOICEPASS_JWT_PUBLIC_KEY",
    ),
    "a private key for RS256": (
        {
            "VOICEPASS_JWT_ALGORITHM": "RS256",
            "VOICEPASS_JWT_SECRET": WITHOUT,
            "VOICEPASS_JWT_PUBLIC_KEY": RSA_PRIVATE_PEM,
        },
        "VOICEPASS_JWT_PUBLIC_KEY",
    ),
    "RSA of 1024 bits": (
        {
            "VOICEPASS_JWT_ALGORITHM": "RS256",
            "VOICEPASS_JWT_SECRET": WITHOUT,
            "VOICEPASS_JWT_PUBLIC_KEY": SMALL_RSA_PEM,
        },
        "VOICEPASS_JWT_PUBLIC_KEY",
    ),
    "a curve for RS256": (
        {"VOICEPASS_JWT_ALGORITHM": "RS256", "VOICEPASS_JWT_SECRET": WITHOUT, "VOICEPASS_JWT_PUBLIC_KEY": EC_PEM},
        "VOICEPASS_JWT_PUBLIC_KEY",
    ),
    "no issuer": ({"VOICEPASS_JWT_ISSUER": WITHOUT}, "VOICEPASS_JWT_ISSUER"),
    "no audience": ({"VOICEPASS_JWT_AUDIENCE": WITHOUT}, "VOICEPASS_JWT_AUDIENCE"),
    "a short webhook secret": ({"ELEVENLABS_WEBHOOK_SECRET": "canary-value"}, "ELEVENLABS_WEBHOOK_SECRET"),
    "a webhook secret with a space": ({"ELEVENLABS_WEBHOOK_SECRET": f"{SECRET} x"}, "ELEVENLABS_WEBHOOK_SECRET"),
    "a comma for a webhook secret": ({"ELEVENLABS_WEBHOOK_SECRET": ","}, "ELEVENLABS_WEBHOOK_SECRET"),
    "three webhook secrets": ({"ELEVENLABS_WEBHOOK_SECRET": ",".join([SECRET] * 3)}, "ELEVENLABS_WEBHOOK_SECRET"),
    "a negative wait between rounds": ({"VOICEPASS_RECONCILE_SECONDS": "-1"}, "VOICEPASS_RECONCILE_SECONDS"),
    "a negative leeway": ({"VOICEPASS_JWT_LEEWAY_SECONDS": "-1"}, "VOICEPASS_JWT_LEEWAY_SECONDS"),
    "a system variable": ({"VOICEPASS_VARIABLES": "system__time=iat"}, "VOICEPASS_VARIABLES"),
    "a secret variable": ({"VOICEPASS_VARIABLES": "secret__key=key"}, "VOICEPASS_VARIABLES"),
    "a variable that is the user's id": ({"VOICEPASS_VARIABLES": "user_id=email"}, "VOICEPASS_VARIABLES"),
    "a variable twice": ({"VOICEPASS_VARIABLES": "a=b,a=c"}, "VOICEPASS_VARIABLES"),
    "a variable without a claim": ({"VOICEPASS_VARIABLES": "canary-value"}, "VOICEPASS_VARIABLES"),
    "every origin": ({"VOICEPASS_ALLOWED_ORIGINS": "*"}, "VOICEPASS_ALLOWED_ORIGINS"),
    "an origin with a path": ({"VOICEPASS_ALLOWED_ORIGINS": "https://a.example/"}, "VOICEPASS_ALLOWED_ORIGINS"),
    "the null origin": ({"VOICEPASS_ALLOWED_ORIGINS": "null"}, "VOICEPASS_ALLOWED_ORIGINS"),
    "another database": ({"VOICEPASS_DATABASE_URL": "mysql://canary-value"}, "VOICEPASS_DATABASE_URL"),
    "a short service token": ({"VOICEPASS_SERVICE_TOKENS": f"{SECRET},canary-value"}, "VOICEPASS_SERVICE_TOKENS"),
    "a service token of 31 characters": ({"VOICEPASS_SERVICE_TOKENS": "x" * 31}, "VOICEPASS_SERVICE_TOKENS"),
    "a short service token with a name": (
        {"VOICEPASS_SERVICE_TOKENS": "crm-canary-value:" + "x" * 31},
        "VOICEPASS_SERVICE_TOKENS",
    ),
    "a service token without its name": ({"VOICEPASS_SERVICE_TOKENS": f":{SECRET}"}, "VOICEPASS_SERVICE_TOKENS"),
    "a service token with a strange name": ({"VOICEPASS_SERVICE_TOKENS": f"a\tb:{SECRET}"}, "VOICEPASS_SERVICE_TOKENS"),
    "a cookie and a page over http": (
        {"VOICEPASS_SESSION_COOKIE": "__Host-session", "VOICEPASS_ALLOWED_ORIGINS": "http://canary-value.example"},
        "VOICEPASS_ALLOWED_ORIGINS",
    ),
    "no deadline": ({"VOICEPASS_DEADLINE_SECONDS": "0"}, "VOICEPASS_DEADLINE_SECONDS"),
    "an unknown log format": ({"VOICEPASS_LOG_FORMAT": "canary-value"}, "VOICEPASS_LOG_FORMAT"),
}


def load_and_configure() -> Settings:
    settings = load_settings()
    configure(settings)
    return settings


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith(("ELEVENLABS_", "VOICEPASS_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)  # away from any .env


def set_env(monkeypatch: pytest.MonkeyPatch, changes: Mapping[str, str | None]) -> None:
    for name, value in ({**GOOD, **changes}).items():
        if value is not None:
            monkeypatch.setenv(name, value)


@table("case", BAD)
def test_a_bad_setting_stops_the_start_and_is_reported_without_its_value(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    changes, named = BAD[case]
    set_env(monkeypatch, changes)

    with pytest.raises(SettingsRefusedError) as refused:
        load_and_configure()

    (problem,) = refused.value.problems
    assert problem.startswith(f"{named} ")
    assert "canary-value" not in str(refused.value)
    assert "MII" not in problem
    assert refused.value.__context__ is None or refused.value.__suppress_context__, "a traceback would show the value"


def test_a_good_configuration_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    set_env(monkeypatch, {"VOICEPASS_VARIABLES": "plan=plan, shop=app_metadata.shop"})

    settings = load_and_configure()

    assert settings.voicepass_variables == {"plan": "plan", "shop": "app_metadata.shop"}
    assert "canary-value" not in repr(settings)


def test_a_cookie_and_pages_over_https_or_on_loopback_start(monkeypatch: pytest.MonkeyPatch) -> None:
    origins = "https://app.example,http://localhost:5173"
    set_env(monkeypatch, {"VOICEPASS_SESSION_COOKIE": "__Host-session", "VOICEPASS_ALLOWED_ORIGINS": origins})

    assert load_and_configure().voicepass_session_cookie == "__Host-session"


@pytest.mark.parametrize("pem", [RSA_PEM, RSA_PEM.replace("\n", "\\n"), RSA_PEM.strip()])
def test_a_public_key_may_be_written_in_one_line(monkeypatch: pytest.MonkeyPatch, pem: str) -> None:
    set_env(
        monkeypatch,
        {"VOICEPASS_JWT_ALGORITHM": "RS256", "VOICEPASS_JWT_SECRET": None, "VOICEPASS_JWT_PUBLIC_KEY": pem},
    )

    assert configure(load_settings()).trusted[0].algorithm == "RS256"


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(SettingsRefusedError) as refused:
        load_and_configure()

    assert [problem.split()[0] for problem in refused.value.problems] == [
        "ELEVENLABS_AGENT_ID",
        "VOICEPASS_JWT_ISSUER",
        "VOICEPASS_JWT_SECRET",
        "VOICEPASS_JWT_AUDIENCE",
        "ELEVENLABS_API_KEY",
    ]


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_secret_may_come_from_a_file_and_its_line_break_is_dropped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ending: str
) -> None:
    (tmp_path / "key").write_bytes(f"sk_from_file{ending}".encode())
    set_env(monkeypatch, {"ELEVENLABS_API_KEY": None, "ELEVENLABS_API_KEY_FILE": str(tmp_path / "key")})

    key = load_and_configure().elevenlabs_api_key

    assert key is not None
    assert key.get_secret_value() == "sk_from_file"


def test_a_secret_in_two_places_is_a_contradiction(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk_from_file")
    set_env(monkeypatch, {"ELEVENLABS_API_KEY_FILE": str(tmp_path / "key")})

    with pytest.raises(SettingsRefusedError, match="both set"):
        load_settings()


def test_the_database_url_may_come_from_a_file_because_it_may_hold_a_password(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "url").write_text("postgresql://voicepass:pw@db/voicepass\n")
    set_env(monkeypatch, {"VOICEPASS_DATABASE_URL_FILE": str(tmp_path / "url")})

    settings = load_settings()

    assert settings.voicepass_database_url == "postgresql://voicepass:pw@db/voicepass"
    assert "pw@db" not in repr(settings)


def test_a_missing_file_is_reported_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_env(monkeypatch, {"ELEVENLABS_API_KEY": None, "ELEVENLABS_API_KEY_FILE": str(tmp_path / "none")})

    with pytest.raises(SettingsRefusedError, match="ELEVENLABS_API_KEY_FILE names a file that cannot be read"):
        load_settings()


def test_serve_prints_a_line_for_each_problem_and_exits(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ELEVENLABS_", "VOICEPASS_"))}

    ended = subprocess.run(
        [sys.executable, "-m", "voicepass", "serve"],
        env=clean | {"VOICEPASS_JWT_SECRET": "canary-value"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )

    assert ended.returncode == 1
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 5
    assert all(re.match(r"(ELEVENLABS|VOICEPASS)_[A-Z_]+ ", line) for line in lines)
    assert "canary-value" not in ended.stderr


@pytest.mark.parametrize("name", WRITERS)
def test_the_documents_describe_every_setting_as_it_is(name: str) -> None:
    text = (ROOT / name).read_text()

    assert WRITERS[name](text) == text, f"update it: .venv/bin/python -m {settings_reference.__name__}"
    for field in Settings.model_fields:
        assert field.upper() in text
    assert SECTIONS.keys() <= Settings.model_fields.keys()


MISSPELT = {
    "VOICEPASS_ALLOWED_ORIGIN": "VOICEPASS_ALLOWED_ORIGINS",
    "VOICEPASS_JWT_SECRTE": "VOICEPASS_JWT_SECRET",
    "voicepass_sesion_cookie": "VOICEPASS_SESSION_COOKIE",
    "VOICEPASS_ORIGINS": "VOICEPASS_ALLOWED_ORIGINS",
    "VOICEPASS_JWT_AUD": "VOICEPASS_JWT_AUDIENCE",
    "VOICEPASS_JWT_SECRETS": "VOICEPASS_JWT_SECRET",
    "VOICEPASS_PROXIES": "VOICEPASS_TRUSTED_PROXIES",
    "VOICEPASS_SERVICE_TOKEN": "VOICEPASS_SERVICE_TOKENS",
    "VOICEPASS_JWT_ISSUER_FILE": "VOICEPASS_JWT_ISSUER",
    "VOICEPASS_PORT": "VOICEPASS_",
    "ELEVENLABS_WEBHOOK_SECRETS": "ELEVENLABS_WEBHOOK_SECRET",
    "ELEVENLABS_KEY": "ELEVENLABS_API_KEY",
    "ELEVENLABS_AGENT": "ELEVENLABS_AGENT_ID",
    "ELEVENLABS_API_KEY_EU": "ELEVENLABS_API_KEY",
}


@pytest.mark.parametrize("source", ["environment", "dotenv"])
@table("name", MISSPELT)
def test_a_misspelt_variable_stops_the_start_and_the_message_names_the_nearest_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, source: str
) -> None:
    set_env(monkeypatch, {name: "canary-value"} if source == "environment" else {})
    if source == "dotenv":
        (tmp_path / ".env").write_text(f"{name}=canary-value\n")

    with pytest.raises(SettingsRefusedError) as refused:
        load_settings()

    assert str(refused.value).startswith(f"{name.upper()} is not a setting: did you mean {MISSPELT[name]}")
    assert "canary-value" not in str(refused.value)


def test_variables_that_other_programs_set_on_purpose_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    of_kubernetes: dict[str, str | None] = {
        "VOICEPASS_SERVICE_HOST": "10.0.0.1",
        "VOICEPASS_SERVICE_PORT": "8000",
        "VOICEPASS_SERVICE_PORT_HTTP": "8000",
        "VOICEPASS_PORT": "tcp://10.0.0.1:8000",
        "VOICEPASS_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "VOICEPASS_PORT_8000_TCP_PROTO": "tcp",
        "VOICEPASS_PORT_8000_TCP_PORT": "8000",
        "VOICEPASS_PORT_8000_TCP_ADDR": "10.0.0.1",
        "VOICEPASS_POSTGRES_SERVICE_HOST": "10.0.0.2",
        "ELEVENLABS_EMULATOR_PORT": "tcp://10.0.0.3:9000",
    }
    set_env(monkeypatch, of_kubernetes | {"ELEVENLABS_VOICE_ID": "x", "ELEVENLABS_MODEL_ID": "x", "VOICEPASS_FOO": ""})

    assert load_and_configure().elevenlabs_agent_id == "agent_1"


def test_variables_that_the_policy_file_names_are_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(
        """
        [agents.default]
        id = "agent_1"
        allow = "everyone"

        [agents.eu]
        id = "agent_2"
        allow = "everyone"
        base_url = "https://api.eu.residency.elevenlabs.io"
        api_key_env = "ELEVENLABS_API_KEY_EU"

        [[issuers]]
        issuer = "https://other.example"
        algorithm = "HS256"
        audience = "voicepass"
        secret_env = 'VOICEPASS_OTHER_SECRET'
        """
    )
    (tmp_path / "secret").write_text(SECRET)
    set_env(
        monkeypatch,
        {
            "ELEVENLABS_AGENT_ID": None,
            "VOICEPASS_POLICY_FILE": "policy.toml",
            "ELEVENLABS_API_KEY_EU": "sk_2",
            "VOICEPASS_OTHER_SECRET_FILE": str(tmp_path / "secret"),
        },
    )

    assert len(configure(load_settings()).trusted) == 2


def test_a_variable_that_a_broken_policy_file_names_is_not_reported_as_misspelt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "policy.toml").write_text('[agents.eu]\nid = \napi_key_env = "ELEVENLABS_API_KEY_EU"\n')
    set_env(monkeypatch, {"VOICEPASS_POLICY_FILE": "policy.toml", "ELEVENLABS_API_KEY_EU": "sk_2"})

    with pytest.raises(SettingsRefusedError, match="VOICEPASS_POLICY_FILE is not TOML"):
        load_and_configure()


def test_a_named_env_file_replaces_the_one_in_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("VOICEPASS_WARM_PASSES=1\nVOICEPASS_MAX_CALLS=1\n")
    (tmp_path / "secret").write_text("sk_from_file")
    (tmp_path / "named").write_text("VOICEPASS_WARM_PASSES=2\nELEVENLABS_API_KEY_FILE=secret\n")
    set_env(monkeypatch, {"ELEVENLABS_API_KEY": None, "VOICEPASS_ENV_FILE": "named"})

    settings = load_and_configure()

    assert (settings.voicepass_warm_passes, settings.voicepass_max_calls) == (2, 512)
    assert settings.read_secret("ELEVENLABS_API_KEY") == "sk_from_file"


def test_an_empty_variable_unsets_the_line_of_the_env_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("VOICEPASS_WARM_PASSES=3\nVOICEPASS_MAX_CALLS=7\n")
    set_env(monkeypatch, {"VOICEPASS_WARM_PASSES": " "})

    settings = load_settings()

    assert (settings.voicepass_warm_passes, settings.voicepass_max_calls) == (0, 7)


def test_no_env_file_is_read_if_the_setting_names_dev_null(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("VOICEPASS_WARM_PASSES=1\nVOICEPASS_UNKNOWN=1\n")
    set_env(monkeypatch, {"VOICEPASS_ENV_FILE": "/dev/null"})

    assert load_and_configure().voicepass_warm_passes == 0


def test_a_named_env_file_that_cannot_be_read_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    set_env(monkeypatch, {"VOICEPASS_ENV_FILE": "missing"})

    with pytest.raises(SettingsRefusedError, match="VOICEPASS_ENV_FILE names a file that cannot be read"):
        load_settings()


def test_the_example_file_needs_only_five_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text((ROOT / ".env.example").read_text())
    monkeypatch.setenv("ELEVENLABS_API_KEY", "sk_1")
    monkeypatch.setenv("ELEVENLABS_AGENT_ID", "agent_1")
    monkeypatch.setenv("VOICEPASS_JWT_SECRET", SECRET)
    monkeypatch.setenv("VOICEPASS_JWT_ISSUER", "https://login.example")
    monkeypatch.setenv("VOICEPASS_JWT_AUDIENCE", "voicepass")

    assert load_and_configure().elevenlabs_base_url == "https://api.elevenlabs.io"


def test_the_reference_names_every_algorithm() -> None:
    described = Settings.model_fields["voicepass_jwt_algorithm"].description or ""
    words = re.findall(r"(\w+?)(256/384/512)|(EdDSA)", described)

    assert {family + size for family, sizes, _ in words for size in sizes.split("/") if size} | {
        name for *_, name in words if name
    } == ALGORITHMS
