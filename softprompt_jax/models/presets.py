"""The published sizes: settings by name, without any weights, and where the weights are published."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from softprompt_jax.config import UserError, nearest, read
from softprompt_jax.models import families
from softprompt_jax.models.settings import RUNTIME_DEFAULTS, ModelSettings
from softprompt_jax.models.t5 import T5Settings

_KNOWN = read(Path(__file__).with_name("t5_sizes.yaml"))
PRESETS = {name: T5Settings(**about) for name, about in _KNOWN["presets"].items()}
# Hub name: (preset, T5X checkpoint or None). A backbone loads by either name.
SOURCES: dict[str, tuple[str, str | None]] = {hub: (size, where) for hub, (size, where) in _KNOWN["sources"].items()}


def hub_name(checkpoint: str) -> str | None:
    """Return the hub name of a published T5X checkpoint's weights, or at least of its size and tokenizer."""
    known = {where: name for name, (_, where) in SOURCES.items() if where} | _KNOWN["t5x_only"]
    return known.get(checkpoint.rstrip("/"))


@functools.cache
def other_presets() -> dict[str, tuple[str, ModelSettings]]:
    """Return the hub name and the settings of the published models that are no T5s, by name."""
    found = {}
    for name, about in read(Path(__file__).with_name("presets.yaml")).items():
        settings = families.family_of(about["model_type"], name).settings_of(about, name)
        tied = about.get("tie_word_embeddings", about["model_type"] != "gpt_neox")
        found[name] = about["hub"], settings.model_copy(update={"tied": tied})
    return found


def preset(name: str) -> ModelSettings:
    """Return the settings of a published size, e.g. `t5-v1_1-small`."""
    known = {**PRESETS, **{name: settings for name, (_, settings) in other_presets().items()}}
    if name not in known:
        raise UserError(f"preset {name!r}: unknown; expected one of {', '.join(known)}{nearest(name, known)}")
    return known[name]


def published_size(source: str) -> ModelSettings | None:
    """Return the settings of a published backbone by its hub name, its T5X checkpoint or the last part of its path."""
    for name, (hub, settings) in other_presets().items():
        if source in (name, hub):
            return settings
    source = hub_name(source) or source
    name = re.sub(r"^flan-t5-(\w+)$|^t5-(\w+)-lm-adapt$", r"t5-v1_1-\1\2", source.rpartition("/")[2])
    return PRESETS.get(SOURCES.get(source, (name,))[0])


def published(settings: ModelSettings) -> str | None:
    """Return the preset that has this model's shapes, whatever its dropout or remat; None if none has."""
    shapes = settings.model_copy(update=RUNTIME_DEFAULTS)
    if isinstance(settings, T5Settings):
        return next((name for name, known in PRESETS.items() if known == shapes), None)
    shapes = shapes.model_copy(update={"eos": 0})
    known = {name: found.model_copy(update={"eos": 0}) for name, (_, found) in other_presets().items()}
    return next((name for name, found in known.items() if found == shapes), None)
