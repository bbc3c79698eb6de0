"""The address of the caller when there are trusted proxies in between."""

import ipaddress
from collections.abc import Sequence

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def client_address(peer: str | None, forwarded_for: Sequence[str], trusted: Sequence[Network]) -> str | None:
    """Return the address a request came from: the rightmost hop that is not a trusted proxy.

    `forwarded_for` holds the values of the X-Forwarded-For headers, in order. A client can write anything into them.
    Only what a trusted proxy appended counts, so they are read from the right, and only if `peer` is trusted.
    """
    hops = [_remove_port(hop.strip()) for value in forwarded_for for hop in value.split(",")]
    address = peer
    while is_in(address, trusted) and hops:
        nearer = hops.pop()
        if _parse(nearer) is None or "%" in nearer:  # the name of a zone, which may be any text
            break
        address = nearer
    return address


def is_in(address: str | None, networks: Sequence[Network]) -> bool:
    """Whether `address` belongs to one of the networks; False for text that is not an address."""
    parsed = _parse(address) if networks and address is not None else None
    return parsed is not None and any(parsed in network for network in networks)


def _remove_port(hop: str) -> str:
    """Return the address in `192.0.2.1:4711`, `[2001:db8::1]:4711` or `[2001:db8::1]`; other text as it is."""
    if hop.startswith("["):
        address, bracket, rest = hop[1:].partition("]")
        is_complete = bracket and (not rest or (rest[0] == ":" and _is_port(rest[1:])))
        return address if is_complete and ":" in address else hop
    address, colon, port = hop.rpartition(":")
    return address if colon and ":" not in address and _is_port(port) else hop


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= len("65535")


def _parse(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    # A socket for both versions reports 10.0.0.1 as ::ffff:10.0.0.1.
    return getattr(parsed, "ipv4_mapped", None) or parsed
