"""Black-box tuning (Sun et al., 2022): a prompt that moves in a small random subspace, so that scores can train it."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from softprompt_jax.config import UserError
from softprompt_jax.methods.base import Context, MethodSettings
from softprompt_jax.methods.p_tuning_v2 import DeepRows, PTuningV2
from softprompt_jax.methods.prompt import PromptMethod, PromptTable, Uniform
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.models.activations import states
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.optim.gradient_free import CMAES, projection
from softprompt_jax.optim.optimizers import Optimizer


class BlackBox(PromptMethod):
    """Black-box tuning: `length` rows that are words plus a fixed random projection of `dimensions` numbers.

    The numbers train, by CMA-ES unless the run says otherwise. `deep`: every layer that reads the text (of the encoder,
    or of a decoder-only model) has rows and numbers of its own (BBTv2, Sun et al., 2022); the optimizer cma_es then
    moves them in turns with `alternate: true`. `scale`: how far numbers of size 1 move the rows, compared with their
    own size.
    """

    paper: ClassVar[str] = "Sun et al., 2022"
    one_for_all: ClassVar[str | None] = "prompt"
    draws_frozen: ClassVar[bool] = True
    default_optimizer: ClassVar[Optimizer] = CMAES()
    kind: Literal["black_box"] = "black_box"
    length: int = Field(default=20, ge=1)  # rows of the prompt
    dimensions: int = Field(default=500, ge=1)  # trained numbers, of each layer with `deep`
    scale: float = Field(default=1.0, gt=0)  # rows' movement for numbers of size 1, over the rows' own size
    deep: bool = False  # rows and numbers for every layer of the encoder, or of a decoder-only model

    def prompt(self, model: LanguageModel, key: jax.Array, context: Context) -> PromptTable:
        """Return rows in a subspace, and with `deep` give every layer that reads the text such rows."""
        if self.deep and self.place in ("decoder", "both"):
            raise UserError(f"methods: black_box deep with place {self.place}; expected a place in the encoder's text")
        keys = jax.random.split(key, 3)
        start = self.first_rows(model, keys[0], context)
        stack = model.context_stack
        if self.deep and stack.depth > 1:  # a first layer reads the prompt itself
            name = next(name for name, each in model.stacks.items() if each is stack)
            later = states(model, start)[name][1:].astype(jnp.float32)
            stack.deep = DeepSubspace(Subspace(later, keys[2], self.dimensions, self.scale))
        return SubspacePrompt(Subspace(start, keys[1], self.dimensions, self.scale))

    def finished(self) -> MethodSettings:
        """Return the settings of the plain rows."""
        deep = PTuningV2(length=self.length, place=self.place, init=Uniform())
        return deep if self.deep else super().finished()


class Subspace(nnx.Module):
    """Rows [P, D], or [L, P, D] of layers, that are where they start plus a projection of d trainable numbers each."""

    def __init__(self, start: Float[Array, "*L P D"], key: jax.Array, dimensions: int, scale: float):
        self.start = nnx.Param(jnp.asarray(start, jnp.float32), axes=("prompt", "embed"))
        self.directions = nnx.Param(projection(key, dimensions, start, scale), axes=("subspace", "prompt", "embed"))
        self.numbers = Trainable(jnp.zeros((*start.shape[:-2], dimensions)), axes=("subspace",))

    def __call__(self) -> Float[Array, "*L P D"]:
        moved = jnp.einsum("...d,...dpw->...pw", self.numbers[...], self.directions[...])
        return self.start[...] + moved


class SubspacePrompt(PromptTable):
    """The rows of a subspace as a model's prompt."""

    def __init__(self, subspace: Subspace):
        self.subspace: Subspace = subspace

    def table(self) -> Float[Array, "P D"]:
        return self.subspace()


class DeepSubspace(DeepRows):
    """The rows of subspaces as those of every layer but the first."""

    def __init__(self, subspace: Subspace):
        self.subspace: Subspace = subspace
        self.length = self.every = subspace.start.shape[-2]
        self.start, self.replace = 0, True

    def table(self) -> Float[Array, "L P D"]:
        return self.subspace()
