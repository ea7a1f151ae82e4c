"""Prefix tuning (Li and Liang, 2021): P trainable keys and values before those of the text, at every layer."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field, field_validator, model_validator

from softprompt_jax.config import UserError
from softprompt_jax.methods.base import Context, MethodSettings, Tensors
from softprompt_jax.methods.prompt import Init, Labels, Vocabulary
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.models.attention import PrefixKeyValues
from softprompt_jax.models.t5 import T5, Stack, T5Settings
from softprompt_jax.optim.optimizers import AdamW, Optimizer

Attended = Literal["encoder", "decoder", "cross"]
Pair = tuple[Array, Array]  # keys and values


class Prefix(MethodSettings):
    """Prefix tuning: `length` keys and values that every query sees, in each kind of attention that is named.

    `network` is the width of the network that makes them while training and is dropped afterwards; with null they
    train themselves, and start as those of real words (`init`). T5 knows positions by a bias only: prefixes
    have none, or with `positions: before` the bias of tokens before the text, as in PEFT.
    """

    paper: ClassVar[str] = "Li and Liang, 2021"
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    default_optimizer: ClassVar[Optimizer] = AdamW(learning_rate=1e-3)
    kind: Literal["prefix"] = "prefix"
    length: int = Field(default=20, ge=1)  # keys and values at every layer
    attentions: list[Attended] = Field(["encoder", "decoder", "cross"], min_length=1)  # kinds of attention that get a
    # prefix
    network: int | None = Field(default=512, ge=1)  # width of the network that makes the prefix in training; null: no
    # network
    positions: Literal["none", "before"] = "none"  # position bias of the prefix: none, or that of tokens before the
    # text
    init: Init | Literal["zero"] | None = None  # start without a network; null: label words where the task has some,
    # else vocabulary

    @field_validator("attentions")
    @classmethod
    def _once_each(cls, names: list[Attended]) -> list[Attended]:
        if len(set(names)) < len(names):
            raise ValueError("expected each attention once")
        return names

    @model_validator(mode="after")
    def _network_starts_by_itself(self) -> Prefix:
        if self.network is not None and self.init is not None:
            raise ValueError("init has no say where a network makes the prefix; expected network: null beside it")
        return self

    @property
    def refuses_packing(self) -> str | None:  # type: ignore[override]
        """Why several examples cannot share a row."""
        if self.positions == "none":
            return None  # all examples share the prefix, wherever they stand
        return "a prefix with positions stands before the first example of a row only; set positions: none"

    def attach(self, model: T5, key: jax.Array, context: Context) -> None:
        """Give the named attentions a trainable prefix."""
        if model.encoder.prefix is not None or model.decoder.prefix is not None:
            raise UserError("methods: two methods want the prefix; expected one; remove the other")
        settings = model.settings
        inner = settings.num_heads * settings.d_kv
        words: dict[Attended, Pair] = {}
        if self.network is None and self.init != "zero":
            init = self.init or (Labels() if context.label_words else Vocabulary())
            words = activations(model, init.rows(self.length, model, key, context))

        def part(name: Attended, index: int) -> KeysValues | Network | None:
            depth = (model.encoder if name == "encoder" else model.decoder).depth
            if name not in self.attentions:
                return None
            if name in words:
                return KeysValues(*words[name])
            if self.network is None:
                return KeysValues(*[jnp.zeros((depth, self.length, inner))] * 2)
            return Network(jax.random.fold_in(key, index), depth, self.length, settings.d_model, self.network, inner)

        encoder, decoder, cross = part("encoder", 0), part("decoder", 1), part("cross", 2)
        before = self.positions == "before"
        if encoder is not None:
            model.encoder.prefix = Prefixes(encoder, None, settings.num_heads, before)
        if decoder is not None or cross is not None:
            model.decoder.prefix = Prefixes(decoder, cross, settings.num_heads, before)

    def finished(self) -> MethodSettings:
        """Return the settings of the prefix without its network."""
        return self.model_copy(update={"network": None, "init": "zero"})

    def per_example_state(self, model: T5) -> Tensors:
        """Return keys and values of every attention that has a prefix."""
        name, found = "positioned" if self.positions == "before" else "prefix", {}
        for stack, sides in ((model.encoder, ("encoder", "")), (model.decoder, ("decoder", "cross"))):
            parts = () if stack.prefix is None else (stack.prefix.attention, stack.prefix.cross)
            for side, part in zip(sides, parts, strict=False):
                if part is not None:  # cross attention knows no positions
                    found[f"{'prefix' if side == 'cross' else name} {side}"] = np.stack(list(map(np.asarray, part())))
        return found

    def to_peft(self, model: T5) -> tuple[dict[str, Any], Tensors]:
        """Return the decoder's keys and values in PEFT's slots, two layers to a slot where the depth is even."""
        settings = model.settings
        if self.attentions != ["decoder"] or self.positions != "before":
            raise UserError(
                f"methods: a prefix of {', '.join(self.attentions)} with positions {self.positions}; expected only the "
                "decoder's with positions before, as PEFT has them on a T5; keep the run folder"
            )
        if settings.num_heads * settings.d_kv != settings.d_model:
            raise UserError(
                "methods: the heads together are not as wide as the model; expected it, since PEFT fails otherwise; "
                "keep the run folder"
            )
        assert model.decoder.prefix.attention is not None
        pairs = [np.asarray(part) for part in model.decoder.prefix.attention()]
        slots = np.zeros((self.length, 2 * model.decoder.depth, settings.d_model), np.float32)
        for layer, (keys, values) in enumerate(_slots(model.decoder.depth)):
            for slot, part in ((keys, pairs[0][layer]), (values, pairs[1][layer])):
                if slots[:, slot].any() and not np.array_equal(slots[:, slot], part):
                    raise UserError(
                        f"methods: layers of the decoder differ (found at {layer}); expected layers i and i + L/2 to "
                        "share a prefix, as in PEFT on a T5 of even depth; keep the run folder"
                    )
                slots[:, slot] = part
        config = {
            "num_virtual_tokens": self.length,
            "num_transformer_submodules": 2,  # PEFT hands keys and values to the layers by it
            "token_dim": settings.d_model,
            "num_layers": model.decoder.depth,
            "num_attention_heads": settings.num_heads,
            "prefix_projection": False,
            "encoder_hidden_size": settings.d_model,
        }
        return config, {"prompt_embeddings": slots.reshape(self.length, -1)}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], tensors: Tensors, settings: T5Settings
    ) -> tuple[MethodSettings, Tensors]:
        """Take PEFT's slots apart: keys and values of the decoder's self-attention."""
        depth, length = settings.num_decoder_layers, config["num_virtual_tokens"]
        slots = tensors["prompt_embeddings"]
        expected = (length, 2 * depth * settings.d_model)
        if slots.shape != expected:
            raise UserError(f"prompt_embeddings: found shape {list(slots.shape)}; expected {list(expected)}")
        slots = slots.reshape(length, 2 * depth, settings.d_model).swapaxes(0, 1)
        chosen = np.asarray(_slots(depth))
        method = cls(length=length, attentions=["decoder"], network=None, positions="before", init="zero")
        place = "decoder.prefix.attention"
        return method, {f"{place}.keys": slots[chosen[:, 0]], f"{place}.values": slots[chosen[:, 1]]}


def _slots(depth: int) -> list[tuple[int, int]]:
    """Return which of PEFT's 2L slots are the keys and the values of each decoder layer."""
    return [(4 * layer % (2 * depth), (4 * layer + 1) % (2 * depth)) for layer in range(depth)]


