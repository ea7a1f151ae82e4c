"""What a batch of 32 different prompts costs, against one prompt of that length.

Three contestants take turns, call by call: the bank with a prompt for each row, the bank with one prompt for all rows,
and the backbone with one prompt attached. All decode the same texts for as many forced tokens: the work is equal.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time

import jax
import machine
import numpy as np
from flax import nnx

from softprompt_jax import PromptBank, load_backbone
from softprompt_jax.backbone import decode
from softprompt_jax.bank import Structure
from softprompt_jax.methods.prompt import attach_rows


@functools.partial(jax.jit, static_argnums=0)
def _decoded(structure: Structure, first, rest, tokens, forced):
    return decode.greedy(structure.merge(first, rest), tokens, forced.shape[1], forced=forced)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt-length", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64, help="of a text")
    parser.add_argument("--answer", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=40)
    chosen = parser.parse_args()
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
    alone = nnx.merge(*nnx.split(backbone.model))
    attach_rows(alone, prompts[0])
    graphdef, rows, rest = nnx.split(alone, lambda path, _: path[0] == "prompt", ...)
    before = np.broadcast_to(np.asarray(alone.prompt.placement.before, np.int32), (chosen.batch, chosen.prompt_length))

    def bank_call(names: list[str]):
        sides = [bank.sides(name, row.tolist())[0] for name, row in zip(names, texts, strict=True)]
        return (*bank.parts, np.asarray(sides, np.int32), forced)

    ends = np.full((chosen.batch, 1), decode.EOS, np.int32)
    contestants = {
        "bank, a prompt each": bank_call([str(number) for number in range(chosen.batch)]),
        "bank, one prompt": bank_call(["0"] * chosen.batch),
        "attached, one prompt": (Structure(graphdef), rows, rest, np.concatenate([before, texts, ends], 1), forced),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    busy, own, started = machine.busy_seconds(), machine.cpu_seconds(), time.monotonic()
    for number in range(chosen.rounds + 2):
        for name, call in contestants.items():
            begun = time.process_time()
            jax.block_until_ready(_decoded(*call))
            if number >= 2:  # compiled, and once more
                seconds[name].append(time.process_time() - begun)
    others = machine.busy_seconds() - busy - (machine.cpu_seconds() - own)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    mixed = medians["bank, a prompt each"]
    result = machine.describe() | {
        "settings": vars(chosen),
        "cpu_seconds_a_batch": {name: round(value, 5) for name, value in medians.items()},
        "more_than_one_prompt_in_the_bank": round(mixed / medians["bank, one prompt"] - 1, 4),
        "more_than_one_prompt_attached": round(mixed / medians["attached, one prompt"] - 1, 4),
        "others_used_cores": round(others / (time.monotonic() - started), 2),
    }
    path = machine.ROOT / "benchmarks" / "results" / "mixed_prompts.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
