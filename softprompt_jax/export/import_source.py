"""Convert any checkpoint to a Hugging Face folder, and any prompt to our file."""

from __future__ import annotations

import shutil
from pathlib import Path

from softprompt_jax.checkpoints import artifact, gguf, gguf_tokenizer, hugging_face, quantized_folder, t5x
from softprompt_jax.checkpoints import backbone as pretrained
from softprompt_jax.config import UserError
from softprompt_jax.files import writable, write_checksums
from softprompt_jax.models.quantized import Quantization

TOKENIZER_FILES = ("*.model", "tokenizer*", "special_tokens_map.json", "added_tokens.json")


def import_source(
    source: str,
    to: str | Path,
    tokenizer: str | None = None,
    dtype: str | None = None,
    quantize: Quantization | None = None,
) -> list[str]:
    """Write a checkpoint (T5X, GGUF, `.bin`, safetensors) in Hugging Face layout and return what was written.

    The prompt of a T5X prompt tuning run is written beside it; if `to` ends in .safetensors, only the prompt is.
    `dtype`: of the weights (default: as they are). `tokenizer`: a SentencePiece file, a folder or a hub name, for a
    source that has none. `quantize`: write a folder of our own with the layers in int8 or nf4 and the rest in `dtype`
    (default bfloat16); the model is never whole in floats.
    Errors: UserError for a source that is no language model, and for a folder that holds weights already.
    """
    to, path = Path(to), Path(source)
    is_gguf = gguf.is_gguf(path)
    if to.suffix == ".safetensors" or (path.is_file() and not is_gguf):
        if quantize is not None:
            raise UserError(f"{source}: a prompt is not quantised; expected a backbone; leave --quantize out")
        if to.suffix != ".safetensors":
            raise UserError(f"{to}: for a prompt; expected a file name ending in .safetensors")
        prompt = artifact.load_artifact(source)
        artifact.save_prompt(prompt.prompt, to, prompt.metadata)
        return [f"{to}: a prompt of {len(prompt.prompt)} rows"]
    if (path / "adapter_config.json").exists():
        raise UserError(
            f"{source}: an adapter of PEFT; expected a language model; load_backbone(BACKBONE, adapter={source!r})"
        )
    if to.exists() and (not to.is_dir() or any(to.glob("*.safetensors"))):
        raise UserError(f"{to}: holds weights already, or is a file; expected a new folder; use another --to")
    settings, tensors, folder = pretrained.open_source(source)
    hugging_face.weight_parts(settings, tensors, source)  # before anything is written
    texts = gguf_tokenizer.tokenizer_files(gguf.open_gguf(path)) if is_gguf and tokenizer is None else {}
    files = [] if texts else tokenizer_files(tokenizer or folder, required=tokenizer is not None)
    if not files and not texts and settings.vocabulary_rows != 384:  # ByT5 needs none
        raise UserError(f"{source}: has no tokenizer; expected one; add --tokenizer with spiece.model or a hub name")
    with writable(to, folder=True):
        for name, text in texts.items():
            (to / name).write_text(text, encoding="utf-8")
        for file in files:  # a single SentencePiece file gets the hub's name for it
            alone = file.suffix == ".model" and len(files) == 1
            shutil.copy(file, to / ("spiece.model" if alone else file.name))
        form = "a T5" if settings.family == "t5" else f"a {settings.family} model"
        if quantize is None:
            print_of_it = pretrained.write_backbone(settings, tensors, to, dtype)
        else:
            backbone = pretrained.load_backbone(source, dtype or "bfloat16", quantize=quantize)
            print_of_it, form = backbone.fingerprint(), f"{form} in {quantize}"
            quantized_folder.save(backbone.model, to, source, print_of_it)
        write_fast_tokenizer(to)
        kept = {"config.json", "quantized.json", "tokenizer.json", *texts, *(file.name for file in files)}
        kept.add("spiece.model")
        write_checksums(to, (name for name in kept if (to / name).is_file()))
        written = [f"{to}: {form} of {settings.parameters():,} parameters, fingerprint {print_of_it}"]
        checkpoint = t5x.find_checkpoint(source)
        if checkpoint is not None and (opened := t5x.Checkpoint(checkpoint)).prompts:
            metadata = {"backbone": str(to), "fingerprint": print_of_it, "step": str(opened.step)}
            artifact.save_prompt(opened.prompt(), to / artifact.PROMPT_FILE, metadata)
            written.append(f"{to / artifact.PROMPT_FILE}: its prompt")
    return written


def write_fast_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` beside a lone SentencePiece file, which transformers reads only with protobuf.

    A quantised folder, of which transformers reads nothing, stays as it is.
    """
    has = {name: (folder / name).exists() for name in ("tokenizer.json", "spiece.model", "config.json")}
    if has["spiece.model"] and has["config.json"] and not has["tokenizer.json"]:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))


def tokenizer_files(tokenizer: str | Path, required: bool) -> list[Path]:
    """Return a tokenizer's files: one SentencePiece file, those of a folder, or of a hub name."""
    path = Path(tokenizer).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        if not required:
            return []
        path = hugging_face.download(tokenizer, TOKENIZER_FILES, str(tokenizer), "a tokenizer")
    found = sorted(file for pattern in TOKENIZER_FILES for file in path.glob(pattern) if file.is_file())
    if required and not found:
        raise UserError(f"{tokenizer}: no tokenizer in the folder; expected spiece.model or tokenizer.json")
    return found
