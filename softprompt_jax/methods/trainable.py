"""What trains is a type: `Trainable`. This file splits a model into trainable and frozen parameters, and merges them.

model = a LanguageModel with frozen `nnx.Param`s, in which methods have put `Trainable`s
parts = split(model)                                the structure, a dictionary of each kind
model = parts.merge(parts.trainable, parts.frozen)  the same model, also inside `jax.jit`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from softprompt_jax.config import UserError
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.quantized import QuantizedLinear
from softprompt_jax.optim.leaf import Leaf
from softprompt_jax.trees import flatten


class Trainable(nnx.Param):
    """A parameter that training changes.

    Metadata: the names of its `axes`, and where they differ from their defaults the fields of `Leaf`:
    `learning_rate_scale`, `method`, `word_ids` and `word_factor`.
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

    def merge(self, trainable: dict[str, Any], frozen: dict[str, Any]) -> LanguageModel:
        """Build the model of these arrays."""
        return nnx.merge(self.graphdef, trainable, frozen)


def split(model: LanguageModel) -> Split:
    """Split a model into trainable and frozen arrays."""
    graphdef, trainable, frozen = nnx.split(model, Trainable, ...)
    return Split(graphdef, nnx.to_pure_dict(trainable), nnx.to_pure_dict(frozen))


def leaves(model: LanguageModel) -> dict[str, Leaf]:
    """Describe every trainable array by its path."""
    variables = nnx.to_pure_dict(nnx.state(model, Trainable), extract_fn=lambda variable: variable)
    found: dict[str, Leaf] = {}
    for path, variable in flatten(variables).items():
        metadata = variable.get_metadata()
        stated = {name: metadata[name] for name in ("method", "word_ids", "word_factor") if name in metadata}
        stacked = len(variable.shape) > len(metadata["axes"])
        found[path] = Leaf(stacked, metadata.get("learning_rate_scale", 1.0), variable.shape, **stated)
    return found


def mark_owner(model: LanguageModel, method: int, learning_rate_scale: float = 1.0) -> None:
    """Mark what a method has just attached, every trainable parameter without an owner, with the method's number.

    `learning_rate_scale` is a factor of the scales that they have.
    """
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Trainable) and "method" not in (metadata := node.get_metadata()):
            scale = learning_rate_scale * metadata.get("learning_rate_scale", 1.0)
            node.set_metadata(method=method, learning_rate_scale=scale)


def put_trained(model: LanguageModel, trained: dict[str, Any], where: str) -> None:
    """Give the model's trainable arrays their trained values.

    Errors: UserError, which names `where`, for arrays of other paths or shapes.
    """
    parts = split(model)
    check_trained(parts.trainable, trained, where)
    nnx.update(model, nnx.state(parts.merge(trained, parts.frozen)))


def check_lengths(methods: Sequence[Any], trained: dict[str, Any], where: str) -> None:
    """Refuse methods with more rows than there are numbers in all that they have trained; nothing is built."""
    numbers = sum(leaf.size for leaf in jax.tree.leaves(trained))
    for method in methods:
        if (length := getattr(method, "row_count", getattr(method, "length", 0))) > numbers:
            raise UserError(
                f"{where}: holds {numbers} numbers, and its settings say {method.kind} of length {length}; "
                "expected the settings and file of one training"
            )


def check_trained(expected: dict[str, Any], trained: dict[str, Any], where: str) -> None:
    """Refuse trained arrays of other paths or shapes than the expected ones, which may be abstract."""
    shapes, found = ({path: list(leaf.shape) for path, leaf in flatten(tree).items()} for tree in (expected, trained))
    for path in sorted({*shapes, *found}):
        if shapes.get(path) != found.get(path):
            raise UserError(
                f"{where}: does not fit its settings or this backbone: found {found.get(path, 'nothing')} for {path}; "
                f"expected {shapes.get(path, 'nothing')}; give the settings, file and backbone of one training"
            )


def thaw(model: LanguageModel, wanted: Callable[[str], bool] = lambda path: True) -> list[str]:
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
