"""P-tuning v2 (Liu et al., 2022): a prompt at every layer, as hidden states at the positions of its ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field

from softprompt_jax.methods.base import Context, MethodSettings, check_free
from softprompt_jax.methods.prompt import PromptMethod, PromptTable, SoftPrompt, Uniform, embedding_scale
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.models.activations import states
from softprompt_jax.models.language_model import LanguageModel


class PTuningV2(PromptMethod):
    """P-tuning v2: `length` rows that every layer puts where the prompt stands.

    `mode`: each layer's rows "replace" what the layer before has left there (they start as the hidden states of the
    words of `init`), or are an addition to it (they start at 0). The rows stand in the token stream, so that packed
    rows and batches of several tasks are exact.
    """

    paper: ClassVar[str] = "Liu et al., 2022"
    kind: Literal["p_tuning_v2"] = "p_tuning_v2"
    length: int = Field(default=20, ge=1)  # rows at every layer
    mode: Literal["replace", "add"] = "replace"  # replacement of what the layer before has left there, or addition to
    # it

    def finished(self) -> MethodSettings:
        """Return the settings of rows that start from nothing in particular."""
        return self.model_copy(update={"init": Uniform()})

    def attach(self, model: LanguageModel, key: jax.Array, context: Context) -> None:
        """Give the model a prompt, and every layer of the stacks in which it stands its rows."""
        for stack in model.stacks.values():
            check_free(stack.deep, "prompts at every layer")
        super().attach(model, key, context)

    def prompt(self, model: LanguageModel, key: jax.Array, context: Context) -> PromptTable:
        """Return the rows of the first layers, and give the others theirs."""
        rows, scale = self.first_rows(model, key, context), embedding_scale(model)
        every = self.row_count  # rows of one task
        for name, stack in model.stacks.items():
            reads_context = stack is model.context_stack
            here = self.place != "decoder" if reads_context else self.place in ("decoder", "both")
            start = 0 if reads_context else every - self.length
            if not here or stack.depth == 1:  # a first layer reads the prompt itself
                continue
            tasks = rows.reshape(-1, every, rows.shape[-1])[:, start : start + self.length]
            stack.deep = DeepRows(self._started(model, name, tasks), every, start, self.mode == "replace", scale)
        return SoftPrompt(rows, scale)

    def _started(self, model: LanguageModel, name: str, tasks: Float[Array, "N P D"]) -> Float[Array, "L N P D"]:
        """Return what the layers after the first of a stack start from."""
        if self.mode == "add":
            return jnp.zeros((model.stacks[name].depth - 1, *tasks.shape))
        return jnp.stack([states(model, task)[name][1:] for task in tasks], 1)


class DeepRows(nnx.Module):
    """What `Stack.deep` is: the rows [L - 1, N P, D] of all layers but the first, which reads embeddings.

    Of every `every` ids a task has, the P from `start` on are these.
    """

    def __init__(self, rows: Float[Array, "L N P D"], every: int, start: int, replace: bool, scale: float = 1.0):
        self.length = rows.shape[2]
        rows = jnp.asarray(rows, jnp.float32).reshape(len(rows), -1, rows.shape[-1])
        self.rows = Trainable(rows, axes=("prompt", "embed"), learning_rate_scale=scale)
        self.every, self.start, self.replace = every, start, replace

    def table(self) -> Float[Array, "L NP D"]:
        """Return the rows of all layers but the first, in float32."""
        return self.rows[...]

    def finished(self) -> DeepRows:
        """Return the same rows as parameters of their own."""
        rows = self.table()
        return DeepRows(rows.reshape(len(rows), -1, self.length, rows.shape[-1]), self.every, self.start, self.replace)

    def __call__(self, indices: Int[Array, "B T"]) -> tuple[Any, Callable[[Array, Any], Array]]:
        """Return what the scan over layers reads, and the function (x, a layer's part of it) -> x that puts it there.

        `indices`: which row of the prompt stands at a position; negative for text.
        """
        rows, length = self.table(), self.length
        inside = indices % self.every - self.start
        here = (indices >= 0) & (inside >= 0) & (inside < length)
        place = jnp.where(here, indices // self.every * length + inside, -1)
        one_hot = jax.nn.one_hot(place, rows.shape[1], dtype=jnp.float32)
        layers = jnp.concatenate([jnp.zeros_like(rows[:1]), rows]), jnp.arange(len(rows) + 1) > 0

        def put(x: Array, layer: tuple[Array, Array]) -> Array:
            row, after_first = layer
            mine = jnp.matmul(one_hot, row, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)
            return jnp.where((here & after_first)[..., None], mine, x) if self.replace else x + mine

        return layers, put
