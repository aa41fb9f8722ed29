"""Which ports the processes that a process has started listen on."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

import psutil


class Port(NamedTuple):
    program: str
    """As ps shows it: gcs_server, or ray::DashboardAgent where a process has named itself."""
    address: str
    number: int

    @property
    def reachable(self) -> bool:
        """From another machine."""
        address = ipaddress.ip_address(self.address)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return not (mapped or address).is_loopback


def beyond_loopback(pid: int) -> tuple[list[Port], list[Port]]:
    """All ports that a process and those below it listen on, and of them those that others can reach."""
    process = psutil.Process(pid)
    found = []
    for one in [process, *process.children(recursive=True)]:
        try:
            command = one.cmdline()
            for connection in one.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    program = command[0].split("/")[-1].strip() if command else one.name()
                    found.append(Port(program, connection.laddr.ip, connection.laddr.port))
        except psutil.NoSuchProcess:
            continue
    return found, [port for port in found if port.reachable]
