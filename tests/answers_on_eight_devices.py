"""Run by test_mesh_answers.py in a process of its own, since the number of devices is fixed when JAX starts.

    answers_on_eight_devices.py FOLDER WHAT MESH

FOLDER holds a backbone, runs and prompts. Prints JSON: what WHAT answers on one device and on the mesh, and of the
arrays that lie on the mesh the largest share of one that a device holds, and that is read at once.
"""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
# A program of several CPU devices that comes from the cache can wait for itself for ever (see on_eight_devices.py).
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import json
import math
import queue
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import small_runs
import tiny_lm
from flax import nnx

import softprompt_jax
from softprompt_jax.checkpoints.tensors import Tensor
from softprompt_jax.config import UserError
from softprompt_jax.distributed.mesh import Mesh
from softprompt_jax.trees import flatten

read: dict[str, float] = {}  # largest share of each matrix that was read at once
whole_read = Tensor.read


def noted_read(tensor: Tensor, index: Any = None) -> np.ndarray:
    values = whole_read(tensor, index)
    if len(tensor.shape) > 1 and min(tensor.shape[-2:]) >= WIDTH:
        read[tensor.name] = max(read.get(tensor.name, 0.0), values.size / math.prod(tensor.shape))
    return values


Tensor.read = noted_read  # type: ignore[method-assign]
ONE = Mesh().build(jax.devices()[:1])
TEXTS = [row["text"] for row in small_runs.rows()[:11]]
WIDTH = 16


def rows(length: int, seed: int) -> np.ndarray:
    return 3 * np.random.default_rng(seed).normal(size=(length, WIDTH)).astype(np.float32)


def shares(model: Any) -> dict[str, float]:
    """Return the share of each matrix that a device holds, by its path."""
    leaves = flatten(nnx.to_pure_dict(nnx.state(model)))
    matrices = {path: leaf for path, leaf in leaves.items() if leaf.ndim > 1 and not path.endswith(("rows", "scale"))}
    return {
        path: max(shard.data.size for shard in leaf.addressable_shards) / leaf.size for path, leaf in matrices.items()
    }


def arrays(backbone: Any) -> dict[str, Any]:
    """What `logits` and `generate` return for a backbone, by every way of decoding."""
    prompt = rows(3, 1)
    tokens = np.asarray([[7, 8, 9, 1], [10, 11, 1, 0], [12, 13, 14, 1]], np.int32)
    own = None if backbone.model.encoder is None else np.asarray([[0, 5, 6]] * 3, np.int32)
    found: dict[str, Any] = {"logits": np.asarray(softprompt_jax.logits(backbone, tokens, own, prompt)).tolist()}
    for name, how in (
        ("greedy", softprompt_jax.Greedy(repetition_penalty=1.3)),
        ("beam", softprompt_jax.Beam(beams=3)),
        ("sampling", softprompt_jax.Sampling(samples=2, top_p=0.9)),
    ):
        ids, scores = softprompt_jax.generate(backbone, tokens, prompt, 6, how, scores=True)
        found[name] = [np.asarray(ids).tolist(), np.asarray(scores).tolist()]
    return found


def bank_of(folder: Path, mesh: Any, causal: bool) -> Any:
    settings = {"trust": True, "mesh": mesh, "device_rows": 64, "batch_size": 4}
    if causal:
        return softprompt_jax.PromptBank.open(folder / "lm_bank", str(folder / "lm"), **settings)
    return softprompt_jax.PromptBank.open(folder / "bank", **settings)


def mixed(bank: Any) -> tuple[list[str], list[str]]:
    texts = TEXTS if bank.backbone.model.encoder is not None else [*tiny_lm.TEXTS] * 3
    return texts, [bank.names[number % len(bank.names)] for number in range(len(texts))]


def of_bank(bank: Any) -> dict[str, Any]:
    """What a bank answers to texts under mixed prompts, prefixes and factors."""
    texts, names = mixed(bank)
    words = [["yes", "no"]] * len(texts)
    return {
        "greedy": bank.generate(texts, names, 5),
        "beam": bank.answers(texts, names, 5, softprompt_jax.Beam(beams=3)),
        "words": [each.tolist() for each in bank.score_words(texts, names, words)],
    }


def of_server(bank: Any) -> dict[str, Any]:
    """What the server's engine answers to the same, while requests join and leave."""
    from softprompt_jax.inference import programs
    from softprompt_jax.serve.engine import Engine
    from softprompt_jax.serve.limits import Limits
    from softprompt_jax.serve.requests import Request, make_job

    limits = Limits(slots=8, max_input_tokens=32, max_prompt_rows=12, max_tokens=5, timeout_s=900)
    engine = Engine(bank, limits)
    engine.start()
    compiled = programs.advance_slots._cache_size(), programs.join_slots._cache_size()
    texts, names = mixed(bank)
    jobs, heard = [], queue.Queue()
    for text, name in zip(texts, names, strict=True):
        request = Request(inputs=text, prompt=name, max_tokens=5, words=["yes"])
        job = make_job(request, engine, heard.put)
        engine.submit(job)
        jobs.append(job)
        time.sleep(0.02)
    ends = [heard.get(timeout=900) for _ in jobs]
    assert all(end is True for end in ends), ends
    again = programs.advance_slots._cache_size(), programs.join_slots._cache_size()
    cut = [leaf.addressable_shards[0].data.size / leaf.size for leaf in (*engine._state.caches, *engine._state.cross)]
    engine.stop()
    answers = [[[answer.tokens, answer.score] for answer in job.answers] for job in jobs]
    return {"answers": answers, "compiled": [list(compiled), list(again)], "caches": cut}


def main() -> None:
    folder, what, text = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    found: dict[str, Any] = {}
    for name, mesh in (("one", ONE), ("mesh", text)):
        if what.startswith("arrays"):
            source = folder / what.partition(" ")[2] if " " in what else folder / "backbone"
            loaded = softprompt_jax.load_backbone(source, mesh=mesh)
            found[name] = arrays(loaded) | {"shares": shares(loaded.model)}
        elif what.startswith(("bank", "server")):
            bank = bank_of(folder, mesh, what.endswith(" lm"))
            found[name] = (of_bank if what.startswith("bank") else of_server)(bank)
            found[name]["shares"] = shares(bank.device.model.merge())
            table = bank.device.model.merge().prompt.rows[...]
            found[name]["table"] = min(shard.data.size for shard in table.addressable_shards) / table.size
        else:
            predictor = softprompt_jax.load_predictor(folder / what, trust=True, mesh=mesh)
            scores = predictor.evaluate(predictor.task, "validation")
            answers = [[answer[0].ids, answer[0].score] for answer in predictor.scored(TEXTS)]
            found[name] = {"answers": answers, "scores": scores, "shares": shares(predictor.model)}
        found[name]["read"] = max(read.values())
        read.clear()
    print(json.dumps(found))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(json.dumps({"error": str(error)}))
