"""Makes the fixtures of test_legacy.py with the code of commit 3b45b86, from which users have runs.

    git worktree add /elsewhere 3b45b86
    cp -r tests/legacy /elsewhere/tests/
    cd /elsewhere && PYTHONPATH=. python tests/legacy/make.py

With newer code it would prove nothing, so it is not to be run again: goldens are what the old code said. Every path in
the runs is relative to the folder that the archives are unpacked in.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)

import conftest  # noqa: E402

conftest.pytest_configure()  # the settings of XLA that the tests run under

import jax  # noqa: E402
import numpy as np  # noqa: E402
import sentencepiece  # noqa: E402
import small_runs  # noqa: E402
import yaml  # noqa: E402
from legacy.measure import asked, logits_of_backbone, measured, prompts_of, without_plane  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from softprompt_jax.backbone.pretrained import save_backbone  # noqa: E402
from softprompt_jax.backbone.t5 import T5, T5Settings  # noqa: E402
from softprompt_jax.interop import save_prompt  # noqa: E402

from softprompt_jax import (  # noqa: E402
    ensemble,
    inspect,
    load_backbone,
    load_prompt,
    load_run,
    rank_sources,
    sweep,
    train,
)
from softprompt_jax.config import Preempted  # noqa: E402
from softprompt_jax.progress import Reporter  # noqa: E402

PREFIX = {"kind": "prefix", "length": 3, "network": 6}
PROMPT = {"kind": "prompt", "length": 4}
LORA = {"kind": "lora", "rank": 2}
# Finished runs: what they change of `short`. Only `prompt` and `lora` keep their checkpoints.
RUNS: dict[str, dict[str, Any]] = {
    "prompt": {"methods": [PROMPT]},
    "embedded": {"methods": [PROMPT], "backbone": "embedded", "steps": 6},
    "prefix": {"methods": [PREFIX]},
    "lora": {"methods": [LORA]},
    "ia3": {"methods": [{"kind": "ia3"}]},
    "p_tuning": {"methods": [{"kind": "p_tuning", "length": 4, "hidden": 6}]},
    "multitask": {"methods": [{"kind": "multitask", "length": 4}], "task": "both"},
    "own": {"methods": [PROMPT], "task": "both"},
    "full": {"methods": [{"kind": "full"}]},
    "prompt_and_ia3": {"methods": [PROMPT, {"kind": "ia3"}]},
    "adapter": {"methods": [{"kind": "adapter", "width": 2}]},
    "norms": {"methods": [{"kind": "norms"}]},
    "bias": {"methods": [{"kind": "bias"}]},
    "p_tuning_v2": {"methods": [{"kind": "p_tuning_v2", "length": 3}]},
    "wayward": {"methods": [{"kind": "wayward", "length": 4, "text": "the garden is warm"}]},
    "black_box": {"methods": [{"kind": "black_box", "length": 4, "dimensions": 6}]},
    "hard": {"methods": [{"kind": "hard", "template": "the {text} as ever"}]},
    "after": {"methods": [PROMPT | {"place": "after"}]},
    "nf4_lora": {"methods": [LORA], "quantize": "nf4"},
    "on_int8": {"methods": [PROMPT], "backbone": "int8"},
}
# Runs that start from one of those; they are trained again from nothing by the tests.
STARTS: dict[str, dict[str, Any]] = {
    "from_prompt": {"methods": [PROMPT | {"init": {"kind": "file", "path": "prompt"}}], "steps": 4},
    "from_multitask": {"methods": [{"kind": "multitask", "length": 4, "source": "multitask"}], "steps": 4},
}
STOPPED: dict[str, dict[str, Any]] = {
    "stopped": {"methods": [PROMPT]},
    "stopped_list": {"methods": [PROMPT, LORA], "optimizer": {"kind": "adamw", "learning_rate": 0.02}},
    "stopped_mixture": {
        **{"methods": [{"kind": "multitask", "length": 4}], "task": "both", "packing": {"length": 64}, "accumulate": 2},
        **{"clip_norm": 1.0, "schedule": {"warmup_steps": 4, "decay": "linear"}, "loss": "mean"},
    },
    "stopped_search": {"methods": [{"kind": "black_box", "length": 4, "dimensions": 6}]},
}
ADAMW = {"kind": "adamw", "learning_rate": 0.05}
OPTIMIZERS: dict[str, dict[str, Any] | None] = {
    **{kind: {"kind": "adafactor", "learning_rate": 0.3} for kind in ("prompt", "multitask", "wayward")},
    **dict.fromkeys(("black_box", "hard"), None),
    "full": ADAMW | {"learning_rate": 0.01},
}
OVER = ["seed=0..1", "learning_rate=0.1,0.3"]


# ------------------------------------------------------------------------------------------- ways to stop


class Stopping(Reporter):
    """Sends this process a signal when `step` is reported."""

    def __init__(self, step: int, told: int):
        super().__init__(quiet=True)
        self.step, self.told = step, told

    def update(self, step: int, steps: int, note: str) -> None:
        if step == self.step:
            time.sleep(2)  # the checkpoint before it is written in the background
            os.kill(os.getpid(), self.told)


def killed(name: str, step: int) -> None:
    """Train NAME.yaml in another process, which dies by SIGKILL past a checkpoint."""
    done = subprocess.run([sys.executable, __file__, name, str(step)], check=False)
    assert done.returncode == -signal.SIGKILL, done.returncode


def cli(*arguments: Any, stdin: str = "") -> str:
    command = [sys.executable, "-m", "softprompt_jax", *map(str, arguments)]
    return subprocess.run(command, input=stdin, text=True, check=True, capture_output=True).stdout


# ------------------------------------------------------------------------------------------------ what is made


def make_backbone() -> dict[str, Any]:
    """Write a T5 of 23 kB that half knows the task, and the task's settings."""
    Path("raw").mkdir()
    sentences = [row["text"] for row in small_runs.rows()] + ["yes no"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        **{"model_prefix": "raw/spiece", "model_type": "word", "vocab_size": 100, "hard_vocab_limit": False},
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2, "character_coverage": 1.0},
        normalization_rule_name="identity",  # 240 kB less
    )
    Path("raw/spiece.vocab").unlink()
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2}
    settings = T5Settings(vocabulary_rows=small_runs.ROWS, **sizes)
    save_backbone(T5(settings, jax.random.key(0)), Path("raw"), "float32")
    Path("task").mkdir()
    task = small_runs.write_task(Path("task"))
    half = small_runs.full_run(task, "raw") | {"steps": 60}
    small_runs.write_config(Path("raw.yaml"), half)
    result = train(load_run("raw.yaml"), "half")
    print("backbone", result["test"])
    cli("export", "half", "--format", "hf", "--to", "backbone")
    for kind in ("int8", "nf4"):
        cli("import", "backbone", "--to", kind, "--quantize", kind, "--dtype", "float32")
    return task


