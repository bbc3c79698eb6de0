"""Which URLs may receive a secret, and which header names the caller's address."""

from ipaddress import ip_network

import pytest
import respx

from tests.conftest import serving_app, settings_with
from tests.tables import table
from voicepass.api.middleware import client_address
from voicepass.app import create_app
from voicepass.outbound import is_safe_url

SAFE = [
    *("https://api.elevenlabs.io", "https://api.elevenlabs.io/", "https://login.example/a/b?c=d"),
    *("HTTPS://LOGIN.EXAMPLE", "https://login.example:8443/x", "https://192.0.2.1", "https://[2001:db8::1]/x"),
    *("https://login.example:443", "http://localhost", "http://localhost:8000/x", "http://127.0.0.1:8000"),
    *("http://127.9.9.9", "http://[::1]:8000/x"),
]
UNSAFE = [
    *("", " ", "https", "https:", "https://", "https:///x", "//login.example", "login.example", "/x"),
    *("https:x.example", "http://login.example", "http://10.0.0.1", "http://192.168.0.1", "http://0.0.0.0"),
    *("http://[::]", "http://[fe80::1]", "http://localhost.x.example", "http://127.0.0.1.x.example"),
    *("http://x.example/localhost", "http://loca1host", "http://127.1", "http://2130706433", "http://0x7f000001"),
    *("http://0177.0.0.1", "http://localhost@x.example", "ftp://login.example", "ws://localhost"),
    *("wss://login.example", "file:///etc/passwd", "javascript:x", "data:,x", "https://user@login.example"),
    *("https://user:pw@login.example", "https://@login.example", "https://:@login.example"),
    *("https://login.example#", "https://login.example#x", "https://login.example/#/x", "https://login.example:0"),
    *("https://login.example:99999", "https://login.example:x", "https://login.example:-1", "https://[::1"),
    *("https://[x]/", "https://login.exa mple", " https://login.example", "https://login.example "),
    *("https://login.example\n", "https://\nlogin.example", "https://login.example\r\nx: y"),
    *("https://login\t.example", "https://login.example\0", "\x01https://login.example"),
    *("https://login.example\\@x.example", "https://login.example\\.x.example", "https:\\\\login.example"),
    *("https://login.example/\x7f", "https://login.example/\u2028", "https://login\u200b.example"),
    *("https://log\u202ein.example",),
]


@table("url", SAFE)
def test_a_secret_may_be_sent_over_tls_or_to_this_machine(url: str) -> None:
    assert is_safe_url(url)


@table("url", UNSAFE)
def test_a_secret_is_sent_to_no_other_url(url: str) -> None:
    assert not is_safe_url(url)


PROXIES = [ip_network(network) for network in ("10.0.0.0/8", "192.0.2.7/32", "2001:db8:aaaa::/48", "fe80::/10")]
STRANGER, PROXY, PROXY_6 = "203.0.113.50", "10.1.2.3", "2001:db8:aaaa::3"

SPOOFED = [
    *("127.0.0.1", "10.0.0.1", "192.0.2.7", "198.51.100.1", "::1", "2001:db8:aaaa::1", "10.0.0.1, 10.0.0.2", "null"),
    *("198.51.100.1, 10.0.0.1", "203.0.113.50", "unknown", "", ",", ", ,", "for=198.51.100.1", '"198.51.100.1"'),
]

