"""Runs that are killed: started again by the same command they end with the same bits as one that was not."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import train_in, write_config

ROOT = Path(__file__).resolve().parents[1]
TIMINGS = {"seconds", "examples_per_s", "tokens_per_s"}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a function that starts a run in a process forked from one that has imported JAX but not used it."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("SOFTPROMPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        context.set_forkserver_preload(["small_runs", "softprompt_jax.training.loop"])

        def started(folder: Path, config: Path, point: str = "", count: int = 0):
            process = context.Process(target=train_in, args=(str(folder), str(config), point, count))
            process.start()
            return process

        yield started


def ended(process) -> int:
    process.join(300)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


def written(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def bits(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def result(folder: Path) -> dict:
    return {k: v for k, v in json.loads((folder / "result.json").read_text()).items() if k not in TIMINGS}


def check_same(folder: Path, uninterrupted: Path) -> None:
    assert bits(folder) == bits(uninterrupted)
    assert metrics(folder) == metrics(uninterrupted)
    assert result(folder) == result(uninterrupted)
    assert (folder / "config.yaml").read_bytes() == (uninterrupted / "config.yaml").read_bytes()
    leftover = [path for path in folder.rglob("*") if "partial" in path.name or "tmp" in path.name]
    assert not leftover
    assert len(list((folder / "checkpoints").iterdir())) <= 2


@pytest.mark.slow
def test_run_killed_while_it_saves_and_while_it_validates(start, small, prompt_run, tmp_path):
    config, run = write_config(tmp_path / "a.yaml", small.short), tmp_path / "run"
    assert ended(start(run, config, "save", 3)) == -signal.SIGKILL  # at step 15, after a validation at 10
    assert not (run / "result.json").exists()
    assert ended(start(run, config, "validate", 2)) == -signal.SIGKILL
    assert 10 < len(metrics(run)) < len(metrics(prompt_run))
    assert ended(start(run, config)) == 0
    check_same(run, prompt_run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "count"),
    [
        ("save", 1),
        ("save", 8),  # the last checkpoint
        ("validate", 1),
        ("validate", 5),
        ("replace", 1),  # before config.yaml
        ("replaced", 1),
        ("replace", 2),  # before trained.safetensors
        ("replaced", 2),
        ("replace", 4),  # before result.json
        ("replaced", 4),
    ],
)
def test_run_killed_at_any_point(start, small, prompt_run, tmp_path, point, count):
    config, run = write_config(tmp_path / "a.yaml", small.short), tmp_path / "run"
    assert ended(start(run, config, point, count)) == -signal.SIGKILL
    assert ended(start(run, config)) == 0
    check_same(run, prompt_run)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_run_killed_at_random_times_again_and_again(start, small, tmp_path, seed):
    settings = small.short | {"steps": 400, "evaluate_every": 40, "checkpoint_every": 7, "log_every": 3}
    config, run, whole = write_config(tmp_path / "a.yaml", settings), tmp_path / "run", tmp_path / "whole"
    assert ended(start(whole, config)) == 0
    draw = random.Random(seed)
    for _ in range(6):
        before = written(run)
        process = start(run, config)
        wanted = draw.choice(["start", "steps", "steps", "checkpoint"])
        while process.is_alive():
            if wanted == "start":
                time.sleep(draw.uniform(0, 3))
                break
            if wanted == "steps" and written(run) > before + draw.randrange(2000):
                break
            if wanted == "checkpoint" and list(run.glob("checkpoints/*tmp*")):
                break
        process.kill()
        ended(process)
    assert ended(start(run, config)) == 0
    check_same(run, whole)


def interruptible(config: Path, run: Path, before: str = "") -> subprocess.Popen:
    """Start `softprompt train` in a process that heeds interrupts, after the statements in `before`."""
    # A shell that runs the tests in the background has them ignore interrupts.
    code = f"import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{before}\n"
    code += "runpy.run_module('softprompt_jax', run_name='__main__')"
    command = [sys.executable, "-c", code, "train", str(config), "--out", str(run)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_an_interrupted_run_has_saved_and_goes_on_from_there(small, tmp_path):
    never = {"steps": 10**6, "evaluate_every": 10**6, "checkpoint_every": 10**6}
    config, run = write_config(tmp_path / "a.yaml", small.short | never), tmp_path / "run"
    saved = None
    for _ in range(2):
        with interruptible(config, run) as running:
            before = written(run)
            while written(run) < before + 1000:
                assert running.poll() is None
                time.sleep(0.05)
            running.send_signal(signal.SIGINT)
            out, err = running.communicate(timeout=120)
        lines = err.splitlines()
        assert (running.returncode, out) == (130, ""), err
        assert "softprompt: interrupted; saving after this step; Ctrl-C again leaves at once" in lines
        step = re.fullmatch(
            rf"softprompt: {run}: told to stop, saved at step (\d+); the same command goes on", lines[-1]
        )
        assert step, err
        assert max(int(path.name) for path in (run / "checkpoints").iterdir()) == int(step[1])
        assert saved is None or f"resumed at step {saved}" in lines
        saved = step[1]


@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once_though_a_step_takes_minutes(small, tmp_path):
    config, run = write_config(tmp_path / "a.yaml", small.short), tmp_path / "run"
    slow = "import time, softprompt_jax.training.loop as loop; made = loop.make_step\n"
    slow += "def waiting():\n    print('in', flush=True)\n    while True:\n        try: time.sleep(600)\n"
    slow += "        except KeyboardInterrupt: pass\n"
    slow += "loop.make_step = lambda *_: lambda *_: waiting()"
    with interruptible(config, run, slow) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "in\n"
        running.send_signal(signal.SIGINT)
        time.sleep(1)
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, err = running.communicate(timeout=120)
    assert running.returncode == 130
    assert time.monotonic() - began < 5
    assert "softprompt: interrupted; the same command goes on" in err.splitlines()[-1]
