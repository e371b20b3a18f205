"""A model being served: its engine, the keeper over it, and the app that turns HTTP into tokens."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
from starlette.types import ASGIApp

from deployments import orphans
from deployments.cards import cards_of
from deployments.config import ModelConfig
from deployments.engines.fake import FakeEngine, Script
from deployments.engines.protocol import Engine, Step, TokenRequest
from deployments.engines.registry import check_installed
from deployments.errors import BallastError, LadderExhausted, UnknownOption
from deployments.healer import Healer
from deployments.keeper import Keeper
from deployments.load_check import LoadCheck
from deployments.openai.tokenizers import ByteTokenizer, Tokenizer, TransformersTokenizer
from deployments.recovery import store_of, supervisor_of
from deployments.relay.copies import Copies
from deployments.relay.token_notes import TokenNotation
from deployments.settings_store import SettingsStore
from deployments.streams import Streams
from deployments.watchdog import Patience
from deployments.watcher import Watcher
from vram.plan import Plan

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Serving:
    """What a replica holds."""

    keeper: Keeper[Any]
    app: ASGIApp  # OpenAI's API, without limits and keys
    watcher: Watcher
    healer: Healer

    async def stop(self) -> None:
        """End the engine for good."""
        await self.healer.stop()
        await self.watcher.stop()
        await self.keeper.stop()


async def start_serving(config: ModelConfig, plan: Plan, *, placement_group: Any) -> Serving:
    """Load the model and return when it serves. Raises `LadderExhausted`, `EngineMissing`."""
    check_installed(config.engine)
    await orphans.reap()  # they hold the memory that this load needs
    if config.engine == "vllm":
        return await _start_vllm(config, plan, placement_group)
    return await _start_tokens(config, plan, placement_group)


async def _start_vllm(config: ModelConfig, plan: Plan, placement_group: Any) -> Serving:
    """vLLM's own front over the keeper."""
    group = await _see_cards(placement_group) if plan.device.kind == "cuda" else None
    from deployments.engines import vllm_front
    from deployments.engines.vllm import VLLMEngine
    from deployments.engines.vllm_deltas import has_parsers
    from deployments.engines.vllm_notes import VLLMNotation
    from deployments.engines.vllm_verdicts import Verdicts

    options = dict(config.engine_args)
    if config.trust_remote_code:
        options["trust_remote_code"] = True
    args = vllm_front.front_args(config.model, config.name, options)
    engine = VLLMEngine(
        lambda settings: vllm_front.make_config(args, settings, placement_group=group),
        faults=config.faults,
    )
    core = vllm_front.JournaledCore()
    copies = Copies(VLLMNotation(), core.on_step) if config.recovery.survive_replica else None
    kept = _keep(config, plan, placement_group, engine, core, copies)
    core.attach(copies.above(kept.keeper) if copies else kept.keeper, engine)
    async with _loaded(kept.keeper, config) as watcher:
        assert engine.config is not None
        joins_deltas = copies is None or not has_parsers(args)
        llm = vllm_front.make_llm(core, engine.config, joins_deltas=joins_deltas)
        app = Verdicts(await vllm_front.make_app(llm, args))
        return Serving(kept.keeper, app, watcher, _healer(kept, config))


async def _see_cards(placement_group: Any) -> Any:
    """Let vLLM see the group's cards; returns the group if its workers have to be Ray's actors.

    The group reserves the cards, so on one node the engine can be plain processes of this replica:
    they carry its mark, its black box and its plugin, share a card by any fraction, and start
    sooner than actors do.
    """
    import ray

    cards = await cards_of(placement_group)
    here = ray.get_runtime_context().get_node_id()
    if any(card.node_id != here for card in cards):
        return placement_group
    # Before vLLM is imported: it looks at once.
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(card.index) for card in cards)
    return None


