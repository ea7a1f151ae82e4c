"""Examples in front of every request beside 20 rows and a prefix of 50 keys that stand for them, on SmolLM2.

    python benchmarks/compress.py [--only movies intents] [--steps 300] [--runs runs/compress]

The context holds examples of the train split in turns of the labels, up to `--tokens`; every row is an input. SmolLM2
learns next to nothing from examples of intents (20 to 31% on validation, 36% without); of movies three contexts were
looked at (74, 76 and 85% on 72 rows of validation, 76% without), of which the last is taken.
Measured on the test split: accuracy without a context, with it, and with what was trained in its place; tokens that the
model reads for a request, and the time of one request at a time. `results/compress.json` has a row for each task and
form; what is there is kept, and a killed training goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import machine
import yaml

RESULTS = Path(__file__).resolve().parent / "results" / "compress.json"
FORMS: dict[str, list[str]] = {
    "20 rows": [],
    "prefix of 50 keys": ["methods=[{kind: prefix, length: 50, network: null, positions: before}]"],
}
TASKS: dict[str, dict[str, Any]] = {
    "movies": {"name": "sentiment_movie", "input": "Review: {text}\nSentiment:", "predict_by": "likelihood"},
    "intents": yaml.safe_load((machine.ROOT / "configs" / "intents" / "run.yaml").read_text())["task"],
}
FIRST = {"movies": 1, "intents": 2}  # example of each label that the context begins with
REQUESTS = 20  # of which times are taken


def main() -> None:
    """Measure what is missing and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=["movies"])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--tokens", type=int, default=400, help="length of the context")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--backbone", default="smollm2")
    parser.add_argument("--runs", type=Path, default=machine.ROOT / "runs" / "compress")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = json.loads(arguments.results.read_text())["rows"] if arguments.results.exists() else []
    for task in arguments.only:
        for form in arguments.forms:
            if not any((row["task"], row["form"], row["steps"]) == (task, form, arguments.steps) for row in rows):
                rows.append(measure(task, form, arguments))
                about = {"about": machine.describe(), "rows": rows}
                arguments.results.write_text(json.dumps(about, indent=1) + "\n")
                print(json.dumps(rows[-1]), flush=True)


def write_context(task: Any, tokenizer: Any, most: int, first: int, path: Path) -> int:
    """Write examples of the train split from a number on, as many as fit; return how many."""
    from softprompt_jax.tasks import load

    by_label: dict[str, list[str]] = {}
    for example in load(task, "train"):
        by_label.setdefault(example.target, []).append(f"{example.input} {example.target}\n\n")
    text, count = "", 0
    while True:
        label = task.words[count % len(task.words)]
        longer = text + by_label[label][first + count // len(task.words)]
        if len(tokenizer.encode(longer)) > most:
            path.write_text(text, encoding="utf-8")
            return count
        text, count = longer, count + 1


def measure(name: str, form: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one form on one task, and measure it beside no context and the whole context."""
    from softprompt_jax import compress, load_backbone, load_predictor
    from softprompt_jax.data.tokenizer import load_tokenizer
    from softprompt_jax.inference.predictor import Predictor
    from softprompt_jax.progress import Reporter
    from softprompt_jax.tasks import load, resolve

    backbone = load_backbone(arguments.backbone)
    tokenizer = load_tokenizer(backbone.folder, backbone.text_format)
    task, folder = resolve(TASKS[name]), arguments.runs / name
    folder.mkdir(parents=True, exist_ok=True)
    shots = write_context(task, tokenizer, arguments.tokens, FIRST[name], folder / "context.txt")
    taught = task.model_dump(mode="json") | {"kind": "distill", "context": str(folder / "context.txt")}
    changes = [
        f"task={json.dumps(taught | {'answers': 'greedy'})}",
        f"steps={arguments.steps}",
        "batch_size=16",
        "shapes=2",
    ]
    changes += ["max_input_tokens=64", "max_target_tokens=8", f"evaluate_every={arguments.steps}"]
    changes += ["evaluation_examples=100", "result_examples=200", "evaluation_batch_size=32", *FORMS[form]]
    own = folder / form.replace(" ", "-")
    cpu, start = machine.cpu_seconds(), time.monotonic()
    result = compress(str(folder / "context.txt"), own, "unused", None, arguments.backbone, 20, changes, Reporter())
    cpu, seconds = machine.cpu_seconds() - cpu, time.monotonic() - start

    examples = load(task, "test")[:200]
    context = (folder / "context.txt").read_text(encoding="utf-8")
    plain = Predictor(backbone.model, tokenizer, task, max_input_tokens=64, batch_size=32)
    alone = plain.texts([example.input for example in examples])
    zero = sum(said == example.target for said, example in zip(alone, examples, strict=True)) / len(examples)
    long = Predictor(backbone.model, tokenizer, task, max_input_tokens=1024, batch_size=1)
    short = load_predictor(own)
    short.batch_size = plain.batch_size = 1
    asked = [example.input for example in examples[:REQUESTS]]
    tokens = statistics.mean(len(tokenizer.input_ids(text)) for text in asked)
    in_front = 20 if form == "20 rows" else 0  # a prefix is keys and values only: no token is read for it
    return {
        **{"task": name, "form": form, "steps": arguments.steps, "shots": shots},
        "context_tokens": result["context_tokens"],
        **{
            f"{side}_accuracy": round(100 * value, 1)
            for side, value in (
                ("zero_shot", zero),
                ("context", result["test"]["teacher_accuracy"]),
                ("compressed", result["test"]["accuracy"]),
                ("untrained", result["baselines"]["untrained"]["accuracy"]),
            )
        },
        "agreement": round(100 * result["test"]["agreement"], 1),
        "tokens_a_request": {
            "zero_shot": tokens,
            "context": tokens + result["context_tokens"],
            "compressed": tokens + in_front,
        },
        "ms_a_request": {
            "zero_shot": times(plain, asked),
            "context": times(long, [context + text for text in asked]),
            "compressed": times(short, asked),
        },
        "training_cpu_s": round(cpu),
        "training_s": round(seconds),
        "bytes": (own / "trained.safetensors").stat().st_size,
    }


def times(predictor: Any, texts: list[str]) -> float:
    """Return the median milliseconds of a request, of one at a time, compiled before."""
    predictor.texts(texts)
    found = []
    for text in texts:
        start = time.perf_counter()
        predictor.texts([text])
        found.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(found), 1)


if __name__ == "__main__":
    main()
