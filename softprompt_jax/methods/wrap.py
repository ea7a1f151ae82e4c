"""How a method takes the place of a `Linear`, found by a pattern over paths.

encoder.layers.attention.query   Linear    before
encoder.layers.attention.query   Wrapped   after: a method's module, with the Linear as its `inner`
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from softprompt_jax.config import UserError, nearest
from softprompt_jax.methods.trainable import leaves
from softprompt_jax.models.families import names
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.layers import Linear
from softprompt_jax.models.quantized import QuantizedLinear


class Wrapped(nnx.Module):
    """A method's module in the place of a Linear; `inner` is that Linear, or another method's module.

    Weights have the inner kernel's leading axis of layers, if it has one: the scan takes it off.
    """

    inner: Linear | Wrapped

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Compute [..., in] -> [..., out]; the key is for dropout, None means evaluation."""
        raise NotImplementedError

    def merged(self, kernel: jax.Array) -> jax.Array | None:
        """Return the float32 kernel [..., in, out] that alone computes the same.

        None, unless a method says otherwise: no kernel adds a constant or computes what is not linear.
        """
        return None

    def merged_bias(self, bias: jax.Array) -> jax.Array:
        """Return the bias [..., out] that stands beside `merged`, in the place of the inner Linear's."""
        return bias


def linears(model: LanguageModel) -> dict[str, tuple[nnx.Module, str]]:
    """Return where each Linear of the layers, or what stands in its place, is: path -> (owner, attribute)."""
    found: dict[str, tuple[nnx.Module, str]] = {}
    for weight in sorted(names(model.settings)):
        path, _, kind = weight.rpartition(".")
        *outer, name = path.split(".")
        if kind == "kernel" and outer:  # not the head, which belongs to no layer
            found[path] = functools.reduce(getattr, outer, model), name
    return found


def standing(model: LanguageModel) -> dict[str, Linear | Wrapped]:
    """Return what stands at the place of each Linear of the layers, by its path."""
    return {path: getattr(owner, name) for path, (owner, name) in linears(model).items()}


def linear_of(module: Linear | Wrapped) -> Linear:
    """Return the Linear at the bottom of a place."""
    return linear_of(module.inner) if isinstance(module, Wrapped) else module


def axes_of(module: Linear | Wrapped) -> tuple[str, str]:
    """Return the names of the axes [in, out] of a place's kernel."""
    return linear_of(module).kernel.get_metadata()["axes"]


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


def plain_bias(module: Linear | Wrapped) -> jax.Array | None:
    """Return the float32 bias [..., out] beside `plain_kernel`; None where the Linear has none."""
    if isinstance(module, Linear):
        return None if module.bias is None else module.bias[...].astype(jnp.float32)
    bias = plain_bias(module.inner)
    return None if bias is None else module.merged_bias(bias)


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
    model: LanguageModel, patterns: Sequence[str], wrap: Callable[[str, Linear | Wrapped], Wrapped], where: str
) -> list[str]:
    """Put `wrap(path, module)` in the place of every Linear that a pattern matches, and return the paths."""
    places = linears(model)
    found = matching(patterns, places, where)
    for path in found:
        owner, name = places[path]
        setattr(owner, name, wrap(path, getattr(owner, name)))
    return found


def merged(model: LanguageModel) -> LanguageModel:
    """Return a model of plain Linears with the same function; the given one stays as it is, to the bit.

    Errors: UserError for what trains and has no place in a plain model.
    """
    model = nnx.merge(*nnx.split(model))
    for owner, name in linears(model).values():
        module = getattr(owner, name)
        if isinstance(module, Wrapped | QuantizedLinear):
            axes = axes_of(module)
            plain = Linear(jax.random.key(0), (1, 1), axes, 0.0)
            plain.kernel = nnx.Param(plain_kernel(module), axes=axes)
            if (bias := plain_bias(module)) is not None:
                plain.bias = nnx.Param(bias, axes=axes[1:])
            setattr(owner, name, plain)
    own = sorted(set(leaves(model)) - set(names(model.settings)))
    if own:
        raise UserError(
            f"methods: {own[0]} has no place in a plain model; expected weights that can be merged into it; "
            "export the run as peft or keep its folder"
        )
    return model
