"""What trains is a type: `Trainable` parameters are split from the frozen rest here and nowhere else.

Also how a method takes the place of a `Linear`, found by a pattern over paths:

    encoder.layers.attention.query   Linear    before
    encoder.layers.attention.query   Wrapped   after: a method's module, with the Linear as its `inner`
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from softprompt_jax.checkpoints.backbone import flatten, names
from softprompt_jax.config import UserError, nearest
from softprompt_jax.models.quantized import QuantizedLinear
from softprompt_jax.models.t5 import T5, Linear


class Trainable(nnx.Param):
    """A parameter that training changes. Metadata: `axes`, and `learning_rate_scale` (default 1)."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What an optimizer needs to know about one trainable array."""

    stacked: bool  # has a leading axis of layers, each of which is a weight of its own
    learning_rate_scale: float
    shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Split:
    """A model taken apart: `merge(trainable, frozen)` puts it together again, also inside `jax.jit`."""

    graphdef: Any
    trainable: dict[str, Any]  # nested dictionary of float32 arrays
    frozen: dict[str, Any]

    def merge(self, trainable: dict[str, Any], frozen: dict[str, Any]) -> T5:
        """Build the model of these arrays."""
        return nnx.merge(self.graphdef, trainable, frozen)


def split(model: T5) -> Split:
    """Split a model into what trains and what is frozen."""
    graphdef, trainable, frozen = nnx.split(model, Trainable, ...)
    return Split(graphdef, nnx.to_pure_dict(trainable), nnx.to_pure_dict(frozen))


def leaves(model: T5) -> dict[str, Leaf]:
    """Describe every trainable array by its path."""
    variables = nnx.to_pure_dict(nnx.state(model, Trainable), extract_fn=lambda variable: variable)
    return {path: Leaf(*_describe(variable)) for path, variable in flatten(variables)}


def put_trained(model: T5, trained: dict[str, Any], where: str) -> None:
    """Give the model's trainable arrays their trained values."""
    parts = split(model)
    expected = {path: leaf.shape for path, leaf in flatten(parts.trainable)}
    found = {path: leaf.shape for path, leaf in flatten(trained)}
    if expected != found:
        odd = sorted({*expected.items()} ^ {*found.items()})[0]
        raise UserError(
            f"{where}: does not fit its config.yaml at {odd[0]} {list(odd[1])}; expected the run's own file"
        )
    nnx.update(model, nnx.state(parts.merge(trained, parts.frozen)))


def thaw(model: T5, wanted=lambda path: True, learning_rate_scale: float = 1.0) -> list[str]:
    """Make every parameter whose path is wanted trainable, in float32, and return the paths."""
    changed = []
    for place, node in nnx.iter_graph(model):
        if not isinstance(node, nnx.Module):
            continue
        for name, variable in list(vars(node).items()):
            path = ".".join(map(str, (*place, name)))
            if isinstance(variable, nnx.Param) and not isinstance(variable, Trainable) and wanted(path):
                if isinstance(node, QuantizedLinear):
                    raise UserError(
                        f"methods: {path} is quantised and cannot train; expected float weights; "
                        "set quantize to null, or train weights beside it (a prompt, LoRA)"
                    )
                value = variable[...].astype(jax.numpy.float32)
                metadata: dict[str, Any] = variable.get_metadata() | {"learning_rate_scale": learning_rate_scale}
                setattr(node, name, Trainable(value, **metadata))
                changed.append(path)
    return changed


