"""Who holds a port: looked up before a start, because Ray says only that it did not work."""

from dataclasses import dataclass
from typing import Any

import psutil


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process that listens on a port."""

    port: int
    process_id: int | None  # None: another user's, which the kernel does not tell
    command: str = ""
    orphaned: bool = False

    def __str__(self) -> str:
        if self.process_id is None:
            return f"port {self.port} is taken by a process of another user: take another port"
        left_over = ", left over from a server that was killed" if self.orphaned else ""
        return (
            f"port {self.port} is taken by process {self.process_id} ({self.command}{left_over}): "
            f"end it with `kill {self.process_id}`, or take another port"
        )


def holder_of(port: int) -> Holder | None:
    """The process that listens on this TCP port of this machine, if any."""
    for connection in _listening():
        if connection.laddr.port != port:
            continue
        if connection.pid is None:
            return Holder(port=port, process_id=None)
        try:
            process = psutil.Process(connection.pid)
            command = " ".join(process.cmdline()[:4]) or process.name()
            orphaned = process.ppid() == 1 and "haproxy" in command
        except psutil.NoSuchProcess:
            continue
        return Holder(port=port, process_id=connection.pid, command=command, orphaned=orphaned)
    return None


def taken_of(ports: range) -> frozenset[int]:
    """Those that somebody listens on, on this machine."""
    return frozenset(c.laddr.port for c in _listening() if c.laddr.port in ports)


def _listening() -> list[Any]:
    connections = psutil.net_connections(kind="tcp")
    return [connection for connection in connections if connection.status == psutil.CONN_LISTEN]
