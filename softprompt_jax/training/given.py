"""What `train` is given in Python beside settings: a loaded backbone, an array to start from, metrics as functions.

None of it fits into a config. The settings of the run name it, so that its folder says what it was made with, and going
on with the run asks for it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from softprompt_jax.checkpoints.backbone import Backbone
from softprompt_jax.config import UserError
from softprompt_jax.methods import Trainable
from softprompt_jax.methods.prompt import PromptMethod, array_init
from softprompt_jax.models.quantized import quantization_of
from softprompt_jax.run import Run

Metric = Callable[[list[str], list[Any]], Mapping[str, float]]


def named_in(run: Run, backbone: Backbone | None, metrics: Sequence[Metric], init: Any) -> Run:
    """Return the settings of a run that is trained with these.

    Errors: UserError where they do not fit the settings, or the settings name functions that are not given.
    """
    if backbone is not None:
        run = _with_backbone(run, backbone)
    if init is not None:
        first = run.methods[0]
        if not isinstance(first, PromptMethod):
            raise UserError(
                f"init: found rows for the method {first.kind}; expected a method with a prompt first; leave init out"
            )
        run = run.model_copy(
            update={"methods": [first.model_copy(update={"init": array_init(init)}), *run.methods[1:]]}
        )
    names = [getattr(metric, "__name__", type(metric).__name__) for metric in metrics]
    if not all(map(callable, metrics)):
        raise UserError("metrics: expected functions of predictions and targets; names of metrics belong to the task")
    if metrics and (run.pretraining is not None or any(task.scored_by_source for task in run.tasks)):
        raise UserError(
            "metrics: the run is scored by its data alone; expected a task with metrics of ours; leave them out"
        )
    if run.metric_functions not in ([], names):
        raise UserError(
            f"metric_functions: the run is scored by {', '.join(run.metric_functions)}, which a config cannot hold; "
            f"found {', '.join(names) or 'none'}; expected the same functions; pass metrics=[...]"
        )
    return run.model_copy(update={"metric_functions": names})


def _with_backbone(run: Run, backbone: Backbone) -> Run:
    model = backbone.model
    found = {"backbone": backbone.identity, "dtype": model.dtype, "quantize": quantization_of(model)}
    for name, value in found.items():
        if name in run.model_fields_set and getattr(run, name) != value:
            raise UserError(
                f"{name}: found {getattr(run, name)!r} in the run, and a loaded backbone with {value!r}; expected the "
                "same; leave it out of the run"
            )
    if jax.tree.leaves(nnx.state(model, Trainable)):
        raise UserError(
            f"backbone {backbone.identity}: has an adapter already; expected a bare model; load it without `adapter`"
        )
    return run.model_copy(update=found)


def scores_of(metrics: Sequence[Metric], predictions: Sequence[str], targets: Sequence[Any]) -> dict[str, float]:
    """Return what functions of predictions and targets say. Errors: UserError for all but finite numbers by name."""
    found: dict[str, float] = {}
    for metric in metrics:
        name = getattr(metric, "__name__", type(metric).__name__)
        said = metric(list(predictions), list(targets))
        if not isinstance(said, Mapping):
            raise UserError(f"metrics: {name} returned {type(said).__name__}; expected a dictionary {{name: number}}")
        for key, value in said.items():
            if not isinstance(value, int | float | np.number) or not math.isfinite(value):
                raise UserError(f"metrics: {name} returned {key} = {value!r}; expected a finite number")
            if key in found:
                raise UserError(f"metrics: two functions return {key}; expected each name once; rename one")
            found[str(key)] = float(value)
    return found
