"""The engines whose memory is known, and what they do with it."""

ENGINES = ("vllm", "transformers", "fake", "tensorrt_llm", "sglang")
ENGINES_ON_CPU = ("vllm", "transformers", "fake")
# These turn whatever their budget leaves into KV cache; the others hold what requests need.
# The fake engine follows vLLM's arithmetic, so that plans and ladders can be tried without it.
FILL_THEIR_BUDGET = frozenset({"vllm", "fake", "tensorrt_llm", "sglang"})
