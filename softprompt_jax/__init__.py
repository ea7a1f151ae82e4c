"""Prompt tuning of frozen T5 models in JAX.

Backbones   load_backbone, Backbone
Running     logits, generate, load_predictor, PromptBank, ensemble
Training    Run, load_run, train, sweep, report
Prompts     load_prompt, rank_sources, recycle, inspect
"""

import importlib
from typing import Any

_PUBLIC = {
    "PromptBank": "inference.bank",
    "Backbone": "checkpoints.backbone",
    "Beam": "models.decode",
    "Greedy": "models.decode",
    "Run": "run",
    "Sampling": "models.decode",
    "UserError": "config",
    "ensemble": "inference.ensemble",
    "generate": "inference.predictor",
    "inspect": "analysis.inspect",
    "load_backbone": "checkpoints.peft",
    "load_predictor": "inference.predictor",
    "load_prompt": "checkpoints.artifact",
    "load_run": "run",
    "logits": "inference.predictor",
    "rank_sources": "analysis.transfer",
    "recycle": "analysis.transfer",
    "report": "analysis.report",
    "sweep": "training.sweep",
    "train": "training.loop",
}
__all__ = list(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import on first use, so that `softprompt --help` does not wait for JAX."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'softprompt_jax' has no attribute {name!r}")
    module = importlib.import_module(f"softprompt_jax.{_PUBLIC[name]}")
    return getattr(module, name)
