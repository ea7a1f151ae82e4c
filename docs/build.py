"""Write the pages that are facts: settings, commands, one for each experiment and method, plots and tables.

    python docs/build.py            write what has changed
    python docs/build.py --check    only say what has changed; exit code 1

They come from the configs, the methods' own statements and the committed JSON, so that they cannot drift.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import commands  # noqa: E402
import paper_pages  # noqa: E402
import settings  # noqa: E402
import speed  # noqa: E402
from plot import curves  # noqa: E402

from softprompt_jax.run import Run  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
HEAD = "<!-- Written by docs/build.py; change what it reads, not this file. -->\n\n"


def main() -> None:
    """Write or check all pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    changed = outdated()
    for path, text in changed.items():
        print(path.relative_to(ROOT))
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    sys.exit(bool(check and changed))


def outdated() -> dict[Path, str]:
    """Return the files that are not what they should be, with what they should hold."""
    pages = dict(all_pages())
    return {path: text for path, text in pages.items() if not path.exists() or path.read_text("utf-8") != text}


def all_pages() -> Iterator[tuple[Path, str]]:
    """Yield every file that is written here and its text."""
    for name, text in paper_pages.pages(RESULTS / "paper"):
        yield ROOT / "docs" / "experiments" / name, text if name.endswith(".svg") else HEAD + text
    yield ROOT / "docs" / "settings.md", HEAD + settings.page(Run)
    yield ROOT / "docs" / "command-line.md", HEAD + commands.page()
    methods = dict(method_pages())
    for kind, text in methods.items():
        yield ROOT / "docs" / "methods" / f"{kind}.md", HEAD + text
    listed = ", ".join(f"[{kind}](methods/{kind}.md)" for kind in methods)
    yield _filled(ROOT / "docs" / "README.md", {"methods": listed})
    yield ROOT / "docs" / "tutorial.ipynb", notebook((ROOT / "docs" / "tutorial.md").read_text("utf-8"))
    shown = [ladder_table()]
    for form, title in (("span", "Span corruption"), ("lm", "LM adaptation"), ("mixture", "Mixture with instructions")):
        title += ": loss on held-out text"
        found = {size: curve["held_out"] for (size, made), curve in ladder_curves().items() if made == form}
        if found:
            every = {size: found.get(size, []) for size, _ in ladder_curves()}  # so that a size has one colour
            yield ROOT / "docs" / f"ladder_{form}.svg", curves(title, every)
            shown.append(f"![{title}](ladder_{form}.svg)")
    yield _filled(ROOT / "docs" / "pretraining.md", {"ladder": "\n\n".join(shown), "embedded": embedded_table()})
    cells, stated = RESULTS / "methods" / "smollm2", ROOT / "benchmarks" / "methods_smollm2.yaml"
    made = {"smollm2": smollm2_table(stated, cells), "defaults": defaults_table(RESULTS / "defaults")}
    yield _filled(ROOT / "benchmarks" / "methods.md", made)
    compared = speed.speeds(RESULTS)
    yield ROOT / "docs" / "speed.svg", speed.picture("Times as fast as PEFT's best", speed.five(compared))
    yield _filled(
        ROOT / "benchmarks" / "README.md", {"five": speed.table(speed.five(compared)), "speed": speed.table(compared)}
    )
    yield _filled(ROOT / "tpu" / "README.md", {"gpu programs": gpu_table(RESULTS / "gpu_programs.json")})
    yield _filled(ROOT / "docs" / "reliability.md", {"faults": faults_table()})
    yield _filled(ROOT / "docs" / "experiments" / "README.md", {"paper": paper_pages.listing(RESULTS / "paper")})
    yield _filled(ROOT / "README.md", {"real": paper_pages.readme(RESULTS / "paper")})
    yield _filled(ROOT / "docs" / "tune.md", {"tune": tune_table(_rows("tune"))})
    yield _filled(ROOT / "docs" / "compress.md", {"compress": compress_table(_rows("compress"))})
    yield _filled(ROOT / "docs" / "coming-from-peft.md", {"quality": quality_table(RESULTS)})


