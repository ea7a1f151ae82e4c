"""How a method takes the place of a `Linear`, found by a pattern over paths.

encoder.layers.attention.query   Linear    before
encoder.layers.attention.query   Wrapped   after: a method's module, with the Linear as its `inner`
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
from flax import nnx

from softprompt_jax.config import UserError, nearest
from softprompt_jax.methods.trainable import leaves
from softprompt_jax.models.families.t5 import names
from softprompt_jax.models.quantized import QuantizedLinear
from softprompt_jax.models.t5 import T5, Linear


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
