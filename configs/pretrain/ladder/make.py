"""Pre-train the ladder: every size of sizes.yaml, with span corruption and then LM-adapted, exported with a card.

    python configs/pretrain/ladder/make.py [--sizes 1m 4m] [--to runs/ladder] [SETTING=VALUE ...]
    python configs/pretrain/ladder/make.py --measure 50      tokens a CPU second of each size, as JSON lines

A killed one goes on. `TO/SIZE-span` and `TO/SIZE-lm` are backbones in Hugging Face layout; of 4m the states after a
tenth and half of the adaptation are kept too (`4m-lm-10`, `4m-lm-50`). Curves: benchmarks/results/ladder/NAME.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from softprompt_jax import config, load_run, train
from softprompt_jax.exporting import export
from softprompt_jax.interop import dump
from softprompt_jax.progress import Reporter
from softprompt_jax.run import Run

HERE = Path(__file__).resolve().parent
CURVES = HERE.parents[2] / "benchmarks" / "results" / "ladder"
KEPT = {"4m": {"lm-10": 0.1, "lm-50": 0.5}}  # states of the adaptation that are kept, as a share of its steps


def sizes() -> dict[str, dict[str, int]]:
    """Return the shapes of each size."""
    return config.read(HERE / "sizes.yaml")


def span_run(size: str, overrides: list[str]) -> Run:
    """Return the span-corruption run of a size."""
    return load_run(
        HERE / "span.yaml", [f"backbone.settings.{key}={value}" for key, value in sizes()[size].items()] + overrides
    )


def lm_run(backbone: Path, share: float, overrides: list[str]) -> Run:
    """Return the LM adaptation of a backbone, or its first part."""
    run = load_run(HERE / "lm.yaml", [f"backbone={backbone}", *overrides])
    return run.model_copy(update={"steps": max(1, round(run.steps * share))})


def make(run: Run, name: str, to: Path, curves: Path) -> None:
    """Train a run, export it with its card, and write its loss curve."""
    folder, backbone = to / "runs" / name, to / name
    result = train(run, folder, Reporter())
    if not (backbone / "config.json").exists():
        export(folder, "hf", backbone)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [{"step": line["step"], "loss": line["loss"]} for line in lines if "loss" in line]
    held_out = [{"step": line["step"], "loss": line["validation"]["loss"]} for line in lines if "validation" in line]
    (backbone / "README.md").write_text(card(run, name, held_out, result), encoding="utf-8")
    curves.mkdir(parents=True, exist_ok=True)
    dump({"name": name, "seconds": result["seconds"], "train": curve, "held_out": held_out}, curves / f"{name}.json")


def card(run: Run, name: str, held_out: list[dict[str, float]], result: dict[str, Any]) -> str:
    """Return the model card of a backbone: what it is, what it saw, for how long, and its loss."""
    data = run.pretraining
    assert data is not None
    texts = "\n".join(f"- {text.path}, weight {text.weight:g}" for text in data.texts)
    losses = ", ".join(f"{line['loss']:.2f} (step {line['step']})" for line in held_out)
    objectives = ", ".join(data.stages[-1].objectives)
    begun = run.backbone if isinstance(run.backbone, str) else "random weights"
    return (
        f"# {name}\n\nA T5 1.1 with the embedded backbone's vocabulary, made by softprompt_jax to compare sizes and "
        f"objectives; for results use a published T5.\n\n"
        f"Objective: {objectives}, from {begun}; {run.steps:,} steps of "
        f"{run.batch_size} examples, {result['seconds']:,.0f} seconds.\n\n"
        f"Loss on held-out text, in nats per target token: {losses}.\n\n"
        f"Text, licensed as the packages that carry it say (see softprompt_jax/embedded/README.md):\n\n{texts}\n"
    )


def measure(size: str, steps: int, overrides: list[str]) -> dict[str, Any]:
    """Train a few steps of a size and return its tokens a CPU second, compilation left out."""
    run = span_run(size, [f"steps={steps}", "log_every=1", *overrides])
    with tempfile.TemporaryDirectory() as folder:
        marks = []

        class Watch(Reporter):
            def update(self, *args: Any, **kwargs: Any) -> None:
                marks.append((time.process_time(), time.monotonic()))

        train(run, Path(folder) / "run", Watch(quiet=True))
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not isinstance(run.backbone, str)
    logged = [line for line in lines if "loss" in line]
    # A step that compiles its shape takes many times the median: the faster half stands for all.
    cpu = [after[0] - before[0] for before, after in itertools.pairwise(marks)]
    tokens = [line["tokens_per_s"] * (b[1] - a[1]) for line, a, b in zip(logged[1:], marks, marks[1:], strict=False)]
    typical = sorted(cpu)[len(cpu) // 2]
    kept = [i for i, seconds in enumerate(cpu) if seconds < 2 * typical]
    rate = sum(tokens[i] for i in kept) / sum(cpu[i] for i in kept)
    full = span_run(size, overrides)
    per_step = sum(tokens) / len(tokens)
    return {
        "size": size,
        "parameters": run.backbone.settings.parameters(),
        "steps_measured": len(kept),
        "tokens_per_cpu_s": round(rate, 1),
        "tokens_per_step": round(per_step),
        "cpu_hours_of_the_span_run": round(full.steps * per_step / rate / 3600, 1),
    }


def main() -> None:
    """Make the ladder, or measure what it would take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(sizes()), choices=list(sizes()))
    parser.add_argument("--to", type=Path, default=Path("runs/ladder"))
    parser.add_argument("--curves", type=Path, default=CURVES)
    parser.add_argument("--measure", type=int, metavar="STEPS")
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE")
    arguments = parser.parse_intermixed_args()
    for size in arguments.sizes:
        if arguments.measure:
            print(json.dumps(measure(size, arguments.measure, arguments.overrides)), flush=True)
            continue
        span = arguments.to / f"{size}-span"
        make(span_run(size, arguments.overrides), span.name, arguments.to, arguments.curves)
        for form, share in ({"lm": 1.0} | KEPT.get(size, {})).items():
            make(lm_run(span, share, arguments.overrides), f"{size}-{form}", arguments.to, arguments.curves)


if __name__ == "__main__":
    try:
        main()
    except config.UserError as error:
        sys.exit(f"ladder: {error}")
