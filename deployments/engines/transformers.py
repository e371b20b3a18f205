"""The `transformers` engine: Hugging Face models, batched and streaming, in an actor that may die.

This side owns the actor's life: creates it, reads its steps, hears its end and waits until its
process is gone. What runs in it is in `transformers_actor` and `transformers_batch`.
"""

import asyncio
import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import structlog

from deployments import allocator
from deployments.engines.protocol import Listener, LoadFailed, Measurement, TokenRequest
from deployments.errors import EngineDied, EngineMissing, Invalid, UnknownOption
from deployments.faults import Fault
from deployments.oom import Cause, Death, classify, death_from_exception
from deployments.phases import Phase
from vram.settings import EngineSettings

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from deployments.engines.transformers_actor import ProcessId

KNOWN_OPTIONS = ("attn_implementation", "revision")
PHASES = (Phase.INIT_DEVICE, Phase.LOAD_MODEL, Phase.PROFILING, Phase.EXECUTE_MODEL)
PROCESS_START_S = 120.0  # Ray starts a worker in 1 to 3 s; longer means that there is no room
KILL_GRACE_S = 5.0

log = structlog.get_logger(__name__)


class TransformersEngine:
    """Engine[TokenRequest]. `placement` is a placement group and the bundle that the actor gets.

    `make_batch` replaces what runs the model in the actor: tests give one that fails.
    """

    def __init__(
        self,
        model_path: str,
        *,
        placement: "tuple[PlacementGroup, int] | None" = None,
        num_cpus: float = 1,
        num_gpus: float = 0,
        threads: int = 1,
        trust_remote_code: bool = False,
        engine_args: Mapping[str, str] | None = None,
        make_batch: Callable[..., Any] | None = None,
        faults: Sequence[Fault] = (),
    ) -> None:
        _check_packages()
        _check_options(engine_args or {})
        self.model_path = model_path
        self.vocabulary_tokens: int | None = None  # known once it was loaded
        self._placement = placement
        self._num_cpus = num_cpus
        self._num_gpus = num_gpus
        self._threads = threads
        self._trust_remote_code = trust_remote_code
        self._options = dict(engine_args or {})
        self._make_batch = make_batch
        self._faults = tuple(faults)
        self._num_lives = 0
        self._actor: Any = None
        self._process: ProcessId | None = None
        self._reader: asyncio.Task[None] | None = None
        self._serves = False

    async def start(self, settings: EngineSettings, listener: Listener) -> None:
        import ray

        _check_settings(settings)
        await self.stop()
        self._num_lives += 1
        self._actor = actor = self._create_actor(settings)
        try:
            async with asyncio.timeout(PROCESS_START_S):
                self._process = await actor.identify.remote()
            self.vocabulary_tokens = await actor.load.remote()
        except TimeoutError:
            await self.stop()
            raise LoadFailed(self._no_room()) from None
        except ray.exceptions.RayError as error:
            await self.stop()
            raise LoadFailed(_death(error, "loading")) from error
        self._serves = True
        self._reader = asyncio.create_task(self._read(actor, listener))

    async def generate(self, request: TokenRequest, emitted: Sequence[int]) -> None:
        """As the protocol says; and `Invalid` for what `check` refuses."""
        self.check(request)
        if not self._serves:
            raise EngineDied("the transformers engine is not running")
        self._actor.add.options(num_returns=0).remote(request, tuple(emitted))

    async def abort(self, request_ids: Sequence[str]) -> None:
        if self._serves:
            self._actor.abort.options(num_returns=0).remote(tuple(request_ids))

    async def measure(self) -> Measurement:
        import ray

        if not self._serves:
            return Measurement(resident_bytes=0, device_bytes=0, process_ids=())
        try:
            measurement: Measurement = await self._actor.measure.remote()
        except ray.exceptions.RayError as error:
            raise EngineDied(f"the transformers engine is gone: {_reason(str(error))}") from error
        return measurement

    async def stop(self) -> None:
        actor, process, reader = self._actor, self._process, self._reader
        self._serves = False
        if reader is not None:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        if actor is not None:
            await _end_actor(actor, process)
        self._actor = self._process = self._reader = None

    def check(self, request: TokenRequest) -> None:
        """Refuse what would end the engine instead of the request; the API asks beforehand."""
        sampling, prompt = request.sampling, request.prompt_token_ids
        finite = math.isfinite(sampling.presence_penalty + sampling.frequency_penalty)
        rules = (
            ("prompt", len(prompt) > 0, "has no tokens"),
            ("temperature", 0 <= sampling.temperature < math.inf, "is not a number from 0 up"),
            ("top_p", 0 < sampling.top_p <= 1, "is not above 0 and at most 1"),
            ("repetition_penalty", 0 < sampling.repetition_penalty < math.inf, "is not above 0"),
            ("presence_penalty", finite, "or frequency_penalty is not a finite number"),
            ("max_tokens", sampling.max_tokens >= 1, "is under 1"),
            ("min_tokens", sampling.min_tokens >= 0, "is negative"),
            ("logprobs", sampling.logprobs is None or sampling.logprobs >= 0, "is negative"),
        )
        for setting, is_valid, problem in rules:
            if not is_valid:
                raise Invalid(f"{setting} {problem}", setting)
        limit = self.vocabulary_tokens
        unknown = next((t for t in prompt if t < 0 or (limit is not None and t >= limit)), None)
        if unknown is not None:
            raise Invalid(f"the prompt has token {unknown}; the model has {limit}", "prompt")

    def _create_actor(self, settings: EngineSettings) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from deployments.engines.transformers_actor import STEPS, LoadSpec, TransformersActor

        options: dict[str, Any] = {"num_cpus": self._num_cpus, "num_gpus": self._num_gpus}
        if self._placement is not None:
            group, bundle_index = self._placement
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=bundle_index
            )
        spec = LoadSpec(
            model_path=self.model_path,
            settings=settings,
            on_gpu=self._num_gpus > 0,
            threads=self._threads,
            trust_remote_code=self._trust_remote_code,
            options=self._options,
            make_batch=self._make_batch,
            life=self._num_lives,
            faults=self._faults,
        )
        variables = allocator.variables(settings, os.environ)
        if variables:
            options["runtime_env"] = {"env_vars": variables}
        make = ray.remote(concurrency_groups={STEPS: 1}, max_restarts=0, **options)
        return make(TransformersActor).remote(spec)

    async def _read(self, actor: Any, listener: Listener) -> None:
        """Hand steps over until the actor's end, and say how it ended."""
        import ray

        try:
            async for reference in actor.steps.options(num_returns="streaming").remote():
                listener.stepped(await reference)
            death = Death(cause=Cause.OTHER, phase="running", message="the engine's loop ended")
        except Exception as error:  # a bug in the listener too: the supervisor has to hear of it
            death = _death(error, "running")
        self._serves = False
        ray.kill(actor)
        listener.died(death)

    def _no_room(self) -> Death:
        return Death(
            cause=Cause.OTHER,
            phase="loading",
            message=f"Ray found no place for the engine's actor in {PROCESS_START_S:.0f} s: "
            f"it asks for {self._num_cpus:g} CPUs and {self._num_gpus:g} GPUs",
        )


