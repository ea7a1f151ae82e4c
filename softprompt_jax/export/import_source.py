"""Convert any checkpoint to a Hugging Face folder, and any prompt to our file."""

from __future__ import annotations

import shutil
from pathlib import Path

from softprompt_jax.checkpoints import artifact, hugging_face, quantized_folder, t5x
from softprompt_jax.checkpoints import backbone as pretrained
from softprompt_jax.config import UserError
from softprompt_jax.files import writable
from softprompt_jax.models.quantized import Quantization

TOKENIZER_FILES = ("*.model", "tokenizer*", "special_tokens_map.json", "added_tokens.json")


def import_source(
    source: str,
    to: str | Path,
    tokenizer: str | None = None,
    dtype: str | None = None,
    quantize: Quantization | None = None,
) -> list[str]:
    """Write a checkpoint (T5X, `.bin`, safetensors) to a folder in Hugging Face layout and return what was written.

    The prompt of a T5X prompt tuning run is written beside it; if `to` ends in .safetensors, only the prompt is.
    `dtype`: of the weights (default: as they are). `tokenizer`: a SentencePiece file, a folder or a hub name, for a
    source that has none. `quantize`: write a folder of our own with the layers in int8 or nf4 and the rest in `dtype`
    (default bfloat16); the model is never whole in floats.
    Errors: UserError for a source that is no T5, and for a folder that holds weights already.
    """
    to, path = Path(to), Path(source)
    if to.suffix == ".safetensors" or path.is_file():
        if quantize is not None:
            raise UserError(f"{source}: a prompt is not quantised; expected a backbone; leave --quantize out")
        return [_import_prompt(source, to)]
    if (path / "adapter_config.json").exists():
        raise UserError(f"{source}: an adapter of PEFT; expected a T5; load_backbone(BACKBONE, adapter={source!r})")
    if to.exists() and (not to.is_dir() or any(to.glob("*.safetensors"))):
        raise UserError(f"{to}: holds weights already, or is a file; expected a new folder; use another --to")
    settings, tensors, folder = pretrained.open_source(source)
    hugging_face.weight_parts(settings, tensors, source)  # before anything is written
    files = tokenizer_files(tokenizer or folder, required=tokenizer is not None)
    if not files and settings.vocabulary_rows != 384:  # ByT5 needs none
        raise UserError(f"{source}: has no tokenizer; expected one; add --tokenizer with spiece.model or a hub name")
    with writable(to, folder=True):
        for file in files:  # a single SentencePiece file gets the hub's name for it
            alone = file.suffix == ".model" and len(files) == 1
            shutil.copy(file, to / ("spiece.model" if alone else file.name))
        if quantize is None:
            print_of_it, form = pretrained.write_backbone(settings, tensors, to, dtype), "a T5"
        else:
            backbone = pretrained.load_backbone(source, dtype or "bfloat16", quantize=quantize)
            print_of_it, form = backbone.fingerprint(), f"a T5 in {quantize}"
            quantized_folder.save(backbone.model, to, source, print_of_it)
        written = [f"{to}: {form} of {settings.parameters():,} parameters, fingerprint {print_of_it}"]
        checkpoint = t5x.find_checkpoint(source)
        if checkpoint is not None and (opened := t5x.Checkpoint(checkpoint)).prompts:
            metadata = {"backbone": str(to), "fingerprint": print_of_it, "step": str(opened.step)}
            artifact.save_prompt(opened.prompt(), to / artifact.PROMPT_FILE, metadata)
            written.append(f"{to / artifact.PROMPT_FILE}: its prompt")
    return written


def _import_prompt(source: str, to: Path) -> str:
    if to.suffix != ".safetensors":
        raise UserError(f"{to}: for a prompt; expected a file name ending in .safetensors")
    found = artifact.load_artifact(source)
    with writable(to):
        artifact.save_prompt(found.prompt, to, found.metadata)
    return f"{to}: a prompt of {len(found.prompt)} rows"


def tokenizer_files(tokenizer: str | Path, required: bool) -> list[Path]:
    """Return a tokenizer's files: one SentencePiece file, those of a folder, or of a hub name."""
    path = Path(tokenizer).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        if not required:
            return []
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            path = Path(snapshot_download(str(tokenizer), allow_patterns=list(TOKENIZER_FILES)))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            raise UserError(
                f"{tokenizer}: neither a file nor a folder nor reachable on the hub; expected a tokenizer"
            ) from None
    found = sorted(file for pattern in TOKENIZER_FILES for file in path.glob(pattern) if file.is_file())
    if required and not found:
        raise UserError(f"{tokenizer}: no tokenizer in the folder; expected spiece.model or tokenizer.json")
    return found
