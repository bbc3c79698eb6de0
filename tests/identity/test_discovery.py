"""voicepass uses a discovery document only if it is the issuer's own and the URL of its keys is safe."""

import pytest
import respx

from tests.conftest import TOKEN_ISSUER
from tests.identity.hostile_jwks import KID, make_set
from tests.identity.issuer import EC_JWK, JWKS_PATH, NEW, Issuer, find_key_name, make_answer, open_keys, open_trap
from tests.tables import table
from voicepass.errors import KeysUnavailable, TokenInvalid
from voicepass.identity.jwks import DISCOVERY_PATH

pytestmark = pytest.mark.anyio


async def test_the_keys_are_fetched_from_the_url_in_the_discovery_document(issuer: Issuer) -> None:
    issuer.answers["/elsewhere"] = make_answer(make_set(NEW))
    issuer.describe(jwks_uri=f"{issuer.url}/elsewhere", authorization_endpoint="https://login.example/authorize")

    async with open_keys(issuer, url=issuer.url + DISCOVERY_PATH) as keys:
        outcomes = [await find_key_name(keys, kid) for kid in ("new", KID)]

    assert outcomes == ["new", TokenInvalid]
    assert issuer.asked == [DISCOVERY_PATH, "/elsewhere"]


async def test_a_changed_url_of_the_keys_is_used_at_the_next_fetch(issuer: Issuer) -> None:
    async with open_keys(issuer, url=issuer.url + DISCOVERY_PATH) as keys:
        await find_key_name(keys)
        issuer.answers["/moved"] = make_answer(make_set(NEW))
        issuer.describe(jwks_uri=f"{issuer.url}/moved")
        issuer.clock.advance(30)

        outcomes = [await find_key_name(keys, kid) for kid in ("new", KID)]

    assert outcomes == ["new", TokenInvalid]


MISLEADING: dict[str, dict[str, object]] = {
    "another issuer": {"issuer": "https://attacker.example"},
    "no issuer": {"issuer": None},
    "the issuer with a slash": {"issuer": f"{TOKEN_ISSUER}/"},
    "the issuer in capitals": {"issuer": TOKEN_ISSUER.upper()},
    "the issuer in a list": {"issuer": [TOKEN_ISSUER]},
    "no jwks_uri": {"jwks_uri": None},
    "a jwks_uri that is a list": {"jwks_uri": [f"https://127.0.0.1{JWKS_PATH}"]},
    "a jwks_uri that is a number": {"jwks_uri": 7},
    "an empty jwks_uri": {"jwks_uri": ""},
    "a relative jwks_uri": {"jwks_uri": JWKS_PATH},
    "a jwks_uri without a scheme": {"jwks_uri": f"//login.example{JWKS_PATH}"},
    "http:// to elsewhere": {"jwks_uri": f"http://login.example{JWKS_PATH}"},
    "http:// to a private address": {"jwks_uri": f"http://169.254.169.254{JWKS_PATH}"},
    "http:// to what looks like loopback": {"jwks_uri": f"http://127.0.0.1.attacker.example{JWKS_PATH}"},
    "a file": {"jwks_uri": "file:///etc/passwd"},
    "a data URL": {"jwks_uri": 'data:application/json,{"keys":[]}'},
    "a user in it": {"jwks_uri": f"https://user:password@127.0.0.1{JWKS_PATH}"},
    "a fragment in it": {"jwks_uri": f"https://127.0.0.1{JWKS_PATH}#x"},
    "no host": {"jwks_uri": f"https://{JWKS_PATH}"},
    "a port that is no number": {"jwks_uri": f"https://127.0.0.1:https{JWKS_PATH}"},
    "port 0": {"jwks_uri": f"https://127.0.0.1:0{JWKS_PATH}"},
    "a line break in the host": {"jwks_uri": f"https://127.0.0.1\n{JWKS_PATH}"},
    "a NUL in the path": {"jwks_uri": f"https://127.0.0.1{JWKS_PATH}\0"},
    "a surrogate in the path": {"jwks_uri": f"https://127.0.0.1{JWKS_PATH}\ud800"},
    "a surrogate in the host": {"jwks_uri": f"https://\ud800.example{JWKS_PATH}"},
    "a host that is no DNS name": {"jwks_uri": f"https://\u2603\u2603.example{JWKS_PATH}"},
    "an invalid punycode host": {"jwks_uri": f"https://xn--a.example{JWKS_PATH}"},
    "a bracket without its pair": {"jwks_uri": f"https://[::1{JWKS_PATH}"},
    "an address of a future IP version": {"jwks_uri": f"https://[v1.a]{JWKS_PATH}"},
    "70,000 characters": {"jwks_uri": f"https://127.0.0.1/{'x' * 70_000}"},
}


