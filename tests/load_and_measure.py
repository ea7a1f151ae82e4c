"""Run by test_streaming.py in processes of their own: load a backbone, and say what that took.

    load_and_measure.py FOLDER DTYPE [PROCESSES PROCESS PORT]

DTYPE may be bfloat16+int8: quantised on the way in. With several processes the weights are cut over all of them. Prints
JSON: bytes requested of the files, the bytes that this process's parts of the weights have, the growth of its anonymous
memory at its peak, and a checksum.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import time

import jax
import jax.numpy as jnp
from flax import nnx

from softprompt_jax.checkpoints import backbone, hugging_face
from softprompt_jax.distributed import mesh as sharding

requested = 0


def counted(path):
    """Open a safetensors file whose tensors count what is read of them."""

    def count(tensor):
        def part(index):
            global requested
            values = tensor.part(index)
            requested += values.nbytes
            return values

        return dataclasses.replace(tensor, part=part)

    return {name: count(tensor) for name, tensor in opened(path).items()}


def anonymous() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def main(folder: str, dtype: str, processes: str = "1", process: str = "0", port: str = "0") -> None:
    mesh = None
    if processes != "1":
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
        mesh = sharding.Mesh(data=1, tensor=int(processes)).build()
    jnp.zeros(1).block_until_ready()
    before = peak = anonymous()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    dtype, _, quantize = dtype.partition("+")
    model = backbone.load_backbone(folder, dtype, mesh=mesh, quantize=quantize or None).model
    leaves = jax.tree.leaves(nnx.state(model))
    jax.block_until_ready(leaves)
    done.set()
    watcher.join()
    answer = {
        "requested": requested,
        "own": sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards),
        "peak": peak - before,
        "fingerprint": backbone.fingerprint(model),
    }
    print(json.dumps(answer))


opened = hugging_face.open_safetensors
hugging_face.open_safetensors = counted
main(*sys.argv[1:])
