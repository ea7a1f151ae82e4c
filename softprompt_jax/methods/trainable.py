"""What trains is a type: `Trainable`. This file splits a model into trainable and frozen parameters, and merges them.

model = T5 with frozen `nnx.Param`s, in which methods have put `Trainable`s
parts = split(model)                                the structure, a dictionary of each kind
model = parts.merge(parts.trainable, parts.frozen)  the same model, also inside `jax.jit`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from softprompt_jax.config import UserError
from softprompt_jax.models.quantized import QuantizedLinear
from softprompt_jax.models.t5 import T5
from softprompt_jax.optim.leaf import Leaf
from softprompt_jax.trees import flatten


class Trainable(nnx.Param):
    """A parameter that training changes.

    Metadata: the names of its `axes`, and where they differ from their defaults the fields of `Leaf`:
    `learning_rate_scale`, `method` and `word_ids`.
    """


@dataclasses.dataclass(frozen=True)
class Split:
    """A model as its structure and two nested dictionaries of arrays."""

    graphdef: Any
    trainable: dict[str, Any]  # float32
    frozen: dict[str, Any]

    @property
    def trains_prompt_only(self) -> bool:
        """Whether only the prompt trains, so that its rows hold all that a run has trained."""
        return set(self.trainable) == {"prompt"}

    def merge(self, trainable: dict[str, Any], frozen: dict[str, Any]) -> T5:
        """Build the model of these arrays."""
        return nnx.merge(self.graphdef, trainable, frozen)


def split(model: T5) -> Split:
    """Split a model into trainable and frozen arrays."""
    graphdef, trainable, frozen = nnx.split(model, Trainable, ...)
    return Split(graphdef, nnx.to_pure_dict(trainable), nnx.to_pure_dict(frozen))


def leaves(model: T5) -> dict[str, Leaf]:
    """Describe every trainable array by its path."""
    variables = nnx.to_pure_dict(nnx.state(model, Trainable), extract_fn=lambda variable: variable)
    return {path: _describe(variable) for path, variable in flatten(variables).items()}


def mark_owner(model: T5, method: int, learning_rate_scale: float = 1.0) -> None:
    """Mark what a method has just attached, every trainable parameter without an owner, with the method's number.

    `learning_rate_scale` is a factor of the scales that they have.
    """
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Trainable) and "method" not in (metadata := node.get_metadata()):
            scale = learning_rate_scale * metadata.get("learning_rate_scale", 1.0)
            node.set_metadata(method=method, learning_rate_scale=scale)


def put_trained(model: T5, trained: dict[str, Any], where: str) -> None:
    """Give the model's trainable arrays their trained values.

    Errors: UserError, which names `where`, for arrays of other paths or shapes.
    """
    parts = split(model)
    check_trained(parts.trainable, trained, where)
    nnx.update(model, nnx.state(parts.merge(trained, parts.frozen)))


def check_trained(expected: dict[str, Any], trained: dict[str, Any], where: str) -> None:
    """Refuse trained arrays of other paths or shapes than the expected ones, which may be abstract."""
    shapes, found = ({path: leaf.shape for path, leaf in flatten(tree).items()} for tree in (expected, trained))
    if shapes != found:
        odd = sorted({*shapes.items()} ^ {*found.items()})[0]
        raise UserError(
            f"{where}: does not fit its config.yaml at {odd[0]} {list(odd[1])}; expected the run's own file"
        )


def thaw(model: T5, wanted: Callable[[str], bool] = lambda path: True) -> list[str]:
    """Make the parameters whose paths are wanted trainable, in float32, and return these paths.

    Errors: UserError for a quantised weight.
    """
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
                setattr(node, name, Trainable(variable[...].astype(jax.numpy.float32), **variable.get_metadata()))
                changed.append(path)
    return changed


def _describe(variable: nnx.Variable) -> Leaf:
    metadata = variable.get_metadata()
    stated = {name: metadata[name] for name in ("method", "word_ids") if name in metadata}
    stacked = len(variable.shape) > len(metadata["axes"])
    return Leaf(stacked, metadata.get("learning_rate_scale", 1.0), variable.shape, **stated)
