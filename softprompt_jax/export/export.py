"""Write what a run has trained in formats that other programs read."""

from __future__ import annotations

import shutil
import string
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from softprompt_jax.assembly import assemble_trained, own_mesh, run_of
from softprompt_jax.checkpoints.artifact import CONFIG_FILE, TRAINED_FILE, Artifact, dump, load_artifact, save_prompt
from softprompt_jax.checkpoints.backbone import save_backbone
from softprompt_jax.checkpoints.peft import save_adapter
from softprompt_jax.config import UserError, to_yaml
from softprompt_jax.distributed import cloud_files
from softprompt_jax.distributed.mesh import AnyMesh, entered, make_mesh
from softprompt_jax.export.base_model import BaseModel, base_model
from softprompt_jax.export.import_source import tokenizer_files, write_fast_tokenizer
from softprompt_jax.export.stablehlo import write_program
from softprompt_jax.files import read_object, writable, write_checksums, written_whole
from softprompt_jax.inference.predictor import load_predictor
from softprompt_jax.methods.wrap import merged

CARD_FILE = "README.md"


def export(
    source: str | Path,
    format: str,
    to: str | Path,
    max_tokens: int | None = None,
    prompt_input: bool = False,
    trust: bool = False,
    mesh: AnyMesh | None = None,
) -> None:
    """Write a tuned model (`hf`) or an adapter (`peft`) to a folder, prompt rows (`npy`, `safetensors`) to a file.

    `safetensors` of a run that has no prompt is all that it trained, under the paths of the model. `stablehlo` is a
    folder with a program (see stablehlo.py), of a run or a prompt file; `max_tokens` and `prompt_input` are about it.
    `embeds` is a folder with the rows as a tensor for servers that take embeddings. Folders of `hf`, `peft` and
    `embeds` have a README.md that names the base model and shows how to load them; one that is there stays.
    Of a run that has not finished, the best checkpoint is exported, or else the latest. All may be on gs:// or s3://.
    `mesh`: the devices that hold the weights meanwhile, by default as in the run; they are written one by one.
    """
    devices = make_mesh(mesh)  # before anything is read
    if Path(to).suffix != f".{format}" and format in ("npy", "safetensors"):
        raise UserError(f"{to}: ends in {Path(to).suffix!r}; expected a file name ending in .{format}")
    if format != "stablehlo" and (max_tokens is not None or prompt_input):
        raise UserError(f"export: --max-tokens and --prompt-input with {format}; expected them with stablehlo only")
    with cloud_files.writing(to) as local:
        if format == "stablehlo":
            predictor = load_predictor(source, trust=trust, mesh=mesh)
            folder = Path(predictor.tokenizer.source)
            folder = folder if folder.is_dir() else folder.parent
            write_program(predictor.model, folder, local, max_tokens or predictor.max_tokens, prompt_input)
        elif format == "embeds":
            _export_embeds(load_artifact(source), local)
        elif format in ("hf", "peft"):
            artifact = load_artifact(source)
            with entered(make_mesh(None, own_mesh([artifact])) if mesh is None else devices):
                _export_model(artifact, format, local, trust)
        else:
            _export_arrays(load_artifact(source), format, local)


def _export_model(artifact: Artifact, format: str, to: Path, trust: bool) -> None:
    run = None if artifact.folder is None else run_of(artifact)
    if run is None:
        raise UserError(f"{artifact.source}: no {CONFIG_FILE}; expected a run folder")
    assembly = assemble_trained(artifact, run, trust=trust)
    base = base_model(assembly.identity)
    if format == "peft":
        save_adapter(assembly.model, run.methods, to, base.source, {"backbone": assembly.identity})
        kinds = ", ".join(method.kind for method in run.methods)
        use = template("use_in_peft.md", **peft_words(to.name, base, assembly.model.encoder is None))
        _write_card(to, {"library_name": "peft", "base_model": base.name}, f"Adapter for PEFT: {kinds}", base, use)
        return
    if assembly.model.prompt is not None:
        raise UserError(f"{artifact.source}: has a prompt, which no Hugging Face model holds; export it as peft or npy")
    if sharded := next(to.glob("*.index.json"), None):
        raise UserError(f"{sharded}: of weights in several files, which would be read first; use another --to")
    folder, rows = assembly.tokenizer_folder, assembly.model.settings.vocabulary_rows
    tokenizer = tokenizer_files(folder, required=not folder.is_dir() and rows != 384)  # ByT5 needs none
    # As it was trained: bfloat16 would swallow small changes.
    save_backbone(merged(assembly.model), to, "float32")
    _keep_other_settings(folder / "config.json", to / "config.json")
    for path in tokenizer:
        shutil.copy(path, to / path.name)
    copied = {path.name for path in tokenizer}
    if "tokenizer.json" not in copied:
        (to / "tokenizer.json").unlink(missing_ok=True)  # of an export before this one
    write_fast_tokenizer(to)
    kept = sorted({"config.json", "tokenizer.json", *copied})
    write_checksums(to, (name for name in kept if (to / name).is_file()))
    use = template("use_in_transformers.md", repository=to.name, auto=auto_class(assembly.model.encoder is None))
    front = {"library_name": "transformers", "base_model": base.name}
    _write_card(to, front, f"Tuned model: {', '.join(method.kind for method in run.methods)}", base, use)


