"""DePT (Shi and Lipani, 2024): a short prompt, and a low-rank offset of the text's embeddings by their position."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field

from softprompt_jax.methods.base import Context, MethodSettings, Tensors, check_free
from softprompt_jax.methods.prompt import (
    PromptMethod,
    PromptTable,
    SoftPrompt,
    Uniform,
    embedding_rms,
    embedding_scale,
)
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.models.language_model import LanguageModel


class DePT(PromptMethod):
    """DePT: `length` rows, and what is added to the embedding of a text's first token, its second, and so on.

    The additions are a product of two thin matrices of rank `rank`, which starts at 0. So a prompt of 40 rows has as
    many numbers as one of 100, and a text is 60 tokens shorter. In a decoder-only model nothing is added to the
    last token of the input, with which its answer begins.
    """

    paper: ClassVar[str] = "Shi and Lipani, 2024"
    one_for_all: ClassVar[str | None] = "offset of the text"
    refuses_packing: ClassVar[str | None] = "what is added depends on a token's place in its row; set packing: false"
    kind: Literal["dept"] = "dept"
    length: int = Field(default=40, ge=1)  # rows of the prompt
    rank: int = Field(default=45, ge=1)  # rank of the matrix that is added to a text's embeddings
    positions: int = Field(
        default=256, ge=1
    )  # number of a text's tokens, from the first on, that something is added to
    offset_rate: float = Field(default=0.1, gt=0)  # learning rate of what is added, over that of the rows

    def attach(self, model: LanguageModel, key: jax.Array, context: Context) -> None:
        """Give the model the prompt, and what is added to its texts."""
        check_free(model.offset, "what is added to the text")
        super().attach(model, key, context)
        factor = model.settings.embedding_scale if model.settings.scales_prompt else 1.0
        unit, scale = embedding_rms(model) * factor, embedding_scale(model) / embedding_rms(model)
        shape, own = (self.positions, self.rank, model.settings.d_model), jax.random.fold_in(key, 1)
        model.offset = Offset(own, shape, unit, self.offset_rate * scale)

    def prompt(self, model: LanguageModel, key: jax.Array, context: Context) -> PromptTable:
        """Return trainable rows."""
        return SoftPrompt(self.first_rows(model, key, context), embedding_scale(model))

    def finished(self) -> MethodSettings:
        """Return the settings without what the rows start from."""
        return self.model_copy(update={"init": Uniform()})

    def per_example_state(self, model: LanguageModel) -> Tensors:
        """Return the two factors of what is added."""
        left, right = model.offset.factors()
        return super().per_example_state(model) | {"offset left": np.asarray(left), "offset right": np.asarray(right)}


class Offset(nnx.Module):
    """What `LanguageModel.offset` is: `unit` times left [S, R] times right [R, D], a row for each place of a text."""

    def __init__(self, key: jax.Array, shape: tuple[int, int, int], unit: float, learning_rate_scale: float):
        positions, rank, width = shape
        size = rank**-0.5
        self.left = Trainable(
            size * jax.random.normal(key, (positions, rank)),
            axes=("prompt", "rank"),
            learning_rate_scale=size * learning_rate_scale,
        )
        self.right = Trainable(
            jnp.zeros((rank, width)), axes=("prompt", "embed"), learning_rate_scale=learning_rate_scale
        )
        self.unit = unit

    def factors(self) -> tuple[Float[Array, "S R"], Float[Array, "R D"]]:
        """Return the factors with the unit in the second."""
        return self.left[...], self.unit * self.right[...]

    def __call__(self, places: Int[Array, "B T"], words: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        """Return what is added to words at these places of their texts; 0 to all else, and behind the last place."""
        left, right = self.factors()
        one_hot = jax.nn.one_hot(jnp.where(words, places, -1), len(left), dtype=jnp.float32)
        return jnp.matmul(one_hot, left, precision=jax.lax.Precision.HIGHEST) @ right