# The X-Forwarded-For headers that the trusted proxy at PROXY sends, and the caller's address in them.
HOPS: dict[str, tuple[list[str], str]] = {
    "one hop": (["198.51.100.1"], "198.51.100.1"),
    "an IPv6 hop": (["2001:db8::9"], "2001:db8::9"),
    "spaces around it": (["  198.51.100.1  "], "198.51.100.1"),
    "a tab before it": (["\t198.51.100.1"], "198.51.100.1"),
    "no space after the comma": (["203.0.113.9,198.51.100.1"], "198.51.100.1"),
    "the caller wrote an address before it": (["127.0.0.1, 198.51.100.1"], "198.51.100.1"),
    "the caller claims a proxy's address": (["10.9.9.9, 198.51.100.1"], "198.51.100.1"),
    "the caller claims many": (["1.1.1.1, 2.2.2.2, 3.3.3.3, 198.51.100.1"], "198.51.100.1"),
    "the caller writes nonsense": (["unknown, <script>, 198.51.100.1"], "198.51.100.1"),
    "the caller sends a header of their own": (["1.1.1.1", "198.51.100.1"], "198.51.100.1"),
    "the caller sends several": (["1.1.1.1", "2.2.2.2, 10.0.0.1", "198.51.100.1"], "198.51.100.1"),
    "a second trusted proxy": (["198.51.100.1, 10.0.0.2"], "198.51.100.1"),
    "a third one": (["198.51.100.1, 192.0.2.7, 10.0.0.2"], "198.51.100.1"),
    "a second proxy over IPv6": (["198.51.100.1, 2001:db8:aaaa::5"], "198.51.100.1"),
    "a proxy that writes IPv4 as IPv6": (["198.51.100.1, ::ffff:10.0.0.2"], "198.51.100.1"),
    "proxies in several headers": (["1.1.1.1, 198.51.100.1", "10.0.0.2", "10.0.0.3"], "198.51.100.1"),
    "an untrusted proxy in the middle": (["198.51.100.1, 203.0.113.9, 10.0.0.2"], "203.0.113.9"),
    "a neighbour of a trusted address": (["198.51.100.1, 192.0.2.8"], "192.0.2.8"),
    "a neighbour of a trusted network": (["198.51.100.1, 11.0.0.1"], "11.0.0.1"),
    "only trusted ones: the first": (["10.0.0.9, 10.0.0.2"], "10.0.0.9"),
    "no header": ([], PROXY),
    "an empty one": ([""], PROXY),
    "a comma": ([","], PROXY),
    "a comma at the end": (["198.51.100.1,"], PROXY),
    "nonsense": (["nonsense"], PROXY),
    "unknown, as a privacy proxy writes": (["198.51.100.1, unknown"], PROXY),
    "nonsense behind a second proxy": (["nonsense, 10.0.0.2"], "10.0.0.2"),
    "a name": (["localhost"], PROXY),
    "a port": (["198.51.100.1:4711"], "198.51.100.1"),
    "a port of a second trusted proxy": (["198.51.100.1:4711, 10.0.0.2:80"], "198.51.100.1"),
    "IPv6 with a port": (["[2001:db8::9]:4711"], "2001:db8::9"),
    "IPv6 in brackets": (["[2001:db8::9]"], "2001:db8::9"),
    "a trusted proxy in brackets": (["198.51.100.1, [2001:db8:aaaa::5]:443"], "198.51.100.1"),
    "IPv4 in brackets": (["[198.51.100.1]:4711"], PROXY),
    "half a pair of brackets": (["[2001:db8::9"], PROXY),
    "text behind the brackets": (["[2001:db8::9]x"], PROXY),
    "IPv6 with a zone in brackets": (["[fe80::1%eth0]:4711"], PROXY),
    "a port that is no number": (["198.51.100.1:http"], PROXY),
    "a port without its number": (["198.51.100.1:"], PROXY),
    "a port of another script": (["198.51.100.1:４７"], PROXY),
    "only a port": ([":4711"], PROXY),
    "IPv6 with a zone": (["fe80::1%eth0"], PROXY),
    "IPv6 with a zone that is a text": (["2001:db8::9%\x1b[31mforged"], PROXY),
    "a network": (["198.51.100.0/24"], PROXY),
    "leading zeros, which some read as octal": (["198.051.100.001"], PROXY),
    "three numbers": (["198.51.100"], PROXY),
    "a bare number": (["3325256705"], PROXY),
    "hexadecimal": (["0xc6336401"], PROXY),
    "a number too large": (["198.51.100.256"], PROXY),
    "in quotes": (['"198.51.100.1"'], PROXY),
    "RFC 7239": (["for=198.51.100.1"], PROXY),
    "an escape sequence": (["\x1b[31m198.51.100.1"], PROXY),
    "a line feed": (["198.51.100.1\n198.51.100.2"], PROXY),
    "a NUL": (["198.51.100.1\0"], PROXY),
    "digits of another script": (["１９８.51.100.1"], PROXY),
    "a semicolon": (["198.51.100.1;198.51.100.2"], PROXY),
    "a space between two": (["198.51.100.1 198.51.100.2"], PROXY),
    "10,000 trusted hops": ([", ".join(["198.51.100.1"] + ["10.0.0.1"] * 10_000)], "198.51.100.1"),
}


