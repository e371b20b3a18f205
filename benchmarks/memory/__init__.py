"""How much device memory vLLM really takes. Loads real engines; knows nothing of estimates."""
