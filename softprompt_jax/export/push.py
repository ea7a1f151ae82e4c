"""Publish a finished run on the hub: its files, an adapter for PEFT where there is one, and a model card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic

from softprompt_jax import config
from softprompt_jax.assembly import abstract_backbone_of, run_of
from softprompt_jax.checkpoints import artifact
from softprompt_jax.checkpoints.packaged import COPIES
from softprompt_jax.checkpoints.peft import TENSOR_FILE
from softprompt_jax.config import UserError, first_line
from softprompt_jax.export.base_model import BaseModel, base_model
from softprompt_jax.export.export import auto_class, export, peft_words, template
from softprompt_jax.files import writable
from softprompt_jax.run import Run
from softprompt_jax.tasks import Task, short
from softprompt_jax.training.run_folder import read_result
from softprompt_jax.trees import flatten

FOLDER = "hub"  # within the run's


def push(source: str | Path, repository: str, dry_run: bool = False, public: bool = False, trust: bool = False) -> Path:
    """Write a finished run's files and card to RUN/hub, and upload them unless it is a dry run.

    A new repository is private unless `public`. A card that is there already, of this repository, stays as it is: it
    may have been changed by hand.
    Errors: UserError for a run that is not finished, a name that is none, and a hub that refuses.
    """
    source = Path(source)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(f"{repository}: not a hub name; expected OWNER/NAME")
    result = read_result(source)
    run = None if result is None else run_of(artifact.load_artifact(source))
    if run is None or result is None:
        raise UserError(f"{source}: no finished run; expected one; finish it with the same command")
    if run.own_prompts:
        raise UserError(f"{source}: has a prompt for each task; expected a run with one; push a run of each task")
    before, folder = source / FOLDER, source / f"{FOLDER}.partial"
    written = before / "README.md"
    kept = written.read_text(encoding="utf-8") if written.exists() else ""
    shutil.rmtree(folder, ignore_errors=True)
    with writable(folder, folder=True):
        for name in ("result.json", artifact.PROMPT_FILE):
            if (source / name).exists():
                shutil.copy(source / name, folder / name)
        settings = config.to_yaml(_without_paths(run.model_dump(mode="json")))
        (folder / "config.yaml").write_text(settings, encoding="utf-8")
        whole = any(method.trains_backbone for method in run.methods)
        reason = None
        try:
            export(source, "hf" if whole else "peft", folder, trust=trust)
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
        _upload(folder, repository, public)
    return folder


def card(run: Run, result: dict[str, Any], repository: str, files: set[str], reason: str | None) -> str:
    """Fill in the model card `card.md`: what it is for, scores, how to load it here and in PEFT, settings.

    `files`: the names of what is published; `reason`: why there is no adapter among them.
    """
    frozen = abstract_backbone_of(run)
    backbone = _without_paths(run.backbone) if isinstance(run.backbone, str) else "scratch"
    base = base_model(run.backbone if isinstance(run.backbone, str) else "scratch")
    kinds = [method.kind for method in run.methods]
    front: dict[str, Any] = {
        "library_name": "peft" if "adapter_config.json" in files else "softprompt_jax",
        "pipeline_tag": "text-generation" if frozen.text_format.causal else "text2text-generation",
        "tags": [frozen.settings.family, "softprompt_jax", *kinds],
    }
    if base.name is not None:
        front["base_model"] = base.name
    tasks = [
        f"## Task\n\n{task.name}. The text that the model reads:\n\n    {task.input}\n\n"
        f"Answers: {', '.join(task.words or ['free text'])}.\n"
        for task in run.tasks
    ]
    use = _use(repository, backbone, base, files, frozen.text_format.causal)
    return template(
        "card.md",
        front=config.to_yaml(front).strip(),
        name=repository.split("/")[1],
        kinds=", ".join(kinds).capitalize(),
        base=base.sentence,
        tasks="\n".join(tasks),
        scores="\n".join(f"| {split} | {metric} | {value:.4f} |" for split, metric, value in _scores(result)),
        how=f"One run, seed {run.seed}; step {result.get('best_step')} of {result.get('steps')}.",
        use=use if reason is None else f"{use}\n\nNo form for PEFT: {reason.partition(': ')[2] or reason}",
        settings=config.to_yaml(_without_paths(_changed_settings(run))).strip(),
    )


def _scores(result: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield (split, metric, value) of the trained model and of the baselines; a count of examples is no score."""
    for split in ("validation", "test"):
        for metric, value in flatten(result.get(split) or {}).items():  # of a mixture: by task
            if metric.rpartition(".")[2] != "count":
                yield split, metric, value
    baselines = result.get("baselines") or {}
    for name, suffix in (("majority", ""), ("untrained", " before training")):
        found = baselines.get(name)
        for metric, value in flatten(found if isinstance(found, dict) else {"majority class": found}).items():
            if value is not None and metric.rpartition(".")[2] != "count":
                yield baselines["split"], f"{metric}{suffix}", value