@table("header", SPOOFED)
@table("peer", [STRANGER, "2001:db8::50", "11.0.0.1", "192.0.2.8", "::ffff:203.0.113.50"])
def test_a_header_of_an_untrusted_peer_never_changes_its_address(peer: str, header: str) -> None:
    assert client_address(peer, [header], PROXIES) == peer


@table("header", SPOOFED)
def test_without_trusted_proxies_forwarded_addresses_are_ignored(header: str) -> None:
    assert client_address("127.0.0.1", [header, "198.51.100.1"], []) == "127.0.0.1"


@table("case", HOPS)
def test_behind_a_trusted_proxy_the_rightmost_untrusted_address_counts(case: str) -> None:
    headers, expected = HOPS[case]

    assert client_address(PROXY, headers, PROXIES) == expected


@pytest.mark.parametrize("peer", [PROXY_6, "fe80::1%eth0", "::ffff:10.1.2.3", "192.0.2.7"])
def test_a_trusted_proxy_may_connect_by_ipv6_with_a_zone_or_as_mapped_ipv4(peer: str) -> None:
    assert client_address(peer, ["1.1.1.1, 198.51.100.1"], PROXIES) == "198.51.100.1"


@pytest.mark.parametrize("peer", [None, "", "testclient", "unix:"])
def test_a_peer_without_an_address_is_no_proxy(peer: str | None) -> None:
    assert client_address(peer, ["198.51.100.1"], PROXIES) == peer


def test_the_tables_hold_at_least_sixty_cases() -> None:
    assert len(HOPS) + len(SPOOFED) >= 60


ARRIVALS: dict[str, tuple[str, str, dict[str, str], str]] = {
    "no proxy is trusted": ("", STRANGER, {"X-Forwarded-For": "198.51.100.1"}, STRANGER),
    "a stranger claims a proxy's address": ("10.0.0.0/8", STRANGER, {"X-Forwarded-For": "10.0.0.1"}, STRANGER),
    "a proxy appended": ("10.0.0.0/8", PROXY, {"X-Forwarded-For": "127.0.0.1, 198.51.100.1"}, "198.51.100.1"),
    "a proxy passed nonsense on": ("10.0.0.0/8", PROXY, {"X-Forwarded-For": "nonsense"}, PROXY),
    "RFC 7239 and nginx": ("10.0.0.0/8", PROXY, {"Forwarded": "for=1.1.1.1", "X-Real-IP": "1.1.1.1"}, PROXY),
    "headers of cloud proxies": ("10.0.0.0/8", PROXY, {"X-Client-IP": "1.1.1.1", "True-Client-IP": "1.1.1.1"}, PROXY),
    "IPv6": ("10.0.0.0/8,2001:db8:aaaa::/48", PROXY_6, {"X-Forwarded-For": "2001:db8::9, 10.0.0.1"}, "2001:db8::9"),
}


@pytest.mark.anyio
@table("case", ARRIVALS)
async def test_the_log_names_the_address_that_the_request_came_from(
    upstream: respx.MockRouter, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    trusted, peer, headers, client = ARRIVALS[case]

    async with serving_app(create_app(settings_with(voicepass_trusted_proxies=trusted)), peer=peer) as api:
        await api.post("/v1/signed-url", headers=headers)

    assert f'"client": "{client}"' in capsys.readouterr().err
    assert not upstream.calls
