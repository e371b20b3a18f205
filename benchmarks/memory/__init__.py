"""How much device memory vLLM really takes. Loads real engines; the estimator knows none of this."""
