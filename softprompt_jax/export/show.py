"""Say what a file or folder is: a prompt, an adapter, a checkpoint, a run; its facts as YAML, tensors as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from softprompt_jax import config
from softprompt_jax.checkpoints import artifact, backbone, gguf, hugging_face, packaged, peft, quantized_folder, t5x
from softprompt_jax.checkpoints.tensors import Tensor, open_safetensors, open_sharded
from softprompt_jax.checkpoints.torch_file import open_torch
from softprompt_jax.config import UserError
from softprompt_jax.files import read_object
from softprompt_jax.methods.reparameterization import is_compact
from softprompt_jax.models.presets import published
from softprompt_jax.training.run_folder import read_result

_READ_NUMBERS = 1 << 28  # norms of more are not computed unasked: they need every number
_TORCH, _YAML = (".bin", ".pt", ".pth"), (".yaml", ".yml")
_Tensors = Mapping[str, Tensor]


def show(source: str, norms: bool = False) -> Iterator[str]:
    """Yield lines that describe a source; `norms` also of what is too large to be read unasked.

    Errors: UserError for what is none of these, or damaged.
    """
    for title, facts, tensors in _parts(source):
        yield title
        yield from (f"  {line}" for line in (config.to_yaml(facts).splitlines() if facts else ()))
        yield from _table(tensors, norms)


def _parts(source: str) -> Iterator[tuple[str, dict[str, Any], _Tensors]]:
    """Yield a title, facts and tensors of the source, and of what lies in it."""
    path = Path(source).expanduser()
    if t5x.is_remote(source) or source == "embedded" or source in packaged.PACKAGES or gguf.is_gguf(source):
        yield _backbone(source)
    elif not path.exists():
        raise UserError(f"{source}: no such file or folder; expected a prompt, an adapter, a checkpoint or a run")
    elif path.is_file():
        yield _file(path)
    elif quantized_folder.is_quantized_folder(path):
        about, tensors = quantized_folder.read_about(path), open_sharded(path / quantized_folder.TENSORS)
        facts = about.model_dump(mode="json") | {"checksums": _checksums(tensors)}
        yield f"{path}: a quantised T5, {about.settings.parameters():,} parameters", facts, tensors
    elif (path / "config.yaml").exists():
        title, _, _ = _file(path / "config.yaml")
        if (result := read_result(path)) is None:
            yield f"{title}; not finished: the same command goes on", {}, {}
            return
        yield title, {key: result.get(key) for key in ("validation", "test", "steps", "best_step")}, {}
        trained = (path / artifact.PROMPT_FILE, path / artifact.TRAINED_FILE)
        yield from (_file(file) for file in trained if file.exists())
    elif (path / peft.CONFIG_FILE).exists():
        settings = read_object(path / peft.CONFIG_FILE, "what PEFT has written")
        kind = f"{peft.read_kind(settings, path)}, for {settings.get('base_model_name_or_path')}"
        file = next((path / name for name in (peft.TENSOR_FILE, peft.OLD_TENSOR_FILE) if (path / name).exists()), None)
        if file is None:
            raise UserError(f"{path}: no {peft.TENSOR_FILE}; expected a complete adapter")
        yield f"{path}: an adapter of PEFT, {kind}", {}, {}
        yield _file(file)
    elif (path / "config.json").exists() or t5x.find_checkpoint(path) is not None:
        yield _backbone(source)
        if (path / artifact.PROMPT_FILE).exists():
            yield _file(path / artifact.PROMPT_FILE)
    else:
        raise UserError(f"{source}: none that is known; expected a prompt, an adapter, a checkpoint or a run")


def _file(path: Path) -> tuple[str, dict[str, Any], _Tensors]:
    if path.suffix in _YAML:
        settings = config.read(path)
        task = settings.get("task")
        name = task.get("name", task.get("kind")) if isinstance(task, dict) else task
        kinds = ", ".join(str(method.get("kind")) for method in settings.get("methods") or [{"kind": "prompt"}])
        return f"{path}: a run on {name} with {kinds}, backbone {settings.get('backbone', 'embedded')}", {}, {}
    if path.suffix == ".npy":
        return f"{path}: {_rows(artifact.load_prompt(path))}", {}, {}
    if path.suffix != ".safetensors" and path.suffix not in _TORCH:
        known = ", ".join((".safetensors", ".npy", *_TORCH, *_YAML))
        raise UserError(f"{path}: found the suffix {path.suffix!r}; expected one of {known}, or a folder")
    tensors = open_torch(path) if path.suffix in _TORCH else open_safetensors(path)
    facts: dict[str, Any] = {"checksums": _checksums(tensors)}
    if path.suffix == ".safetensors":
        facts |= dict(sorted(artifact.read_metadata(path).items()))
    if "settings" in facts:  # JSON in a text
        facts["settings"] = artifact.Artifact(str(path), facts).settings
    if set(tensors) == {artifact.ROWS}:
        return f"{path}: {_rows(artifact.load_prompt(path))}", facts, {}
    if is_compact(tensors):
        said = f"{_rows(artifact.load_prompt(path))}, made of {_numbers(tensors):,} numbers and a seed"
        return f"{path}: {said}", facts, tensors
    return f"{path}: {len(tensors)} tensors, {_numbers(tensors):,} numbers", facts, tensors


def _rows(rows: np.ndarray) -> str:
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    return (
        f"a prompt of {rows.shape[0]} rows of width {rows.shape[1]}; "
        f"norms of rows {lengths.min():.4g} to {lengths.max():.4g}, mean {lengths.mean():.4g}"
    )


def _backbone(source: str) -> tuple[str, dict[str, Any], _Tensors]:
    settings, tensors, folder = backbone.open_source(source)
    hugging_face.weight_parts(settings, tensors, source)
    is_gguf, facts = gguf.is_gguf(source), settings.model_dump(mode="json")
    form = "a GGUF file" if is_gguf else f"a {settings.family.replace('t5', 'T5')} in Hugging Face layout"
    if (checkpoint := t5x.find_checkpoint(source)) is not None:
        form, opened = "a checkpoint of T5X", t5x.Checkpoint(checkpoint)
        facts |= {"step": opened.step, "Adafactor": f"slots of {len(opened.adafactor())} weights"}
        facts |= {"prompt": _rows(opened.prompt())} if opened.prompts else {}
    else:
        facts["checksums"] = _checksums(tensors)
        if not is_gguf and not any(folder.glob("*.model")) and not any(folder.glob("tokenizer*")):
            facts["tokenizer"] = "none in the folder"
    sizes = f", sizes of {known}" if (known := published(settings)) else ""
    return f"{source}: {form}, {settings.parameters():,} parameters{sizes}", facts, tensors


def _numbers(tensors: _Tensors) -> int:
    return sum(int(np.prod(tensor.shape)) for tensor in tensors.values())


def _table(tensors: _Tensors, norms: bool) -> Iterator[str]:
    wanted = norms or _numbers(tensors) <= _READ_NUMBERS
    width = max(map(len, tensors), default=0)
    for name, tensor in sorted(tensors.items()):
        norm = f"  norm {np.linalg.norm(tensor.read().astype(np.float64)):.4g}" if wanted else ""
        yield f"  {name:{width}}  {'x'.join(map(str, tensor.shape)) or 'number':>12}{norm}"
    if not wanted:
        yield f"  norms left out, since {_numbers(tensors):,} numbers would be read; add --norms"


def _checksums(tensors: _Tensors) -> str:
    checked = sum(tensor.checked for tensor in tensors.values())
    return f"of {checked} of {len(tensors)} tensors" if checked else "none, a changed number cannot be seen"
