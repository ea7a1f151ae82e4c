"""Optimizers and schedules as settings: the paper's Adafactor, AdamW, warm-up, decay, clipping.

Each method of a run has an optimizer; methods with equal settings share one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import Field

from softprompt_jax.config import Settings, UserError
from softprompt_jax.optim.gradient_free import CMAES, GradientFree, GreedyWords, NoTraining, Search
from softprompt_jax.optim.leaf import Leaf


class Schedule(Settings):
    """The learning rate's factor over the run: linear warm-up, then constant or decaying to `final`."""

    warmup_steps: int = Field(default=0, ge=0)  # steps in which the factor rises to 1
    decay: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "constant"  # course of the factor after warm-up
    final: float = Field(default=0.0, ge=0, le=1)  # share of the learning rate that is left at the last step

    def build(self, learning_rate: float | jax.Array, steps: int) -> optax.Schedule:
        """Return step -> learning rate for a run of `steps` steps."""
        rest = max(1, steps - self.warmup_steps)
        after = {
            "constant": lambda: optax.constant_schedule(learning_rate),
            "linear": lambda: optax.linear_schedule(learning_rate, self.final * learning_rate, rest),
            "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest, self.final),
            "inverse_sqrt": lambda: lambda step: learning_rate * (1 + step / max(1, self.warmup_steps)) ** -0.5,
        }[self.decay]()
        if not self.warmup_steps:
            return after
        warmup = optax.linear_schedule(learning_rate / self.warmup_steps, learning_rate, self.warmup_steps)
        return optax.join_schedules([warmup, after], [self.warmup_steps])


class Adafactor(Settings):
    """Adafactor as in Lester et al. (2021): constant 0.3, no parameter scaling, no momentum.

    `step_origin` is where its step counter starts. The paper's code restores it with the pre-trained
    model (1,100,000) while the second moment starts at zero, so that for thousands of steps the RMS
    clip binds and every update has an RMS of exactly the learning rate. 0 gives plain Adafactor. With `restore`
    step and second moments are those of the backbone's T5X checkpoint, as in the paper's model tuning.
    """

    kind: Literal["adafactor"] = "adafactor"
    learning_rate: float = Field(default=0.3, gt=0)  # step's size (root mean square of an update that is clipped to 1)
    decay: float = Field(default=0.8, gt=0, lt=1)  # exponent of the second moments' decay
    clipping: float | None = Field(default=1.0, gt=0)  # largest root mean square of an update, before the learning
    # rate; null: no limit
    weight_decay: float = Field(default=1e-5, ge=0)  # share of each weight lost in a step, whatever the learning rate
    parameter_scaling: bool = False  # factor of each update: the weight's root mean square
    step_origin: int = Field(default=1_100_000, ge=0)  # first value of the step counter (see above)
    restore: bool = False  # start from the step and the second moments of the backbone's T5X checkpoint

    def transform(self, schedule: optax.Schedule) -> list[optax.GradientTransformation]:
        return [
            optax.scale_by_factored_rms(decay_rate=self.decay, step_offset=-self.step_origin),
            *([] if self.clipping is None else [optax.clip_by_block_rms(self.clipping)]),
            optax.scale_by_learning_rate(schedule, flip_sign=False),
            *([optax.scale_by_param_block_rms()] if self.parameter_scaling else []),
        ]


class AdamW(Settings):
    """AdamW (Loshchilov and Hutter, 2019); the weight decay is times the learning rate.

    The learning rate's default is for prompts; methods on weights bring their own (`softprompt methods`).

    To train a T5 from random weights set `parameter_scaling`: its query weights start so small that a plain
    step of 1e-3 changes them by a tenth, and small models of ours learned nothing from their encoder.
    """

    kind: Literal["adamw"] = "adamw"
    learning_rate: float = Field(default=0.3, gt=0)  # step's size; the default is for prompts
    beta1: float = Field(default=0.9, ge=0, lt=1)  # decay of the first moments
    beta2: float = Field(default=0.999, ge=0, lt=1)  # decay of the second moments
    epsilon: float = Field(default=1e-8, gt=0)  # addition to the second moment's root
    weight_decay: float = Field(default=0.0, ge=0)  # share of each weight lost in a step, times the learning rate
    parameter_scaling: bool = False  # factor of each update: the weight's root mean square

    def transform(self, schedule: optax.Schedule) -> list[optax.GradientTransformation]:
        return [
            optax.scale_by_adam(self.beta1, self.beta2, self.epsilon),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(schedule, flip_sign=False),
            *([optax.scale_by_param_block_rms()] if self.parameter_scaling else []),
        ]


Optimizer = Annotated[Adafactor | AdamW | CMAES | GreedyWords | NoTraining, Field(discriminator="kind")]
OPTIMIZERS: dict[str, type[Settings]] = {
    cls.model_fields["kind"].default: cls for cls in get_args(get_args(Optimizer)[0])
}