async def _start_tokens(config: ModelConfig, plan: Plan, placement_group: Any) -> Serving:
    """Ballast's own OpenAI layer over the keeper."""
    from deployments.openai.app import build_openai_app

    engine, tokenizer = _token_engine(config, plan, placement_group)
    streams = Streams()
    copies = Copies(TokenNotation(), streams.on_step) if config.recovery.survive_replica else None
    kept = _keep(config, plan, placement_group, engine, streams, copies)
    keeper = kept.keeper
    streams.attach(copies.above(keeper) if copies else keeper)

    def max_model_len() -> int:
        assert keeper.settings is not None
        return keeper.settings.max_model_len

    async with _loaded(keeper, config) as watcher:
        app = build_openai_app(
            config.name,
            streams,
            keeper,
            tokenizer,
            max_model_len,
            wait_s=config.recovery.wait_s,
            max_waiting=config.recovery.max_waiting,
        )
        return Serving(keeper, app, watcher, _healer(kept, config))


class _Voice(Protocol):
    """What is above a keeper: it hears of tokens, and of requests that get no more of them."""

    def on_step(self, step: Step) -> None: ...

    def on_give_up(self, error: LadderExhausted) -> None: ...

    def on_refusal(self, request_id: str, error: BallastError) -> None: ...


@dataclass(frozen=True, slots=True)
class _Kept:
    """A keeper, and what its healer is to know besides."""

    keeper: Keeper[Any]
    store: SettingsStore
    check: LoadCheck


def _keep(
    config: ModelConfig,
    plan: Plan,
    placement_group: Any,
    engine: Engine[Any],
    voice: _Voice,
    copies: Copies[Any, Any] | None,
) -> _Kept:
    """With copies between keeper and voice, where a relay is to have them."""
    store, check = store_of(config, plan), LoadCheck(config, plan, placement_group)
    keeper: Keeper[Any] = Keeper(
        config.name,
        engine,
        supervisor_of(config, plan, store),
        on_step=copies.on_step if copies else voice.on_step,
        on_give_up=voice.on_give_up,
        on_refusal=voice.on_refusal,
        isolation_s=config.recovery.isolation_s,
        before_load=check,
    )
    return _Kept(keeper, store, check)


@asynccontextmanager
async def _loaded(keeper: Keeper[Any], config: ModelConfig) -> AsyncIterator[Watcher]:
    """The first load, looked after like every later one; ended if what follows it fails."""
    recovery = config.recovery
    patience = Patience(
        stopped_s=recovery.stopped_s, stall_s=recovery.stall_s, load_s=recovery.load_s
    )
    watcher = Watcher(keeper, patience)
    watcher.start()
    try:
        await keeper.start()
        yield watcher
    except BaseException:
        await watcher.stop()
        await keeper.stop()
        raise


def _healer(kept: _Kept, config: ModelConfig) -> Healer:
    """From the first load on."""
    healer = Healer(
        kept.keeper,
        kept.store,
        heal_after_s=config.recovery.heal_after_s,
        remember=config.recovery.remember,
        lease_s=config.recovery.load_s + config.recovery.heal_after_s,
        room=kept.check.room,
    )
    healer.start()
    return healer


def _token_engine(
    config: ModelConfig, plan: Plan, placement_group: Any
) -> tuple[Engine[TokenRequest], Tokenizer]:
    if config.engine == "fake":
        if config.engine_args:
            raise UnknownOption("fake", next(iter(config.engine_args)), "it takes none")
        return FakeEngine(Script(faults=config.faults)), ByteTokenizer()
    from deployments.engines.transformers import TransformersEngine

    engine = TransformersEngine(
        config.model,
        placement=(placement_group, 1),
        num_cpus=config.engine_cpus,
        num_gpus=plan.gpu_fraction if plan.device.kind == "cuda" else 0,
        threads=max(1, round(config.engine_cpus)),
        trust_remote_code=config.trust_remote_code,
        engine_args=config.engine_args,
        faults=config.faults,
    )
    return engine, TransformersTokenizer.load(config.model)
