"""Prefix tuning (Li and Liang, 2021): P trainable keys and values before those of the text, at every layer."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field, field_validator, model_validator

from softprompt_jax.config import UserError
from softprompt_jax.methods import peft_names
from softprompt_jax.methods.base import AdapterConfig, Context, MethodSettings, Tensors, check_free
from softprompt_jax.methods.prompt import LENGTHS, Init, Labels, Text, Vocabulary
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.models.activations import Attended, Pair, activations, attentions
from softprompt_jax.models.attention import PrefixKeyValues
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.settings import ModelSettings
from softprompt_jax.optim.optimizers import AdamW, Optimizer

_EVERY: list[Attended] = ["encoder", "decoder", "cross"]


class Prefix(MethodSettings):
    """Prefix tuning: `length` keys and values that every query sees, in each kind of attention that is named.

    `network` is the width of the network that makes them while training and is dropped afterwards; with null they
    train themselves, and start as those of real words (`init`). T5 has positions only as a bias. Prefixes
    have no bias, or with `positions: before` that of tokens before the text, as in PEFT. In other models
    prefixes are in every window, or with `positions: before` take the first positions, behind which those of the text
    begin; trained keys are never rotated. A decoder-only model has only the attention `decoder`.

    With `init: {kind: text, text: ...}` the prefix is at first what the model itself computes of this text (repeated or
    cut to `length` tokens). No network, `positions: before` and `attentions: context` are then the defaults. A
    decoder-only model answers at first as with the text in front of the input, BOS included (the run's `text: {bos:
    false}` leaves it out of the input, where the tokenizer adds one). In an encoder this is near, not equal: there the
    text would see the input, too.
    """

    paper: ClassVar[str] = "Li and Liang, 2021"
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    default_optimizer: ClassVar[Optimizer] = AdamW(learning_rate=1e-3)
    kind: Literal["prefix"] = "prefix"
    length: int = Field(default=20, ge=1)  # keys and values at every layer
    attentions: Annotated[list[Attended], Field(min_length=1)] | Literal["context"] = Field([*_EVERY])  # kinds that get
    # a prefix; of all three those that the model has; context: those that read the input
    network: int | None = Field(default=512, ge=1)  # width of the network that makes the prefix in training; null: no
    # network
    positions: Literal["none", "before"] = "none"  # position bias of the prefix: none, or that of tokens before the
    # text
    init: Init | Literal["zero"] | None = None  # start without a network; null: label words where the task has some,
    # else vocabulary

    @model_validator(mode="before")
    @classmethod
    def _words_need_no_network(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("init") is None:
            return values
        init = values["init"]
        kind = init.get("kind") if isinstance(init, dict) else getattr(init, "kind", None)
        text = {"positions": "before", "attentions": "context"} if kind == "text" else {}
        return {"network": None, **text, **values}

    @field_validator("attentions")
    @classmethod
    def _once_each(cls, names: list[Attended] | str) -> list[Attended] | str:
        if isinstance(names, list) and len(set(names)) < len(names):
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

    def space(self, labelled: bool) -> dict[str, list[Any]]:
        """Return lengths; what the keys and values start from matters only without a network."""
        return {"length": LENGTHS}

    def attach(self, model: LanguageModel, key: jax.Array, context: Context) -> None:
        """Give the named attentions a trainable prefix."""
        for stack in model.stacks.values():
            check_free(stack.prefix, "the prefix")
        settings, wanted, before = model.settings, self._attentions(model), self.positions == "before"
        inner = settings.key_width
        words: dict[Attended, Pair] = {}
        if self.network is None and self.init != "zero":
            init = self.init or (Labels() if context.label_words else Vocabulary())
            if isinstance(init, Text) and before:
                encode, bos = context.encode, context.bos
                context = dataclasses.replace(context, encode=lambda text: [*bos, *encode(text)])
            words = activations(model, init.rows(self.length, model, key, context), before)

        def part(name: Attended, index: int) -> KeysValues | Network | None:
            if name not in wanted:
                return None
            depth = (model.encoder if name == "encoder" else model.decoder).depth
            if self.network is None:
                return KeysValues(*words.get(name, [jnp.zeros((depth, self.length, inner))] * 2))
            return Network(jax.random.fold_in(key, index), depth, self.length, settings.d_model, self.network, inner)

        encoder, decoder, cross = part("encoder", 0), part("decoder", 1), part("cross", 2)
        if encoder is not None:
            model.encoder.prefix = Prefixes(encoder, None, settings.num_key_heads, before)
        if decoder is not None or cross is not None:
            model.decoder.prefix = Prefixes(decoder, cross, settings.num_key_heads, before)

    def _attentions(self, model: LanguageModel) -> list[Attended]:
        """Return the kinds of attention that get a prefix."""
        known = attentions(model)
        if self.attentions == "context":
            return [name for name in known if name != "decoder" or model.encoder is None]
        wanted = known if set(self.attentions) == set(_EVERY) else self.attentions
        if missing := [name for name in wanted if name not in known]:
            raise UserError(
                f"methods: prefix attentions has {', '.join(missing)}, which this model has not; expected some of "
                f"{', '.join(known)}; leave attentions out for all of them"
            )
        return wanted

    def without_sources(self) -> MethodSettings:
        return self.finished() if self.network is None else self

    def finished(self) -> MethodSettings:
        """Return the settings of the prefix without its network."""
        return self.model_copy(update={"network": None, "init": "zero"})

    def per_example_state(self, model: LanguageModel) -> Tensors:
        """Return keys and values of every attention that has a prefix."""
        name, found = "positioned" if self.positions == "before" else "prefix", {}
        for stack_name, stack in model.stacks.items():
            sides = ("encoder", "") if stack_name == "encoder" else ("decoder", "cross")
            parts = () if stack.prefix is None else (stack.prefix.attention, stack.prefix.cross)
            for side, part in zip(sides, parts, strict=False):
                if part is not None:  # cross attention knows no positions
                    found[f"{'prefix' if side == 'cross' else name} {side}"] = np.stack(list(map(np.asarray, part())))
        return found

    def to_peft(self, model: LanguageModel) -> tuple[AdapterConfig, Tensors]:
        """Return the decoder's keys and values in PEFT's slots; on a T5 of even depth two layers share a slot."""
        settings, alone = model.settings, model.encoder is None
        if self._attentions(model) != ["decoder"] or self.positions != "before":
            raise UserError(
                f"methods: a prefix of {', '.join(self._attentions(model))} with positions {self.positions}; expected "
                "only the decoder's with positions before, as PEFT has them on a T5; keep the run folder"
            )
        width = settings.key_width
        if not alone and width != settings.d_model:
            raise UserError(
                "methods: the heads together are not as wide as the model; expected it, since PEFT fails otherwise; "
                "keep the run folder"
            )
        assert model.decoder.prefix.attention is not None
        chosen = _slots(model.decoder.depth, alone)
        pairs = np.stack([*map(np.asarray, model.decoder.prefix.attention())], 1)  # [L, 2, P, D]
        slots = np.zeros((2 * model.decoder.depth, self.length, width), np.float32)
        slots[chosen] = pairs
        if (unlike := (slots[chosen] != pairs).any((1, 2, 3))).any():
            raise UserError(
                f"methods: layers of the decoder differ (found at {np.argmax(unlike)}); expected layers i and i + L/2 "
                "to share a prefix, as in PEFT on a T5 of even depth; keep the run folder"
            )
        # PEFT hands keys to the layers by the number of submodules.
        config = peft_names.prompt_config(settings, self.length, 1 if alone else 2) | {
            "num_layers": model.decoder.depth,
            "prefix_projection": False,
            "encoder_hidden_size": width,
        }
        if alone:
            config |= {"token_dim": width, "num_attention_heads": settings.num_key_heads}
        return config, {"prompt_embeddings": slots.swapaxes(0, 1).reshape(self.length, -1)}

    @classmethod
    def from_peft(
        cls, config: AdapterConfig, tensors: Tensors, settings: ModelSettings
    ) -> tuple[MethodSettings, Tensors]:
        """Take PEFT's slots apart: keys and values of the decoder's self-attention."""
        depth, length = settings.decoder_depth, config["num_virtual_tokens"]
        slots, width = tensors["prompt_embeddings"], settings.key_width
        expected = (length, 2 * depth * width)
        if slots.shape != expected:
            raise UserError(f"prompt_embeddings: found shape {list(slots.shape)}; expected {list(expected)}")
        slots = slots.reshape(length, 2 * depth, width).swapaxes(0, 1)
        chosen = _slots(depth, config.get("task_type") == "CAUSAL_LM")
        method = cls(length=length, attentions=["decoder"], network=None, positions="before", init="zero")
        place = "decoder.prefix.attention"
        return method, {f"{place}.keys": slots[chosen[:, 0]], f"{place}.values": slots[chosen[:, 1]]}


def _slots(depth: int, alone: bool) -> np.ndarray:
    """Return which of PEFT's 2L slots are the keys and the values [L, 2] of each decoder layer.

    `alone`: of a decoder-only model; an encoder-decoder's layers take every second pair.
    """
    return ((2 if alone else 4) * np.arange(depth)[:, None] + [0, 1]) % (2 * depth)


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

    def shift(self) -> int:
        """Return how many positions the prefix of self-attention takes before the first token."""
        return self.positioned

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
