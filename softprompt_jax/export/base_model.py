"""The model below what a run trained, as others know it: a name on the hub, a folder, or a plain sentence."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from softprompt_jax.checkpoints.backbone import EMBEDDED
from softprompt_jax.checkpoints.packaged import COPIES
from softprompt_jax.checkpoints.quantized_folder import is_quantized_folder
from softprompt_jax.models.presets import SOURCES


class BaseModel(NamedTuple):
    """What transformers loads it by on this machine, whether that is a name on the hub, and a sentence about it."""

    source: str | None  # None: transformers cannot load it
    on_hub: bool
    sentence: str

    @property
    def name(self) -> str | None:
        """The name on the hub; None where it has none."""
        return self.source if self.on_hub else None


def base_model(backbone: str) -> BaseModel:
    """Describe the backbone of an `Assembly.identity`: a hub name, a folder, a T5X checkpoint, one of ours."""
    if backbone == "scratch":
        return BaseModel(None, False, "The base model has random weights, which are drawn from the run's seed.")
    if backbone == "embedded":
        sentence = "The base model is the small T5 inside softprompt_jax; `softprompt import embedded --to embedded` "
        return BaseModel(str(EMBEDDED), False, f"{sentence}writes it.")
    if backbone in COPIES:
        name, form = COPIES[backbone]
        sentence = f"The base model in training was `{backbone}` of softprompt_jax, the {form} copy of {name}. On the "
        sentence += (
            f"original weights the scores may differ; `softprompt import {backbone} --to {backbone}` writes the "
        )
        return BaseModel(name, True, f"{sentence}copy.")
    checkpoints = {where: name for name, (_, where) in SOURCES.items() if where is not None}
    if (name := checkpoints.get(backbone.rstrip("/"))) is not None:
        return BaseModel(name, True, f"The base model is {name}, read from its T5X checkpoint {backbone}.")
    folder = Path(backbone).expanduser().absolute()
    if "://" not in backbone and not folder.exists():
        return BaseModel(backbone, True, f"The base model is {backbone}.")
    sentence = (
        f"The base model was read from `{folder.name}`, a folder of its author with no name on the hub; put your "
    )
    readable = (folder / "config.json").is_file() and not is_quantized_folder(folder)
    return BaseModel(backbone if readable else None, False, f"{sentence}copy in its place.")