def _changed_settings(run: Run) -> dict[str, Any]:
    """Return the task, the methods, and all else in which a run differs from the defaults with these."""
    chosen: dict[str, Any] = {"task": run.task, "methods": run.methods}
    defaults = config.parse(Run, chosen, "defaults").model_dump(mode="json")
    changed = {key: value for key, value in run.model_dump(mode="json").items() if value != defaults[key]}
    if isinstance(run.task, Task):
        chosen["task"] = short(run.task)  # the name of a named task
    return {key: _changed(value) for key, value in chosen.items()} | changed


def _changed(value: Any) -> Any:
    """Return what differs from the defaults of nested settings; a `kind` stays, since it says which they are."""
    if isinstance(value, pydantic.BaseModel):
        fields = type(value).model_fields
        found = {name: getattr(value, name) for name in fields}
        return {
            name: _changed(item)
            for name, item in found.items()
            if name == "kind" or item != fields[name].get_default(call_default_factory=True)
        }
    if isinstance(value, list | tuple):
        return [_changed(item) for item in value]
    return {key: _changed(item) for key, item in value.items()} if isinstance(value, dict) else value


def _shorten_paths(folder: Path) -> None:
    """Shorten the paths in what the files of prompts and adapters say of themselves."""
    for name in (artifact.PROMPT_FILE, artifact.TRAINED_FILE, TENSOR_FILE):
        if (path := folder / name).exists():
            arrays, metadata = artifact.read_tensors(path)
            if "settings" in metadata:
                metadata["settings"] = json.dumps(_without_paths(json.loads(metadata["settings"])))
            artifact.write_tensors(arrays, path, _without_paths(metadata))
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        artifact.dump(_without_paths(json.loads(adapter.read_text(encoding="utf-8"))), adapter)


def _without_paths(value: Any) -> Any:
    """Shorten paths of this machine to their last name: they tell others nothing."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _use(repository: str, backbone: str, base: BaseModel, files: set[str], causal: bool) -> str:
    """Return Markdown with the code that loads what is published, here and in PEFT or transformers."""
    if backbone == "scratch":
        given = ", trust=True"
    elif backbone in ("embedded", *COPIES) or backbone == base.name:  # found by the run's own settings
        given = ""
    else:
        given = f', backbone="{base.name or Path(backbone).name}"'
    if "config.json" in files:
        ours = template("use_model.md", repository=repository)
        theirs = template("use_in_transformers.md", repository=repository, auto=auto_class(causal))
        return f"{ours}\n\nIn transformers:\n\n{theirs}"
    pages = [template("use_run.md", repository=repository, given=given)]
    if "adapter_config.json" in files:
        pages.append(template("use_in_peft.md", **peft_words(repository, base, causal)))
    return "\n\n".join(pages)


def _upload(folder: Path, repository: str, public: bool) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # the hub's own errors, and those of whatever carries its requests
        raise UserError(
            f"{repository}: the hub did not take it ({first_line(error)}); expected a login and a right to write "
            f"there; the files are in {folder}"
        ) from None