class Wrapped(nnx.Module):
    """A method's module in the place of a Linear; `inner` is that Linear, or another method's module.

    Weights have the inner kernel's leading axis of layers, if it has one: the scan takes it off.
    """

    inner: Linear | Wrapped

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Compute [..., in] -> [..., out]; the key is for dropout, None means evaluation."""
        raise NotImplementedError

    def merged(self, kernel: jax.Array) -> jax.Array | None:
        """Return the float32 kernel [..., in, out] that alone computes the same, or None if there is none."""
        raise NotImplementedError


def linears(model: T5) -> dict[str, tuple[nnx.Module, str]]:
    """Return where each Linear of the layers, or what stands in its place, is: path -> (owner, attribute)."""
    known = names(model.settings)

    def walk(owner: nnx.Module, prefix: str) -> Iterator[tuple[str, tuple[nnx.Module, str]]]:
        for name, child in vars(owner).items():
            if isinstance(child, Linear | Wrapped) and f"{prefix}{name}.kernel" in known:
                yield prefix + name, (owner, name)
            elif isinstance(child, nnx.Module) and not isinstance(child, Wrapped):
                yield from walk(child, f"{prefix}{name}.")

    return dict(sorted((*walk(model.encoder, "encoder."), *walk(model.decoder, "decoder."))))


def linear_of(module: Linear | Wrapped) -> Linear:
    """Return the Linear at the bottom of a place."""
    return linear_of(module.inner) if isinstance(module, Wrapped) else module


def kernel_shape(module: Linear | Wrapped) -> tuple[int, ...]:
    """Return [..., in, out] of a place's kernel, however it is stored."""
    return jax.eval_shape(linear_of(module).weight).shape


def plain_kernel(module: Linear | Wrapped) -> jax.Array:
    """Return the float32 kernel [..., in, out] that alone computes what stands in a place.

    Errors: UserError where something stands there that no kernel can express.
    """
    if isinstance(module, Linear):
        return module.weight()
    kernel = module.merged(plain_kernel(module.inner))
    if kernel is None:
        raise UserError(
            f"methods: what {type(module).__name__.lower()} adds cannot be merged into a weight; expected a method "
            "that can; keep the run's folder, or leave this method out"
        )
    return kernel


def matching(patterns: Sequence[str], paths: Iterable[str], where: str) -> list[str]:
    """Return the paths that a pattern matches: `query`, `attention.query`, `decoder.*.value`, `*`.

    A pattern stands for a whole path or its end after a dot; `*` stands for anything.
    Errors: UserError for a pattern that matches nothing.
    """
    paths, found = list(paths), set()
    for pattern in patterns:
        hits = {path for path in paths if fnmatch.fnmatchcase(f".{path}", f"*.{pattern}")}
        if not hits:
            ends = dict.fromkeys(path.split(".", start)[-1] for start in range(5, 0, -1) for path in paths)
            short = dict.fromkeys(path.rpartition(".")[2] for path in paths)
            raise UserError(
                f"{where}: {pattern!r} matches no weight of this backbone; expected one of {', '.join(short)}, or a "
                f"path such as {paths[0]}{nearest(pattern, ends)}"
            )
        found |= hits
    return [path for path in paths if path in found]


def replace(
    model: T5, patterns: Sequence[str], wrap: Callable[[str, Linear | Wrapped], Wrapped], where: str
) -> list[str]:
    """Put `wrap(path, module)` in the place of every Linear that a pattern matches, and return the paths."""
    places = linears(model)
    found = matching(patterns, places, where)
    for path in found:
        owner, name = places[path]
        setattr(owner, name, wrap(path, getattr(owner, name)))
    return found


def merged(model: T5) -> T5:
    """Return a model of plain Linears with the same function; the given one stays as it is, to the bit.

    Errors: UserError for what trains and has no place in a plain T5.
    """
    model = nnx.merge(*nnx.split(model))
    for owner, name in linears(model).values():
        module = getattr(owner, name)
        if isinstance(module, Wrapped | QuantizedLinear):
            axes = linear_of(module).kernel.get_metadata()["axes"]
            plain = Linear(jax.random.key(0), (1, 1), axes, 0.0)
            plain.kernel = nnx.Param(plain_kernel(module), axes=axes)
            setattr(owner, name, plain)
    own = sorted(set(leaves(model)) - set(names(model.settings)))
    if own:
        raise UserError(
            f"methods: {own[0]} has no place in a plain T5; expected weights that can be merged into it; "
            "export the run as peft or keep its folder"
        )
    return model


def _describe(variable: nnx.Variable) -> tuple[bool, float, tuple[int, ...]]:
    metadata = variable.get_metadata()
    return len(variable.shape) > len(metadata["axes"]), metadata.get("learning_rate_scale", 1.0), variable.shape
