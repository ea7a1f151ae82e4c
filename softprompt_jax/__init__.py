"""Prompt tuning of frozen T5 models in JAX."""
