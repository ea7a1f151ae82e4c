"""What quantising costs in quality, on the backbone that ships here: logits, and prompts trained on it.

    python benchmarks/quantised.py [--seeds 1] [--steps 500] [--runs runs/quantised]

Against bfloat16: the relative error of the logits of the validation split's first answers, how often the most likely
token is another, the cosine of the prompt's gradient, and the test accuracy of prompts trained on each form. Runs what
is missing, then writes `benchmarks/results/quantised.json`. Two to three minutes a run on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np

from softprompt_jax import load_run, train
from softprompt_jax.checkpoints.backbone import load_backbone
from softprompt_jax.cli.allocator import keep_freed_memory
from softprompt_jax.data.task import load
from softprompt_jax.data.tokenizer import load_tokenizer
from softprompt_jax.methods import split
from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.optim.losses import cross_entropy
from softprompt_jax.progress import Reporter
from softprompt_jax.tasks import resolve

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quantised.json"
FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "nf4": {"dtype": "bfloat16", "quantize": "nf4"},
}
TASK, ROWS, LENGTH = "sentiment_movie", 128, 20


def forward(form: dict[str, Any], batch: dict[str, jax.Array], prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of the real target tokens and the prompt's gradient in one form of the backbone."""
    model = load_backbone(dtype=form["dtype"], quantize=form.get("quantize")).model
    attach_rows(model, prompt)
    parts = split(model)

    @jax.jit
    def compute(trainable: Any, frozen: Any) -> Any:
        def loss(trainable: Any) -> Any:
            logits = parts.merge(trainable, jax.lax.stop_gradient(frozen))(batch)
            return cross_entropy(logits, batch["decoder_targets"])[0], logits

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    (_, logits), gradient = compute(parts.trainable, parts.frozen)
    return np.asarray(logits)[np.asarray(batch["decoder_targets"]) != 0], np.ravel(jax.tree.leaves(gradient)[0])


def rows(length: int = 64, targets: int = 8) -> tuple[dict[str, jax.Array], np.ndarray]:
    """Return validation sentences behind a prompt of rows of the vocabulary, and the prompt."""
    backbone = load_backbone()
    tokenizer, vocabulary = load_tokenizer(backbone.folder), backbone.settings.vocabulary_rows
    prompt = np.asarray(backbone.model.embedding[100 : 100 + LENGTH])

    def padded(ids: list[int], width: int) -> list[int]:
        ids = [*ids[: width - 1], 1]
        return ids + [0] * (width - len(ids))

    examples = load(resolve(TASK), "validation")[:ROWS]
    around = list(range(vocabulary, vocabulary + LENGTH))
    inputs = np.asarray([around + padded(tokenizer.encode(e.input), length) for e in examples], np.int32)
    answers = np.asarray([padded(tokenizer.encode(e.target), targets) for e in examples], np.int32)
    shifted = np.pad(answers[:, :-1], ((0, 0), (1, 0)))
    batch = {"encoder_tokens": inputs, "decoder_inputs": shifted, "decoder_targets": answers}
    return {name: jnp.asarray(array) for name, array in batch.items()}, prompt


def main() -> None:
    """Measure every form and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quantised")
    arguments = parser.parse_args()
    keep_freed_memory()
    batch, prompt = rows()
    reference, direction = forward(FORMS["bfloat16"], batch, prompt)
    found: dict[str, dict[str, Any]] = {}
    for name, form in FORMS.items():
        logits, gradient = forward(form, batch, prompt)
        cosine = gradient @ direction / np.linalg.norm(gradient) / np.linalg.norm(direction)
        found[name] = {
            "logit_error": round(float(np.linalg.norm(logits - reference) / np.linalg.norm(reference)), 4),
            "other_token": round(float(np.mean(logits.argmax(-1) != reference.argmax(-1))), 4),
            "gradient_cosine": round(float(cosine), 4),
        }
        print(name, found[name], flush=True)
    for name, form in FORMS.items() if arguments.seeds else ():
        scores = []
        for seed in range(arguments.seeds):
            changes = [f"{key}={value}" for key, value in form.items()]
            run = load_run(ROOT / "configs" / "quickstart.yaml", [f"steps={arguments.steps}", f"seed={seed}", *changes])
            result = train(run, arguments.runs / f"{name}-{arguments.steps}-{seed}", Reporter(quiet=True))
            scores.append(100 * result["test"]["accuracy"])
            print(f"{name}  seed {seed}: {scores[-1]:.1f}", flush=True)
        found[name] |= {
            "test_accuracy": round(statistics.mean(scores), 1),
            "test_accuracy_sd": round(statistics.stdev(scores), 1) if len(scores) > 1 else None,
        }
    answer = {
        "about": machine.describe(),
        "task": TASK,
        "rows": ROWS,
        "seeds": arguments.seeds,
        "steps": arguments.steps,
        "forms": found,
    }
    RESULTS.write_text(json.dumps(answer, indent=1) + "\n")


if __name__ == "__main__":
    main()
