"""The import path of a model's application: from YAML to a plan, from the plan to a placement."""

from pathlib import Path

from ray import serve

from deployments.config import ModelConfig
from deployments.engines.vllm_plugin import SHARE_CORES
from deployments.gateway import MODEL_DEPLOYMENT
from deployments.planning import make_plan
from deployments.relay.deployment import RELAY_DEPLOYMENT, Relay
from deployments.replica import Replica
from placement.nodes import Node
from vram.plan import Plan


def build(args: ModelConfig) -> serve.Application:
    """One model, placed by its plan; with `recovery.survive_replica` behind a relay."""
    args = _with_absolute_paths(args)
    if not args.recovery.survive_replica:
        # Ray pickles a wrapped class by value, a plain one by name: keep the plain one importable.
        return _model(args, serve.ingress()(Replica))
    relay = serve.deployment(name=RELAY_DEPLOYMENT)(serve.ingress()(Relay))
    return relay.options(
        ray_actor_options={"num_cpus": args.recovery.relay_cpus},
        max_ongoing_requests=args.limits.max_ongoing_requests * args.num_replicas,
    ).bind(args, _model(args, Replica))


def _model(args: ModelConfig, replica: type) -> serve.Application:
    planned, placed = make_plan(args, _cluster(args))
    return (
        serve.deployment(name=MODEL_DEPLOYMENT)(replica)
        .options(
            num_replicas=args.num_replicas,
            ray_actor_options={
                "num_cpus": args.replica_cpus,
                "runtime_env": {"env_vars": {**_engine_env(planned), **args.env}},
            },
            placement_group_bundles=list(placed.bundles),
            placement_group_strategy=placed.strategy,
            max_ongoing_requests=args.limits.max_ongoing_requests,
            health_check_period_s=5.0,
            health_check_timeout_s=30.0,
            # The ladder has been climbed inside the constructor: the same again would end the same.
            max_constructor_retry_count=1,
        )
        .bind(args, planned, placed)
    )


def _cluster(config: ModelConfig) -> tuple[Node, ...] | None:
    """What the cards are chosen from; None where the config says which and how many.

    What is in use counts as free: at a new deployment the model's own cards are.
    """
    if not config.leaves_cards_to_the_plan:
        return None
    from placement.inventory import connected, read_inventory

    return read_inventory(as_if_empty=True) if connected() else None


def _with_absolute_paths(config: ModelConfig) -> ModelConfig:
    """Replicas run in other working directories, and on other nodes with the same file system."""
    folder, keys = Path(config.model), config.api_keys_file
    return config.model_copy(
        update={
            "model": str(folder.resolve()) if folder.exists() else config.model,
            "api_keys_file": keys and keys.absolute(),
        }
    )


def _engine_env(planned: Plan) -> dict[str, str]:
    """What the engine's processes have to know before they start."""
    on_cpu = planned.device.kind == "cpu"
    return {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding each engine to all cores: they collide
        "VLLM_NO_USAGE_STATS": "1",
        SHARE_CORES: "1" if on_cpu else "0",
    }
