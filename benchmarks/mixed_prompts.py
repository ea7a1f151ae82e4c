"""What a batch of 32 different prompts costs, against one prompt of that length, and against PEFT.

    .venv-torch/bin/python benchmarks/mixed_prompts.py [--rounds 20]      # without torch: --no-peft; about two minutes

Contestants take turns, batch by batch: the bank with a prompt for each text, the bank with one prompt for all, the
backbone with one prompt attached; and in a process of its own PEFT, which has one prompt in a batch: a batch of one
text for each of the 32 prompts, or all texts under one. Each decodes the same texts for as many tokens. Before that,
the bank and PEFT must give the same greedy answers. A line is appended to results/mixed_prompts.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np

RESULTS = machine.ROOT / "benchmarks" / "results" / "mixed_prompts.jsonl"


def peft(folder: Path, tokens: int) -> None:
    """Obey words on stdin: `answers`, or a way of batching, which is timed."""
    import torch
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    about = json.loads((folder / "about.json").read_text())
    prompts, texts = np.load(folder / "prompts.npy"), torch.from_numpy(np.load(folder / "texts.npy").astype(np.int64))
    kind = AutoModelForCausalLM if about["causal"] else T5ForConditionalGeneration
    task = "CAUSAL_LM" if about["causal"] else "SEQ_2_SEQ_LM"
    backbone = kind.from_pretrained(about["backbone"], dtype=torch.float32)
    config = PromptTuningConfig(task_type=task, num_virtual_tokens=prompts.shape[1], num_transformer_submodules=1)
    model = get_peft_model(backbone, config, adapter_name="p0").eval()
    for number, rows in enumerate(prompts):
        if number:
            model.add_adapter(f"p{number}", config)
        model.prompt_encoder[f"p{number}"].embedding.weight.data.copy_(torch.from_numpy(rows))

    def answered(name: str, rows: Any, **least: int) -> list[list[int]]:
        model.set_adapter(name)
        with torch.inference_mode():
            found = model.generate(
                input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=tokens, do_sample=False, **least
            )
        return found[
            :, rows.shape[1] if about["causal"] else 1 :
        ].tolist()  # behind the context, or the decoder's start

    for word in map(str.strip, sys.stdin):
        told: dict[str, Any] = {}
        cpu = machine.cpu_seconds()
        if word == "answers":
            told["tokens"] = [answered(f"p{n}", texts[n : n + 1])[0] for n in range(len(texts))]
        elif word == "a prompt each":
            for n in range(len(texts)):
                answered(f"p{n}", texts[n : n + 1], min_new_tokens=tokens)
        else:
            answered("p0", texts, min_new_tokens=tokens)
        out.write(json.dumps(told | {"cpu_s": machine.cpu_seconds() - cpu}) + "\n")


class Peft:
    """That process, pinned to this one's core."""

    def __init__(self, folder: Path, tokens: int):
        command = [sys.executable, __file__, "--peft-in", str(folder), "--answer", str(tokens)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the process of PEFT has ended; is torch installed? else add --no-peft")
        return json.loads(line)


def answer(row: list[int], eos: int, padding: int) -> list[int]:
    """Return an answer's tokens before its EOS."""
    row = [token for token in row if token > padding]
    return row[: row.index(eos)] if eos in row else row


def main() -> None:
    """Let all take turns, print and append what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="embedded", help="embedded, smollm2, or a Hugging Face folder")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt-length", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64, help="of a text")
    parser.add_argument("--answer", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--peft-in", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, for the child too
    if chosen.peft_in:
        peft(chosen.peft_in, chosen.answer)
        return
    import jax
    from flax import nnx

    from softprompt_jax import PromptBank, load_backbone
    from softprompt_jax.cli.allocator import keep_freed_memory
    from softprompt_jax.inference.programs import DeviceModel
    from softprompt_jax.methods.prompt import attach_rows
    from softprompt_jax.models import decode

    @functools.partial(jax.jit, static_argnums=3)
    def decoded(model: DeviceModel, tokens: Any, forced: Any, most: int) -> Any:
        return decode.greedy(model.merge(), tokens, most, forced=forced)[0]

    keep_freed_memory()
    backbone = load_backbone(chosen.backbone)
    draw, settings = np.random.default_rng(0), backbone.settings
    deviation = float(np.asarray(backbone.model.embedding[...], np.float32).std())
    prompts = deviation * draw.normal(size=(chosen.batch, chosen.prompt_length, settings.d_model)).astype(np.float32)
    bank = PromptBank(backbone)
    for number, rows in enumerate(prompts):
        bank.add(str(number), rows)
    bank.load(set(bank.names))
    texts = draw.integers(100, settings.vocabulary_rows - 200, (chosen.batch, chosen.tokens)).astype(np.int32)
    forced = draw.integers(100, settings.vocabulary_rows - 200, (chosen.batch, chosen.answer)).astype(np.int32)
    causal, eos, padding = backbone.text_format.causal, settings.eos, settings.padding
    end = [] if causal else [eos]
    ends = np.full((chosen.batch, len(end)), eos, np.int32)
    alone = nnx.merge(*nnx.split(backbone.model))
    attach_rows(alone, prompts[0])
    before = np.broadcast_to(np.asarray(alone.prompt.layout.before, np.int32), (chosen.batch, chosen.prompt_length))

    def in_bank(names: list[str]) -> tuple[Any, ...]:
        sides = [bank.sides(name, [*row.tolist(), *end])[0] for name, row in zip(names, texts, strict=True)]
        return (bank.device.model, np.asarray(sides, np.int32))

    each = in_bank([str(number) for number in range(chosen.batch)])
    calls = {
        "bank, a prompt each": each,
        "bank, one prompt": in_bank(["0"] * chosen.batch),
        "attached, one prompt": (
            DeviceModel.of(alone, lambda path, _: path[0] == "prompt"),
            np.concatenate([before, texts, ends], 1),
        ),
    }
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, other, agree = Path(name), None, None
        if not chosen.no_peft:
            np.save(folder / "prompts.npy", prompts)
            np.save(folder / "texts.npy", np.concatenate([texts, ends], 1))
            (folder / "about.json").write_text(json.dumps({"backbone": str(backbone.folder), "causal": causal}))
            other = Peft(folder, chosen.answer)
            free = np.asarray(decoded(*each, forced[:, :0], chosen.answer))
            pairs = zip(free.tolist(), other("answers")["tokens"], strict=True)
            agree = statistics.mean(
                float(answer(ours, eos, padding) == answer(theirs, eos, padding)) for ours, theirs in pairs
            )
            if agree < 0.9:
                raise SystemExit(f"{agree:.0%} of the answers agree; expected at least 90%")
        busy, own, started = machine.busy_seconds(), machine.cpu_seconds(), time.monotonic()
        theirs = 0.0
        for number in range(chosen.rounds + 2):
            taken: dict[str, float] = {}
            for title, call in calls.items():
                begun = machine.cpu_seconds()
                jax.block_until_ready(decoded(*call, forced, chosen.answer))
                taken[title] = machine.cpu_seconds() - begun
            for word in ("a prompt each", "one prompt") if other and number % 4 == 0 else ():
                taken[f"peft, {word}"] = other(word)["cpu_s"]
                theirs += taken[f"peft, {word}"]
            if number >= 2 or (other and number == 0 and chosen.rounds < 3):  # compiled, and once more
                for title, value in taken.items():
                    seconds.setdefault(title, []).append(value)
        others = machine.busy_seconds() - busy - (machine.cpu_seconds() - own) - theirs
        elapsed = time.monotonic() - started
        if other:
            assert other.process.stdin is not None
            other.process.stdin.close()
            other.process.wait()
    medians = {title: statistics.median(values) for title, values in seconds.items()}
    mixed = medians["bank, a prompt each"]
    result = machine.describe() | {
        "settings": {key: value for key, value in vars(chosen).items() if key not in ("results", "peft_in")},
        "cpu_seconds_a_batch": {title: round(value, 5) for title, value in medians.items()},
        "least": {title: round(min(values), 5) for title, values in seconds.items()},
        "more_than_one_prompt_in_the_bank": round(mixed / medians["bank, one prompt"] - 1, 4),
        "more_than_one_prompt_attached": round(mixed / medians["attached, one prompt"] - 1, 4),
        "times_peft": {title: round(value / mixed, 2) for title, value in medians.items() if title.startswith("peft")},
        "answers_that_agree": agree,
        "others_used_cores": round(others / elapsed, 2),
    }
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    with chosen.results.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps({key: result[key] for key in list(result)[4:]}, indent=2))


if __name__ == "__main__":
    main()
