"""Sizes for people. Everywhere else a size is an int of bytes."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def gib(size_bytes: int) -> str:
    """One decimal of GiB, two below 1 GiB so that a small model is not "0.0 GiB"."""
    size = size_bytes / GIB
    return f"{size:.2f} GiB" if abs(size) < 1 else f"{size:.1f} GiB"


def gib_to_bytes(size_gib: float) -> int:
    """The whole bytes in this many GiB."""
    return int(size_gib * GIB)


def ceil_div(dividend: int, divisor: int) -> int:
    """Division rounded up, in integers."""
    return -(-dividend // divisor)


def round_up(number: int, multiple: int) -> int:
    """The next multiple at or above the number."""
    return ceil_div(number, multiple) * multiple