def write_configs(task: dict[str, Any]) -> None:
    turned = task | {"name": "turned", "target": {"yes": "no", "no": "yes"}, "input": "{text} today"}
    both = {"kind": "mixture", "name": "both", "tasks": [task, turned], "prompts": "own"}
    short = small_runs.short_run(task, "backbone") | {"steps": 20, "evaluate_every": 5, "log_every": 2}
    for name, changes in {**RUNS, **STARTS, **STOPPED}.items():
        settings = short | changes
        if settings["task"] == "both":
            settings["task"] = both
        settings = {"optimizer": OPTIMIZERS.get(settings["methods"][0]["kind"], ADAMW)} | settings
        if settings["optimizer"] is None:  # the method's own
            del settings["optimizer"]
        small_runs.write_config(Path(f"{name}.yaml"), settings)
    small_runs.write_config(Path("sweep.yaml"), short | {"methods": [PROMPT], "steps": 10})


def make_stopped(goldens: dict[str, Any]) -> None:
    """Make runs that were stopped, by SIGTERM and by SIGKILL, and what they end as."""
    for name in STOPPED:
        for seed in range(40):  # one whose best step comes after its stop
            run = load_run(f"{name}.yaml", [f"seed={seed}"])
            result = train(run, f"whole/{name}/{seed}")
            if result["best_step"] > 12:
                break
        else:
            raise AssertionError(f"{name}: no seed has its best step late")
        values = yaml.safe_load(Path(f"{name}.yaml").read_text()) | {"seed": seed}
        small_runs.write_config(Path(f"{name}.yaml"), values)
        print(name, "seed", seed, result["validation"], result["baselines"]["untrained"])
        if name in ("stopped", "stopped_mixture"):
            try:
                train(load_run(f"{name}.yaml"), name, Stopping(8, signal.SIGTERM))
                raise AssertionError("it was not stopped")
            except Preempted as told:
                print(told)
        else:
            killed(name, 12)
        shutil.rmtree(Path(name) / "tensorboard")  # whose file has the name of this machine
        shutil.copytree(name, f"continued/{name}")
        train(load_run(f"{name}.yaml"), f"continued/{name}")
        whole, again = Path(f"whole/{name}/{seed}"), Path(f"continued/{name}")
        for file in ("prompt.safetensors", "trained.safetensors"):
            if (whole / file).exists():
                assert (whole / file).read_bytes() == (again / file).read_bytes(), "it goes on to other bits"
        goldens["arrays"] |= {
            f"{name}/final/{key}": value for key, value in load_file(whole / "trained.safetensors").items()
        }
        goldens["said"][name] = {"losses": losses(again), "result": result_of(whole)}


