"""Answers of a trained run: one at a time, in mixed batches, or several prompts together.

`predictor` answers for one run, `bank` for many prompts over one frozen model (with `prompt_cache`), `ensemble` lets
several prompts vote, `evaluate` decodes and scores a split. What they compile is in `programs`.
Begin with `bank.py`."""
