"""Write what was trained in formats that other programs read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from softprompt_jax import config
from softprompt_jax.assembly import Assembly, assemble
from softprompt_jax.checkpoints import artifact
from softprompt_jax.checkpoints.backbone import save_backbone
from softprompt_jax.checkpoints.peft import save_adapter
from softprompt_jax.checkpoints.training_state import Checkpoints
from softprompt_jax.config import UserError
from softprompt_jax.distributed import cloud_files
from softprompt_jax.export.import_source import tokenizer_files
from softprompt_jax.export.stablehlo import write_program
from softprompt_jax.inference.predictor import load_predictor
from softprompt_jax.methods import put_trained
from softprompt_jax.methods.wrap import merged
from softprompt_jax.run import Run, load_run


def export(
    source: str | Path, format: str, to: str | Path, max_tokens: int | None = None, prompt_input: bool = False
) -> None:
    """Write a tuned model (`hf`) or an adapter (`peft`) to a folder, prompt rows (`npy`, `safetensors`) to a file.

    `safetensors` of a run that has no prompt is all that it trained, under the paths of the model. `stablehlo` is a
    folder with a program (see stablehlo.py), of a run or a prompt file; `max_tokens` and `prompt_input` are about it.
    All may be on gs:// or s3://.
    """
    if Path(to).suffix != f".{format}" and format in ("npy", "safetensors"):
        raise UserError(f"{to}: ends in {Path(to).suffix!r}; expected a file name ending in .{format}")
    if format != "stablehlo" and (max_tokens is not None or prompt_input):
        raise UserError(f"export: --max-tokens and --prompt-input with {format}; expected them with stablehlo only")
    with cloud_files.writing(to) as made:
        if format == "stablehlo":
            _export_program(cloud_files.local(source), made, max_tokens, prompt_input)
        else:
            _export(cloud_files.local(source), format, made, f"{source}/{cloud_files.CHECKPOINTS}")


def _export_program(source: Path, to: Path, max_tokens: int | None, prompt_input: bool) -> None:
    predictor = load_predictor(source)
    folder = Path(predictor.tokenizer.source)
    folder = folder if folder.is_dir() else folder.parent
    try:
        write_program(predictor.model, folder, to, max_tokens or predictor.max_tokens, prompt_input)
    except OSError as error:
        raise UserError(f"{to}: cannot be written ({error.strerror}); expected a writable place") from None


def _export(source: Path, format: str, to: Path, checkpoints: str) -> None:
    try:
        if format == "hf":
            assembly = load_latest(source, checkpoints)
            if assembly.model.prompt is not None:
                raise UserError(f"{source}: has a prompt, which no Hugging Face model holds; export it as peft or npy")
            if sharded := next(to.glob("*.index.json"), None):
                raise UserError(f"{sharded}: of weights in several files, which would be read first; use another --to")
            folder, rows = assembly.tokenizer_folder, assembly.model.settings.vocabulary_rows
            tokenizer = tokenizer_files(folder, required=not folder.is_dir() and rows != 384)  # ByT5 needs none
            # As it was trained: bfloat16 would swallow small changes.
            save_backbone(merged(assembly.model), to, "float32")
            for path in tokenizer:
                shutil.copy(path, to / path.name)
            _write_fast_tokenizer(to, {path.name for path in tokenizer})
            return
        if format == "peft":
            assembly, run = load_latest(source, checkpoints), load_run(source / "config.yaml")
            backbone = None if assembly.identity in ("embedded", "scratch") else assembly.identity
            save_adapter(assembly.model, run.methods, to, backbone, {"backbone": assembly.identity})
            return
        trained = source / artifact.TRAINED_FILE
        if format == "safetensors" and trained.exists() and not (source / artifact.PROMPT_FILE).exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(trained, to)
            return
        rows, metadata = artifact.read_prompt(source)
        if format == "npy" and (place := metadata.get("place", "before")) != "before":
            raise UserError(
                f"{source}: its rows do not all stand before the text ({place}), which .npy cannot say; "
                "expected a format that can; export it as safetensors"
            )
        to.parent.mkdir(parents=True, exist_ok=True)
        if format == "npy":
            with to.open("wb") as file:  # given a name, NumPy would change it
                np.save(file, rows)
        else:
            artifact.save_prompt(rows, to, metadata)
    except OSError as error:
        raise UserError(f"{to}: cannot be written ({error.strerror}); expected a writable place") from None


def _write_fast_tokenizer(folder: Path, copied: set[str]) -> None:
    """Write `tokenizer.json` beside a lone `spiece.model`, which transformers reads only with protobuf."""
    if "spiece.model" in copied and "tokenizer.json" not in copied:
        from transformers import AutoTokenizer

        (folder / "tokenizer.json").unlink(missing_ok=True)  # of an export before this one
        AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))


def load_latest(folder: Path, checkpoints: str | None = None) -> Assembly:
    """Load what a run has trained: its result, or until it is finished its latest checkpoint."""
    settings = folder / "config.yaml"
    if not settings.exists():
        raise UserError(f"{folder}: no config.yaml; expected a run folder")
    run, file = config.parse(Run, config.read(settings), str(settings)), folder / artifact.TRAINED_FILE
    assembly = assemble(run.finished() if file.exists() else run.model_copy(update={"attention": "auto"}))
    if file.exists():
        trained, metadata = artifact.load_trained(file)
    else:
        opened = Checkpoints(checkpoints or folder / cloud_files.CHECKPOINTS, read_only=True)
        step = opened.latest()
        if step is None:
            raise UserError(f"{folder}: has no checkpoint yet; expected one; wait for the run's first")
        trained, metadata = opened.restore(step)["trainable"], {}
        opened.close()
    put_trained(assembly.model, trained, str(folder))
    artifact.check_backbone(metadata, assembly.model, str(folder), assembly.identity, "give the one it was trained on")
    return assembly