def _filled(path: Path, tables: dict[str, str]) -> tuple[Path, str]:
    """Return a page with new text between its marks <!-- NAME --> and <!-- end of NAME -->."""
    text = path.read_text(encoding="utf-8")
    for name, table in tables.items():
        text, times = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)",
            lambda match, table=table: f"{match.group(1)}\n{table}\n\n{match.group(2)}",
            text,
            flags=re.S,
        )
        assert times == 1, f"{path}: {times} marks {name}; expected one"
    return path, text


def _rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of a committed result; none where nothing has been measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []


def _mean(found: dict[str, Any]) -> str:
    return f"{found['mean']:.1f}" + ("" if found["sd"] is None else f" ± {found['sd']:.1f}")


def gpu_table(path: Path) -> str:
    """Return what the programs take that were compiled for GPUs."""
    result = json.loads(path.read_text("utf-8"))
    head = ("program", "for", "peak of a GPU, GiB", "in it", "sent or received by a GPU", "largest batch")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in result["rows"]:
        peak = f"{row['peak_bytes'] / 2**30:.2f} of {row['limit_bytes'] / 2**30:.1f}"
        kernels = ", ".join(f"{name} {count}" for name, count in row["kernels"].items())
        sent = ", ".join(f"{kind} {size / 2**20:,.1f} MiB" for kind, size in row["collectives"].items()) or "nothing"
        lines.append(f"| {row['name']} | {row['topology']} | {peak} | {kernels} | {sent} | {row['largest_batch']:,} |")
    s, versions = result["settings"], ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return "\n".join(lines) + (
        f"\n\nCompiled on {result['date']} ({versions}) by `benchmarks/gpu_programs.py`, no GPU at hand: {s['dtype']}, "
        f"batch {s['batch_size']}, 100 prompt rows and {s['max_input_tokens']} tokens of text, "
        f"{s['max_target_tokens']} of target. A call in the loop over layers counts once."
    )


def tune_table(rows: list[dict[str, Any]]) -> str:
    """Return what a race finds beside the default and the whole grid."""
    if not rows:
        return "Not measured yet."
    lines = ["| task | candidates, steps | default | best of the grid | winner of the race | its place in the grid |"
             " CPU s: one run, grid, race and winner |", "|---" * 7 + "|"]  # fmt: skip
    for row in rows:
        cells = [f"{row['candidates']}, {row['steps']}", *(_mean(row[side]) for side in ("default", "grid", "tune"))]
        cells[2] += f" ({row['grid']['settings']})"
        cells[3] += f" ({row['tune']['settings']})"
        cells += [f"{row['place_of_the_winner_in_the_grid']} of {row['candidates']}"]
        cpu = ", ".join(f"{row[side]['cpu_s']:,}" for side in ("default", "grid", "tune"))
        lines.append(f"| {' | '.join([row['task'], *cells, cpu])} ({row['share_of_the_grids_cpu']:.0%}) |")
    said = "Test score in percent, mean ± sd of three seeds; grid and race choose by validation loss."
    return "\n".join([*lines, "", said])


def compress_table(rows: list[dict[str, Any]]) -> str:
    """Return what a compressed context gives and costs beside none and the whole."""
    if not rows:
        return "Not measured yet."
    lines = ["| task | student | accuracy: zero-shot | with the context | compressed | agreement | tokens a request:"
             " context, compressed | ms a request: zero-shot, context, compressed | training, CPU s |"]  # fmt: skip
    lines.append("|---" * 9 + "|")
    for row in rows:
        tokens, times = row["tokens_a_request"], row["ms_a_request"]
        cells = [
            f"{row[name]:.1f}"
            for name in ("zero_shot_accuracy", "context_accuracy", "compressed_accuracy", "agreement")
        ]
        cells.append(f"{tokens['context']:.0f}, {tokens['compressed']:.0f}")
        cells.append(", ".join(f"{times[side]:.0f}" for side in ("zero_shot", "context", "compressed")))
        task = f"{row['task']}, {row['shots']} examples in {row['context_tokens']} tokens"
        form = f"{row['form']}, {row['steps']} steps"
        lines.append(f"| {' | '.join([task, form, *cells])} | {row['training_cpu_s']:,} |")
    said = "SmolLM2-135M-Instruct, percent of 200 test rows, one request at a time on two CPU cores."
    return "\n".join([*lines, "", said])


