"""Prompt tuning of frozen language models in JAX.

Backbones   load_backbone, Backbone
Training    Run, Task, Mixture, load_run, train, TrainedRun, sweep, tune, compress, report; TensorBoard, WandB
Methods     Prompt, LoRA, Prefix and the others of `softprompt methods`
Optimizers  Adafactor, AdamW, CMAES, GreedyWords, NoTraining, Schedule
Sources     Task.from_rows, Files, Folder, Hub, Package, Seqio, Rows
Running     logits, generate, load_predictor, PromptBank, ensemble; Greedy, Sampling, Beam
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
    from softprompt_jax.data.few_shot import FewShot
    from softprompt_jax.data.packages import Package
    from softprompt_jax.data.packing import Packing
    from softprompt_jax.data.rows import Rows
    from softprompt_jax.data.seqio_source import Seqio
    from softprompt_jax.data.sources import Files, Folder, Hub, Inputs
    from softprompt_jax.data.task import Task
    from softprompt_jax.data.tokenizer import TextSettings
    from softprompt_jax.distributed.mesh import Mesh
    from softprompt_jax.inference.bank import PromptBank
    from softprompt_jax.inference.ensemble import ensemble
    from softprompt_jax.inference.from_arrays import generate, logits
    from softprompt_jax.inference.predictor import load_predictor
    from softprompt_jax.methods import (
        IA3,
        Adapter,
        Bias,
        BlackBox,
        DePT,
        Full,
        Hard,
        LoRA,
        Multitask,
        Norms,
        Prefix,
        Prompt,
        PTuning,
        PTuningV2,
        Wayward,
    )
    from softprompt_jax.models.decode import Beam, Greedy, LengthPenalty, Sampling
    from softprompt_jax.optim.gradient_free import CMAES, GreedyWords, NoTraining
    from softprompt_jax.optim.optimizers import Adafactor, AdamW, Schedule
    from softprompt_jax.run import Run, Scratch, load_run
    from softprompt_jax.tasks.mixture import Mixture
    from softprompt_jax.training.callbacks import TensorBoard, WandB
    from softprompt_jax.training.compress import compress
    from softprompt_jax.training.loop import train
    from softprompt_jax.training.sweep import sweep
    from softprompt_jax.training.trained_run import TrainedRun
    from softprompt_jax.training.tune import tune

__version__ = "0.1.0"
__all__ = ["CMAES", "IA3", "Adafactor", "AdamW", "Adapter", "Backbone", "Beam", "Bias", "BlackBox", "DePT", "FewShot"]
__all__ += [
    "Files",
    "Folder",
    "Full",
    "Greedy",
    "GreedyWords",
    "Hard",
    "Hub",
    "Inputs",
    "LengthPenalty",
    "LoRA",
    "Mesh",
    "Mixture",
]
__all__ += ["Multitask", "NoTraining", "Norms", "PTuning", "PTuningV2", "Package", "Packing", "Prefix", "Prompt"]
__all__ += ["PromptBank", "Rows", "Run", "Sampling", "Schedule", "Scratch", "Seqio", "Task", "TensorBoard"]
__all__ += ["TextSettings", "TrainedRun", "UserError", "WandB", "Wayward"]
__all__ += [
    "compress",
    "ensemble",
    "generate",
    "inspect",
    "load_backbone",
    "load_predictor",
    "load_prompt",
    "load_run",
    "logits",
]
__all__ += ["rank_sources", "recycle", "report", "sweep", "train", "tune"]
_NAMES = {
    "analysis.inspect": "inspect",
    "analysis.report": "report",
    "analysis.transfer": "rank_sources recycle",
    "checkpoints.artifact": "load_prompt",
    "checkpoints.backbone": "Backbone load_backbone",
    "config": "UserError",
    "data.few_shot": "FewShot",
    "data.packages": "Package",
    "data.packing": "Packing",
    "data.rows": "Rows",
    "data.seqio_source": "Seqio",
    "data.sources": "Files Folder Hub Inputs",
    "data.task": "Task",
    "data.tokenizer": "TextSettings",
    "distributed.mesh": "Mesh",
    "inference.bank": "PromptBank",
    "inference.ensemble": "ensemble",
    "inference.from_arrays": "generate logits",
    "inference.predictor": "load_predictor",
    "methods": "Adapter Bias BlackBox DePT Full Hard IA3 LoRA Multitask Norms PTuning PTuningV2 Prefix Prompt Wayward",
    "models.decode": "Beam Greedy LengthPenalty Sampling",
    "optim.gradient_free": "CMAES GreedyWords NoTraining",
    "optim.optimizers": "Adafactor AdamW Schedule",
    "run": "Run Scratch load_run",
    "tasks.mixture": "Mixture",
    "training.callbacks": "TensorBoard WandB",
    "training.compress": "compress",
    "training.loop": "train",
    "training.sweep": "sweep",
    "training.trained_run": "TrainedRun",
    "training.tune": "tune",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `softprompt --help` does not wait for JAX."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'softprompt_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"softprompt_jax.{_MODULE_OF[name]}"), name)
