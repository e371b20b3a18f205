"""vLLM's own front over an engine that may die: AsyncLLM and the OpenAI layer, used as they are.

The journal sits below vLLM's output processor, at the client of EngineCore: whatever happens to the
engine, the detokenizer, the search for stop strings, the logprobs and the parsers of a stream live
on in this process and see each token once.
"""

import asyncio
import dataclasses
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import FastAPI

from deployments.engines.protocol import Step
from deployments.engines.vllm import VLLMEngine
from deployments.engines.vllm_deltas import keep_apart
from deployments.engines.vllm_prompts import prepare_short_ones_here
from deployments.engines.vllm_verdicts import refuse
from deployments.errors import BallastError, LadderExhausted, UnknownOption
from vram.settings import EngineSettings, owned_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM

# Facts that the plan or the deployment owns: with a second owner the engine could differ from its
# placement.
_OWNED = frozenset(owned_settings()) | {
    "api_key",
    "disable_log_stats",
    "distributed_executor_backend",
    "enable_expert_parallel",
    "enable_lora",
    "host",
    "model",
    "port",
    "served_model_name",
}

_BUSIEST = ("/v1/chat/completions", "/v1/completions")


class RequestTaker(Protocol):
    """What is needed of `Keeper[EngineCoreRequest]`."""

    async def generate(
        self, request_id: str, request: "EngineCoreRequest", *, total_tokens: int
    ) -> None: ...
    async def abort(self, request_ids: Sequence[str]) -> None: ...


class JournaledCore:
    """Stands where AsyncLLM expects the client of EngineCore, and goes on when that dies."""

    def __init__(self) -> None:
        self.engine_ranks_managed = [0]
        self.resources = SimpleNamespace(engine_dead=False)
        self._keeper: RequestTaker | None = None
        self._engine: VLLMEngine | None = None
        self._outputs: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()
        self._llm: AsyncLLM | None = None
        self._refusals: set[asyncio.Task[None]] = set()  # the loop itself keeps no task alive

    def attach(self, keeper: RequestTaker, engine: VLLMEngine) -> None:
        self._keeper = keeper
        self._engine = engine

    def serve(self, llm: "AsyncLLM") -> None:
        """The front that hears of a request that is refused."""
        self._llm = llm

    def on_step(self, step: Step) -> None:
        self._outputs.put_nowait(step)  # type: ignore[arg-type]

    def on_give_up(self, error: LadderExhausted) -> None:
        self.resources.engine_dead = True
        self._outputs.put_nowait(error)

    def on_refusal(self, request_id: str, error: BallastError) -> None:
        assert self._llm is not None
        task = asyncio.get_running_loop().create_task(refuse(self._llm, request_id, error))
        self._refusals.add(task)
        task.add_done_callback(self._refusals.discard)

    async def get_output_async(self) -> "EngineCoreOutputs":
        outputs = await self._outputs.get()
        if isinstance(outputs, Exception):
            raise outputs
        return outputs

    async def add_request_async(self, request: "EngineCoreRequest") -> None:
        assert self._keeper is not None
        prompt_tokens = len(request.prompt_token_ids or ())
        params = request.sampling_params
        output_tokens = (params.max_tokens or 0) if params else 0
        await self._keeper.generate(
            request.request_id, request, total_tokens=prompt_tokens + output_tokens
        )

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        assert self._keeper is not None
        await self._keeper.abort(request_ids)

    def shutdown(self, timeout: float | None = None) -> None:
        """The keeper ends the engine; AsyncLLM has nothing to end."""

    def __getattr__(self, name: str) -> Any:
        """All that needs no journal goes to the client of the engine that now runs."""
        if name.startswith("_"):
            raise AttributeError(name)
        assert self._engine is not None
        return getattr(self._engine.core, name)


