"""Starts Ray Serve LLM as its documentation does, on a Ray of its own, and stays until a signal.

Nothing here is Ballast; it is the neighbour to compare with. Which of its two modes runs is a
matter of the environment (see servers.py).
"""

import argparse
import signal
import sys

# Serve LLM asks for two ingress replicas of one CPU each beside the model's; Ray only counts them.
LOGICAL_CPUS = 8
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    arguments = parser.parse_args()

    import ray
    from ray import serve

    try:
        from ray.serve.llm import LLMConfig, build_openai_app
    except ModuleNotFoundError as missing:
        sys.exit(f"Ray Serve LLM needs {missing.name}: pip install pyarrow jsonref")

    ray.init(address="local", num_cpus=LOGICAL_CPUS, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
    config = LLMConfig(
        model_loading_config={"model_id": "demo", "model_source": arguments.model},
        accelerator_config={"kind": "cpu"},
        deployment_config={"num_replicas": 1},
        engine_kwargs={
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": arguments.max_model_len,
            "max_num_seqs": arguments.max_num_seqs,
        },
    )
    serve.run(build_openai_app({"llm_configs": [config]}))
    print("ready", flush=True)
    # Blocked only now, or Ray's processes would inherit it and never hear their own SIGTERM.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    signal.sigwait(STOP_SIGNALS)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
