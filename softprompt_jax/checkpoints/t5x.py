"""T5X checkpoints in every published layout, read without t5x: weights, Adafactor's slots, a run's prompt.

A checkpoint is a folder, local or `gs://`, with the file `checkpoint` (msgpack; one zarr folder for each array) or,
since 2024, with an Orbax tree in `state/`. Arrays are looked for in this folder, not where they were first written.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from flax import serialization, traverse_util

from softprompt_jax import config
from softprompt_jax.checkpoints.tensors import Index, Tensor, finite_float32
from softprompt_jax.config import UserError
from softprompt_jax.models.presets import PRESETS
from softprompt_jax.models.t5 import T5Settings

_STEP = re.compile(r"checkpoint_(\d+)")
_UNFINISHED = re.compile(r"(\.|-)(orbax-checkpoint-)?tmp(-|$)")
_LAYER = re.compile(r"(encoder|decoder)\.(?:layers_(\d+)|layers|encoder|decoder)\.(.+)")
_SLOT = re.compile(r"state\.param_states\.(.+)\.(m|v|v_row|v_col)")
_NAMES = config.read_text((Path(__file__).parent / "t5x_names.yaml").read_text(encoding="utf-8"), "t5x_names.yaml")
_CACHE_BYTES = 1 << 29  # a chunk of stacked layers is read once a layer


def is_remote(source: str | Path) -> bool:
    """Tell whether a source is in a bucket."""
    return str(source).startswith("gs://")


def find_checkpoint(source: str | Path) -> str | None:
    """Return the checkpoint that a source is, or the latest in a run folder; None if it is no T5X folder."""
    if is_remote(source):
        return str(source).rstrip("/")
    folder = Path(source).expanduser()
    if not folder.is_dir() or (folder / "config.json").exists() or (folder / "config.yaml").exists():
        return None
    if _UNFINISHED.search(folder.resolve().name):
        raise UserError(f"{source}: a checkpoint that was never finished; expected checkpoint_STEP; use an earlier one")
    if (folder / "checkpoint").is_file() or (folder / "state").is_dir():
        return str(folder)
    steps = {int(found[1]): path for path in folder.iterdir() if (found := _STEP.fullmatch(path.name))}
    return find_checkpoint(steps[max(steps)]) if steps else None


class Checkpoint:
    """A T5X checkpoint: its weights under their Hugging Face names, its step, slots and prompt. Arrays are read lazily.

    Errors: UserError names what is missing, unreadable or of no known layout.
    """

    def __init__(self, root: str):
        self.root = root
        self._store = _kvstore(root)
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        found = self._msgpack()
        arrays = self._orbax() if found is None else found
        targets = {name.removeprefix("target."): t for name, t in arrays.items() if name.startswith("target.")}
        self.prompts = {n: t for n, t in targets.items() if n.startswith("encoder.") and n.endswith("prompt")}
        self._targets = targets
        self._slots = {name: tensor for name, tensor in arrays.items() if _SLOT.fullmatch(name)}
        self._step = arrays.get("state.step")
        self._axis = _layer_axis(targets, root)
        self._depths = {
            stack: targets[name].shape[self._axis]
            for stack in ("encoder", "decoder")
            if (name := _stacked_norm(targets, stack)) and self._axis is not None
        }
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in targets.items():
            if name not in self.prompts:
                self.tensors |= self._translated(name, tensor)

    @property
    def step(self) -> int:
        """The step at which the checkpoint was written, 0 if it does not say."""
        return 0 if self._step is None else int(self._step.read())

    def settings(self) -> T5Settings:
        """Derive the settings from the shapes; the rest is as in the published T5s."""
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
        first = "encoder.block.0.layer.{}.weight"
        try:
            rows, width = shapes["shared.weight"]
            buckets, heads = shapes[bias.format(0)]
            inner = shapes[first.format("0.SelfAttention.q")][0]
            gated = first.format("1.DenseReluDense.wi_0") in shapes
            d_ff = shapes[first.format(f"1.DenseReluDense.{'wi_0' if gated else 'wi'}")][0]
        except (KeyError, ValueError) as error:
            missing = error.args[0] if isinstance(error, KeyError) else "matrices of two axes"
            raise UserError(f"{self.root}: no {missing} (Hugging Face's name); expected the weights of a T5") from None
        if inner % heads:
            raise UserError(f"{self.root}: {inner} query columns for {heads} heads; expected a multiple")
        tied = "lm_head.weight" not in shapes
        settings = T5Settings(
            vocabulary_rows=rows,
            d_model=width,
            d_kv=inner // heads,
            d_ff=d_ff,
            num_heads=heads,
            num_layers=_depth(shapes, "encoder"),
            num_decoder_layers=_depth(shapes, "decoder"),
            activation="gelu_tanh" if gated else "relu",
            gated=gated,
            tied=tied,
            scale_output=tied,
            bias_in_every_layer=bias.format(1) in shapes,
            relative_buckets=buckets,
        )
        # Shapes do not tell which gated activation it is; for a published size it is known.
        alike = (
            known for known in PRESETS.values() if known.model_copy(update={"activation": "gelu_tanh"}) == settings
        )
        return next(alike, settings)

    def prompt(self) -> np.ndarray:
        """Return the rows [P, D] that a prompt tuning run trained, float32."""
        if len(self.prompts) != 1:
            found = ", ".join(self.prompts) or "none"
            raise UserError(f"{self.root}: prompts of the encoder: {found}; expected one; use a prompt tuning run's")
        (tensor,) = self.prompts.values()
        return finite_float32(tensor.read(), f"{self.root}: {tensor.name}")

    def adafactor(self) -> dict[str, dict[str, Tensor]]:
        """Return Adafactor's slots (v, or v_row and v_col, and m with momentum) by Hugging Face name of the weight.

        `v` and `m` have the weight's shape there. `v_row` and `v_col` are those of T5X's matrix [in, out]: means over
        its longer and over its shorter axis. A frozen weight has none.
        """
        slots: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self._slots.items():
            found = _SLOT.fullmatch(name)
            assert found is not None
            weight, slot = found.groups()
            if tensor.shape == (1,):  # what Adafactor writes for a slot that it does not use
                continue
            joint = weight in self._targets and len(self._targets[weight].shape) > 2  # layers, or heads and their width
            if weight in self.prompts or (slot.startswith("v_") and not joint):
                translated = {_their_name(weight)[0]: {slot: tensor}}
            elif slot in ("v", "m"):
                translated = {theirs: {slot: part} for theirs, part in self._translated(weight, tensor).items()}
            else:
                translated = self._factored(weight)
            for theirs, parts in translated.items():
                slots.setdefault(theirs, {}).update(parts)
        return slots

    def _factored(self, weight: str) -> dict[str, dict[str, Tensor]]:
        """Return v_row and v_col of each matrix of an array of more axes. Skip this on first reading.

        T5X takes the mean over the input's axes or over the output's, in each layer by itself. By its standard rules
        the row is the side of the model's width, which for `out` and `wo` is the output. Shapes that say otherwise are
        believed; the rules decide where input and output are equally large.
        """
        slots = (f"state.param_states.{weight}.{slot}" for slot in ("v_row", "v_col"))
        means = [self._slots[slot] for slot in slots if slot in self._slots]
        shape, found = self._targets[weight].shape, _LAYER.fullmatch(weight)
        axis = self._axis if found is not None and found[2] is None else None
        own = [number for number in range(len(shape)) if number != axis]
        inputs = 2 if len(own) == 3 and weight.endswith(".out.kernel") else 1
        sides = own[:inputs], own[inputs:]
        # The axes that are left where the mean is taken over the output, and where it is over the input.
        left = [sorted([*side] if axis is None else [*side, axis]) for side in sides]
        readings = [left, left[::-1]]
        if weight.endswith((".out.kernel", ".wo.kernel")):
            readings.reverse()
        shapes = [[tuple(shape[number] for number in axes) for axes in reading] for reading in readings]
        given = [tensor.shape for tensor in means]
        if given not in shapes or not weight.endswith(".kernel"):
            both = " or ".join(", ".join(str(list(each)) for each in reading) for reading in shapes)
            raise UserError(
                f"{self.root}: slots v_row, v_col of {weight}: found {', '.join(str(list(s)) for s in given)}; "
                f"expected {both}; start without slots"
            )
        pairs = list(zip(means, readings[shapes.index(given)], strict=True))
        lengths = [math.prod(shape[number] for number in side) for side in sides]
        if pairs[0][1] is not left[lengths[0] > lengths[1]]:  # the mean over the longer comes first
            pairs.reverse()

        def vector(tensor: Tensor, axes: list[int], layer: int) -> Tensor:
            tensor = tensor if axis is None else tensor.layer(layer, axes.index(axis))
            return tensor.merged(0) if len(tensor.shape) == 2 else tensor

        result = {}
        for layer in range(1 if axis is None else shape[axis]):
            name = weight if axis is None or found is None else f"{found[1]}.layers_{layer}.{found[3]}"
            vectors = [vector(*pair, layer) for pair in pairs]
            result[_their_name(name)[0]] = dict(zip(("v_row", "v_col"), vectors, strict=True))
        return result

    # ------------------------------------------------------------------------------------------ names

    def _translated(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return one array of T5X as tensors of Hugging Face, one a layer if it stacks them."""
        found = _LAYER.fullmatch(name)
        if found is None or found[2] is not None:
            their_name, transposed = _their_name(name)
            return {their_name: _matrix(tensor, name, transposed)}
        stack, _, rest = found.groups()
        assert self._axis is not None
        if tensor.shape[self._axis : self._axis + 1] != (self._depths[stack],):
            raise UserError(
                f"{self.root}: {name} has shape {list(tensor.shape)}; "
                f"expected {self._depths[stack]} layers along axis {self._axis}"
            )
        layers = {}
        for layer in range(self._depths[stack]):
            their_name, transposed = _their_name(f"{stack}.layers_{layer}.{rest}")
            layers[their_name] = _matrix(tensor.layer(layer, self._axis), name, transposed)
        return layers

    # ---------------------------------------------------------------------------------------- layouts

    def _msgpack(self) -> dict[str, Tensor] | None:
        """Read the file `checkpoint`; None if there is none."""
        where = f"{self.root}/checkpoint"
        content = _value(self._store, "checkpoint", self.root)
        if content is None:
            return None
        try:
            tree = serialization.msgpack_restore(content)
            tree = {part: tree["optimizer"][part] for part in ("target", "state")}
            found = traverse_util.flatten_dict(tree, is_leaf=lambda _, value: "driver" in value, sep=".")
        except Exception as error:  # msgpack has no common exception, and other programs name a file so too
            raise UserError(f"{where}: not a T5X checkpoint ({error!r:.80}); expected T5X's msgpack file") from None
        arrays: dict[str, Tensor] = {}
        for name, value in found.items():
            if isinstance(value, dict):
                arrays[name] = self._outside(value, name)
            elif isinstance(value, np.ndarray | np.generic | int):
                arrays[name] = Tensor(name, np.shape(value), np.asarray(value).__getitem__)
        return arrays

    def _outside(self, spec: dict[str, Any], name: str) -> Tensor:
        """Return the array that a tensorstore spec means, found by the name of its folder."""
        try:
            shape = tuple(int(length) for length in spec["metadata"]["shape"])
            written = spec.get("path") or spec["kvstore"]["path"]
            folder = written.rstrip("/").rsplit("/", 1)[-1]
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"{self.root}: {name} has no shape and path; expected a tensorstore spec") from None
        store = {**self._store, "path": f"{self._store['path']}{folder}/"}
        opened = functools.cache(lambda: self._open(store).result())  # stays open from the first time on

        def part(index: Index) -> np.ndarray:
            if opened().shape != shape:
                raise UserError(f"tensor {name}: has shape {list(opened().shape)}; expected {list(shape)}")
            return np.asarray(opened()[index].read().result())

        return Tensor(name, shape, part)

    def _open(self, store: dict[str, Any]) -> Any:
        # A missing chunk reads as zeros: right for slots, whose zeros may have been left out, wrong for weights.
        zeros = store["path"].rstrip("/").rsplit("/", 1)[-1].startswith("state.")
        spec = {"driver": "zarr", "kvstore": store, "fill_missing_data_reads": zeros}
        return ts.open(spec, read=True, open=True, context=self._context)

    def _orbax(self) -> dict[str, Tensor]:
        """Open the arrays of an Orbax tree."""
        base = {**self._store, "path": f"{self._store['path']}state/"}
        nested = _value(base, "manifest.ocdbt", self.root) is not None
        store = {"driver": "ocdbt", "base": base, "path": ""} if nested else base
        keys = [key.decode() for key in _result(lambda: ts.KvStore.open(store).result().list(), self.root)]
        names = [key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray")]
        if not names:
            raise UserError(
                f"{self.root}: neither a file 'checkpoint' nor arrays in state/; expected a finished T5X checkpoint"
            )
        opening = {name: self._open({**store, "path": f"{store['path']}{name}/"}) for name in names}

        def tensor(name: str) -> Tensor:
            opened = opening[name].result()
            return Tensor(name, tuple(opened.shape), lambda index: np.asarray(opened[index].read().result()))

        return {name: tensor(name) for name in names}


def _their_name(name: str) -> tuple[str, bool]:
    """Translate a weight of T5X to its Hugging Face name and "is transposed there"; an unknown one stays as it is."""
    layer = re.search(r"\.layers_(\d+)(?=\.)", name)
    without = name if layer is None else name.replace(layer[0], "", 1)
    for pattern, theirs, transposed in _NAMES:
        if found := re.fullmatch(pattern, without):
            return found.expand(theirs).format(layer[1] if layer else 0), transposed
    return name, False


def _matrix(tensor: Tensor, name: str, transposed: bool) -> Tensor:
    """Return a weight as Hugging Face has it; attention kernels may have heads and their width apart."""
    if len(tensor.shape) == 3 and name.endswith(".kernel"):
        tensor = tensor.merged(0 if name.endswith(".out.kernel") else 1)
    return tensor.transposed() if transposed and len(tensor.shape) == 2 else tensor


def _stacked_norm(targets: dict[str, Tensor], stack: str) -> str | None:
    norm = re.compile(rf"{stack}\.(layers|encoder|decoder)\.pre_mlp_layer_norm\.scale")
    return next((name for name in targets if norm.fullmatch(name)), None)


def _layer_axis(targets: dict[str, Tensor], root: str) -> int | None:
    """Return along which axis scanned layers are stacked (T5X: 1), or None if every layer has its own arrays."""
    name = _stacked_norm(targets, "encoder")
    if name is None or "token_embedder.embedding" not in targets:
        odd = next((n for n in targets if (found := _LAYER.fullmatch(n)) and found[2] is None), None)
        if odd is not None:
            raise UserError(f"{root}: {odd} stacks layers but there is no such norm; expected a T5's weights")
        return None
    width = targets["token_embedder.embedding"].shape[-1]
    return 1 if targets[name].shape[0] == width else 0


def _depth(shapes: dict[str, Any], stack: str) -> int:
    found = (re.match(rf"{stack}\.block\.(\d+)\.", name) for name in shapes)
    return 1 + max((int(match[1]) for match in found if match), default=0)


def _kvstore(root: str) -> dict[str, str]:
    if is_remote(root):
        bucket, _, path = root.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
    return {"driver": "file", "path": f"{Path(root).resolve()}/"}


def _value(store: dict[str, Any], key: str, root: str) -> bytes | None:
    """Return a file's content, None if there is none."""
    return _result(lambda: ts.KvStore.open(store).result().read(key), root).value or None


def _result(start: Callable[[], Any], root: str) -> Any:
    """Wait for tensorstore, which raises ValueError for a bucket out of reach too."""
    try:
        return start().result()
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{root}: cannot be read ({reason}); expected a T5X checkpoint within reach") from None