class Prefixes(nnx.Module):
    """What `Stack.prefix` is: keys and values before those of self-attention, of cross attention, or of both."""

    def __init__(
        self, attention: KeysValues | Network | None, cross: KeysValues | Network | None, heads: int, positions: bool
    ):
        self.attention: Any = nnx.data(None) if attention is None else attention
        self.cross: Any = nnx.data(None) if cross is None else cross
        self.heads, self.positions = heads, positions
        length = 0 if attention is None else attention.length
        self.unpositioned, self.positioned = (0, length) if positions else (length, 0)

    def __call__(self) -> tuple[PrefixKeyValues | None, PrefixKeyValues | None]:
        """Return keys and values [L, H, P, K] of both attentions."""
        return self._split(self.attention), self._split(self.cross)

    def _split(self, part: KeysValues | Network | None) -> PrefixKeyValues | None:
        if part is None:
            return None
        return PrefixKeyValues(*(x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2) for x in part()))

    def finished(self) -> Prefixes:
        """Return the same prefixes without their networks."""
        own, cross = (None if part is None else KeysValues(*part()) for part in (self.attention, self.cross))
        return Prefixes(own, cross, self.heads, self.positions)


class KeysValues(nnx.Module):
    """Trainable keys and values [L, P, HK]."""

    def __init__(self, keys: Float[Array, "L P HK"], values: Float[Array, "L P HK"]):
        self.keys = Trainable(jnp.asarray(keys, jnp.float32), axes=("prompt", "heads"))
        self.values = Trainable(jnp.asarray(values, jnp.float32), axes=("prompt", "heads"))
        self.length = keys.shape[1]

    def __call__(self) -> Pair:
        return self.keys[...], self.values[...]


