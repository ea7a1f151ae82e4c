"""Several processes predict and evaluate as one, and end together."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import small_runs
from test_multihost import ROOT, finish, free_port

from softprompt_jax.config import UserError
from softprompt_jax.distributed import mesh as sharding
from softprompt_jax.inference import shares
from softprompt_jax.inference.shares import Share

TEXTS = [row["text"] for row in small_runs.rows()[:23]]


def start(count: int, *arguments: object, **environment: str) -> list[subprocess.Popen]:
    """Start a command in so many processes."""
    port, started = free_port(), []
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    for index in range(count):
        command = [sys.executable, "-m", "softprompt_jax", *map(str, arguments)]
        if count > 1:
            command += ["--coordinator", f"localhost:{port}", "--processes", str(count), "--process", str(index)]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
    return started


@pytest.fixture
def lines(tmp_path) -> Path:
    return small_runs.write_rows(
        tmp_path / "texts.jsonl", [{"text": text, "number": i} for i, text in enumerate(TEXTS)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "{data: 1, fsdp: 2}"])
def test_two_processes_predict_the_lines_and_scores_of_one(prompt_run, lines, tmp_path, mesh):
    mesh = [] if mesh is None else ["--mesh", mesh]
    found = {}
    for count in (1, 2):
        out = tmp_path / f"{count}.jsonl"
        own = mesh if count == 2 else []
        predicted = finish(start(count, "predict", prompt_run, "--input", lines, "--output", out, "--trust", *own))
        assert [code for code, *_ in predicted] == [0] * count, predicted
        scored = finish(start(count, "eval", prompt_run, "--trust", *own))
        assert [code for code, *_ in scored] == [0] * count, scored
        assert [bool(text) for _, text, _ in scored] == [True, *[False] * (count - 1)]  # one speaks for all
        found[count] = out.read_text(), json.loads(scored[0][1])
    assert found[1] == found[2]
    assert [json.loads(line)["number"] for line in found[2][0].splitlines()] == list(range(len(TEXTS)))
    assert {path.name for path in tmp_path.glob("*.jsonl*")} == {"texts.jsonl", "1.jsonl", "2.jsonl"}  # no part is left


@pytest.mark.slow
def test_a_bank_is_shared_by_two_processes_too(prompt_run, tmp_path):
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "moods").symlink_to(prompt_run)
    asked = small_runs.write_rows(tmp_path / "in.jsonl", [{"inputs": text, "prompt": "moods"} for text in TEXTS])
    for count in (1, 2):
        done = finish(
            start(count, "predict", tmp_path / "bank", "--trust", "--input", asked, "--output", tmp_path / str(count))
        )
        assert [code for code, *_ in done] == [0] * count, done
    assert (tmp_path / "1").read_text() == (tmp_path / "2").read_text()


@pytest.mark.slow
def test_a_bad_line_ends_all_processes_with_the_same_words(prompt_run, tmp_path):
    asked = small_runs.write_rows(tmp_path / "in.jsonl", [*({"text": text} for text in TEXTS), {"wrong": 1}])
    done = finish(start(2, "predict", prompt_run, "--trust", "--input", asked, "--output", tmp_path / "out"), 120)
    assert [code for code, *_ in done] == [2, 2], done
    assert all(f"{asked}:24: " in err for _, _, err in done), done
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_standard_output_is_no_place_for_several_processes(prompt_run, lines):
    for code, _, err in finish(start(2, "predict", prompt_run, "--trust", "--input", lines), 120):
        assert (code, "expected --input and --output files" in err) == (2, True), err


@pytest.mark.slow
def test_when_a_process_is_killed_the_other_ends_and_says_which(prompt_run, tmp_path):
    many = small_runs.write_rows(tmp_path / "many.jsonl", [{"text": text} for text in TEXTS] * 4000)
    started = start(2, "predict", prompt_run, "--trust", "--input", many, "--output", tmp_path / "out")
    until = time.monotonic() + 300
    while not all((tmp_path / f"out.part-00{n}-of-002").exists() for n in (1, 2)):
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(2)
    started[1].kill()
    killed = time.monotonic()
    (code, _, err), _ = finish(started, 120)
    assert code != 0
    assert time.monotonic() - killed < 60
    assert "stopped sending heartbeats" in err or "Task 1 heartbeat timeout" in err or "task:1" in err, err[-3000:]


def test_shares_are_even_and_joined_in_order(tmp_path):
    share = Share.of_lines(23, 0, 3)
    assert share == Share(0, 3, 8)
    assert Share.of_lines(10**6, 1, 2).chunk == shares.CHUNK
    assert Share.of_lines(0, 0, 2).chunk == 1
    output, every = str(tmp_path / "out"), [f"{number}\n" for number in range(23)]
    for index in range(3):
        own = [every[start : start + 8] for start in range(0, 23, 8) if start // 8 % 3 == index]
        Path(shares.part_name(output, share._replace(index=index))).write_text("".join(itertools.chain(*own)))
    shares.join(output, share)
    assert (tmp_path / "out").read_text() == "".join(every)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match=r"out.part-001-of-003: not there; expected a folder that all processes see"):
        shares.join(output, share)


@pytest.mark.parametrize(
    ("owners", "blocks"),
    [
        ([[[0]], [[0]], [[1]], [[1]]], [{0}, {1}]),  # data 4: two processes of two devices
        ([[[0], [0]], [[1], [1]]], [{0}, {1}]),  # data 2, fsdp 2: weights are cut inside a process
        ([[[0], [1]]], [{0, 1}]),  # fsdp 2: weights are cut over the processes
        ([[[0], [1]], [[2], [3]]], [{0, 1}, {2, 3}]),
        ([[[0]], [[1]], [[0]], [[1]]], [{0, 1}]),  # no block of rows is one process's
    ],
)
def test_processes_over_which_weights_are_cut_compute_together(owners, blocks):
    devices = np.vectorize(lambda process: types.SimpleNamespace(process_index=process))(np.asarray(owners))
    found = sharding.blocks_of_processes(devices)
    assert [{device.process_index for device in block.flat} for block in found] == blocks
    assert sum(block.size for block in found) == devices.size
