"""Every method on one task and backbone: what it scores, trains, costs and leaves on disk.

    python benchmarks/methods.py [--seeds 3] [--steps 500] [--only lora ia3] [--runs runs/methods]

Trains `configs/methods/*.yaml` on the task that they name with the embedded backbone, each run in a process of its own
(so that its memory is its own), all of a seed before the next. What is done is kept, a killed run goes on. Then writes
`results/methods.json` and the table in `methods.md`.
A row is of runs of as many steps as asked for; others in the same folder are left out.

    python benchmarks/methods.py --backbone smollm2 [--seeds 3] [--only lora ia3] [--runs runs/methods]

The same on a real language model: every line of `methods_smollm2.yaml` on movie sentences and on intents, 200 steps.
Each run leaves one file, `results/methods/smollm2/TASK-METHOD-SEED.json`, and its folder is deleted. A run whose file
exists is done; a killed run goes on from its last checkpoint, three minutes back at most. `docs/build.py` writes the
table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import yaml

ROOT = machine.ROOT
CONFIGS = ROOT / "configs" / "methods"
HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "methods.json", HERE / "methods.md"
SMOLLM2 = HERE / "methods_smollm2.yaml"
BETWEEN = "<!-- made by methods.py -->"
TASK = "sentiment_movie"
INTERVAL = 10  # steps, over which time is measured


def main() -> None:
    """Run what is missing, then write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=["embedded", "smollm2"], default="embedded")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: 500; with smollm2 what its file says")
    parser.add_argument("--only", nargs="+", help="names of configs; the table then has what is done")
    parser.add_argument("--tasks", nargs="+", help="with smollm2: names of tasks")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "methods")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--cells", type=Path, default=SMOLLM2, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "methods", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a worker ends with this process
    if arguments.backbone == "smollm2":
        unknown = set(arguments.only or ()) - set(yaml.safe_load(arguments.cells.read_text())["methods"])
        if unknown:
            parser.error(f"no method {', '.join(sorted(unknown))} in {arguments.cells}; expected names from there")
        sys.exit(measure_cells(arguments))
    arguments.steps = arguments.steps or 500
    names = in_order(path.stem for path in CONFIGS.glob("*.yaml"))
    unknown = set(arguments.only or ()) - set(names)
    if unknown:
        parser.error(f"no config {', '.join(sorted(unknown))}; expected some of {', '.join(names)}")
    for seed in range(arguments.seeds):
        for name in names:
            if arguments.only is None or name in arguments.only:
                measure(name, seed, arguments.steps, arguments.runs)
    rows = [row for name in names if (row := summary(name, arguments.runs, arguments.seeds, arguments.steps))]
    rows.sort(key=lambda row: -row["accuracy_mean"])
    about = {"about": machine.describe(), "steps": arguments.steps, "rows": rows}
    RESULTS.write_text(json.dumps(about, indent=1) + "\n")
    before, _, after = PAGE.read_text().split(BETWEEN)
    PAGE.write_text(BETWEEN.join([before, "\n" + table(rows) + "\n", after]))
    print(table(rows))


def in_order(names: Any) -> list[str]:
    """Sort configs, those that start from another's run after it."""
    return sorted(names, key=lambda name: (len(sources(name)), name))


def load(name: str) -> dict[str, Any]:
    """Read a config, with what it is based on."""
    from softprompt_jax import config

    return config.read(CONFIGS / f"{name}.yaml")


def sources(name: str) -> dict[str, str]:
    """Return the configs whose runs a config starts from, by the setting that names them."""
    found = {}
    for number, method in enumerate(load(name)["methods"]):
        if "source" in method:
            found[f"methods.{number}.source"] = Path(method["source"]).name
        elif isinstance(method.get("init"), dict) and "path" in method["init"]:
            found[f"methods.{number}.init.path"] = Path(method["init"]["path"]).name
    return found


def place(runs: Path, name: str, steps: int, seed: int) -> Path:
    """Return the folder of a run."""
    return runs / name / str(min(steps, load(name)["steps"])) / str(seed)


