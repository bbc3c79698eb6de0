"""The address of the caller, when trusted proxies stand between."""

import ipaddress
from collections.abc import Sequence

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


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