def losses(folder: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line["step"], line["loss"]] for line in lines if "loss" in line]


def result_of(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text())
    return {key: value for key, value in result.items() if key != "seconds"}


def make_sweeps(goldens: dict[str, Any]) -> None:
    """Make a finished sweep, and one whose second pair of prompts was stopped."""
    goldens["said"]["sweep"] = sweep("sweep.yaml", OVER, "sweep")

    class Second(Stopping):
        pairs = 0

        def start(self, what: str, step: int, steps: int) -> None:
            self.pairs += 1
            self.step = 4 if self.pairs == 2 else -1

    try:
        sweep("sweep.yaml", OVER, "sweep_stopped", together=2, reporter=Second(-1, signal.SIGTERM))
        raise AssertionError("it was not stopped")
    except Preempted as told:
        print(told)
    shutil.copytree("sweep_stopped", "continued/sweep_stopped")
    sweep("sweep.yaml", OVER, "continued/sweep_stopped", together=2)
    names = [run["name"] for run in goldens["said"]["sweep"]["runs"]]
    for name in names:
        goldens["arrays"][f"sweep_stopped/{name}"] = load_prompt(f"continued/sweep_stopped/{name}")
    sources = [f"sweep/{name}" for name in names]
    goldens["said"]["ensemble"] = ensemble(sources, split="test")
    goldens["said"]["rank_sources"] = rank_sources("prompt", sources)
    goldens["said"]["inspect"] = without_plane(inspect(["prompt", *sources[:2]]))


def make_bank(goldens: dict[str, Any]) -> None:
    """Gather prompts of every kind that a bank takes, and ask it by the command line."""
    bank = Path("bank")
    bank.mkdir()
    for name in ("prompt", "prefix", "ia3", "prompt_and_ia3", "after"):
        (bank / name).mkdir()
        for file in ("config.yaml", "trained.safetensors", "prompt.safetensors", "result.json"):
            if (Path(name) / file).exists():
                shutil.copy(Path(name) / file, bank / name / file)
    shutil.copy("own/prompts/turned.safetensors", bank / "turned.safetensors")
    np.save(bank / "rows.npy", 3 * np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32))
    rows = 3 * np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    save_prompt(rows, bank / "both.safetensors", {"place": "both", "backbone": "backbone"})
    names = sorted(path.stem if path.is_file() else path.name for path in bank.iterdir())
    answered = cli("predict", bank, stdin="".join(json.dumps(line) + "\n" for line in asked(names)))
    goldens["said"]["bank"] = [json.loads(line) for line in answered.splitlines()]


