"""P-tuning (Liu et al., 2021): prompt rows made by a small network while training, plain rows afterwards."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from softprompt_jax.methods.base import AdapterConfig, Context, MethodSettings, Tensors
from softprompt_jax.methods.prompt import Init, Prompt, PromptMethod, PromptTable, embedding_rms
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.settings import ModelSettings
from softprompt_jax.optim.optimizers import AdamW, Optimizer


class PTuning(PromptMethod):
    """P-tuning: `length` vectors that a network mixes ("lstm") or maps one by one ("mlp") to rows.

    The network's rows are scaled to the size of the backbone's words. With `place` they may stand at any place of a
    template.
    """

    paper: ClassVar[str] = "Liu et al., 2021"
    peft_type: ClassVar[str | None] = "P_TUNING"
    default_optimizer: ClassVar[Optimizer] = AdamW(learning_rate=1e-3)
    kind: Literal["p_tuning"] = "p_tuning"
    length: int = Field(default=20, ge=1)  # rows of the prompt
    network: Literal["lstm", "mlp"] = "lstm"  # network that makes the rows: lstm mixes them, mlp maps each by itself
    hidden: int = Field(default=256, ge=1)  # network's width
    layers: int = Field(default=2, ge=1, le=1000)  # number of LSTM layers
    init: Init | None = None  # vectors to start from; null: drawn at random

    def prompt(self, model: LanguageModel, key: jax.Array, context: Context) -> PromptTable:
        """Return rows that a network makes."""
        scale, width = embedding_rms(model), model.settings.d_model
        keys = jax.random.split(key)
        if self.init is None:
            tasks = (len(context.words_by_task),) if context.words_by_task else ()
            vectors = jax.random.normal(keys[0], (*tasks, self.row_count, width))
        else:
            vectors = self.first_rows(model, keys[0], context) / scale
        hidden = self.hidden
        network = LSTM(keys[1], width, hidden, self.layers) if self.network == "lstm" else MLP(keys[1], width, hidden)
        return NetworkPrompt(vectors, network, scale)

    def to_peft(self, model: LanguageModel) -> tuple[AdapterConfig, Tensors]:
        """Return the rows; PEFT saves no network either."""
        config, tensors = self.finished().to_peft(model)
        network = {
            "encoder_reparameterization_type": self.network.upper(),
            "encoder_hidden_size": self.hidden,
            "encoder_num_layers": self.layers,
            "encoder_dropout": 0.0,
        }
        return config | network, tensors

    @classmethod
    def from_peft(
        cls, config: AdapterConfig, tensors: Tensors, settings: ModelSettings
    ) -> tuple[MethodSettings, Tensors]:
        """Take the rows as a plain prompt, since the network is not in the file."""
        return Prompt.from_peft(config, tensors, settings)


class NetworkPrompt(PromptTable):
    """P trainable vectors [P, D], or [N, P, D] for N tasks, and the network that makes rows of them."""

    def __init__(self, vectors: Float[Array, "*N P D"], network: nnx.Module, scale: float):
        self.vectors = Trainable(jnp.asarray(vectors, jnp.float32), axes=("prompt", "embed"))
        self.network: Any = network
        self.scale = scale

    def table(self) -> Float[Array, "NP D"]:
        vectors = self.vectors[...]
        rows = (self.network if vectors.ndim == 2 else jax.vmap(self.network))(vectors)
        return self.scale * rows.reshape(-1, rows.shape[-1])


class Dense(nnx.Module):
    """x W + b, trainable; W drawn with a deviation of `gain` over the root of its inputs, b zero."""

    def __init__(self, key: jax.Array, inputs: int, outputs: int, gain: float = 1.0):
        kernel = gain * inputs**-0.5 * jax.random.normal(key, (inputs, outputs))
        self.kernel = Trainable(kernel, axes=("network_in", "network_out"))
        self.bias = Trainable(jnp.zeros((outputs,)), axes=("network_out",))

    def __call__(self, x: Float[Array, "P in"]) -> Float[Array, "P out"]:
        return x @ self.kernel[...] + self.bias[...]


class MLP(nnx.Module):
    """Three layers with ReLU between them; each row by itself."""

    def __init__(self, key: jax.Array, width: int, hidden: int):
        keys = jax.random.split(key, 3)
        self.first = Dense(keys[0], width, hidden)
        self.second = Dense(keys[1], hidden, hidden, 2**0.5)  # half of a ReLU's inputs are lost
        self.third = Dense(keys[2], hidden, width, 2**0.5)

    def __call__(self, x: Float[Array, "P D"]) -> Float[Array, "P D"]:
        return self.third(jax.nn.relu(self.second(jax.nn.relu(self.first(x)))))


class LSTM(nnx.Module):
    """An LSTM that reads the prompt in both directions, and two layers with ReLU between them."""

    def __init__(self, key: jax.Array, width: int, hidden: int, layers: int):
        keys = jax.random.split(key, 2 * layers + 2)
        self.layers = layers
        for layer in range(layers):
            inputs = width if layer == 0 else 2 * hidden
            setattr(self, f"forwards{layer}", Direction(keys[2 * layer], inputs, hidden, reverse=False))
            setattr(self, f"backwards{layer}", Direction(keys[2 * layer + 1], inputs, hidden, reverse=True))
        self.first = Dense(keys[-2], 2 * hidden, 2 * hidden)
        self.second = Dense(keys[-1], 2 * hidden, width, 2**0.5)

    def __call__(self, x: Float[Array, "P D"]) -> Float[Array, "P D"]:
        for layer in range(self.layers):
            x = jnp.concatenate([getattr(self, f"forwards{layer}")(x), getattr(self, f"backwards{layer}")(x)], -1)
        return self.second(jax.nn.relu(self.first(x)))


class Direction(nnx.Module):
    """One direction of one LSTM layer (Hochreiter and Schmidhuber, 1997); gates: input, forget, cell, output."""

    def __init__(self, key: jax.Array, inputs: int, hidden: int, reverse: bool):
        keys = jax.random.split(key)
        self.input = Dense(keys[0], inputs, 4 * hidden)
        drawn = hidden**-0.5 * jax.random.normal(keys[1], (hidden, 4 * hidden))
        self.recurrent = Trainable(drawn, axes=("network_in", "network_out"))
        self.reverse = reverse

    def __call__(self, x: Float[Array, "P in"]) -> Float[Array, "P H"]:
        recurrent = self.recurrent[...]

        def step(state, projected):
            hidden, cell = state
            enter, forget, new, leave = jnp.split(projected + hidden @ recurrent, 4)
            cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
            hidden = jax.nn.sigmoid(leave) * jnp.tanh(cell)
            return (hidden, cell), hidden

        zeros = jnp.zeros(recurrent.shape[0])
        return jax.lax.scan(step, (zeros, zeros), self.input(x), reverse=self.reverse)[1]
