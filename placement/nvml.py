"""The cards of this machine as NVIDIA's driver sees them. Thin: pynvml in, values out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vram.errors import Invalid
from vram.gpu import CARD_ALIASES, CARDS_GIB, NOISE, Device
from vram.units import GIB

FIRST_WITH_BFLOAT16 = (8, 0)
FIRST_WITH_FLOAT8 = (8, 9)
MOST_NVLINKS = 18  # of a Hopper or Blackwell card
# What a display or the driver itself keeps of a card that nobody uses.
IDLE_BYTES = GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverCard:
    """One card, or one MIG slice of one. `total_bytes` is without what the driver keeps."""

    device: Device
    free_bytes: int
    nvlinks: int

    @property
    def free_share(self) -> float:
        """In hundredths, rounded down; an idle card is a whole one."""
        if self.device.total_bytes - self.free_bytes <= IDLE_BYTES:
            return 1.0
        return int(100 * self.free_bytes / self.device.total_bytes) / 100


def read_cards() -> tuple[DriverCard, ...]:
    """Every card of this machine; a card that is cut is its slices. Raises Invalid if none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Invalid(
            f"this machine has no NVIDIA GPU that a driver answers for ({error}): name cards with "
            '--gpus "1xH100", or plan for device.kind: cpu',
            "gpus",
        ) from error
    try:
        number = pynvml.nvmlDeviceGetCount()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(number)]
        cards = tuple(card for handle in handles for card in _of_handle(pynvml, handle))
    finally:
        pynvml.nvmlShutdown()
    if not cards:
        raise Invalid(
            'the driver of this machine sees no GPU: name cards with --gpus "1xH100"', "gpus"
        )
    return cards


def card_name(product: str, total_bytes: int) -> str:
    """Our name of a product; one that we do not know keeps its own, since its size is known."""
    words = NOISE.sub(" ", product.upper().replace("-", " ")).split()
    candidates = ["-".join(words), "".join(words), *words]
    for word in candidates:
        sizes = [name for name in CARDS_GIB if name == word or name.startswith(f"{word}-")]
        if sizes:
            # A100, H100, V100: the memory says which.
            return min(sizes, key=lambda name: abs(CARDS_GIB[name] * GIB - total_bytes))
        if word in CARD_ALIASES:
            return CARD_ALIASES[word]
    return "-".join(product.split())[:60] or "unnamed"


def _of_handle(pynvml: Any, handle: Any) -> Iterator[DriverCard]:
    whole = _card(pynvml, handle, _text(pynvml.nvmlDeviceGetName(handle)))
    slices = list(_slices(pynvml, handle, whole))
    yield from slices or [whole]


def _slices(pynvml: Any, handle: Any, whole: DriverCard) -> Iterator[DriverCard]:
    try:
        current, _pending = pynvml.nvmlDeviceGetMigMode(handle)
        if not current:
            return
        number = pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except pynvml.NVMLError:
        return  # a card that can't be cut
    for index in range(number):
        try:
            part = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except pynvml.NVMLError:
            continue  # this place is not used
        total_bytes, free_bytes = _memory(pynvml, part)
        profile = _text(pynvml.nvmlDeviceGetName(part)).rpartition("MIG ")[2]
        device = Device(
            name=f"{whole.device.name} MIG {profile}",
            total_bytes=total_bytes,
            kind="cuda",
            bfloat16=whole.device.bfloat16,
            float8=whole.device.float8,
        )
        yield DriverCard(device=device, free_bytes=free_bytes, nvlinks=0)


def _card(pynvml: Any, handle: Any, product: str) -> DriverCard:
    total_bytes, free_bytes = _memory(pynvml, handle)
    capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    device = Device(
        name=card_name(product, total_bytes),
        total_bytes=total_bytes,
        kind="cuda",
        bfloat16=capability >= FIRST_WITH_BFLOAT16,
        float8=capability >= FIRST_WITH_FLOAT8,
    )
    return DriverCard(device=device, free_bytes=free_bytes, nvlinks=_nvlinks(pynvml, handle))


def _memory(pynvml: Any, handle: Any) -> tuple[int, int]:
    """What programs can have, and what of it is free: the driver's own part counts as neither."""
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    return int(memory.total) - int(memory.reserved), int(memory.free)


def _nvlinks(pynvml: Any, handle: Any) -> int:
    found = 0
    for link in range(MOST_NVLINKS):
        try:
            found += bool(pynvml.nvmlDeviceGetNvLinkState(handle, link))
        except pynvml.NVMLError:
            break  # there is no such link on this card
    return found


def _text(name: str | bytes) -> str:
    """Older bindings give bytes."""
    return name.decode() if isinstance(name, bytes) else name
