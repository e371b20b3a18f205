"""Loads that plain vLLM refuses or dies on, and what Ballast makes of them, on a real card."""