# The check of a URL accepts these, but nothing can connect to them.
ACCEPTED_AS_A_URL = {
    "a host that is no DNS name",
    "an invalid punycode host",
    "an address of a future IP version",
    "70,000 characters",
}


@table("document", MISLEADING)
async def test_a_misleading_discovery_document_is_not_followed(issuer: Issuer, document: str) -> None:
    issuer.asked.clear()
    issuer.describe(**MISLEADING[document])
    async with open_keys(issuer, url=issuer.url + DISCOVERY_PATH) as keys:
        outcomes = [await find_key_name(keys) for _ in range(3)]
        with pytest.raises(KeysUnavailable) as refused:
            await keys.check()

    note = refused.value.operator_note.rpartition("(")[2].removesuffix(")")
    assert outcomes == [KeysUnavailable] * 3
    assert issuer.asked == [DISCOVERY_PATH]
    if "issuer" in MISLEADING[document]:
        assert note == "the discovery document is another issuer's"
    elif document not in ACCEPTED_AS_A_URL:
        assert note == "the discovery document names no https:// jwks_uri"


@pytest.mark.parametrize("path", [DISCOVERY_PATH, JWKS_PATH])
async def test_no_redirect_is_followed_from_the_document_or_from_its_keys(issuer: Issuer, path: str) -> None:
    async with open_trap() as (elsewhere, visitors), open_keys(issuer, url=issuer.url + DISCOVERY_PATH) as keys:
        issuer.answers[path] = make_answer(b"", status="307 Temporary Redirect", headers=f"Location: {elsewhere}/\r\n")

        seen = await find_key_name(keys)

    assert seen is KeysUnavailable
    assert visitors == []


async def test_no_key_is_fetched_over_http_from_a_document_at_https(issuer: Issuer) -> None:
    url = TOKEN_ISSUER + DISCOVERY_PATH
    with respx.mock(assert_all_called=False, using="voicepass") as router:
        insecure = router.get(f"http://127.0.0.1{JWKS_PATH}").respond(json={"keys": [EC_JWK]})
        secure = router.get(url).respond(json={"issuer": TOKEN_ISSUER, "jwks_uri": f"http://127.0.0.1{JWKS_PATH}"})

        async with open_keys(issuer, url=url) as keys:
            with pytest.raises(KeysUnavailable) as refused:
                await keys.check()

    assert refused.value.operator_note.endswith("(the discovery document leads from https:// to http://)")
    assert secure.called
    assert not insecure.called


async def test_the_keys_of_a_document_at_https_are_fetched_over_https(issuer: Issuer) -> None:
    url, jwks_uri = TOKEN_ISSUER + DISCOVERY_PATH, TOKEN_ISSUER + JWKS_PATH
    with respx.mock(using="voicepass") as router:
        router.get(url).respond(json={"issuer": TOKEN_ISSUER, "jwks_uri": jwks_uri})
        router.get(jwks_uri).respond(json={"keys": [EC_JWK]})

        async with open_keys(issuer, url=url) as keys:
            seen = await find_key_name(keys)

    assert seen == KID
