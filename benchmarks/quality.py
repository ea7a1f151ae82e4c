"""Prompt tuning beside PEFT's: accuracy and CPU time on one model, with the same texts in the same batches.

    .venv-torch/bin/python benchmarks/quality.py [--seeds 3] [--only movies intents] [--runs runs/quality]

SmolLM2, 20 rows, 200 steps of 8 texts, float32, on movie sentences and on intents. Ours are the cells `prompt` (default
settings) and `prompt_tuned` (after `softprompt tune`) of `methods_smollm2.yaml`; `methods.py` trains those that are
missing. PEFT's PROMPT_TUNING trains on the same tokens in transformers' model, with the settings in `SIDES`. Both
answer with the likelier label word, EOS included; PEFT's answers are computed by PEFT. Each run leaves one file, in
`results/quality/` or `results/methods/smollm2/`; what is there is done. `docs/build.py` writes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import machine
import methods
import numpy as np

RESULTS = machine.ROOT / "benchmarks" / "results"
OURS = ("prompt", "prompt_tuned")  # methods of methods_smollm2.yaml
TEXTS = {  # in the form of the one in PEFT's guide
    "movies": "Classify if the review is positive or negative.\n",
    "intents": "Classify if the message is refund, delivery, cancel, address, broken or thanks.\n",
}
SIDES: dict[str, dict[str, Any]] = {
    # PEFT's default start (RANDOM), with the default training settings of PEFT's own comparison of methods
    "peft_default": {"init": "RANDOM", "learning_rate": 1e-4, "weight_decay": 0.1, "decay": "cosine", "clip": 1.0},
    # the best prompt tuning of that comparison
    "peft_vocabulary": {
        "init": "SAMPLE_VOCAB",
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "decay": "cosine",
        "clip": 1.0,
    },
    # PEFT's guide to prompt-based methods
    "peft_guide": {"init": "TEXT", "learning_rate": 3e-2, "weight_decay": 0.01, "decay": "linear", "clip": None},
}


def main() -> None:
    """Measure what is missing, the first seed of all first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(TEXTS), default=list(TEXTS))
    parser.add_argument("--sides", nargs="+", choices=[*SIDES, *OURS], default=[*SIDES, *OURS])
    parser.add_argument("--steps", type=int, help="default: what methods_smollm2.yaml says")
    parser.add_argument("--runs", type=Path, default=machine.ROOT / "runs" / "quality")
    parser.add_argument("--cells", type=Path, default=methods.SMOLLM2, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=4, metavar=("SIDE", "TASK", "SEED", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        side, task, seed, file = arguments.worker
        measured = peft_run(side, task, run_of(arguments, task, int(seed)))
        part = Path(f"{file}.part")  # renamed, so that a killed command leaves no half file
        part.write_text(json.dumps(measured | machine.describe(), indent=1) + "\n")
        part.rename(file)
        return
    failed = [name for seed in range(arguments.seeds) for name in measure(arguments, seed)]
    raise SystemExit(f"failed: {', '.join(failed)}; the same command goes on" if failed else 0)


def measure(arguments: argparse.Namespace, seed: int) -> Iterator[str]:
    """Measure what is missing of a seed; yield what failed."""
    asked = [] if arguments.steps is None else ["--steps", str(arguments.steps)]
    for side in arguments.sides:
        for task in arguments.only:
            if side in OURS:
                file = arguments.results / "methods" / "smollm2" / f"{task}-{side}-{seed}.json"
                command = ["methods.py", "--backbone", "smollm2", "--only", side, "--tasks", task]
                command += ["--seeds", str(seed + 1), "--results", str(arguments.results / "methods")]
            else:
                file = arguments.results / "quality" / f"{task}-{side}-{seed}.json"
                command = ["quality.py", "--worker", side, task, str(seed), str(file)]
            file.parent.mkdir(parents=True, exist_ok=True)
            command += [*asked, "--cells", str(arguments.cells), "--runs", str(arguments.runs)]
            if not file.exists():
                subprocess.run([sys.executable, str(methods.HERE / command[0]), *command[1:]], check=False)
            if not file.exists():
                yield file.stem
            else:
                found = json.loads(file.read_text())
                print(f"{file.stem}: {found['accuracy']:.1f}, {found['run_cpu_s'] / 60:.1f} CPU minutes", flush=True)


def run_of(arguments: argparse.Namespace, task: str, seed: int) -> Any:
    """Return our run with default settings: its model, texts, order of batches and steps are PEFT's too."""
    from softprompt_jax import load_run
    from softprompt_jax.checkpoints.backbone import find_folder

    chosen = argparse.Namespace(**vars(arguments) | {"only": ["prompt"], "tasks": [task], "seeds": seed + 1})
    *_, (_, config, settings) = methods.cells(chosen)
    run = load_run(config, methods.changes_of(settings))
    return run.model_copy(update={"backbone": str(find_folder(run.backbone))})


def peft_run(side: str, task: str, run: Any) -> dict[str, Any]:
    """Train PEFT's prompt on a run's batches; return what `methods.py` measures of ours."""
    import torch
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_scheduler

    from softprompt_jax.assembly import abstract_backbone_of, assemble
    from softprompt_jax.cli.allocator import keep_freed_memory
    from softprompt_jax.data.batches import TrainBatches
    from softprompt_jax.training.run_data import TaskSplits

    warnings.filterwarnings("ignore")
    keep_freed_memory()  # torch, too, is faster with it
    torch.manual_seed(run.seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    assembly, how = assemble(run, abstract_backbone_of(run)), SIDES[side]
    splits = TaskSplits(run.tasks[0], run, assembly, 0)
    train, test = splits.tokens["train"], splits.tokens["test"].first(run.result_examples)
    order = TrainBatches(train, run.batch_size, run.seed, assembly.layout, max_shapes=run.max_compiled_shapes)
    backbone = AutoModelForCausalLM.from_pretrained(run.backbone, dtype=torch.float32, attn_implementation="sdpa")
    backbone.config.use_cache = False
    text = (
        {"prompt_tuning_init_text": TEXTS[task], "tokenizer_name_or_path": run.backbone}
        if how["init"] == "TEXT"
        else {}
    )
    rows = run.methods[0].length
    config = PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=rows, prompt_tuning_init=how["init"], **text)
    model = get_peft_model(backbone, config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=how["learning_rate"], weight_decay=how["weight_decay"])
    scheduler = get_scheduler(how["decay"], optimizer, num_warmup_steps=0, num_training_steps=run.steps)
    words = [np.asarray(ids, np.int64) for ids in assembly.tokenizer.target_batch(run.tasks[0].choices)]
    texts = [test.input(number) for number in range(len(test))]
    targets = [example.target for example in splits.examples["test"][: len(test)]]

    def accuracy() -> float:
        chosen = likeliest(model, texts, words)
        return 100 * float(np.mean([run.tasks[0].choices[n] == t for n, t in zip(chosen, targets, strict=True)]))

    model.eval()  # no dropout; gradients are unaffected
    untrained, times, losses = accuracy(), [machine.cpu_seconds()], []
    for step in range(run.steps):
        ids = np.concatenate(order.row_ids(step))
        loss = model(**padded([train.input(i) for i in ids], [train.target(i) for i in ids])).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if how["clip"] is not None:
            torch.nn.utils.clip_grad_norm_(weights, how["clip"])
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
        if (step + 1) % methods.INTERVAL == 0:
            times.append(machine.cpu_seconds())
            print(f"{task} {side} {run.seed}: step {step + 1} of {run.steps}, loss {losses[-1]:.3f}", flush=True)
    spent = np.diff(times) / methods.INTERVAL
    return {
        "cell": f"{task}-{side}-{run.seed}",
        "accuracy": accuracy(),
        "untrained": untrained,
        "trainable": sum(weight.numel() for weight in weights),
        "rows": rows,
        "step_cpu_s": statistics.median(spent.tolist()) if len(spent) else None,
        "run_cpu_s": machine.cpu_seconds(),
        "peak_gib": machine.peak_memory_gib(),
        "steps": run.steps,
        "losses": {"first": losses[0], "last 10": statistics.mean(losses[-10:])},
        "settings": how,
    }


def padded(inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return a batch as transformers wants it, padded to its longest row; only targets count in the loss."""
    import torch

    whole = [np.concatenate(pair) for pair in zip(inputs, targets, strict=True)]
    ids = np.zeros((len(whole), max(map(len, whole))), np.int64)
    labels, mask = np.full_like(ids, -100), np.zeros_like(ids)
    for row, (text, target) in enumerate(zip(inputs, targets, strict=True)):
        ids[row, : len(whole[row])], mask[row, : len(whole[row])] = whole[row], 1
        labels[row, len(text) : len(whole[row])] = target
    return {
        name: torch.from_numpy(value)
        for name, value in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
    }


def likeliest(model: Any, texts: Sequence[np.ndarray], words: Sequence[np.ndarray], batch_size: int = 32) -> list[int]:
    """Return which word is likeliest behind each text, by the sum of its tokens' log-probabilities."""
    import torch

    order, scores = np.argsort([len(text) for text in texts]), np.zeros((len(texts), len(words)))
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        for column, word in enumerate(words):
            batch = padded([texts[n] for n in numbers], [word] * len(numbers))
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = model(**batch).logits[:, -labels.shape[1] :][:, :-1]  # those of the prompt's rows come first
            wanted = labels[:, 1:]
            log_p = -torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="none")
            scores[numbers, column] = log_p.reshape(wanted.shape).sum(1).numpy()
    return scores.argmax(1).tolist()


if __name__ == "__main__":
    main()
