"""Reparameterisations: what a prompt's rows are made of while they train. Afterwards they are plain rows.

A class of settings builds a module; calling it returns the rows. `rms` is the root mean square of the backbone's words,
`scale` the factor of the rows' learning rate; numbers of the size 1 change in proportion by `scale / rms` of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from pydantic import BeforeValidator, Field

from softprompt_jax.config import Settings, UserError, by_kind
from softprompt_jax.methods.trainable import Trainable

_PARTS = ("numbers", "scale", "shift")  # tensors of a compact file
_MOST = 1 << 24  # numbers of the rows, or of the projection, that a compact file may stand for
_START = 0.1  # share of the words' size that a fresh network adds


class Residual(Settings):
    """Rows plus a shallow network of them (Razdaibiedina et al., 2023): one hidden layer with ReLU, then a layer norm.

    The network is shared by all rows and dropped after training.
    """

    paper: ClassVar[str] = "Razdaibiedina et al., 2023"
    kind: Literal["residual"] = "residual"
    hidden: int = Field(default=128, ge=1, le=65_536)  # width of the network's hidden layer

    def build(self, rows: Float[Array, "*N P D"], rms: float, scale: float, key: jax.Array) -> ResidualRows:
        return ResidualRows(rows, self.hidden, rms, scale, key)


class ULPT(Settings):
    """Rows in a few dimensions and a frozen random projection up to the model's width (Wu et al., 2025).

    A shift and a scale of each column train too. The projection follows from `seed`: the run also leaves
    `prompt_compact.safetensors`, the seed and the trained numbers, a prompt file like any other.
    """

    paper: ClassVar[str] = "Wu et al., 2025"
    kind: Literal["ulpt"] = "ulpt"
    dimensions: int = Field(default=64, ge=1, le=1024)  # trained numbers of a row
    seed: int = Field(default=0, ge=0, lt=2**32)  # seed of the projection

    def build(self, rows: Float[Array, "*N P D"], rms: float, scale: float, key: jax.Array) -> ProjectedRows:
        return ProjectedRows(rows, self.dimensions, self.seed, rms, scale)


Reparameterization = Annotated[Annotated[Residual | ULPT, Field(discriminator="kind")], BeforeValidator(by_kind)]
REPARAMETERIZATIONS = (Residual, ULPT)


class ResidualRows(nnx.Module):
    """Trainable rows [P, D], or [N, P, D] of N tasks, and what a shared network adds to them."""

    def __init__(self, rows: Float[Array, "*N P D"], hidden: int, rms: float, scale: float, key: jax.Array):
        width, keys, unit = rows.shape[-1], jax.random.split(key), scale / rms

        def weight(values: Array, size: float, *axes: str) -> Trainable:
            return Trainable(values, axes=axes, learning_rate_scale=unit * size)

        self.rows = Trainable(jnp.asarray(rows, jnp.float32), axes=("prompt", "embed"), learning_rate_scale=scale)
        into, out = width**-0.5, (2 / hidden) ** 0.5  # half of a ReLU's inputs are lost
        self.down = weight(into * jax.random.normal(keys[0], (width, hidden)), into, "network_in", "network_out")
        self.bias = weight(jnp.zeros((hidden,)), 1.0, "network_out")
        self.up = weight(out * jax.random.normal(keys[1], (hidden, width)), out, "network_in", "network_out")
        self.gain = weight(jnp.full((width,), _START), 1.0, "network_out")
        self.shift = weight(jnp.zeros((width,)), 1.0, "network_out")
        self.rms = rms

    def __call__(self) -> Float[Array, "*N P D"]:
        """Return the rows with what the network adds."""
        rows = self.rows[...]
        made = jax.nn.relu(rows / self.rms @ self.down[...] + self.bias[...]) @ self.up[...]
        made = made - made.mean(-1, keepdims=True)
        made = made * jax.lax.rsqrt(jnp.mean(jnp.square(made), -1, keepdims=True) + 1e-5)
        return rows + self.rms * (made * self.gain[...] + self.shift[...])


class ProjectedRows(nnx.Module):
    """P vectors of r trainable numbers, a frozen projection [r, D], and trainable shift and scale of its columns.

    Starts with the mean of the first rows as the shift, and of what is left the nearest that the projection can make.
    """

    def __init__(self, rows: Float[Array, "*N P D"], dimensions: int, seed: int, rms: float, scale: float):
        directions, unit = projection(dimensions, rows.shape[-1], seed), scale / rms
        rows = jnp.asarray(rows, jnp.float32) / rms
        shift = rows.mean(-2)
        numbers = (rows - shift[..., None, :]) @ np.linalg.pinv(directions)
        self.directions = nnx.Param(jnp.asarray(directions), axes=("subspace", "prompt"))
        self.numbers = Trainable(numbers, axes=("prompt", "subspace"), learning_rate_scale=unit)
        self.scale = Trainable(jnp.ones_like(shift), axes=("network_out",), learning_rate_scale=unit)
        self.shift = Trainable(shift, axes=("network_out",), learning_rate_scale=unit)
        self.seed, self.rms = seed, rms

    def __call__(self) -> Float[Array, "*N P D"]:
        """Return the rows."""
        made = self.numbers[...] @ self.directions[...]
        return self.rms * (made * self.scale[...][..., None, :] + self.shift[...][..., None, :])

    def compact(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Return the tensors and the metadata of a compact file, from which `expanded` makes the rows again."""
        numbers, scale, shift = (np.asarray(getattr(self, name)[...]) for name in _PARTS)
        return dict(zip(_PARTS, (numbers, self.rms * scale, self.rms * shift), strict=True)), {"seed": str(self.seed)}


def projection(dimensions: int, width: int, seed: int) -> Float[np.ndarray, "r D"]:
    """Return the frozen projection of a seed: normal, with a variance of 1 / r; the same in every version of NumPy."""
    drawn = np.random.RandomState(seed).standard_normal((dimensions, width))  # whose stream NumPy has frozen
    return (dimensions**-0.5 * drawn).astype(np.float32)


def is_compact(names: Mapping[str, object]) -> bool:
    """Tell whether tensors of these names are a compact prompt."""
    return set(names) == set(_PARTS)


def expanded(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], where: str) -> Float[np.ndarray, "P D"]:
    """Return the rows of a compact file. Errors: UserError for shapes or a seed that cannot be."""
    numbers, scale, shift = (tensors[name] for name in _PARTS)
    seed = metadata.get("seed", "")
    fits = numbers.ndim == 2 and numbers.size and scale.ndim == 1 and scale.shape == shift.shape and scale.size
    # A small file may state shapes whose product is large.
    if not fits or max(numbers.shape) * scale.size > _MOST or not re.fullmatch("[0-9]{1,10}", seed) or int(seed) >> 32:
        raise UserError(
            f"{where}: found numbers {list(numbers.shape)}, scale {list(scale.shape)}, shift {list(shift.shape)}, seed "
            f"{seed[:20]!r}; expected [P, r], [D], [D], P x D and r x D of at most {_MOST}, and a number under 2^32; "
            "give the run's prompt.safetensors"
        )
    return numbers @ projection(numbers.shape[1], len(shift), int(seed)) * scale + shift