def front_args(model: str, name: str, options: Mapping[str, Any]) -> Namespace:
    """vLLM's server arguments: its own defaults, and the user's `engine_args`.

    Raises `UnknownOption` for a key that vLLM does not have, or that the plan owns.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = _arg_parser()(FlexibleArgumentParser())
    command = ["--model", model, "--served-model-name", name]
    known = vars(parser.parse_args(command))
    for key, value in options.items():
        if key in _OWNED:
            raise UnknownOption("vllm", key, "the plan owns it; set it beside `engine_args`")
        if key not in known:
            raise UnknownOption("vllm", key, "vLLM has no such argument")
        command += _flag(key, value, takes_several=_takes_several(parser, key))
    try:
        args = parser.parse_args(command)
    except SystemExit:  # argparse has said on stderr what it does not like
        raise UnknownOption("vllm", ", ".join(options), "vLLM does not take its value") from None
    args.disable_log_stats = False
    return args


def _flag(key: str, value: Any, *, takes_several: bool) -> list[str]:
    """One argument as vLLM's own command line has it."""
    name = key.replace("_", "-")
    match value:
        case list() if takes_several:
            return [
                f"--{name}",
                *(item if isinstance(item, str) else json.dumps(item) for item in value),
            ]
        case True:
            return [f"--{name}"]
        case False:
            return [f"--no-{name}"]
        case dict() | list():
            return [f"--{name}", json.dumps(value)]
        case _:
            return [f"--{name}", str(value)]


def _takes_several(parser: ArgumentParser, key: str) -> bool:
    """Whether a list is given as words of its own, such as `lora_modules`, and not as JSON."""
    return any(action.dest == key and action.nargs in ("*", "+") for action in parser._actions)


def planned_args(settings: EngineSettings) -> dict[str, Any]:
    """The plan in vLLM's words. The draft model of speculative tokens is in `engine_args`."""
    args = dataclasses.asdict(settings)
    del args["num_speculative_tokens"]
    del args["expandable_segments"]  # in the environment of its processes
    if settings.max_cudagraph_capture_size is None:
        del args["max_cudagraph_capture_size"]
    else:
        args["cudagraph_capture_sizes"] = None  # a list of the user's would say otherwise
    args["enable_expert_parallel"] = args.pop("expert_parallel")
    if not settings.max_loras:
        del args["max_loras"], args["max_lora_rank"]
    else:
        args["enable_lora"] = True
    return args


def make_config(
    args: Namespace, settings: EngineSettings, *, placement_group: Any = None
) -> "VllmConfig":
    """vLLM's configuration for exactly these settings.

    With a placement group, its workers are Ray's actors in that group; else plain processes.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    base = AsyncEngineArgs.from_cli_args(args)
    planned = dataclasses.replace(base, **planned_args(settings))
    # Said outright: inside a placement group vLLM would choose Ray by itself.
    local = "uni" if settings.num_gpus == 1 else "mp"
    planned.distributed_executor_backend = local if placement_group is None else "ray"
    config = planned.create_engine_config(UsageContext.OPENAI_API_SERVER)
    if placement_group is not None:
        config.parallel_config.placement_group = placement_group
    return config


def make_llm(core: JournaledCore, config: "VllmConfig", *, joins_deltas: bool = True) -> "AsyncLLM":
    """AsyncLLM over an engine that is already running; see `vllm_deltas` for `joins_deltas`."""
    from vllm.v1.engine.async_llm import AsyncLLM

    if not joins_deltas:
        keep_apart()
    with _given_core(core):
        llm = AsyncLLM.from_vllm_config(config)
    core.serve(llm)
    prepare_short_ones_here(llm)
    return llm


async def make_app(llm: "AsyncLLM", args: Namespace) -> FastAPI:
    """vLLM's OpenAI server without its launcher."""
    try:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
    except ImportError:  # vLLM 0.26
        from vllm.entrypoints.openai.api_server import build_app, init_app_state
    tasks = await llm.get_supported_tasks()
    app: FastAPI = build_app(args, tasks, llm.model_config)
    await init_app_state(llm, app.state, args, tasks)
    # Starlette asks one route after the other, twice for a call because vLLM counts it by route.
    app.router.routes.sort(key=lambda route: getattr(route, "path", None) not in _BUSIEST)
    # vLLM's handler of a dead engine wants to end the uvicorn server; ours is Ray Serve's.
    app.state.server = SimpleNamespace()
    return app


def _arg_parser() -> Any:
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # vLLM 0.26
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    return make_arg_parser


@contextmanager
def _given_core(core: JournaledCore) -> Iterator[None]:
    """AsyncLLM makes its client of EngineCore itself and takes none from outside: hand it ours."""
    from vllm.v1.engine.core_client import EngineCoreClient

    original = EngineCoreClient.make_async_mp_client
    EngineCoreClient.make_async_mp_client = staticmethod(lambda **_: core)
    try:
        yield
    finally:
        EngineCoreClient.make_async_mp_client = original