def measure(name: str, seed: int, steps: int, runs: Path) -> None:
    """Train a config in a process of its own, unless that is done."""
    steps = min(steps, load(name)["steps"])
    folder = place(runs, name, steps, seed)
    if (folder / "measured.json").exists():
        return
    changes = [f"seed={seed}", f"steps={steps}", f"evaluate_every={steps}", f"checkpoint_every={steps}"]
    changes += [f"log_every={min(INTERVAL, steps)}", "evaluation_examples=64"]  # one checkpoint: nothing to select
    if "warmup_steps" in load(name).get("schedule", {}):
        changes += [f"schedule.warmup_steps={steps // 10}"]
    changes += [f"{setting}={place(runs, source, steps, seed)}" for setting, source in sources(name).items()]
    done = run_apart(CONFIGS / f"{name}.yaml", folder, changes, runs)
    print(f"{name} seed {seed}: " + ((folder / "measured.json").read_text() if done else "failed"), flush=True)


def run_apart(config: Path, folder: Path, changes: list[str], runs: Path) -> bool:
    """Train and measure in a process of its own; tell whether it has ended well."""
    command = [sys.executable, __file__, "--worker", str(config), str(folder), *changes]
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str((runs / "compiled").absolute())
    return subprocess.run(command, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}).returncode == 0


def measure_cells(arguments: argparse.Namespace) -> int:
    """Train every cell that has no file yet; one that fails stays empty until the next command. Return an exit code."""
    results, failed = arguments.results / arguments.backbone, []

    def missing() -> Iterator[tuple[str, Path, dict[str, Any]]]:
        done = {path.stem for path in results.glob("*.json")} | {*failed}
        return (cell for cell in cells(arguments) if cell[0] not in done)

    while cell := next(missing(), None):
        name, config, settings = cell
        folder = arguments.runs / arguments.backbone / name
        if (folder / "measured.json").exists() or run_apart(config, folder, changes_of(settings), arguments.runs):
            line = {"cell": name, **json.loads((folder / "measured.json").read_text()), "settings": settings}
            results.mkdir(parents=True, exist_ok=True)
            part = results / f"{name}.part"  # renamed, so that a killed command leaves no half file
            part.write_text(json.dumps(line | machine.describe(), indent=1) + "\n")
            part.rename(results / f"{name}.json")
            shutil.rmtree(folder)
            print(f"{name}: {line['accuracy']:.1f}, {line['run_cpu_s'] / 60:.1f} CPU minutes", flush=True)
        else:
            failed.append(name)
            print(f"{name}: failed", flush=True)
    return int(bool(failed))


def cells(arguments: argparse.Namespace) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Yield the name, config and changed settings of each run, as the file lists them now; all of a seed first."""
    stated = yaml.safe_load(arguments.cells.read_text())
    for seed in range(arguments.seeds):
        for method, own in stated["methods"].items():
            only, own = own.get("only", {}), {key: value for key, value in own.items() if key != "only"}
            for task, config in stated["tasks"].items():
                wanted = method in (arguments.only or [method]) and task in (arguments.tasks or [task])
                if wanted and task in only.get("tasks", [task]) and seed in only.get("seeds", [seed]):
                    limits = {} if arguments.steps is None else {"steps": arguments.steps}
                    yield f"{task}-{method}-{seed}", ROOT / config, stated["settings"] | own | limits | {"seed": seed}


def changes_of(settings: dict[str, Any]) -> list[str]:
    """Return settings as KEY=VALUE."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def spent_file(folder: Path) -> Path:
    """Return where a run that may be killed notes the CPU seconds of its processes."""
    return folder.parent / f"{folder.name}.spent.json"