def faults_table() -> str:
    """Return the counts of the latest committed `LONG=1 make test-faults`."""
    found = json.loads((RESULTS / "faults.json").read_text("utf-8"))
    lines = ["| what | cases | as expected | seconds |", "|---|--:|--:|--:|"]
    lines += [
        f"| {row['kind']} | {row['cases']:,} | {row['as_expected']:,} | {row['seconds']} |" for row in found["rows"]
    ]
    ends = next(row["ends"] for row in found["rows"] if "ends" in row)
    memory = next(row["memory_mib"] for row in found["rows"] if "memory_mib" in row)
    said = ", ".join(f"{count} {name}" for name, count in sorted(ends.items(), key=lambda item: -item[1]))
    facts = f"Damaged files: {said}. The server's memory: {memory['after_500']} MiB after 500 requests, "
    return "\n".join([*lines, "", f"{facts}{memory['at_the_end']} MiB at the end. Seed {found['seed']}, two cores."])


def notebook(text: str) -> str:
    """Return a page as a notebook: its blocks of bash are cells to run, what stands between them is text."""
    cells = []
    for number, part in enumerate(re.split(r"^```(?:bash)?\n", text, flags=re.M)):
        cell = {"id": f"cell-{number}", "metadata": {}, "source": part.strip().splitlines(keepends=True)}
        if number % 2:
            cell["source"] = ["%%bash\n", 'cd "$(git rev-parse --show-toplevel)"\n', *cell["source"]]
            cells.append({"cell_type": "code", "execution_count": None, "outputs": []} | cell)
        elif cell["source"]:
            cells.append({"cell_type": "markdown"} | cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def embedded_table() -> str:
    """Return the table of the embedded backbone: accuracy, and F1 of the rare class where that is measured."""
    rows = json.loads((RESULTS / "embedded.json").read_text())["rows"]
    tasks, methods = ({row[key]: None for row in rows} for key in ("task", "method"))
    by_both = {(row["task"], row["method"]): row for row in rows}

    def said(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        spread = "" if row["accuracy_sd"] is None else f" ± {row['accuracy_sd']}"
        return f"{row['accuracy_mean']}{spread}" + (f" (F1 {row['f1_mean']:.0f})" if "f1_mean" in row else "")

    lines = [["test accuracy (mean ± sd of seeds)", *tasks], ["---"] * (1 + len(tasks))]
    lines.append(["majority class", *(str(next(r["majority"] for r in rows if r["task"] == task)) for task in tasks)])
    lines += [[method, *(said(by_both.get((task, method))) for task in tasks)] for method in methods]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ladder_curves() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the loss curves of the ladder's backbones by size and form, in their order."""
    sizes = list(yaml.safe_load((ROOT / "configs" / "pretrain" / "ladder" / "sizes.yaml").read_text("utf-8")))
    forms = ["span", "lm-10", "lm-50", "lm", "lm-1000", "mixture"]
    paths = {(size, form): RESULTS / "ladder" / f"{size}-{form}.json" for size in sizes for form in forms}
    return {key: json.loads(path.read_text()) for key, path in paths.items() if path.exists()}


def ladder_table() -> str:
    """Return what each backbone of the ladder saw and what it came to."""
    lines = ["| backbone | parameters | tokens | held-out loss at the start | at the end |", "|---" * 5 + "|"]
    for curve in ladder_curves().values():
        first, last = (curve["held_out"][i]["loss"] for i in (0, -1))
        lines.append(f"| {curve['name']} | {curve['parameters']:,} | {curve['tokens']:,} | {first:.2f} | {last:.2f} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- methods


def method_result(row: dict[str, Any]) -> str:
    """Say what `benchmarks/methods.py` measured of a config."""
    spread = "" if row["accuracy_sd"] is None else f" ± {row['accuracy_sd']}"
    step = "" if row["step_cpu_s"] is None else f"; {row['step_cpu_s']:.2f} CPU seconds a step"
    return (
        f"Measured on the movie sentences (majority class {row['majority']}): test accuracy {row['accuracy_mean']}"
        f"{spread} after {row['steps']} step{'s' if row['steps'] > 1 else ''}, {row['seeds']} seeds{step}; "
        f"{row['trainable']:,} numbers trained, {row['bytes'] / 1000:,.1f} KB. "
        "[All methods in one table](../../benchmarks/methods.md)."
    )


def _accuracy(runs: list[dict[str, Any]]) -> str:
    """Return mean and standard deviation of the accuracies of some seeds; nothing where none is done."""
    scores = [run["accuracy"] for run in runs]
    if len(scores) < 2:
        return "".join(f"{score:.1f} (one seed)" for score in scores)
    return f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f} ({len(scores)})"


def quality_table(results: Path) -> str:
    """Return what `benchmarks/quality.py` has measured so far: a row for each way to train a prompt."""
    ways = {
        ("quality", "peft_default"): "PEFT: random rows; AdamW, 0.0001",
        ("quality", "peft_vocabulary"): "PEFT: sampled vocabulary; AdamW, 0.001",
        ("quality", "peft_guide"): "PEFT: rows of a text; AdamW, 0.03",
        ("methods/smollm2", "prompt"): "here: default settings",
        ("methods/smollm2", "prompt_tuned"): "here: after `softprompt tune`",
    }
    tasks = ("movies", "intents")
    lines = [["20 rows on SmolLM2, 200 steps of 8", *tasks, "untrained", "CPU s a step"], ["---"] * 5]
    for (folder, side), title in ways.items():
        each = [
            [
                json.loads(path.read_text("utf-8"))
                for path in sorted((results / folder).glob(f"{task}-{side}-[0-9].json"))
            ]
            for task in tasks
        ]
        untrained = ", ".join(f"{statistics.mean(run['untrained'] for run in runs):.1f}" for runs in each if runs)
        clocks = ", ".join(f"{statistics.median(run['step_cpu_s'] for run in runs):.2f}" for runs in each if runs)
        lines.append([title, *map(_accuracy, each), untrained, clocks])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def smollm2_table(stated: Path, cells: Path) -> str:
    """Return what `benchmarks/methods.py --backbone smollm2` has measured so far: a row for each method it knows."""
    known = yaml.safe_load(stated.read_text("utf-8"))
    found = collections.defaultdict(list)
    for path in sorted(cells.glob("*.json")):
        task, _, method = path.stem.rpartition("-")[0].partition("-")
        found[task, method].append(json.loads(path.read_text("utf-8")))

    def level(task: str, key: str) -> str:
        """Say what the plain model comes to, which is what `norms` starts from."""
        runs = [run for (of, method), runs in found.items() if of == task and method == "norms" for run in runs]
        return f"{runs[0][key] * (100 if key == 'majority' else 1):.1f}" if runs else ""

    def median(runs: list[dict[str, Any]], key: str, unit: float = 1.0) -> str:
        values = [run[key] / unit for run in runs if run[key] is not None]
        return f"{statistics.median(values):,.1f}" if values else ""

    tasks = list(known["tasks"])
    times = [f"CPU {what}, {task}" for what in ("s a step", "min a run") for task in tasks]
    lines = [["method", *tasks, "trained", "rows", *times, "KB on disk"]]
    lines.append(["---"] * len(lines[0]))
    empty = [""] * (3 + len(times))
    lines.append(["*majority class*", *(level(task, "majority") for task in tasks), *empty])
    lines.append(["*without training*", *(level(task, "untrained") for task in tasks), *empty])
    for method in known["methods"]:
        each = [found[task, method] for task in tasks]
        first = next((runs[0] for runs in each if runs), None)
        facts = ["", ""] if first is None else [f"{first['trainable']:,}", str(first["rows"])]
        clocks = [median(runs, "step_cpu_s") for runs in each] + [median(runs, "run_cpu_s", 60) for runs in each]
        size = "" if first is None else f"{first['bytes'] / 1000:,.1f}"
        lines.append([method, *map(_accuracy, each), *facts, *clocks, size])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def defaults_table(folder: Path) -> str:
    """Return what `benchmarks/defaults.py` has measured so far: a row for each task, in percent."""
    found = {(path.parent.name, path.stem): json.loads(path.read_text("utf-8")) for path in folder.glob("*/*.json")}
    models = {"embedded": "embedded T5", "smollm2": "SmolLM2"}
    lines = [
        "| task | mean of | " + " | ".join(f"{model}, untrained | default prompt" for model in models.values()) + " |"
    ]
    lines.append("|---" * (2 + 2 * len(models)) + "|")
    for name in sorted({name for _, name in found}):
        each = [found.get((model, name)) for model in models]
        metrics = next(one["metrics"] for one in each if one)
        scores = [f"{100 * one[key]:.1f}" if one else "" for one in each for key in ("untrained", "trained")]
        lines.append(f"| {name} | {', '.join(metrics)} | {' | '.join(scores)} |")
    return "\n".join(lines)


def method_pages() -> Iterator[tuple[str, str]]:
    """Yield the page of each kind of method, and of each reparameterisation of a prompt."""
    from softprompt_jax.methods import METHODS, Prompt
    from softprompt_jax.methods.listing import optimizer_of, parameters
    from softprompt_jax.methods.reparameterization import REPARAMETERIZATIONS
    from softprompt_jax.models.presets import preset

    headings, sizes = settings.titles(Run), preset("t5-v1_1-base")
    configs = {path: path.read_text("utf-8") for path in sorted((ROOT / "configs").glob("*.yaml"))}
    configs |= {path: path.read_text("utf-8") for path in sorted((ROOT / "configs" / "methods").glob("*.yaml"))}
    measured = {row["method"]: method_result(row) for row in json.loads((RESULTS / "methods.json").read_text())["rows"]}
    configs = dict(sorted(configs.items(), key=lambda item: "First:" in item[1]))  # after what they need
    pages: list[tuple[str, Any, Any]] = [(kind, method, method()) for kind, method in METHODS.items()]
    made = [each() for each in REPARAMETERIZATIONS]
    pages[1:1] = [(each.kind, type(each), Prompt(reparameterization=each)) for each in made]
    for kind, about, defaults in pages:
        method, trained = type(defaults), parameters(sizes, defaults)
        parts = [f"# {kind}", settings.prose(about), f"Paper: {about.paper}."]
        if about is not method:
            parts[1] = f"A prompt with `reparameterization: {kind}`.\n\n{parts[1]}"
        share = trained / sizes.parameters()
        facts = [f"trains {trained:,} numbers of a T5 1.1 base with default settings ({share:.3%})"]
        facts.append(f"default optimizer and learning rate: {optimizer_of(method)}")
        facts.append(f"PEFT: {method.peft_type}" if method.peft_type else "not in PEFT")
        facts.append(
            "leaves every output as it was at the start" if method.identity_at_start else "changes outputs at once"
        )
        facts.append(f"no packing: {defaults.refuses_packing}" if defaults.refuses_packing else "may be packed")
        parts.append("\n".join(f"- {fact}" for fact in facts))
        parts.append(settings.table(about, headings, "../settings.md"))
        for path, text in configs.items():
            if kind in map(_kind_of, yaml.safe_load(text).get("methods", [])):
                where = path.relative_to(ROOT)
                command = f"    softprompt train {where} --out runs/{path.stem}"
                parts.append(f"[{where}](../../{where}): {paper_pages.said_above(text)}\n\n{command}")
                if path.parent.name == "methods" and path.stem in measured:
                    parts.append(measured[path.stem])
        yield kind, "\n\n".join(parts) + "\n"


def _kind_of(method: dict[str, Any]) -> str:
    """Return on whose page a method of a config stands."""
    made_of = method.get("reparameterization")
    return made_of["kind"] if isinstance(made_of, dict) else made_of or str(method.get("kind"))


if __name__ == "__main__":
    main()
