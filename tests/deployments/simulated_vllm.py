"""vLLM's start-up as arithmetic: a truth beside the estimate, and where a load dies of it."""

from dataclasses import dataclass, field

from deployments.events import Died, GiveUp, Spawn, Started
from deployments.oom import Cause, Death
from deployments.supervisor import State, Supervisor
from vram.errors import Invalid
from vram.estimate import estimate
from vram.gpu import Device
from vram.graphs import counted_graph_bytes
from vram.kv_cache import cache_layout
from vram.model import ModelShape
from vram.settings import EngineSettings
from vram.shortage import Shortage, ShortageKind
from vram.units import GIB, MIB

PIECE_BYTES = 256 * MIB  # an allocation that fails asks for no more than this


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """One card and one model as they really are."""

    shape: ModelShape
    device: Device
    factors: dict[str, float] = field(default_factory=dict)  # of the estimate's items
    others_bytes: int = 0  # held by somebody else
    takes_fp8_cache: bool = True

    def death(self, settings: EngineSettings) -> Death | None:
        """How a load with these settings ends; None where it serves and goes on to."""
        try:
            found = estimate(self.shape, settings, self.device, "vllm")
        except Invalid as error:
            return Death(cause=Cause.REFUSED, phase="loading", message=str(error))
        if settings.kv_cache_dtype == "fp8" and not self.takes_fp8_cache:
            return Death(cause=Cause.REFUSED, phase="loading", message="no fp8 KV cache here")
        size = {
            item.name: int(item.bytes * self.factors.get(item.name, 1.0))
            for item in (*found.items, *found.outside)
        }
        total_bytes = self.device.total_bytes
        free_bytes = total_bytes - self.others_bytes - size["context"]
        budget_bytes = int(settings.gpu_memory_utilization * total_bytes)
        if free_bytes < budget_bytes:
            return _short(
                ShortageKind.NOT_FREE, budget_bytes, _printed(free_bytes), total_bytes=total_bytes
            )
        used_bytes = size["weights"] + size["non_torch"] + size["communication"]
        if used_bytes > free_bytes:
            return _allocation(ShortageKind.WEIGHTS, used_bytes, free_bytes)
        if used_bytes + size["peak_activation"] > free_bytes:
            return _allocation(
                ShortageKind.ACTIVATIONS, used_bytes + size["peak_activation"], free_bytes
            )
        cache_bytes = budget_bytes - used_bytes + size["communication"] - size["peak_activation"]
        cache_bytes -= counted_graph_bytes(self.shape, self.device, "vllm", size["cuda_graphs"])
        if settings.kv_cache_memory_bytes is not None:
            cache_bytes = settings.kv_cache_memory_bytes
        death = self._planning(settings, cache_bytes)
        if death is not None:
            return death
        for kind, item in (
            (ShortageKind.CACHE_ALLOCATION, cache_bytes),
            (ShortageKind.GRAPH_CAPTURE, size["cuda_graphs"]),
            (ShortageKind.WARM_UP, size.get("runner_state", 0)),
            (ShortageKind.RUN_TIME, size["peak_activation"] + size["allocator_slack"]),
        ):
            used_bytes += item
            if used_bytes > free_bytes:
                return _allocation(kind, used_bytes, free_bytes)
        return None

    def _planning(self, settings: EngineSettings, cache_bytes: int) -> Death | None:
        layout = cache_layout(self.shape, settings, self.device, "vllm")
        if cache_bytes <= 0:
            return _short(ShortageKind.NO_CACHE_BLOCKS)
        if cache_bytes < layout.sequence_bytes(settings.max_model_len):
            fitting = layout.longest_context(cache_bytes, settings.max_model_len)
            return _short(
                ShortageKind.CONTEXT_TOO_LONG,
                _printed(layout.sequence_bytes(settings.max_model_len)),
                _printed(cache_bytes),
                max_model_len=fitting or None,
            )
        states = layout.num_pages(cache_bytes)
        if layout.has_states and settings.max_num_seqs > states:
            return _short(ShortageKind.TOO_MANY_SEQUENCES, max_num_seqs=states)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """How a supervisor fared."""

    supervisor: Supervisor
    serves: bool
    reason: str

    @property
    def loads(self) -> int:
        return len(self.supervisor.attempts)

    @property
    def settings(self) -> EngineSettings:
        return self.supervisor.attempts[-1].settings

    @property
    def tried(self) -> list[EngineSettings]:
        return [attempt.settings for attempt in self.supervisor.attempts]


def run(supervisor: Supervisor, truth: Truth, longest_request_tokens: int = 0) -> Story:
    """Until it serves for good, or gives up."""
    effects = supervisor.begin(0.0)
    for _ in range(100):
        last = effects[-1]
        if isinstance(last, GiveUp):
            return Story(supervisor=supervisor, serves=False, reason=last.reason)
        assert isinstance(last, Spawn)
        death = truth.death(last.settings)
        if death is None or death.phase == "running":
            supervisor.on_event(Started(generation=last.generation, at_s=0.0))
        if death is None:
            assert supervisor.state is State.READY
            return Story(supervisor=supervisor, serves=True, reason="")
        effects = supervisor.on_event(
            Died(
                generation=last.generation,
                death=death,
                at_s=0.0,
                longest_request_tokens=longest_request_tokens,
            )
        )
    raise AssertionError("it never ends")


def _allocation(kind: ShortageKind, wanted_bytes: int, free_bytes: int) -> Death:
    """The allocation that found no room: at most a piece, of which some was free."""
    missing_bytes = wanted_bytes - free_bytes
    asked_bytes = min(max(missing_bytes, 2 * MIB), PIECE_BYTES)
    return _short(kind, asked_bytes, max(asked_bytes - missing_bytes, 0))


def _short(
    kind: ShortageKind,
    asked_bytes: int | None = None,
    free_bytes: int | None = None,
    *,
    total_bytes: int | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
) -> Death:
    shortage = Shortage(
        kind=kind,
        asked_bytes=asked_bytes,
        free_bytes=free_bytes,
        total_bytes=total_bytes,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
    )
    phase = "running" if kind is ShortageKind.RUN_TIME else "loading"
    return Death(
        cause=Cause.DEVICE_MEMORY, phase=phase, message=f"simulated {kind}", shortage=shortage
    )


def _printed(size_bytes: int) -> int:
    """vLLM prints hundredths of a GiB."""
    return int(round(size_bytes / GIB, 2) * GIB)
