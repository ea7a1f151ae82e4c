"""Black-box tuning (Sun et al., 2022): a prompt that moves in a small random subspace, so that scores can train it."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from softprompt_jax.config import UserError
from softprompt_jax.data.prompt_layout import PromptLayout
from softprompt_jax.methods.base import Context, MethodSettings
from softprompt_jax.methods.p_tuning_v2 import DeepRows, PTuningV2
from softprompt_jax.methods.prefix import states
from softprompt_jax.methods.prompt import Prompt, PromptMethod, PromptTable, Uniform
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.models.t5 import T5
from softprompt_jax.optim.gradient_free import CMAES, projection
from softprompt_jax.optim.optimizers import Optimizer


class BlackBox(PromptMethod):
    """Black-box tuning: `length` rows that are words plus a fixed random projection of `dimensions` numbers.

    The numbers train, by CMA-ES unless the run says otherwise. `deep`: every encoder layer has rows and numbers of its
    own (BBTv2, Sun et al., 2022); the optimizer cma_es then moves them in turns with `alternate: true`. `scale`: how
    far numbers of size 1 move the rows, compared with their own size.
    """

    paper: ClassVar[str] = "Sun et al., 2022"
    draws_frozen: ClassVar[bool] = True
    default_optimizer: ClassVar[Optimizer] = CMAES()
    kind: Literal["black_box"] = "black_box"
    length: int = Field(default=20, ge=1)  # rows of the prompt
    dimensions: int = Field(default=500, ge=1)  # trained numbers, of each layer with `deep`
    scale: float = Field(default=1.0, gt=0)  # rows' movement for numbers of size 1, over the rows' own size
    deep: bool = False  # rows and numbers for every encoder layer

    def attach(self, model: T5, key: jax.Array, context: Context) -> None:
        """Give the model a prompt in a subspace, and with `deep` every encoder layer."""
        layout = self.find_placement(model, context)
        if context.words_by_task:
            raise UserError("methods: black_box has one prompt for all tasks; expected prompts: shared")
        if self.deep and self.place in ("decoder", "both"):
            raise UserError(f"methods: black_box deep with place {self.place}; expected a place in the encoder's text")
        if self.deep and model.encoder.deep is not None:
            raise UserError("methods: two methods want prompts at every layer; expected one; remove the other")
        keys = jax.random.split(key, 3)
        start = self.first_rows(model, keys[0], context)
        if self.deep and model.encoder.depth > 1:  # a first layer reads the prompt itself
            later = states(model, start)["encoder"][1:].astype(jnp.float32)
            model.encoder.deep = DeepSubspace(Subspace(later, keys[2], self.dimensions, self.scale))
        subspace = Subspace(start, keys[1], self.dimensions, self.scale)
        model.prompt = SubspacePrompt(subspace, self.place, layout)

    def finished(self) -> MethodSettings:
        """Return the settings of the plain rows."""
        if self.deep:
            return PTuningV2(length=self.length, place=self.place, init=Uniform())
        return Prompt(length=self.length, place=self.place, init=Uniform())


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

    def __init__(self, subspace: Subspace, place: str, layout: PromptLayout):
        self.subspace: Subspace = subspace
        self.place, self.layout = place, layout

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

    def finished(self) -> DeepRows:
        return DeepRows(self.subspace()[:, None], self.every, 0, True, 1.0)