def work(config: str, folder: str, *changes: str) -> None:
    """Train one run and write what it took into its folder."""
    from softprompt_jax import load_run, train
    from softprompt_jax.assembly import abstract_backbone_of, assemble
    from softprompt_jax.cli.allocator import keep_freed_memory
    from softprompt_jax.progress import Reporter

    spent = spent_file(Path(folder))
    killed: dict[str, Any] = json.loads(spent.read_text()) if spent.exists() else {"cpu_s": 0.0, "intervals_s": []}

    class Clock(Reporter):
        """Notes the CPU seconds at every line of progress."""

        seconds: list[float] = []  # noqa: RUF012

        def update(self, step: int, steps: int, note: str) -> None:
            self.seconds.append(machine.cpu_seconds())
            spent.write_text(json.dumps({"cpu_s": killed["cpu_s"] + self.seconds[-1], "intervals_s": intervals()}))

    def intervals() -> list[float]:
        own = [after - before for before, after in zip(Clock.seconds, Clock.seconds[1:], strict=False)]
        return killed["intervals_s"] + own

    keep_freed_memory()
    run = load_run(config, changes)
    spent.parent.mkdir(parents=True, exist_ok=True)
    result = train(run, folder, Clock(quiet=True), wait=True)  # the worker of a killed command may still be at work
    if (Path(folder) / "measured.json").exists():  # it was, and has measured
        return
    model = assemble(run, abstract_backbone_of(run)).model
    prefixes = [stack.prefix.unpositioned + stack.prefix.positioned for stack in model.stacks.values() if stack.prefix]
    rows = 0 if model.prompt is None else model.prompt.layout.row_count(model.settings.vocabulary_rows)
    before = result["baselines"]["untrained"]
    measured = {
        "accuracy": 100 * result["test"].get("accuracy", result["test"].get("mean")),
        "untrained": 100 * before.get("accuracy", before.get("mean")),
        "majority": result["baselines"]["majority"],
        "trainable": result["trainable_parameters"],
        "rows": rows + max(prefixes, default=0),
        "step_cpu_s": statistics.median(intervals()) / INTERVAL if intervals() else None,
        "run_cpu_s": killed["cpu_s"] + machine.cpu_seconds(),
        "peak_gib": machine.peak_memory_gib(),
        "bytes": (Path(folder) / "trained.safetensors").stat().st_size,
        "steps": result["steps"],
    }
    (Path(folder) / "measured.json").write_text(json.dumps(measured))
    spent.unlink(missing_ok=True)


def summary(name: str, runs: Path, seeds: int, steps: int) -> dict[str, Any] | None:
    """Return a method's row over the seeds that are done; none for a first stage, whose tasks are others."""
    found = [place(runs, name, steps, seed) / "measured.json" for seed in range(seeds)]
    measured = [json.loads(path.read_text()) for path in found if path.exists()]
    task = load(name)["task"]
    if not measured or (task if isinstance(task, str) else task.get("name")) != TASK:
        return None
    scores = [one["accuracy"] for one in measured]
    timed = [one["step_cpu_s"] for one in measured if one["step_cpu_s"] is not None]
    return {
        "method": name,
        "seeds": len(scores),
        "accuracy_mean": round(statistics.mean(scores), 1),
        "accuracy_sd": round(statistics.stdev(scores), 1) if len(scores) > 1 else None,
        "untrained": round(statistics.mean(one["untrained"] for one in measured), 1),
        "majority": round(100 * measured[0]["majority"], 1),
        "steps": measured[0]["steps"],
        "trainable": measured[0]["trainable"],
        "step_cpu_s": round(statistics.median(timed), 3) if timed else None,
        "peak_gib": round(statistics.median(one["peak_gib"] for one in measured), 2),
        "bytes": measured[0]["bytes"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| config | test accuracy | seeds | steps | before | trainable | CPU s a step | peak GiB | KB on disk |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sd = "" if row["accuracy_sd"] is None else f" ± {row['accuracy_sd']}"
        step = "-" if row["step_cpu_s"] is None else f"{row['step_cpu_s']:.2f}"
        lines.append(
            f"| {row['method']} | {row['accuracy_mean']}{sd} | {row['seeds']} | {row['steps']} | {row['untrained']} "
            f"| {row['trainable']:,} "
            f"| {step} | {row['peak_gib']:.2f} | {row['bytes'] / 1000:,.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
