"""Prompt tuning of frozen T5 models in JAX.

Backbones   load_backbone, Backbone
Running     logits, generate, load_predictor, PromptBank, ensemble
Training    Run, load_run, train, sweep, report
Prompts     load_prompt, rank_sources, recycle, inspect
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; the table below is what runs
    from softprompt_jax.analysis.inspect import inspect
    from softprompt_jax.analysis.report import report
    from softprompt_jax.analysis.transfer import rank_sources, recycle
    from softprompt_jax.checkpoints.artifact import load_prompt
    from softprompt_jax.checkpoints.backbone import Backbone, load_backbone
    from softprompt_jax.config import UserError
    from softprompt_jax.inference.bank import PromptBank
    from softprompt_jax.inference.ensemble import ensemble
    from softprompt_jax.inference.predictor import generate, load_predictor, logits
    from softprompt_jax.models.decode import Beam, Greedy, Sampling
    from softprompt_jax.run import Run, load_run
    from softprompt_jax.training.loop import train
    from softprompt_jax.training.sweep import sweep

__version__ = "0.1.0"
__all__ = [
    "Backbone",
    "Beam",
    "Greedy",
    "PromptBank",
    "Run",
    "Sampling",
    "UserError",
    "ensemble",
    "generate",
    "inspect",
    "load_backbone",
    "load_predictor",
    "load_prompt",
    "load_run",
    "logits",
    "rank_sources",
    "recycle",
    "report",
    "sweep",
    "train",
]
_MODULE_OF = {
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
    "load_backbone": "checkpoints.backbone",
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


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `softprompt --help` does not wait for JAX."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'softprompt_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"softprompt_jax.{_MODULE_OF[name]}"), name)
