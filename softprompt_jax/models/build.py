"""From settings to a model, whichever its family."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx

from softprompt_jax.models.causal import CausalLM
from softprompt_jax.models.causal_settings import CausalSettings
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.settings import ModelSettings
from softprompt_jax.models.t5 import T5, T5Settings
from softprompt_jax.models.t5gemma import T5Gemma, T5GemmaSettings

_MODELS: dict[type[ModelSettings], Any] = {T5Settings: T5, CausalSettings: CausalLM, T5GemmaSettings: T5Gemma}


def settings_class(family: Any) -> type[ModelSettings]:
    """Return the class of a family's settings."""
    if family == "t5":
        return T5Settings
    return T5GemmaSettings if str(family).startswith("t5gemma") else CausalSettings


def build(settings: ModelSettings, rng: jax.Array, dtype: str = "float32") -> LanguageModel:
    """Build a model with random weights in float32; it computes in `dtype`."""
    return _MODELS[type(settings)](settings, rng, dtype)


def abstract(settings: ModelSettings, dtype: str = "float32") -> LanguageModel:
    """Build a model as shapes and dtypes only; nothing is allocated."""
    mesh = jax.sharding.get_abstract_mesh()
    made = _abstract(settings, dtype, mesh)  # pyright: ignore[reportArgumentType]  # settings are frozen
    return nnx.merge(*made, copy=True)


@functools.lru_cache(maxsize=16)  # tracing takes a tenth of a second, and a run needs it several times
def _abstract(settings: ModelSettings, dtype: str, mesh: Any) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: build(settings, jax.random.key(0), dtype)))
