"""What a person writes in YAML: the one place where configuration and environment enter."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from deployments.engines.registry import check_engine
from deployments.engines.transformers import KNOWN_OPTIONS, PHASES
from deployments.errors import UnknownOption
from deployments.faults import Fault
from deployments.phases import Phase
from deployments.wishes import problem_with_wishes
from placement.requests import Objective
from vram.gpu import Device, cpu_device, device_named
from vram.plan import Wishes
from vram.settings import owned_settings
from vram.units import GIB

# It is a part of URLs (`/NAME/v1`) and of metrics.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
# The gateway's own paths, and Ray's (`/-/routes`): the prefix of such a model would take them.
RESERVED_NAMES = frozenset({"-", "api", "health", "metrics", "status", "v1"})
BODY_BYTES = 8 * 2**20
# Engines of ours run on one card and take these `engine_args`; vLLM knows its own when it starts.
_OWN_ENGINES: dict[str, tuple[str, ...]] = {"transformers": KNOWN_OPTIONS, "fake": ()}
_PHASES = {"transformers": PHASES}  # of a life; the others have them all
_PLANNED = frozenset(owned_settings())


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DeviceConfig(_Strict):
    """The card that a model is planned for; on CPU, the share of the RAM that stands for one."""

    kind: Literal["cuda", "cpu"] = "cuda"
    name: str | None = Field(None, description="card, as in `H200` or `A100-80GB`; for kind cuda")
    memory_gib: float | None = Field(None, gt=0, description="its memory; for kind cpu")
    gpu_fraction: float | None = Field(
        None, gt=0, le=1, description="share of the card, for small models"
    )

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> "DeviceConfig":
        on_cpu = self.kind == "cpu"
        rules = (
            (
                on_cpu and self.memory_gib is None,
                "device.memory_gib is missing: say how much RAM the model may use",
            ),
            (
                on_cpu and self.gpu_fraction is not None,
                "device.gpu_fraction has no effect on a CPU; lower memory_gib instead",
            ),
            (
                on_cpu and self.name is not None,
                "device.name has no effect on a CPU: remove it, or write kind: cuda",
            ),
            (
                not on_cpu and self.memory_gib is not None,
                "device.memory_gib has no effect on a card, whose name says it: remove it, "
                "or write kind: cpu",
            ),
        )
        problem = next((problem for is_wrong, problem in rules if is_wrong), None)
        if problem is not None:
            raise ValueError(problem)
        return self

    def device(self) -> Device | None:
        """None leaves the card to the plan."""
        if self.kind == "cpu":
            return cpu_device(int((self.memory_gib or 0) * GIB))
        return None if self.name is None else device_named(self.name)


class RecoveryConfig(_Strict):
    """What happens when the engine dies."""

    policy: Literal["diagnose", "fixed"] = "diagnose"
    allow: tuple[Literal["fp8_kv_cache", "fp8_weights"], ...] = Field(
        ("fp8_kv_cache",), description="steps that change what a model answers; for `diagnose`"
    )
    max_restarts: int = Field(
        10, ge=0, description="for deaths that were not memory, in the window"
    )
    restart_window_s: float = Field(600.0, gt=0)
    wait_s: float = Field(120.0, gt=0, description="how long a new request waits for the engine")
    max_waiting: int = Field(1024, ge=0, description="how many new requests may wait for it")
    memory_back_s: float = Field(
        30.0, ge=0, description="how long a restart waits for the memory of the dead engine"
    )
    stopped_s: float = Field(
        5.0, gt=0, description="how long a process of the engine may be stopped (SIGSTOP)"
    )
    stall_s: float = Field(
        60.0, gt=0, description="how long the engine may take no step while it has requests"
    )
    load_s: float = Field(600.0, gt=0, description="how long the engine may load")
    isolation_s: float = Field(
        30.0, gt=0, description="how long a suspect is held back for the others to end"
    )
    remember: bool = Field(
        True, description="a new replica starts with the settings that worked after a step down"
    )
    heal_after_s: float = Field(
        1800.0, gt=0, description="how long it is quiet before larger settings are tried again"
    )
    survive_replica: bool = Field(
        False, description="streams outlive the replica, too: a relay holds them"
    )
    silence_s: float = Field(
        15.0, ge=3, description="a replica that says nothing for so long is dead to its relay"
    )
    relay_cpus: float = Field(0.2, ge=0, description="reserved for the relay")

    @model_validator(mode="after")
    def _no_relay_setting_without_effect(self) -> "RecoveryConfig":
        for name in ("silence_s", "relay_cpus"):
            if name in self.model_fields_set and not self.survive_replica:
                raise ValueError(f"{name} has no effect without survive_replica: true")
        return self


class LimitsConfig(_Strict):
    """What a client may ask for."""

    max_body_bytes: int = Field(BODY_BYTES, gt=0)
    max_ongoing_requests: int = Field(1024, gt=0, description="per replica; more wait in Ray Serve")


class ModelConfig(_Strict):
    """`args` of one application: a model, the card it is planned for, and how it is served."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: Annotated[str, Field(pattern=NAME)]
    model: str = Field(description="a local folder or a Hugging Face name")
    engine: str = "vllm"
    device: DeviceConfig

    # What it has to be good for; and how many cards a replica may take for it.
    objective: Objective | None = None
    context: int | None = Field(None, ge=1, description="tokens that one request may have at least")
    concurrency: int | None = Field(
        None, ge=1, le=1 << 20, description="requests of `context` tokens that it holds at once"
    )
    max_gpus: int | None = Field(None, ge=1, le=1024)

    # Pins for the planner; what is left out, it chooses.
    dtype: str | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    max_model_len: int | None = Field(None, ge=1)
    max_num_seqs: int | None = Field(None, ge=1)
    max_num_batched_tokens: int | None = Field(None, ge=1)
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    tensor_parallel_size: int | None = Field(None, ge=1)
    pipeline_parallel_size: int | None = Field(None, ge=1)
    enforce_eager: bool | None = None
    max_loras: int | None = Field(None, ge=1, le=1024, description="LoRA adapters in one batch")
    max_lora_rank: int | None = Field(None, ge=1, le=1024)

    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="handed to the engine as it is; no key that is planned"
    )
    env: dict[str, str] = Field(default_factory=dict, description="of the replica and its engine")
    trust_remote_code: bool = False
    skip_vram_check: bool = False

    num_replicas: int = Field(1, ge=1)
    replica_cpus: float = Field(1.0, ge=0)
    engine_cpus: float = Field(1.0, ge=0)

    recovery: RecoveryConfig = RecoveryConfig()
    limits: LimitsConfig = LimitsConfig()
    api_keys_file: Path | None = Field(
        None, description="one key a line; BALLAST_API_KEYS otherwise"
    )
    fault_injection: bool = False
    faults: tuple[Fault, ...] = Field((), description="deaths to rehearse, see docs/faults.md")

    @field_validator("name")
    @classmethod
    def _no_path_of_the_gateway(cls, name: str) -> str:
        if name in RESERVED_NAMES:
            raise ValueError(f"/{name} is a path of the gateway: give the model another name")
        return name

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, engine: str) -> str:
        check_engine(engine)
        return engine

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> "ModelConfig":
        if self.faults and not self.fault_injection:
            raise ValueError("faults have no effect without fault_injection: true")
        phases = _PHASES.get(self.engine, tuple(Phase))
        for fault in self.faults:
            if fault.phase not in phases:
                raise ValueError(
                    f"faults: the engine {self.engine} has no phase {fault.phase.value}; it has "
                    f"{', '.join(phases)}"
                )
            no_graphs = self.enforce_eager or self.device.kind == "cpu"
            if fault.phase is Phase.GRAPH_CAPTURE and self.engine == "vllm" and no_graphs:
                raise ValueError(
                    "faults: no graphs are captured on a CPU or with enforce_eager: "
                    "write phase: warm_up"
                )
        return self

    @model_validator(mode="after")
    def _what_the_engine_can(self) -> "ModelConfig":
        known = _OWN_ENGINES.get(self.engine)
        for option in self.engine_args:
            if option in _PLANNED:
                reason = "the plan owns it; pins stand beside `engine_args`"
                raise UnknownOption(self.engine, option, reason)
            if known is not None and option not in known:
                reason = f"it takes {', '.join(known) or 'none'}"
                raise UnknownOption(self.engine, option, reason)
        for setting in ("tensor_parallel_size", "pipeline_parallel_size"):
            degree = getattr(self, setting)
            if known is not None and degree not in (None, 1):
                raise ValueError(
                    f"{setting} is {degree}, and the engine {self.engine} runs on one card: "
                    f"remove it, or serve the model with engine: vllm"
                )
        return self

    @model_validator(mode="after")
    def _no_wish_without_effect(self) -> "ModelConfig":
        problem = problem_with_wishes(self)
        if problem:
            raise ValueError(problem)
        return self

    @property
    def leaves_cards_to_the_plan(self) -> bool:
        """Whether the answer depends on which cards there are, and how many."""
        if self.device.kind == "cpu":
            return False
        one_card = self.engine in _OWN_ENGINES or self.device.gpu_fraction not in (None, 1.0)
        return self.device.name is None or (self.tensor_parallel_size is None and not one_card)

    def wishes(self) -> Wishes:
        return Wishes(
            context=self.context,
            concurrency=self.concurrency,
            dtype=self.dtype,
            quantization=self.quantization,
            kv_cache_dtype=self.kv_cache_dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            gpu_memory_utilization=self.gpu_memory_utilization,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            enforce_eager=self.enforce_eager,
            max_loras=self.max_loras,
            max_lora_rank=self.max_lora_rank,
            gpu_fraction=self.device.gpu_fraction,
        )


class GatewayConfig(_Strict):
    """`args` of the application at `/`: one `/v1` in front of all models."""

    limits: LimitsConfig = LimitsConfig()
    api_keys_file: Path | None = None
    num_replicas: int = Field(1, ge=1)
    replica_cpus: float = Field(0.1, ge=0)