class Network(nnx.Module):
    """P vectors of width D and a network with one hidden layer (tanh) that makes the keys and values of all layers."""

    def __init__(self, key: jax.Array, depth: int, length: int, width: int, hidden: int, inner: int):
        keys = jax.random.split(key, 3)
        self.rows = Trainable(jax.random.normal(keys[0], (length, width)), axes=("prompt", "embed"))
        self.hidden = Trainable(width**-0.5 * jax.random.normal(keys[1], (width, hidden)), axes=("embed", "network"))
        self.hidden_bias = Trainable(jnp.zeros((hidden,)), axes=("network",))
        drawn = hidden**-0.5 * jax.random.normal(keys[2], (depth, hidden, 2 * inner))
        self.output = Trainable(drawn, axes=("network", "heads"))
        self.output_bias = Trainable(jnp.zeros((depth, 2 * inner)), axes=("heads",))
        self.length = length

    def __call__(self) -> Pair:
        hidden = jnp.tanh(self.rows[...] @ self.hidden[...] + self.hidden_bias[...])
        keys, values = jnp.split(hidden @ self.output[...] + self.output_bias[...][:, None], 2, -1)
        return keys, values


def activations(model: T5, rows: Float[Array, "P D"]) -> dict[Attended, Pair]:
    """Return the keys and values [L, P, HK] that embedded words have at every layer, in each kind of attention."""
    known = states(model, rows)
    encoded = known["encoded"]

    def own(layer_and_x: tuple[Any, Array]) -> Pair:
        layer, x = layer_and_x
        normed = layer.attention_norm(x)
        return layer.attention.key(normed), layer.attention.value(normed)

    return {
        "encoder": jax.lax.map(own, (model.encoder.layers, known["encoder"])),
        "decoder": jax.lax.map(own, (model.decoder.layers, known["decoder"])),
        "cross": jax.lax.map(
            lambda layer: (layer.cross.key(encoded), layer.cross.value(encoded)), model.decoder.layers
        ),
    }


def states(model: T5, rows: Float[Array, "P D"]) -> dict[str, Array]:
    """Return the hidden states [L, P, D] of words before every layer of `encoder` and `decoder`, and `encoded` [P, D].

    `rows` are the embedded words. They stand alone in the encoder, and in a decoder that sees their encoding.
    """
    x = rows[None].astype(model.dtype)
    together = jnp.ones((1, 1, 1, len(rows)), bool)
    encoder, encoded = _through(model.encoder, x, together)
    encoded = model.encoder.norm(encoded)
    decoder, _ = _through(model.decoder, x, jnp.tril(jnp.ones((len(rows), len(rows)), bool))[None, None], encoded)
    return {"encoder": encoder, "decoder": decoder, "encoded": encoded[0]}


def _through(stack: Stack, x: Array, visible: Array, encoded: Array | None = None) -> tuple[Array, Array]:
    """Run the layers of a stack; return what each of them reads, and the output before the norm."""
    positions = jnp.arange(x.shape[1])

    def run(x, layer):
        before = x[0]
        x = layer.attend_self(x, (layer.bias if stack.bias is None else stack.bias)(positions, positions), visible)
        if layer.cross is not None:
            assert encoded is not None
            seen = jnp.ones((1, 1, 1, encoded.shape[1]), bool)
            x = layer.attend_cross(x, layer.cross.keys_values(encoded), seen)
        return layer.feed(x), before

    x, reads = jax.lax.scan(run, x, stack.layers)
    return reads, x
