"""What lies in a bank's folder: prompts and runs, what they say of themselves, and why one cannot be in a bank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softprompt_jax.assembly import run_of
from softprompt_jax.checkpoints.artifact import CONFIG_FILE, PROMPT_FILE, TRAINED_FILE, Artifact, load_artifact
from softprompt_jax.config import UserError, parse
from softprompt_jax.data.tokenizer import TextSettings
from softprompt_jax.distributed.cloud_files import CHECKPOINTS
from softprompt_jax.methods.base import MethodSettings
from softprompt_jax.tasks import resolve

SUFFIXES = (".safetensors", ".npy")  # of prompt files


def is_bank(folder: Path) -> bool:
    """Tell whether a folder is one of prompts and runs, not a run's."""
    return folder.is_dir() and not (folder / CONFIG_FILE).exists()


def artifacts_in(folder: str | Path) -> dict[Path, Artifact]:
    """Read the prompts and runs of a bank's folder."""
    return {path: load_artifact(path) for path in sorted(Path(folder).iterdir()) if _may_be_prompt(path)}


def check_artifact(name: str, artifact: Artifact) -> None:
    """Refuse what no bank can hold, by its settings alone: nothing is attached, and no device is used.

    Errors: UserError, which calls it by its name.
    """
    if reason := why_unfit(artifact):
        raise UserError(
            f"prompt {name}: {reason}; expected a prompt, a prefix or ia3, of which each text of a batch can have its "
            "own; use the run by itself"
        )


def why_unfit(artifact: Artifact) -> str | None:
    """Say why a bank cannot hold what a run has trained; None: it can."""
    if artifact.rows is not None:
        return None
    run = run_of(artifact)
    if run is None:
        return "holds neither a prompt nor a run's settings"
    if run.own_prompts:
        return "has a prompt for each task, whose files are in its folder prompts/"
    for method in run.methods:
        if type(method).per_example_state is MethodSettings.per_example_state:
            return f"{method.kind} changes the model for every text, so that it cannot be in a bank"
    return None


def _may_be_prompt(path: Path) -> bool:
    """Tell whether a file or folder of a bank's folder is a prompt's; a run counts from its first checkpoint on."""
    if path.suffix in SUFFIXES or any((path / file).exists() for file in (PROMPT_FILE, TRAINED_FILE)):
        return True
    return (path / CONFIG_FILE).exists() and any(step.name.isdigit() for step in path.glob(f"{CHECKPOINTS}/*"))


def about(artifact: Artifact) -> dict[str, Any]:
    """Return what a prompt says of its task: name, label words, and whether answers begin with <extra_id_0>."""
    told: dict[str, Any] = {"task": artifact.metadata.get("task"), "step": artifact.step}
    settings = artifact.settings or {}
    if "text" in settings:
        told["text"] = parse(TextSettings, settings["text"], artifact.source)
    try:
        task = resolve(settings["task"])
    except (KeyError, ValueError, TypeError, UserError):  # such as a task that is known where it was trained only
        return told
    return told | {
        "task": task.name,
        "label_words": tuple(task.words or ()),
        "target_sentinel": bool(settings.get("target_sentinel")),
    }
