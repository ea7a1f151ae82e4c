"""Adapter folders of Hugging Face PEFT, read and written without it: a JSON file beside a safetensors file.

Each method converts itself (`to_peft`, `from_peft`); here are the files, and what holds for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from softprompt_jax.checkpoints.artifact import check_fingerprint, read_tensors, write_tensors
from softprompt_jax.checkpoints.backbone import fingerprint
from softprompt_jax.checkpoints.torch_file import open_torch
from softprompt_jax.config import UserError, nearest
from softprompt_jax.methods import METHODS, Context, MethodSettings, put_trained, split
from softprompt_jax.models.t5 import T5
from softprompt_jax.trees import flatten, unflatten

CONFIG_FILE, TENSOR_FILE, OLD_TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TASK = "SEQ_2_SEQ_LM"


def attach_adapter(model: T5, folder: str | Path) -> MethodSettings:
    """Attach what PEFT has trained, with its values, and return its settings.

    Errors: UserError for an unknown kind of adapter, one that needs what we cannot do, or of another backbone.
    """
    folder = Path(folder)
    config = read_config(folder)
    kind, kinds = read_kind(config, folder), _kinds()
    if config.get("task_type") not in (None, TASK):
        raise UserError(
            f"{folder / CONFIG_FILE}: task_type is {config['task_type']!r}; expected {TASK}, an adapter of a T5"
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
    check_fingerprint(metadata, fingerprint(model), str(folder), "this one")
    try:
        method, values = kinds[kind].from_peft(config, tensors, model.settings)
    except KeyError as error:
        raise UserError(f"{folder}: no {error.args[0]!r}; expected it in an adapter of kind {kind}") from None
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    before = flatten(split(model).trainable)
    method.attach(model, jax.random.key(0), Context())
    shapes = {path: leaf.shape for path, leaf in flatten(split(model).trainable).items() if path not in before}
    for path in sorted({*shapes, *values}):
        found = list(values[path].shape) if path in values else "nothing"
        if path not in shapes or found != list(shapes[path]):
            expected = list(shapes[path]) if path in shapes else "nothing"
            raise UserError(f"{folder}: found {found} for {path}; expected {expected} on this backbone; give its own")
    put_trained(
        model,
        unflatten(before | {path: jax.numpy.float32(value) for path, value in values.items()}),
        str(folder),
    )
    return method


def save_adapter(
    model: T5, methods: Sequence[MethodSettings], folder: str | Path, backbone: str | None, metadata: dict[str, str]
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
        "task_type": TASK,  # without it PEFT ignores a prompt
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / TENSOR_FILE, metadata | {"format": "pt", "fingerprint": fingerprint(model)})
    text = json.dumps(common | settings, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def read_kind(config: dict[str, Any], folder: Path) -> str:
    """Return an adapter's kind, if it is one that is known here."""
    kind, kinds = str(config.get("peft_type")), _kinds()
    if kind not in kinds:
        raise UserError(
            f"{folder / CONFIG_FILE}: peft_type is {kind!r}; expected one of {', '.join(sorted(kinds))}"
            f"{nearest(kind, kinds)}"
        )
    return kind


def _kinds() -> dict[str, type[MethodSettings]]:
    return {method.peft_type: method for method in METHODS.values() if method.peft_type}


def read_config(folder: Path) -> dict[str, Any]:
    """Read an adapter's `adapter_config.json`."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no {CONFIG_FILE}; expected a folder that PEFT has written") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); expected PEFT's settings") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: found {type(config).__name__}; expected a JSON object, PEFT's settings")
    return config
