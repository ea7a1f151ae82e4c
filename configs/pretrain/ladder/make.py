"""Pre-train the ladder: every size of sizes.yaml in three forms, exported with a card.

    python configs/pretrain/ladder/make.py [--sizes 1m 3m] [--forms span lm] [--longer 10] [SETTING=VALUE ...]

`span` fills in spans; `lm` goes on from it with prefix language modelling; `mixture` is the embedded backbone's recipe
(configs/pretrain/embedded.yaml), and of 3m, which has its shape, the embedded backbone itself. A killed one goes on.
`TO/SIZE-FORM` are backbones in Hugging Face layout; of 3m a tenth, half and ten times the adaptation are made too
(`3m-lm-10`, `3m-lm-50`, `3m-lm-1000`). Curves and cards: TO/curves/NAME.json and .md; with
`--curves benchmarks/results/ladder` those of the docs.
Where the configs' folder of texts is not there, texts.py fetches others out of packages.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import texts

from softprompt_jax import config, load_run, train
from softprompt_jax.checkpoints.artifact import dump
from softprompt_jax.checkpoints.backbone import EMBEDDED
from softprompt_jax.export.export import export
from softprompt_jax.progress import Reporter
from softprompt_jax.run import Run

HERE = Path(__file__).resolve().parent
FORMS = ("span", "lm", "mixture")
KEPT = {"3m": {"lm-10": 0.1, "lm-50": 0.5, "lm-1000": 10.0}}  # adaptations of other lengths, as a share of its steps


def sizes() -> dict[str, dict[str, int]]:
    """Return the shapes of each size."""
    return config.read(HERE / "sizes.yaml")


def span_run(size: str, overrides: list[str]) -> Run:
    """Return the span-corruption run of a size."""
    return load_run(HERE / "span.yaml", _shape(size) + overrides)


def mixture_run(size: str, overrides: list[str]) -> Run:
    """Return the run of a size by the embedded backbone's recipe."""
    return load_run(HERE.parent / "embedded.yaml", _shape(size) + overrides)


def lm_run(backbone: Path, overrides: list[str]) -> Run:
    """Return the LM adaptation of a backbone."""
    return load_run(HERE / "lm.yaml", [f"backbone={backbone}", *overrides])


def lasting(run: Run, factor: float) -> Run:
    """Return a run with `factor` times as many steps."""
    return run.model_copy(update={"steps": max(1, round(run.steps * factor))})


def _shape(size: str) -> list[str]:
    return [f"backbone.settings.{key}={value}" for key, value in sizes()[size].items()]


def other_texts(to: Path, overrides: list[str]) -> list[str]:
    """Return the settings that put texts out of packages in the place of the configs', where these are not there."""
    folder = config.read(HERE / "span.yaml")["task"]["texts_folder"]
    if Path(folder).is_dir() or any(text.startswith("task.texts") for text in overrides):
        return []
    found = texts.write(to)
    print(f"{folder}: not there; reading {', '.join(text['path'] for text in found)} in {to} instead", flush=True)
    return [f"task.texts_folder={to}", f"task.texts={json.dumps(found)}"]


def make(run: Run, name: str, to: Path, curves: Path) -> None:
    """Train a run, export it with its card, and write its loss curve."""
    folder, backbone = to / "runs" / name, to / name
    result = train(run, folder, Reporter())
    if not (backbone / "config.json").exists():
        export(folder, "hf", backbone)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    curve = [{"step": line["step"], "loss": round(line["loss"], 4)} for line in logged]
    held_out = [{"step": line["step"], "loss": line["validation"]["loss"]} for line in lines if "validation" in line]
    about = card(run, name, held_out, result)
    (backbone / "README.md").write_text(about, encoding="utf-8")
    steps = [line["step"] for line in logged]
    examples = [run.batch_size * (step - before) for before, step in zip([0, *steps], steps, strict=False)]
    tokens = sum(n * line["tokens_per_s"] / line["examples_per_s"] for n, line in zip(examples, logged, strict=True))
    facts = {"name": name, "parameters": result["trainable_parameters"], "tokens": round(tokens)}
    curves.mkdir(parents=True, exist_ok=True)
    (curves / f"{name}.md").write_text(about, encoding="utf-8")
    dump(facts | {"seconds": result["seconds"], "train": curve, "held_out": held_out}, curves / f"{name}.json")


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
        + ("\nWords are labelled by the polarity lexicons that card names.\n" if data.lexicon else "")
    )


def make_size(size: str, forms: list[str], longer: float, to: Path, curves: Path, overrides: list[str]) -> None:
    """Make the forms of a size that are asked for and not there yet; `lm` needs `span`."""
    span = to / f"{size}-span"
    if "span" in forms:
        make(lasting(span_run(size, overrides), longer), span.name, to, curves)
    if "lm" in forms:
        if not (span / "config.json").exists():
            raise config.UserError(
                f"{span}: no backbone; expected the span form of {size}; make it too: --forms span lm"
            )
        for form, share in ({"lm": 1.0} | KEPT.get(size, {})).items():
            make(lasting(lm_run(span, overrides), share * longer), f"{size}-{form}", to, curves)
    if "mixture" in forms and size == "3m":
        shutil.copytree(EMBEDDED, to / "3m-mixture", dirs_exist_ok=True)
    elif "mixture" in forms:
        make(lasting(mixture_run(size, overrides), longer), f"{size}-mixture", to, curves)


def main() -> None:
    """Make the ladder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["350k", "1m", "3m", "11m"], choices=list(sizes()))
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--longer", type=float, default=1.0, metavar="FACTOR", help="times as many steps of all runs")
    parser.add_argument("--to", type=Path, default=Path("runs/ladder"))
    parser.add_argument("--curves", type=Path, help="folder of the loss curves (default: TO/curves)")
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE")
    arguments = parser.parse_intermixed_args()
    to, overrides = arguments.to, arguments.overrides
    overrides += other_texts(to / "texts", overrides)
    for size in arguments.sizes:
        make_size(size, arguments.forms, arguments.longer, to, arguments.curves or to / "curves", overrides)


if __name__ == "__main__":
    try:
        main()
    except config.UserError as error:
        sys.exit(f"ladder: {error}")
