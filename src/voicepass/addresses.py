"""Which addresses may be trusted: where a secret may be sent, and whose word tells the caller's own address."""

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def is_loopback(host: str | None) -> bool:
    """Whether `host` is this machine, by its own name or address."""
    if host == "localhost":
        return True
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_safe_url(url: str) -> bool:
    """Whether a secret, or trust in what comes back, may travel there: https://, or http:// to this machine."""
    # `urlsplit` drops line breaks and takes spaces for part of a host; what dials the URL would not agree with it.
    if not url.isprintable() or any(mark in url for mark in " \\#"):
        return False
    try:
        parts = urlsplit(url)
        secure = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname))
        return secure and bool(parts.hostname) and parts.username is None and parts.port != 0
    except ValueError:  # a port that is no number
        return False


def client_address(peer: str | None, forwarded_for: Sequence[str], trusted: Sequence[Network]) -> str | None:
    """Return the address a request came from: the rightmost hop that is not a trusted proxy.

    `forwarded_for`: the values of the X-Forwarded-For headers, in order. A client can write what it likes into them;
    only what a trusted proxy has appended counts, so they are read from the right, and never when `peer` is a stranger.
    """
    hops = [hop.strip() for value in forwarded_for for hop in value.split(",")]
    address = peer
    while is_in(address, trusted) and hops:
        nearer = hops.pop()
        if not _is_address(nearer):
            break
        address = nearer
    return address


def _is_address(text: str) -> bool:
    return _parsed(text) is not None and "%" not in text  # after it, a zone's name: any text whatever


def is_in(address: str | None, networks: Sequence[Network]) -> bool:
    """Whether `address` belongs to one of the networks; False for text that is not an address."""
    parsed = _parsed(address) if networks and address is not None else None
    return parsed is not None and any(parsed in network for network in networks)


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    # A socket for both versions shows 10.0.0.1 as ::ffff:10.0.0.1.
    return getattr(parsed, "ipv4_mapped", None) or parsed