async def _end_actor(actor: Any, process: "ProcessId | None") -> None:
    """Kill the actor and wait for the end of its process, on whichever node it is."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from deployments.engines.transformers_actor import end_process

    if not ray.is_initialized():
        return
    ray.kill(actor)
    if process is None:
        return
    if process.node_id == ray.get_runtime_context().get_node_id():
        is_gone = await asyncio.to_thread(end_process, process, KILL_GRACE_S)
    else:
        there = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
        end_there = ray.remote(num_cpus=0, scheduling_strategy=there)(end_process)
        try:
            is_gone = await end_there.remote(process, KILL_GRACE_S)
        except ray.exceptions.RayError as error:  # the node is gone, and the process with it
            log.warning("engine_node_unreachable", node_id=process.node_id, error=str(error))
            return
    if not is_gone:
        log.error("engine_process_survives_sigkill", pid=process.pid, node_id=process.node_id)


def _death(error: BaseException, phase: str) -> Death:
    """What the actor said of its end; where it said nothing, what Ray says."""
    import ray

    death = getattr(getattr(error, "cause", None), "death", None)
    if isinstance(death, Death):
        return death
    if not isinstance(error, ray.exceptions.ActorDiedError):
        return death_from_exception(error, phase)
    found = classify(str(error))
    return Death(
        cause=Cause.KILLED if found is Cause.OTHER else found,
        phase=phase,
        message=f"the engine's actor is gone: {_reason(str(error))}",
    )


def _reason(text: str) -> str:
    """The part of Ray's page-long message that says what happened."""
    _, _, detail = text.rpartition("Worker exit detail: ")
    return (detail or text).strip().split(". Some common causes")[0].splitlines()[0][:300]


def _check_packages() -> None:
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise EngineMissing("transformers", package, "pip install 'ballast[transformers]'")


def _check_options(options: Mapping[str, str]) -> None:
    planned = {field.name for field in dataclasses.fields(EngineSettings)}
    for option in options:
        if option in planned:
            raise UnknownOption("transformers", option, "the plan sets it")
        if option not in KNOWN_OPTIONS:
            known = f"known options are {', '.join(KNOWN_OPTIONS)}"
            raise UnknownOption("transformers", option, known)


def _check_settings(settings: EngineSettings) -> None:
    """A setting without effect is an error, or a warning where a ladder may bring it."""
    if settings.num_gpus > 1:
        raise Invalid(
            f"the transformers engine runs on one GPU, the plan wants {settings.num_gpus}; serve "
            f"the model with vllm, or set tensor_parallel_size and pipeline_parallel_size to 1",
            "tensor_parallel_size",
        )
    if settings.kv_cache_dtype not in ("auto", settings.dtype):
        log.warning(
            "setting_without_effect", engine="transformers", setting="kv_cache_dtype",
            value=settings.kv_cache_dtype, instead=settings.dtype,
        )  # fmt: skip
