"""What trains is a type: `Trainable` parameters are split from the frozen rest here and nowhere else."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from softprompt_jax.config import UserError
from softprompt_jax.models.quantized import QuantizedLinear
from softprompt_jax.models.t5 import T5
from softprompt_jax.trees import flatten


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
    return {path: Leaf(*_describe(variable)) for path, variable in flatten(variables).items()}


def put_trained(model: T5, trained: dict[str, Any], where: str) -> None:
    """Give the model's trainable arrays their trained values."""
    parts = split(model)
    expected = {path: leaf.shape for path, leaf in flatten(parts.trainable).items()}
    found = {path: leaf.shape for path, leaf in flatten(trained).items()}
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


def _describe(variable: nnx.Variable) -> tuple[bool, float, tuple[int, ...]]:
    metadata = variable.get_metadata()
    return len(variable.shape) > len(metadata["axes"]), metadata.get("learning_rate_scale", 1.0), variable.shape
