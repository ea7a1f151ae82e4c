"""What methods there are: how much each trains on a backbone, and with which others it can stand."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
from flax import nnx

from softprompt_jax.config import UserError
from softprompt_jax.methods import METHODS, Context, MethodSettings
from softprompt_jax.methods.trainable import Trainable
from softprompt_jax.models.t5 import T5, T5Settings

_CONTEXT = Context(encode=lambda text: [0] * len(text.split()))  # a piece for each word
_SMALL = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}


@dataclasses.dataclass(frozen=True)
class Listed:
    """One line of the list."""

    kind: str
    paper: str
    parameters: int  # that train, with default settings
    peft: str | None
    not_with: list[str]  # kinds that cannot stand beside it, in either order


def listed(settings: T5Settings) -> list[Listed]:
    """Describe every method with its default settings on a backbone of these sizes; no weight is made."""
    apart = _apart(settings)
    return [
        Listed(kind, method.paper, parameters(settings, method()), method.peft_type, sorted(apart[kind]))
        for kind, method in METHODS.items()
    ]


def parameters(settings: T5Settings, method: MethodSettings) -> int:
    """Return how many numbers a method trains on a backbone of these sizes; no weight is made."""
    model = _attached(settings, [method])
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, Trainable)))


def _apart(settings: T5Settings) -> dict[str, set[str]]:
    """Try every two methods on a model as small as can be; itself beside itself is left out."""
    small = settings.model_copy(update=_SMALL)
    found: dict[str, set[str]] = {kind: set() for kind in METHODS}
    for one, other in itertools.combinations(METHODS, 2):
        if not (_fit(small, [one, other]) or _fit(small, [other, one])):
            found[one].add(other)
            found[other].add(one)
    return found


def _fit(settings: T5Settings, kinds: list[str]) -> bool:
    try:
        _attached(settings, [METHODS[kind]() for kind in kinds])
    except UserError:
        return False
    return True


def _attached(settings: T5Settings, methods: list[MethodSettings]) -> T5:
    """Return the model with the methods as shapes only."""

    def build() -> T5:
        model = T5(settings, jax.random.key(0))
        for method in methods:
            method.attach(model, jax.random.key(0), _CONTEXT)
        return model

    return nnx.eval_shape(build)
