"""The programs of `predict` and `serve` as they would run elsewhere, on abstract weights: what `plan` compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt_jax import methods
from softprompt_jax.assembly import Assembly, check_devices
from softprompt_jax.config import parse
from softprompt_jax.distributed import mesh
from softprompt_jax.inference import memory, programs
from softprompt_jax.inference.programs import DeviceModel
from softprompt_jax.inference.prompt_cache import with_table
from softprompt_jax.methods import Trainable
from softprompt_jax.models import continuous_batching
from softprompt_jax.models.decode import Beam, Sampling
from softprompt_jax.run import Run
from softprompt_jax.serve.limits import Limits

Purpose = Literal["train", "predict", "serve"]
TABLE_ROWS = 8192  # of a bank's table of prompts


@dataclasses.dataclass(frozen=True)
class Answering:
    """What answers texts on a mesh: its programs, for `rows` texts or slots at once."""

    traced: list[Any]
    model: DeviceModel
    rows: int
    cache_bytes: int  # of keys and values, that a device holds


def predicting(run: Run, assembly: Assembly, rows: int | None) -> Answering:
    """Return the program of `predict` for `rows` texts at once (default: as the run evaluates)."""
    model = _finished(run, assembly)
    around, before = assembly.layout.lengths
    rows = mesh.round_rows(rows or run.evaluation_batch_size)
    shapes = (rows, run.max_input_tokens + around), (rows, before), (rows,), (rows, 0)
    given = mesh.shard_batch(tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))
    made, how = DeviceModel.of(model, Trainable), run.decoding
    copies = how.beams if isinstance(how, Beam) else how.samples if isinstance(how, Sampling) else 1
    context, own = shapes[0][1], before + run.max_target_tokens
    held = memory.cache_bytes(model.settings, run.dtype, rows * copies, context, own)
    return Answering([programs.answers.trace(made, how, run.max_target_tokens, *given)], made, rows, held)


def serving(run: Run, assembly: Assembly, rows: int | None, free: Callable[[Any], int]) -> Answering:
    """Return the programs of `serve` with `rows` slots; by default as many as the server has.

    `free`: what a device has left beside a model's arrays, in bytes.
    """
    asked = {"max_input_tokens": run.max_input_tokens, "max_tokens": run.max_target_tokens}
    limits = parse(Limits, asked, "plan")
    model = _finished(run, assembly)
    made, kind = with_table(model, TABLE_ROWS)
    made = DeviceModel.of(mesh.shard_model(made), kind)
    before = assembly.layout.lengths[1]
    context, own = limits.max_input_tokens + limits.max_prompt_rows, limits.max_tokens + before
    sizes = model.settings, run.dtype, context, own
    slots = rows or memory.slots_that_fit(*sizes, free((made.changing, made.frozen)), limits.slots)
    batch = dataclasses.replace(made, tables={}, entries=np.zeros(programs.JOINED, np.int32))
    empty = programs.empty_slots.trace(batch, slots, own, context)
    layout = empty.lower().compile().output_shardings
    shapes = jax.tree.unflatten(jax.tree.structure(layout), jax.tree.leaves(empty.out_info))
    state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, layout
    )
    number, places = jax.ShapeDtypeStruct((), jnp.int32), [jax.ShapeDtypeStruct((slots,), jnp.int32)] * 2
    texts = [jax.ShapeDtypeStruct((programs.JOINED, length), jnp.int32) for length in (context, before)]
    wanted = continuous_batching.nothing_wanted(slots, own, model.settings.padding)
    traced = [
        programs.advance_slots.trace(made, state, number, slots, context),
        programs.join_slots.trace(batch, state, *texts, number, *places, wanted),
    ]
    return Answering(traced, made, slots, memory.cache_bytes(model.settings, run.dtype, slots, context, own))


def _finished(run: Run, assembly: Assembly) -> Any:
    """Return the abstract model as it answers, sharded over the mesh."""
    check_devices(run.model_copy(update={"batch_size": mesh.row_shards(), "accumulate": 1, "packing": None}), assembly)
    return mesh.shard_model(nnx.eval_shape(methods.finish, assembly.model))
