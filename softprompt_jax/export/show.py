"""Say what a file or folder is: a prompt, an adapter, a checkpoint, a run; shapes, norms, metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from softprompt_jax import config
from softprompt_jax.checkpoints import artifact, backbone, hugging_face, peft, quantized_folder, t5x
from softprompt_jax.checkpoints.tensors import Tensor, open_safetensors
from softprompt_jax.checkpoints.torch_file import open_torch
from softprompt_jax.config import UserError
from softprompt_jax.models.presets import published

_READ_NUMBERS = 1 << 28  # norms of more are not computed unasked: they need every number


def show(source: str, norms: bool = False) -> Iterator[str]:
    """Yield lines that describe a source; `norms` also of what is too large to be read unasked.

    Errors: UserError for what is none of these, or damaged.
    """
    path = Path(source).expanduser()
    if t5x.is_remote(source) or source == "embedded":
        yield from _backbone(source, norms)
    elif not path.exists():
        raise UserError(f"{source}: no such file or folder; expected a prompt, an adapter, a checkpoint or a run")
    elif path.is_file():
        yield from _file(path, norms)
    elif quantized_folder.is_quantized_folder(path):
        yield f"{path}: a quantised T5, {quantized_folder.read_about(path).settings.parameters():,} parameters"
        yield from quantized_folder.describe(path)
        tensors = quantized_folder.open_tensors(path)
        yield from _tensors(tensors, norms)
        yield from _checksums(tensors)
    elif (path / "config.yaml").exists():
        yield from _run(path, norms)
    elif (path / peft.CONFIG_FILE).exists():
        yield from _adapter(path, norms)
    elif (path / "config.json").exists() or t5x.find_checkpoint(path) is not None:
        yield from _backbone(source, norms)
        if (path / artifact.PROMPT_FILE).exists():
            yield from _file(path / artifact.PROMPT_FILE, norms)
    else:
        raise UserError(f"{source}: none that is known; expected a prompt, an adapter, a checkpoint or a run")


def _file(path: Path, norms: bool) -> Iterator[str]:
    if path.suffix == ".safetensors":
        tensors = open_safetensors(path)
        metadata = artifact.read_metadata(path)
    elif path.suffix in (".bin", ".pt", ".pth"):
        tensors, metadata = open_torch(path), {}
    else:
        rows, metadata = artifact.read_prompt(path)
        yield f"{path}: {_rows(rows)}"
        return
    if set(tensors) == {artifact.ROWS}:
        rows, _ = artifact.read_prompt(path)
        yield f"{path}: {_rows(rows)}"
    else:
        numbers = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
        yield f"{path}: {len(tensors)} tensors, {numbers:,} numbers"
        yield from _tensors(tensors, norms)
    yield from _checksums(tensors)
    yield from _metadata(metadata)


def _rows(rows: np.ndarray) -> str:
    lengths = np.linalg.norm(rows, axis=1)
    return (
        f"a prompt of {rows.shape[0]} rows of width {rows.shape[1]}; "
        f"norms of rows {lengths.min():.4g} to {lengths.max():.4g}, mean {lengths.mean():.4g}"
    )


def _adapter(folder: Path, norms: bool) -> Iterator[str]:
    settings = peft.read_config(folder)
    kind = peft.read_kind(settings, folder)
    yield f"{folder}: an adapter of PEFT, {kind}, for {settings.get('base_model_name_or_path')}"
    files = [folder / name for name in (peft.TENSOR_FILE, peft.OLD_TENSOR_FILE) if (folder / name).exists()]
    if not files:
        raise UserError(f"{folder}: no {peft.TENSOR_FILE}; expected a complete adapter")
    yield from _file(files[0], norms)


def _run(folder: Path, norms: bool) -> Iterator[str]:
    settings = config.read(folder / "config.yaml")
    task = settings.get("task")
    name = task.get("name", task.get("kind")) if isinstance(task, dict) else task
    kinds = ", ".join(str(method.get("kind")) for method in settings.get("methods") or [])
    yield f"{folder}: a run on {name} with {kinds}, backbone {settings.get('backbone')}"
    result = folder / "result.json"
    if not result.exists():
        yield "not finished: the same command goes on"
        return
    try:
        values = json.loads(result.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{result}: not JSON ({error}); expected a run's result") from None
    for key in ("validation", "test"):
        for metric, value in (values.get(key) or {}).items():
            yield f"{key} {metric}: {value:.4g}" if isinstance(value, float) else f"{key} {metric}: {value}"
    yield f"best of {values.get('steps')} steps: {values.get('best_step')}"
    for file in (artifact.PROMPT_FILE, artifact.TRAINED_FILE):
        if (folder / file).exists():
            yield from _file(folder / file, norms)
            return


def _backbone(source: str, norms: bool) -> Iterator[str]:
    settings, tensors, folder = backbone.open_source(source)
    hugging_face.weight_parts(settings, tensors, source)
    checkpoint = t5x.find_checkpoint(source)
    form = "a checkpoint of T5X" if checkpoint is not None else "a T5 in Hugging Face layout"
    known = published(settings)
    yield f"{source}: {form}, {settings.parameters():,} parameters" + (f", sizes of {known}" if known else "")
    for name, value in settings.model_dump().items():
        yield f"  {name}: {value}"
    if checkpoint is not None:
        opened = t5x.Checkpoint(checkpoint)
        slots = opened.adafactor()
        yield f"  step: {opened.step}"
        yield f"  Adafactor: slots of {len(slots)} weights" if slots else "  Adafactor: no slots"
        if opened.prompts:
            yield f"  {_rows(opened.prompt())}"
    elif not any(folder.glob("*.model")) and not any(folder.glob("tokenizer*")):
        yield "  tokenizer: none in the folder"
    yield from _tensors(tensors, norms)
    if checkpoint is None:
        yield from _checksums(tensors)


def _tensors(tensors: Mapping[str, Tensor], norms: bool) -> Iterator[str]:
    numbers = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    wanted = norms or numbers <= _READ_NUMBERS
    width = max(map(len, tensors), default=0)
    for name, tensor in sorted(tensors.items()):
        norm = f"  norm {np.linalg.norm(tensor.read().astype(np.float32)):.4g}" if wanted else ""
        yield f"  {name:{width}}  {'x'.join(map(str, tensor.shape)) or 'number':>12}{norm}"
    if not wanted:
        yield f"  norms left out, since {numbers:,} numbers would be read; add --norms"


def _checksums(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    checked = sum(tensor.checked for tensor in tensors.values())
    if tensors and not checked:
        yield "  checksums: none; a changed number that is still finite cannot be seen"
    else:
        yield f"  checksums: of {checked} of {len(tensors)} tensors"


def _metadata(metadata: dict[str, Any]) -> Iterator[str]:
    for name, value in sorted(metadata.items()):
        yield f"  {name}: {value}"
