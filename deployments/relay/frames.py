"""What a relay and a replica say to each other over TCP. Knows neither HTTP nor models."""

import asyncio
from collections import deque
from dataclasses import dataclass
from enum import Enum

MAX_PAYLOAD_BYTES = 2**30
_READ_BYTES = 2**16
_HEADER_BYTES = 5  # the kind, and the payload's length


class Kind(Enum):
    SECRET = b"S"  # relay: the first frame; without the right one nothing is read any further
    NOTES = b"N"  # relay: what earlier replicas wrote of this request; replica: what it adds
    REQUEST = b"Q"  # relay: `RequestHead`
    BODY = b"B"  # of the request, of the answer
    HEAD = b"H"  # replica: `ResponseHead`
    END = b"E"  # replica: the answer is complete
    FAILED = b"F"  # replica: a mistake in the application; another one would make it again
    BEAT = b"K"  # replica: alive, with or without news


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    payload: bytes = b""


class BrokenFrameError(Exception):
    """These bytes are no frames."""


def encode(kind: Kind, payload: bytes = b"") -> bytes:
    return kind.value + len(payload).to_bytes(4) + payload


class Decoder:
    """Frames out of bytes, however they are cut."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Raises `BrokenFrameError`."""
        self._bytes += data
        frames, at = [], 0
        while len(self._bytes) - at >= _HEADER_BYTES:
            length = int.from_bytes(self._bytes[at + 1 : at + _HEADER_BYTES])
            if length > MAX_PAYLOAD_BYTES:
                raise BrokenFrameError(f"a frame of {length} bytes")
            end = at + _HEADER_BYTES + length
            if len(self._bytes) < end:
                break
            payload = bytes(self._bytes[at + _HEADER_BYTES : end])
            frames.append(Frame(_kind(bytes(self._bytes[at : at + 1])), payload))
            at = end
        del self._bytes[:at]
        return frames


class FrameReader:
    """Frames as they arrive."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._decoder = Decoder()
        self._frames: deque[Frame] = deque()

    async def read(self, *, timeout_s: float | None = None) -> Frame | None:
        """None: the other side is gone. Raises `BrokenFrameError`, `OSError`, `TimeoutError`."""
        while not self._frames:
            async with asyncio.timeout(timeout_s):
                data = await self._reader.read(_READ_BYTES)
            if not data:
                return None
            self._frames.extend(self._decoder.feed(data))
        return self._frames.popleft()


def _kind(value: bytes) -> Kind:
    try:
        return Kind(value)
    except ValueError:
        raise BrokenFrameError(f"a frame of the unknown kind {value!r}") from None
