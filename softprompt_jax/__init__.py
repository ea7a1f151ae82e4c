"""Prompt tuning of frozen T5 models in JAX.

Backbones   load_backbone, Backbone
Running     logits, generate, load_predictor, PromptBank, ensemble
Training    Run, load_run, train, sweep, report
Prompts     load_prompt, rank_sources, recycle, inspect
"""

import importlib
import sys
import types
from typing import Any

_PUBLIC = {
    "PromptBank": "bank",
    "Backbone": "backbone.pretrained",
    "Beam": "backbone.decode",
    "Greedy": "backbone.decode",
    "Run": "run",
    "Sampling": "backbone.decode",
    "UserError": "config",
    "ensemble": "ensemble",
    "generate": "predict",
    "inspect": "interpret",
    "load_backbone": "peft",
    "load_predictor": "predict",
    "load_prompt": "interop",
    "load_run": "run",
    "logits": "predict",
    "rank_sources": "transfer",
    "recycle": "transfer",
    "report": "report",
    "sweep": "sweep",
    "train": "train",
}
__all__ = list(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import on first use, so that `softprompt --help` does not wait for JAX."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'softprompt_jax' has no attribute {name!r}")
    module = importlib.import_module(f"softprompt_jax.{_PUBLIC[name]}")
    return getattr(module, name)


class _Package(types.ModuleType):
    """Keeps `softprompt_jax.train` the function: importing the file `train` would put the module there."""

    def __setattr__(self, name: str, value: Any) -> None:
        public = name in _PUBLIC and isinstance(value, types.ModuleType)
        super().__setattr__(name, getattr(value, name) if public else value)


sys.modules[__name__].__class__ = _Package
