"""Which of a machine's network interfaces has an address."""

from __future__ import annotations

import socket

import psutil


def interface_of(host: str) -> str | None:
    """The name of the interface that has the address, or the name, of this machine; None when none has."""
    try:
        wanted = {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] in wanted for each in addresses):
            return name
    return None