def build_for_methods(
    optimizers: Sequence[Optimizer],
    schedule: Schedule,
    steps: int,
    leaves: Mapping[str, Leaf],
    clip_norm: float | None = None,
) -> optax.GradientTransformation | Search:
    """Build what updates the arrays of a list of methods: each method's under its own settings, with one schedule.

    Where all settings are equal the state is that of one optimizer over everything. `clip_norm` is of the gradient of
    all that trains.
    """
    first, *others = optimizers
    if all(settings == first for settings in others):
        return build(first, schedule.build(first.learning_rate, steps), leaves, clip_norm)
    parts: dict[Hashable, optax.GradientTransformation] = {}
    for index, settings in enumerate(optimizers):
        built = build(settings, schedule.build(settings.learning_rate, steps), leaves)
        # Run refuses every search beside an optimizer but that of `kind: none`, which changes nothing.
        parts[str(index)] = optax.set_to_zero() if isinstance(built, Search) else built

    def owners(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda keys, _: str(leaves[_path(keys)].method), params)

    def untrained(params: Any) -> Any:
        return jax.tree.map(lambda owner: isinstance(optimizers[int(owner)], NoTraining), owners(params))

    clip = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    return optax.chain(optax.masked(optax.set_to_zero(), untrained), *clip, optax.partition(parts, owners))


def describe_rates(names: Sequence[str], optimizers: Sequence[Optimizer], leaves: Mapping[str, Leaf]) -> str:
    """Return a line with the learning rate of each method: its optimizer's, times the scales of its arrays."""
    found = []
    for index, (name, settings) in enumerate(zip(names, optimizers, strict=True)):
        scales = sorted({leaf.learning_rate_scale for leaf in leaves.values() if leaf.method == index})
        rates = " and ".join(f"{settings.learning_rate * scale:.4g}" for scale in scales)
        factors = f", {settings.learning_rate:g} x {', '.join(f'{s:.4g}' for s in scales)}" if scales != [1.0] else ""
        found.append(f"{name} {rates} ({settings.kind}{factors})")
    return f"learning rate: {'; '.join(found)}"


def build(
    settings: Optimizer,
    schedule: optax.Schedule,
    leaves: Mapping[str, Leaf],
    clip_norm: float | None = None,
) -> optax.GradientTransformation | Search:
    """Build what updates a nested dictionary of trainable arrays under one optimizer: a transformation or a search.

    Stacked leaves [L, ...] are updated per layer, since clipping, scaling and factoring are per matrix.
    """
    if isinstance(settings, GradientFree):
        return settings.search(leaves)
    parts = [_per_layer(part, leaves) for part in settings.transform(schedule)]
    parts.append(_scaled(leaves))
    if settings.kind == "adafactor" and settings.weight_decay:
        parts.append(optax.add_decayed_weights(settings.weight_decay))
    parts.append(optax.scale(-1.0))
    if clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(clip_norm))
    return optax.chain(*parts)


def from_slots(
    optimizer: Any, slots: Mapping[str, Mapping[str, np.ndarray]], where: str
) -> optax.GradientTransformation:
    """Return an optimizer that starts from the slots of a T5X checkpoint."""
    return optax.GradientTransformation(lambda params: restored(optimizer.init(params), slots, where), optimizer.update)


def restored(state: Any, slots: Mapping[str, Mapping[str, np.ndarray]], where: str) -> Any:
    """Return Adafactor's fresh state with the second moments that a T5X checkpoint holds, by path of the array.

    Errors: UserError for an array without slots of its shape, and for a checkpoint with momentum, which ours has not.
    """

    def filled(keys: tuple, moments: Any) -> Any:
        if not isinstance(moments, optax.FactoredState):
            return moments
        path = keys[-1].key
        found = slots.get(path, {})
        if "m" in found:
            raise UserError(f"{where}: momentum for {path}; expected none; leave out optimizer.restore")
        used: dict[str, Any] = {name: getattr(moments, name) for name in ("v", "v_row", "v_col")}
        count: Any = moments.count
        # What optax does not use is one number, of each layer if there are several.
        used = {name: leaf for name, leaf in used.items() if leaf.shape not in (count.shape, (*count.shape, 1))}
        if {name: leaf.shape for name, leaf in used.items()} != {name: slot.shape for name, slot in found.items()}:
            expected = ", ".join(f"{name} {list(leaf.shape)}" for name, leaf in used.items())
            listed = ", ".join(f"{name} {list(slot.shape)}" for name, slot in found.items()) or "none"
            raise UserError(
                f"{where}: slots of {path}: found {listed}; expected {expected}; leave out optimizer.restore"
            )
        return moments._replace(**{name: jnp.asarray(slot, jnp.float32) for name, slot in found.items()})

    return jax.tree.map_with_path(filled, state, is_leaf=lambda part: isinstance(part, optax.FactoredState))


def _path(keys: tuple) -> str:
    return ".".join(str(key.key) for key in keys)


def _scaled(leaves: Mapping[str, Leaf]) -> optax.GradientTransformation:
    """Multiply each leaf's update by its own learning-rate scale."""

    def scaled(updates: Any, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda k, u: leaves[_path(k)].learning_rate_scale * u, updates)

    return optax.stateless(scaled)


def _per_layer(part: optax.GradientTransformation, leaves: Mapping[str, Leaf]) -> optax.GradientTransformation:
    """Apply `part` to every leaf by itself, and to a stacked leaf layer by layer."""

    def each(function, stacked: bool):
        return jax.vmap(function) if stacked else function

    def init(params: Any):
        paths = jax.tree_util.tree_flatten_with_path(params)[0]
        return {_path(k): each(part.init, leaves[_path(k)].stacked)(leaf) for k, leaf in paths}

    def update(updates: Any, state: Any, params: Any = None):
        flat, structure = jax.tree_util.tree_flatten_with_path(updates)
        results, states = [], {}
        for (keys, leaf), param in zip(flat, jax.tree.leaves(params), strict=True):
            path = _path(keys)
            result, states[path] = each(part.update, leaves[path].stacked)(leaf, state[path], param)
            results.append(result)
        return structure.unflatten(results), states

    return optax.GradientTransformation(init, update)
