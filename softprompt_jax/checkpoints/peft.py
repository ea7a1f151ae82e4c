"""Adapter folders of Hugging Face PEFT, read and written without it: a JSON file beside a safetensors file.

Each method converts itself (`to_peft`, `from_peft`); here are the files, and what holds for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from softprompt_jax.checkpoints.artifact import PEFT_CONFIG, PEFT_TENSORS, Artifact, read_tensors, write_tensors
from softprompt_jax.checkpoints.backbone import fingerprint
from softprompt_jax.checkpoints.tensors import finite_float32
from softprompt_jax.checkpoints.torch_file import open_torch
from softprompt_jax.config import UserError, first_line, nearest
from softprompt_jax.files import read_object, writable
from softprompt_jax.methods import (
    METHODS,
    Context,
    MethodSettings,
    check_lengths,
    check_trained,
    put_trained,
    split,
)
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.trees import flatten, unflatten

CONFIG_FILE, TENSOR_FILE, OLD_TENSOR_FILE = PEFT_CONFIG, PEFT_TENSORS, "adapter_model.bin"
SEQ_2_SEQ, CAUSAL = "SEQ_2_SEQ_LM", "CAUSAL_LM"  # task types: of encoder-decoders, of decoder-only models
_KINDS = {method.peft_type: method for method in METHODS.values() if method.peft_type}


def attach_adapter(model: LanguageModel, folder: str | Path) -> MethodSettings:
    """Attach what PEFT has trained, with its values, and return its settings.

    Errors: UserError for an unknown kind of adapter, one that needs what we cannot do, or of another backbone.
    """
    folder = Path(folder)
    config = read_object(folder / CONFIG_FILE, "what PEFT has written")
    kind = read_kind(config, folder)
    task = _task_type(model)
    if config.get("task_type") not in (None, task):
        raise UserError(
            f"{folder / CONFIG_FILE}: task_type is {config['task_type']!r}; expected {task}, an adapter of such a model"
        )
    if config.get("modules_to_save"):
        raise UserError(
            f"{folder / CONFIG_FILE}: modules_to_save is {config['modules_to_save']}; expected none, since whole "
            "weights beside an adapter cannot be attached; merge it in PEFT and load the merged model"
        )
    if not (folder / TENSOR_FILE).exists() and (folder / OLD_TENSOR_FILE).exists():
        opened = open_torch(folder / OLD_TENSOR_FILE)
        tensors, metadata = {name: tensor.read() for name, tensor in opened.items()}, {}
    else:
        tensors, metadata = read_tensors(folder / TENSOR_FILE)
    Artifact(str(folder), metadata).check_backbone(fingerprint(model), "this one")
    try:
        method, values = _KINDS[kind].from_peft(config | {"task_type": task}, tensors, model.settings)
    except KeyError as error:
        raise UserError(f"{folder}: no {error.args[0]!r}; expected it in an adapter of kind {kind}") from None
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:  # numbers that are none, ...
        raise UserError(
            f"{folder / CONFIG_FILE}: is not that of its tensors ({first_line(error)}); expected an adapter of kind "
            f"{kind} as PEFT writes it"
        ) from None

    def attached(model: LanguageModel) -> LanguageModel:
        method.attach(model, jax.random.key(0), Context())
        return model

    arrays = {path: jax.numpy.asarray(finite_float32(value, f"{folder}: {path}")) for path, value in values.items()}
    trained = unflatten(flatten(split(model).trainable) | arrays)
    check_lengths([method], trained, str(folder))
    expected = nnx.eval_shape(attached, nnx.merge(*nnx.split(model)))  # before anything of a stated size is built
    check_trained(split(expected).trainable, trained, str(folder))
    put_trained(attached(model), trained, str(folder))
    return method


def save_adapter(
    model: LanguageModel,
    methods: Sequence[MethodSettings],
    folder: str | Path,
    backbone: str | None,
    metadata: dict[str, str],
) -> None:
    """Write what trains as an adapter that PEFT loads on the same backbone, in float32.

    `backbone`: where PEFT finds it, None where it cannot. Errors: UserError for what PEFT cannot express.
    """
    if len(methods) != 1:
        kinds = " and ".join(str(method.kind) for method in methods)  # type: ignore[attr-defined]
        raise UserError(f"methods: found {kinds}; expected one, since a PEFT adapter holds one; keep the run folder")
    settings, tensors = methods[0].to_peft(model)
    common = {
        "base_model_name_or_path": backbone,
        "inference_mode": True,
        "peft_type": methods[0].peft_type,
        "task_type": _task_type(model),  # without it PEFT ignores a prompt
    }
    text = json.dumps(common | settings, indent=2, sort_keys=True) + "\n"
    with writable(folder, folder=True) as to:
        write_tensors(tensors, to / TENSOR_FILE, metadata | {"format": "pt", "fingerprint": fingerprint(model)})
        (to / CONFIG_FILE).write_text(text, encoding="utf-8")


def _task_type(model: LanguageModel) -> str:
    return CAUSAL if model.encoder is None else SEQ_2_SEQ


def read_kind(config: dict[str, Any], folder: Path) -> str:
    """Return an adapter's kind, if it is one that is known here."""
    kind = str(config.get("peft_type"))
    if kind not in _KINDS:
        expected = f"{', '.join(sorted(_KINDS))}{nearest(kind, _KINDS)}"
        raise UserError(f"{folder / CONFIG_FILE}: peft_type is {kind!r}; expected one of {expected}")
    return kind
