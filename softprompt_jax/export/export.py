"""Write what a run has trained in formats that other programs read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from softprompt_jax.assembly import assemble_trained, run_of
from softprompt_jax.checkpoints.artifact import CONFIG_FILE, TRAINED_FILE, Artifact, load_artifact, save_prompt
from softprompt_jax.checkpoints.backbone import save_backbone
from softprompt_jax.checkpoints.peft import save_adapter
from softprompt_jax.config import UserError
from softprompt_jax.distributed import cloud_files
from softprompt_jax.export.import_source import tokenizer_files
from softprompt_jax.export.stablehlo import write_program
from softprompt_jax.inference.predictor import load_predictor
from softprompt_jax.methods.wrap import merged


def export(
    source: str | Path, format: str, to: str | Path, max_tokens: int | None = None, prompt_input: bool = False
) -> None:
    """Write a tuned model (`hf`) or an adapter (`peft`) to a folder, prompt rows (`npy`, `safetensors`) to a file.

    `safetensors` of a run that has no prompt is all that it trained, under the paths of the model. `stablehlo` is a
    folder with a program (see stablehlo.py), of a run or a prompt file; `max_tokens` and `prompt_input` are about it.
    Of a run that has not finished, the best checkpoint is exported, or else the latest. All may be on gs:// or s3://.
    """
    if Path(to).suffix != f".{format}" and format in ("npy", "safetensors"):
        raise UserError(f"{to}: ends in {Path(to).suffix!r}; expected a file name ending in .{format}")
    if format != "stablehlo" and (max_tokens is not None or prompt_input):
        raise UserError(f"export: --max-tokens and --prompt-input with {format}; expected them with stablehlo only")
    with cloud_files.writing(to) as local:
        try:
            if format == "stablehlo":
                _export_program(source, local, max_tokens, prompt_input)
            elif format in ("hf", "peft"):
                _export_model(load_artifact(source), format, local)
            else:
                _export_arrays(load_artifact(source), format, local)
        except OSError as error:
            raise UserError(f"{local}: cannot be written ({error.strerror}); expected a writable place") from None


def _export_program(source: str | Path, to: Path, max_tokens: int | None, prompt_input: bool) -> None:
    predictor = load_predictor(source)
    folder = Path(predictor.tokenizer.source)
    folder = folder if folder.is_dir() else folder.parent
    write_program(predictor.model, folder, to, max_tokens or predictor.max_tokens, prompt_input)


def _export_model(artifact: Artifact, format: str, to: Path) -> None:
    run = None if artifact.folder is None else run_of(artifact)
    if run is None:
        raise UserError(f"{artifact.source}: no {CONFIG_FILE}; expected a run folder")
    assembly = assemble_trained(artifact, run)
    if format == "peft":
        backbone = None if assembly.identity in ("embedded", "scratch") else assembly.identity
        save_adapter(assembly.model, run.methods, to, backbone, {"backbone": assembly.identity})
        return
    if assembly.model.prompt is not None:
        raise UserError(f"{artifact.source}: has a prompt, which no Hugging Face model holds; export it as peft or npy")
    if sharded := next(to.glob("*.index.json"), None):
        raise UserError(f"{sharded}: of weights in several files, which would be read first; use another --to")
    folder, rows = assembly.tokenizer_folder, assembly.model.settings.vocabulary_rows
    tokenizer = tokenizer_files(folder, required=not folder.is_dir() and rows != 384)  # ByT5 needs none
    # As it was trained: bfloat16 would swallow small changes.
    save_backbone(merged(assembly.model), to, "float32")
    for path in tokenizer:
        shutil.copy(path, to / path.name)
    _write_fast_tokenizer(to, {path.name for path in tokenizer})


def _write_fast_tokenizer(folder: Path, copied: set[str]) -> None:
    """Write `tokenizer.json` beside a lone `spiece.model`, which transformers reads only with protobuf."""
    if "spiece.model" in copied and "tokenizer.json" not in copied:
        from transformers import AutoTokenizer

        (folder / "tokenizer.json").unlink(missing_ok=True)  # of an export before this one
        AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))


def _export_arrays(artifact: Artifact, format: str, to: Path) -> None:
    if format == "npy" and artifact.rows is not None and artifact.place != "before":
        raise UserError(
            f"{artifact.source}: its rows do not all stand before the text ({artifact.place}), which .npy cannot say; "
            "expected a format that can; export it as safetensors"
        )
    finished = artifact.folder if artifact.step is None else None
    if format == "safetensors" and artifact.rows is None and finished is not None:  # no prompt: all, as it is
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(finished / TRAINED_FILE, to)
        return
    rows = artifact.prompt
    to.parent.mkdir(parents=True, exist_ok=True)
    if format == "safetensors":
        save_prompt(rows, to, artifact.metadata)
    else:
        with to.open("wb") as file:  # given a name, NumPy would change it
            np.save(file, rows)
