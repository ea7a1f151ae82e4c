"""Publish a finished run on the hub: its files, an adapter for PEFT where there is one, and a model card."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from softprompt_jax import config
from softprompt_jax.checkpoints import artifact
from softprompt_jax.checkpoints.peft import TENSOR_FILE
from softprompt_jax.config import UserError
from softprompt_jax.export.export import export
from softprompt_jax.models.presets import SOURCES
from softprompt_jax.run import Run
from softprompt_jax.trees import flatten

FOLDER = "hub"  # within the run's


def push(source: str | Path, repository: str, dry_run: bool = False) -> Path:
    """Write a finished run's files and card to RUN/hub, and upload them unless it is a dry run.

    A card that is there already, of this repository, stays as it is: it may have been changed by hand.
    Errors: UserError for a run that is not finished, a name that is none, and a hub that refuses.
    """
    source = Path(source)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(f"{repository}: not a hub name; expected OWNER/NAME")
    if not (source / "config.yaml").exists() or not (source / "result.json").exists():
        raise UserError(f"{source}: no finished run; expected one; finish it with the same command")
    run = config.parse(Run, config.read(source / "config.yaml"), str(source / "config.yaml"))
    if run.own_prompts:
        raise UserError(f"{source}: has a prompt for each task; expected a run with one; push a run of each task")
    result = json.loads((source / "result.json").read_text(encoding="utf-8"))
    before, folder = source / FOLDER, source / f"{FOLDER}.partial"
    written = before / "README.md"
    kept = written.read_text(encoding="utf-8") if written.exists() else ""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("result.json", artifact.PROMPT_FILE):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    (folder / "config.yaml").write_text(config.to_yaml(_public(run.model_dump(mode="json"))), encoding="utf-8")
    whole = any(method.trains_backbone for method in run.methods)
    reason = None
    try:
        export(source, "hf" if whole else "peft", folder)
    except UserError as error:
        reason = str(error)
    if not whole and not (folder / artifact.PROMPT_FILE).exists():
        shutil.copy(source / artifact.TRAINED_FILE, folder / artifact.TRAINED_FILE)
    _shorten_paths(folder)
    text = card(run, result, repository, {path.name for path in folder.iterdir()}, reason)
    ours = re.search(rf"(?<![\w./-]){re.escape(repository)}(?![\w./-])", kept)
    (folder / "README.md").write_text(kept if ours else text, encoding="utf-8")
    shutil.rmtree(before, ignore_errors=True)  # only now: what is there may have been changed by hand
    folder = folder.rename(before)
    if not dry_run:
        _upload(folder, repository)
    return folder


def card(run: Run, result: dict[str, Any], repository: str, files: set[str], reason: str | None) -> str:
    """Write the model card: what it is for, scores, settings, how to load it here and in PEFT."""
    backbone = run.backbone if isinstance(run.backbone, str) else "a T5 with random weights"
    public = _public(backbone)
    name = repository.split("/")[1]
    kinds = ", ".join(method.kind for method in run.methods)
    front: dict[str, Any] = {
        "library_name": "peft" if "adapter_config.json" in files else "softprompt_jax",
        "pipeline_tag": "text2text-generation",
        "tags": ["t5", "softprompt_jax", *[method.kind for method in run.methods]],
    }
    if backbone in SOURCES:
        front["base_model"] = backbone
    lines = ["---", config.to_yaml(front).strip(), "---", "", f"# {name}", ""]
    lines += [f"{kinds.capitalize()} for a frozen T5 ({public}), trained with softprompt_jax.", ""]
    for task in run.tasks:
        lines += ["## Task", "", f"{task.name}. The text that the model reads:", "", f"    {task.input}", ""]
        lines += [f"Answers: {', '.join(task.words)}." if task.words else "Answers: free text.", ""]
    lines += ["## Scores", "", "| split | metric | value |", "|---|---|---|"]
    for split in ("validation", "test"):
        for metric, value in flatten(result.get(split) or {}).items():  # of a mixture: by task
            lines.append(f"| {split} | {metric} | {value:.4f} |")
    baselines = result.get("baselines")
    if baselines:
        for metric, value in flatten({"majority class": baselines.get("majority")}).items():
            lines += [] if value is None else [f"| {baselines['split']} | {metric} | {value:.4f} |"]
        for metric, value in flatten(baselines.get("untrained") or {}).items():
            lines.append(f"| {baselines['split']} | {metric} before training | {value:.4f} |")
    lines += ["", f"One run, seed {run.seed}; step {result.get('best_step')} of {result.get('steps')}.", ""]
    before = all(getattr(method, "place", "before") == "before" for method in run.methods)
    lines += ["## Use", "", *_usage(repository, public, files, before), ""]
    if reason is not None:
        lines += [f"No form for PEFT: {reason.partition(': ')[2] or reason}", ""]
    defaults = config.parse(Run, {"task": run.task}, "defaults").model_dump(mode="json")
    settings = {key: value for key, value in run.model_dump(mode="json").items() if value != defaults[key]}
    settings = {"task": defaults["task"], "methods": defaults["methods"]} | settings
    lines += ["## Settings", "", "Only what differs from the defaults; `config.yaml` has all.", "", "```yaml"]
    lines += [config.to_yaml(_public(settings)).strip(), "```", ""]
    return "\n".join(lines)


def _shorten_paths(folder: Path) -> None:
    """Shorten the paths in what the files of prompts and adapters say of themselves."""
    for name in (artifact.PROMPT_FILE, artifact.TRAINED_FILE, TENSOR_FILE):
        if (path := folder / name).exists():
            arrays, metadata = artifact.read_tensors(path)
            if "settings" in metadata:
                metadata["settings"] = json.dumps(_public(json.loads(metadata["settings"])))
            artifact.write_tensors(arrays, path, _public(metadata))
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        artifact.dump(_public(json.loads(adapter.read_text(encoding="utf-8"))), adapter)


def _public(value: Any) -> Any:
    """Shorten paths of this machine to their last name: they tell others nothing."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _usage(repository: str, backbone: str, files: set[str], before: bool) -> list[str]:
    fetch = ["from huggingface_hub import snapshot_download", f'folder = snapshot_download("{repository}")']
    if "config.json" in files:
        here = ["from softprompt_jax import generate, load_backbone", "", f'model = load_backbone("{repository}")']
        here += ['generate(model, ["..."])']
    elif artifact.PROMPT_FILE in files and not before:
        here = ["from softprompt_jax import load_predictor", *fetch, ""]
        here += [f'load_predictor(folder, backbone="{backbone}").texts(["..."])']
    elif artifact.PROMPT_FILE in files:
        here = ["from softprompt_jax import generate, load_backbone, load_prompt", *fetch, ""]
        here += [f'generate(load_backbone("{backbone}"), ["..."], load_prompt(folder))']
    elif "adapter_config.json" in files:
        here = ["from softprompt_jax import generate, load_backbone", *fetch, ""]
        here += [f'generate(load_backbone("{backbone}", adapter=folder), ["..."])']
    else:
        here = [f"# train again: softprompt train config.yaml, or download the files of {repository}"]
    lines = ["```python", *here, "```"]
    if "adapter_config.json" in files:
        lines += ["", "In PEFT:", "", "```python", "from peft import PeftModel"]
        lines += ["from transformers import AutoModelForSeq2SeqLM", ""]
        lines += [f'model = AutoModelForSeq2SeqLM.from_pretrained("{backbone}")']
        lines += [f'model = PeftModel.from_pretrained(model, "{repository}")', "```"]
    return lines


def _upload(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # the hub's own errors, and those of whatever carries its requests
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{repository}: the hub did not take it ({reason}); expected a login and a right to write there; "
            f"the files are in {folder}"
        ) from None
