"""EngineCore and its workers wake each other where they compute on the cores that serve them.

vLLM's readers look at shared memory as fast as they can for a second after each message. That saves
microseconds beside a GPU; on a CPU it takes a core from HTTP and from the model. vLLM's own
notification is no way to wait there: it passes two more threads and may be dropped. A datagram
passes none and is queued.
"""

import errno
import hashlib
import socket
import time
from contextlib import suppress
from typing import Any

# The waits for a scheduler's or a sampler's turn are over by then, and sleeping costs them a tenth.
_SPIN_S = 1e-3
_MAX_READERS = 64


def install() -> None:
    """Replace how the shared-memory queues of this process wait and notify."""
    import zmq
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    make = SpinCondition.__init__

    def init(self: Any, is_reader: bool, context: Any, notify_address: str, **options: Any) -> None:
        make(self, is_reader, context, notify_address, **options)
        self.wake_address = notify_address
        self.wake_socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.wake_socket.setblocking(False)
        self.wait_began_s = None
        if is_reader:
            _bind(self.wake_socket, notify_address)
            self.poller.unregister(self.local_notify_socket)
            self.poller.register(self.wake_socket.fileno(), zmq.POLLIN)

    def wait(self: Any, timeout_ms: int | None = None) -> None:
        """Return when the writer has notified, when `cancel` is called, or by and by."""
        now_s = time.monotonic()
        if self.wait_began_s is None:
            self.wait_began_s = now_s
        if now_s - self.wait_began_s < _SPIN_S:
            shm_broadcast.sched_yield()
        elif self.wake_socket.fileno() in dict(self.poller.poll(timeout_ms)):
            with suppress(BlockingIOError):
                while self.wake_socket.recv(1):  # all of them are answered by the next look
                    pass

    def record_read(self: Any) -> None:
        self.wait_began_s = None

    def notify(self: Any) -> None:
        for number in range(_MAX_READERS):
            try:
                self.wake_socket.sendto(b"\0", _address(self.wake_address, number))
            except BlockingIOError:
                continue  # it has more to read than it can have missed
            except ConnectionRefusedError:
                break  # there are no more

    SpinCondition.__init__ = init
    SpinCondition.wait = wait
    SpinCondition.record_read = record_read
    SpinCondition.notify = notify


def _bind(wake_socket: socket.socket, notify_address: str) -> None:
    """Each reader of a queue takes the first number that is free."""
    for number in range(_MAX_READERS):
        try:
            return wake_socket.bind(_address(notify_address, number))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(f"{_MAX_READERS} processes read {notify_address} already")


def _address(notify_address: str, number: int) -> bytes:
    """An abstract one, so that nothing stays behind of a process that is killed."""
    digest = hashlib.blake2b(notify_address.encode(), digest_size=12).hexdigest()
    return f"\0ballast-{digest}-{number}".encode()
