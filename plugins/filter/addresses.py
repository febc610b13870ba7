"""Filters that turn a server's listen address into the address for its clients."""

from __future__ import annotations

from collections.abc import Callable

# Addresses that only servers use, and the address that a client connects to instead.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "::": "::1"}  # noqa: S104 - not bound to


def connect_address(bind_address: str) -> str:
    """Return the address at which a client on the same machine reaches a server."""
    return _LOOPBACK.get(bind_address, bind_address)


def url_host(address: str) -> str:
    """Return an address as the host of a URL: IPv6 in brackets (RFC 3986 §3.2.2)."""
    return f"[{address}]" if ":" in address else address


class FilterModule:
    """Filters ``connect_address`` and ``url_host``."""

    def filters(self) -> dict[str, Callable[[str], str]]:
        """Return the filters by name."""
        return {"connect_address": connect_address, "url_host": url_host}