def make_exports() -> None:
    cli("export", "lora", "--format", "peft", "--to", "exports/peft_lora")
    cli("export", "prompt", "--format", "peft", "--to", "exports/peft_prompt")
    cli("export", "lora", "--format", "hf", "--to", "exports/hf")
    cli("export", "prompt", "--format", "npy", "--to", "exports/prompt.npy")
    cli("export", "prompt", "--format", "safetensors", "--to", "exports/prompt.safetensors")
    cli("export", "ia3", "--format", "safetensors", "--to", "exports/ia3.safetensors")
    # A program says which line of which file each operation is from; without it, absolute paths.
    os.environ["JAX_HLO_SOURCE_FILE_CANONICALIZATION_REGEX"] = ".*/"
    cli("export", "prompt", "--format", "stablehlo", "--to", "exports/program", "--max-tokens", 4)


# ------------------------------------------------------------------------------------------------ how it is packed

ARCHIVES = {
    "base": ["backbone", "int8", "nf4", "task"],
    "runs": list(RUNS),
    "stopped": list(STOPPED),
    "sweeps": ["sweep", "sweep_stopped"],
    "bank": ["bank"],
    "exports": ["exports"],
}


def pack(name: str, paths: list[Path]) -> None:
    """Write files as an archive that says nothing of when, where and by whom it was made."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(paths):
            content = path.read_bytes()
            if path.name == "commit_success.txt":  # Orbax tells the absolute path and asks only whether the file exists
                content = content.replace(str(Path.cwd()).encode(), b"")
            for place in (Path.cwd(), HERE.parents[1], Path(sys.prefix)):
                assert str(place).encode() not in content, path
            entry = tarfile.TarInfo(str(path))
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    (HERE / f"{name}.tar.gz").write_bytes(gzip.compress(out.getvalue(), 9, mtime=0))


def files_in(folder: str) -> list[Path]:
    kept = ("prompt", "lora", *STOPPED, "sweep_stopped")
    return [
        path
        for path in Path(folder).rglob("*")
        if path.is_file()
        and "tensorboard" not in path.parts  # whose files have the name of the machine
        and not path.name.endswith(".lock")
        and ("checkpoints" not in path.parts or path.parts[0] in kept)
    ]


def main() -> None:
    task = make_backbone()
    write_configs(task)
    goldens: dict[str, Any] = {"arrays": {}, "said": {}}
    for name in RUNS:
        result = train(load_run(f"{name}.yaml"), name)
        print(name, result["best_step"], result["validation"], result["baselines"]["untrained"])
    for name in STARTS:
        train(load_run(f"{name}.yaml"), name)
        goldens["arrays"][f"{name}/final"] = load_prompt(name)
    make_stopped(goldens)
    make_sweeps(goldens)
    make_bank(goldens)
    make_exports()
    bare = logits_of_backbone(load_backbone("backbone"))
    for name in RUNS:
        for label, predictor in prompts_of(name):
            found, said = measured(predictor)
            if "logits" in found and name not in ("embedded", "hard"):
                assert np.abs(found["logits"] - bare).max() > 0.01, f"{name}: has learnt nothing"
            goldens["arrays"] |= {f"{label}/{key}": value for key, value in found.items()}
            goldens["said"][label] = said
    for name in ("backbone", "int8", "nf4", "exports/hf"):
        goldens["arrays"][f"{name}/logits"] = logits_of_backbone(load_backbone(name))
    for name in ("peft_lora", "peft_prompt"):
        goldens["arrays"][f"exports/{name}/logits"] = logits_of_backbone(
            load_backbone("backbone", adapter=f"exports/{name}")
        )
    for name, folders in ARCHIVES.items():
        paths = [path for folder in folders for path in files_in(folder)]
        pack(name, paths + (sorted(Path().glob("*.yaml")) if name == "base" else []))
    np.savez_compressed(HERE / "goldens.npz", **goldens["arrays"])
    (HERE / "goldens.json").write_text(json.dumps(goldens["said"], indent=1, ensure_ascii=False) + "\n")
    for path in sorted(HERE.iterdir()):
        print(f"{path.name:16} {path.stat().st_size:8,}" if path.is_file() else "")


if __name__ == "__main__":
    if len(sys.argv) == 3:  # in a child
        train(load_run(f"{sys.argv[1]}.yaml"), sys.argv[1], Stopping(int(sys.argv[2]), signal.SIGKILL))
        raise AssertionError("it lives")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["SOFTPROMPT_CACHE"] = str(Path(folder) / "cache")
        main()
