"""One training step for all methods and optimizers, and the state that it changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from softprompt_jax.checkpoints.backbone import load_adafactor
from softprompt_jax.distributed import mesh as sharding
from softprompt_jax.methods import Split
from softprompt_jax.models.settings import Remat
from softprompt_jax.optim.gradient_free import Search
from softprompt_jax.optim.leaf import Leaf
from softprompt_jax.optim.losses import cross_entropy, divergence, finite_mean
from softprompt_jax.optim.optimizers import build_for_methods, from_slots
from softprompt_jax.run import Run
from softprompt_jax.training import remat
from softprompt_jax.training.distill import teacher_logits

State = dict[str, Any]  # trainable, optimizer, step (which is also the data position)


def first_state(optimizer: optax.GradientTransformation | Search, trainable: Any) -> State:
    """Return the state before the first step."""
    return {
        "trainable": jax.tree.map(jnp.copy, trainable),  # donated; the start is compared with later
        "optimizer": optimizer.init(trainable),
        "step": jnp.zeros((), jnp.int32),
    }


def build_optimizer(
    run: Run, leaves: Mapping[str, Leaf], backbone: str | None = None
) -> optax.GradientTransformation | Search:
    """Build what updates a run's trainable arrays.

    `backbone`: the T5X checkpoint from whose step and slots an optimizer with `restore` goes on; None: from none.
    """
    optimizers, slots = run.optimizers, {}
    if backbone is not None and getattr(run.optimizer, "restore", False):
        step, slots = load_adafactor(backbone)
        optimizers = [each.model_copy(update={"step_origin": step}) for each in optimizers]
    built = build_for_methods(optimizers, run.schedule, run.steps, leaves, run.clip_norm)
    return from_slots(built, slots, str(backbone)) if slots else built


def make_step(
    run: Run,
    parts: Split,
    optimizer: optax.GradientTransformation | Search,
    state_shardings: Any = None,
    memory: int | None = None,
) -> Callable:
    """Return `plain_step`, which has the mathematics, jitted: `step(state, frozen, batch, key) -> state, metrics`.

    `state` is donated. `state_shardings` keeps the state where it lies, which XLA would be free to change. `memory` are
    the bytes of a device, by default what it tells itself.
    """
    memory, room = memory or remat.memory(), None
    if run.remat == "auto" and memory is not None:
        state = jax.eval_shape(functools.partial(first_state, optimizer), parts.trainable)
        state = sharding.with_sharding(state, state_shardings)
        held = sharding.local_bytes(parts.frozen) + 2 * sharding.local_bytes(state)  # with gradient and updates
        room = remat.room(held, memory)
    step = plain_step(run, parts, optimizer, room)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))


def plain_step(
    run: Run, parts: Split, optimizer: optax.GradientTransformation | Search, room: int | None = None
) -> Callable:
    """Return `step(state, frozen, batch, key) -> state, metrics`.

    With `remat: auto` each shape of a batch keeps as many activations as fit into `room` bytes of a device.

    Only the trainable argument is differentiated, so that no weight gradient of the frozen backbone is
    ever computed. A search differentiates nothing: all its candidates are scored at once, without dropout. With
    accumulation losses and weights are summed over the parts and divided once.
    """

    def summed_loss(trainable: Any, frozen: Any, batch: dict[str, jax.Array], key: jax.Array | None, policy=None):
        model = parts.merge(trainable, jax.lax.stop_gradient(frozen))
        hidden = model.hidden(batch, key, policy)
        logits = model.project(hidden)
        padding, targets = model.settings.padding, batch["decoder_targets"]
        if model.context is None:
            loss, weight = cross_entropy(logits, targets, run.z_loss, run.label_smoothing, padding)
        else:
            loss, weight = divergence(logits, teacher_logits(model, batch), targets, padding)
        return loss + sum(method.penalty(model, batch, hidden, logits) for method in run.methods), weight

    gradient = jax.value_and_grad(summed_loss, has_aux=True)

    def part_gradient(trainable: Any, frozen: Any, batch: dict[str, jax.Array], key: jax.Array | None):
        def kept(policy: Remat) -> int:
            return remat.kept_bytes(lambda own, some: summed_loss(own, frozen, some, key, policy)[0], trainable, batch)

        policy = remat.choose(kept, room) if run.remat == "auto" and room is not None else None
        (loss, weight), gradients = gradient(trainable, frozen, batch, key, policy)
        return loss, weight, gradients

    def divided(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return jax.tree.map(lambda x: x.reshape(run.accumulate, -1, *x.shape[1:]), batch)

    def search(state: State, frozen: Any, batch: dict[str, jax.Array], key: jax.Array):
        assert isinstance(optimizer, Search)
        candidates, drawn = optimizer.propose(state["optimizer"], state["trainable"], frozen, key)
        score = jax.vmap(lambda one, part: summed_loss(one, frozen, part, None), (0, None))
        losses, weights = jax.lax.map(lambda part: score(candidates, part), divided(batch))
        losses = losses.sum(0) / jnp.maximum(weights.sum(0), 1)
        return *optimizer.choose(state["optimizer"], state["trainable"], drawn, losses), finite_mean(losses)

    def descend(state: State, frozen: Any, batch: dict[str, jax.Array], key: jax.Array | None):
        assert not isinstance(optimizer, Search)
        trainable = state["trainable"]
        if run.accumulate == 1:
            loss, weight, gradients = part_gradient(trainable, frozen, batch, key)
        else:
            keys = None if key is None else jax.random.split(key, run.accumulate)

            def add(total, part):
                return jax.tree.map(jnp.add, total, part_gradient(trainable, frozen, *part)), None

            zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
            (loss, weight, gradients), _ = jax.lax.scan(add, zeros, (divided(batch), keys))
        weight = jnp.maximum(weight, 1)
        if run.loss == "mean":
            gradients = jax.tree.map(lambda g: g / weight, gradients)
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], trainable)
        return optax.apply_updates(trainable, updates), optimizer_state, loss / weight

    def step(state: State, frozen: Any, batch: dict[str, jax.Array], key: jax.Array):
        if isinstance(optimizer, Search):
            trainable, changed, loss = search(state, frozen, batch, jax.random.fold_in(key, state["step"]))
        else:
            dropout_key = jax.random.fold_in(key, state["step"]) if run.draws_dropout else None
            trainable, changed, loss = descend(state, frozen, batch, dropout_key)
        return {"trainable": trainable, "optimizer": changed, "step": state["step"] + 1}, {"loss": loss}

    return step
