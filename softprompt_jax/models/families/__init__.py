"""One file a family of models: from its `config.json` to settings and back, and the names of its tensors.

Knows no files on disk: `checkpoints/` opens them and asks here what a name means. To add a family, copy the file that
is nearest and add it to `_FAMILIES`; `Family` says what it must have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from softprompt_jax.config import UserError, first_line, nearest
from softprompt_jax.models.families import gemma, gpt2, gpt_neo, gpt_neox, llama, t5, t5gemma
from softprompt_jax.models.families.common import Opened, Weight
from softprompt_jax.models.settings import ModelSettings


@runtime_checkable
class Family(Protocol):
    """What the file of a family has. `settings` are those of its own class."""

    @property
    def MODEL_TYPES(self) -> Sequence[str]:
        """Return the values of `model_type` that it reads."""
        ...

    def settings_of(self, config: Mapping[str, Any], where: str) -> ModelSettings:
        """Return the settings that a `config.json` states. Errors: UserError names the field."""
        ...

    def complete(
        self,
        config: Mapping[str, Any],
        settings: Any,
        tensors: Mapping[str, Opened],
        equal: Callable[[Opened, Opened], bool],
        where: str,
    ) -> tuple[ModelSettings, dict[str, Opened]]:
        """Return the settings, with what only the weights tell (`tied`), and the tensors under the names of `names`."""
        ...

    def config_of(self, settings: Any) -> dict[str, Any]:
        """Return the `config.json` of a model."""
        ...

    def names(self, settings: Any) -> dict[str, Weight]:
        """Map each weight of ours to its Hugging Face tensors."""
        ...


_FAMILIES: tuple[Family, ...] = (t5, t5gemma, llama, gemma, gpt2, gpt_neo, gpt_neox)
MODEL_TYPES: dict[str, Family] = {kind: family for family in _FAMILIES for kind in family.MODEL_TYPES}


def family_of(model_type: Any, where: str) -> Family:
    """Return the family of a `model_type`.

    Errors: UserError says which there are.
    """
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise UserError(
            f"{where}: model_type is {model_type!r}; expected one of {', '.join(sorted(MODEL_TYPES))}"
            f"{nearest(str(model_type), MODEL_TYPES)}"
        )
    return MODEL_TYPES[model_type]


def settings_of(config: Mapping[str, Any], where: str) -> ModelSettings:
    """Return the settings of a config of any family. Errors: UserError."""
    family = family_of(config.get("model_type"), where)
    try:
        return family.settings_of(config, where)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # a value of another type
        raise UserError(
            f"{where}: is no config of a {config['model_type']} ({type(error).__name__}: {first_line(error)}); "
            "expected it as it was published"
        ) from None


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, Opened],
    equal: Callable[[Opened, Opened], bool],
    where: str,
) -> tuple[ModelSettings, dict[str, Opened]]:
    """Return the settings of a config, completed from the weights, and these under the names of `names`.

    `equal` decides whether two tensors hold the same numbers. Errors: UserError names the field or the tensor.
    """
    settings = settings_of(config, where)
    return family_of(config["model_type"], where).complete(config, settings, tensors, equal, where)


def names(settings: ModelSettings) -> dict[str, Weight]:
    """Map each weight of ours to its Hugging Face tensors."""
    return MODEL_TYPES[settings.family].names(settings)


def config_of(settings: ModelSettings, dtype: str) -> dict[str, Any]:
    """Return the `config.json` of a model whose weights are stored as `dtype`."""
    return {**MODEL_TYPES[settings.family].config_of(settings), "dtype": dtype}


def is_stacked(path: str) -> bool:
    """Tell whether a weight of ours has a leading axis of layers."""
    return ".layers." in path