def _keep_other_settings(original: Path, written: Path) -> None:
    """Add to a model's `config.json` what its backbone's says beside the model, such as the longest text and BOS."""
    if not original.is_file():
        return
    before, after = (read_object(path, "a model's config.json") for path in (original, written))
    if before.get("model_type") == after["model_type"]:
        ours = {"torch_dtype", "quantization_config", "_name_or_path"}
        dump({key: value for key, value in before.items() if key not in ours} | after, written)


def template(page: str, **words: str) -> str:
    """Fill a template of this folder."""
    return string.Template((Path(__file__).parent / page).read_text(encoding="utf-8")).substitute(words).strip()


def auto_class(causal: bool) -> str:
    """Return transformers' class for such models, without its Auto."""
    return "ModelForCausalLM" if causal else "ModelForSeq2SeqLM"


def peft_words(repository: str, base: BaseModel, causal: bool) -> dict[str, str]:
    """Return the words of `use_in_peft.md`."""
    kind = auto_class(causal)
    if base.name is not None:
        lines = [f"from peft import AutoPeft{kind}", "", f'model = AutoPeft{kind}.from_pretrained("{repository}")']
    else:
        folder = "backbone" if base.source is None else Path(base.source).name
        lines = ["from peft import PeftModel", f"from transformers import Auto{kind}", ""]
        lines += [f'model = Auto{kind}.from_pretrained("{folder}")']
        lines += [f'model = PeftModel.from_pretrained(model, "{repository}")']
    return {"code": "\n".join(lines)}


def _write_card(folder: Path, front: dict[str, str | None], title: str, base: BaseModel, use: str) -> None:
    if (folder / CARD_FILE).exists():  # it may have been written by hand
        return
    text = to_yaml({name: value for name, value in front.items() if value is not None}).strip()
    card = template("exported.md", front=text, title=title, base=base.sentence, use=use)
    (folder / CARD_FILE).write_text(f"{card}\n", encoding="utf-8")


def _export_embeds(artifact: Artifact, to: Path) -> None:
    if artifact.place != "before":
        raise UserError(
            f"{artifact.source}: its rows stand {artifact.place!r}; expected rows before the text; keep the run folder"
        )
    rows = np.ascontiguousarray(artifact.prompt, np.float32)
    backbone = artifact.metadata.get("backbone")
    said = "The file does not say on which model." if backbone is None else base_model(backbone).sentence
    note = template("embeds.md", rows=str(len(rows)), width=str(rows.shape[1]), base=said)
    with writable(to, folder=True):
        save_file({"prompt_embeds": rows}, to / "prompt_embeds.safetensors")
        (to / CARD_FILE).write_text(f"{note}\n", encoding="utf-8")


def _export_arrays(artifact: Artifact, format: str, to: Path) -> None:
    if format == "npy" and artifact.rows is not None and artifact.place != "before":
        raise UserError(
            f"{artifact.source}: its rows do not all stand before the text ({artifact.place}), which .npy cannot say; "
            "expected a format that can; export it as safetensors"
        )
    finished = artifact.folder if artifact.step is None else None
    if format == "safetensors" and artifact.rows is None and finished is not None:  # no prompt: all, as it is
        shutil.copy(finished / TRAINED_FILE, to)
    elif format == "safetensors":
        save_prompt(artifact.prompt, to, artifact.metadata)
    else:
        with written_whole(to) as partial, partial.open("wb") as file:  # given a name, NumPy would change it
            np.save(file, artifact.prompt)
