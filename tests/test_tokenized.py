"""The cache of tokens: whole or made anew, safe for several writers; a million examples in little memory."""

from __future__ import annotations

import json
import multiprocessing
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_batches import ROWS, Letters, some_examples

from softprompt_jax.data.tokenized import TokenizedSet, concatenate, tokenize

ARRAYS = ("inputs", "input_offsets", "targets", "target_offsets")


def tokens(folder: Path | None, tokenizer: Letters | None = None) -> TokenizedSet:
    return tokenize(some_examples(30), tokenizer or Letters(), ROWS, 12, 8, cache=folder)


def same(first: TokenizedSet, second: TokenizedSet) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ARRAYS) and (
        first.truncated_inputs == second.truncated_inputs
    )


def test_examples_are_read_again_but_tokenised_once(tmp_path):
    tokenizer = Letters()
    expected = tokens(tmp_path, tokenizer)
    calls = tokenizer.calls
    assert same(tokens(tmp_path, tokenizer), expected)
    assert tokenizer.calls == calls
    # An iterator can be gone through only once.
    assert same(tokenize(iter(some_examples(30)), tokenizer, ROWS, 12, 8, cache=tmp_path), expected)
    assert tokenizer.calls == calls


def test_another_tokenizer_has_another_place(tmp_path):
    other = Letters()
    other.fingerprint = "others"
    tokens(tmp_path)
    tokens(tmp_path, other)
    assert other.calls
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_file_is_made_anew(tmp_path):
    expected = tokens(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    draw = random.Random(0)
    damaged = [whole[: draw.randrange(len(whole))] for _ in range(5)] + [b"", b"nonsense" * 99]
    for place in draw.sample(range(len(whole)), 150):
        damaged.append(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        assert same(tokens(tmp_path), expected)
    path.write_bytes(damaged[0])
    tokenizer = Letters()
    tokens(tmp_path, tokenizer)
    assert tokenizer.calls
    assert len(list(tmp_path.iterdir())) == 1
    assert same(tokens(tmp_path), expected)


def _write(folder: str, count: int) -> None:
    for _ in range(count):
        for path in Path(folder).glob("*.npz"):
            path.unlink(missing_ok=True)
        assert same(tokens(Path(folder)), tokens(None))


def test_several_writers_leave_one_whole_file(tmp_path):
    context = multiprocessing.get_context("forkserver")
    writers = [context.Process(target=_write, args=(str(tmp_path), 40)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    tokens(tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".npz"


def test_sets_of_several_tasks_are_one_after_the_other():
    sets = [tokenize(some_examples(count, seed=count), Letters(), ROWS, 48, 8) for count in (5, 9)]
    joined = concatenate(sets)
    assert joined.tasks.tolist() == [0] * 5 + [1] * 9
    for index in range(14):
        part, own = (sets[0], index) if index < 5 else (sets[1], index - 5)
        np.testing.assert_array_equal(joined.input(index), part.input(own))
        np.testing.assert_array_equal(joined.target(index), part.target(own))


MILLION = """
import itertools, json, sys
import numpy as np
from softprompt_jax.data.packing import Packing
from softprompt_jax.data.batches import TrainBatches, examples_in
from softprompt_jax.data.prompt_layout import PromptLayout
from softprompt_jax.data.task import Task, iterate
from softprompt_jax.data.tokenized import tokenize
from softprompt_jax.data.tokenizer import load_tokenizer

path, backbone, cache = sys.argv[1:]
task = Task(source={"kind": "files", "train": path}, label_words=["yes", "no"])

class Train:
    def __iter__(self):
        return iterate(task, "train")

from pathlib import Path
rows = 8192
tokens = tokenize(Train(), load_tokenizer(backbone), rows, 64, 8, cache=Path(cache))
prompt = PromptLayout(np.arange(rows, rows + 20))
counts = []
for packing in (None, Packing(length=512)):
    batches = TrainBatches(tokens, 256, 0, prompt, packing=packing)
    start = batches.batches_per_epoch - 3  # over the end of an epoch
    counts.append(sum(examples_in(batch) for batch in itertools.islice(batches.from_step(start), 6)))
# Not ru_maxrss, which begins at the size of the process that started this one.
peak = next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"examples": len(tokens), "counts": counts, "peak_mib": peak}))
"""


@pytest.mark.slow
def test_a_million_short_examples_need_little_memory(tmp_path):
    draw = random.Random(0)
    words = ["room", "tea", "night", "train", "corner", "shop", "garden", "slow", "bright", "quick", "the", "is", "and"]
    with (tmp_path / "train.jsonl").open("w") as file:
        for number in range(1_000_000):
            text = " ".join(draw.choices(words, k=draw.randint(4, 14)))
            file.write(json.dumps({"text": f"{text} {number}", "label": "yes" if number % 2 else "no"}) + "\n")
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", MILLION, tmp_path / "train.jsonl", root / "softprompt_jax/embedded", tmp_path]
    done = subprocess.run(list(map(str, command)), cwd=root, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["examples"] == 1_000_000
    assert result["counts"] == [6 * 256, pytest.approx(6 * 256, rel=0.05)]
    assert result["peak_mib"] < 1500
