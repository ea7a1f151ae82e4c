"""Run by test_mesh.py in a process of its own, since the number of devices is fixed when JAX starts.

    on_eight_devices.py FAMILY prompt,full 10 DATA,FSDP,TENSOR ...

A kind may also be int8 or nf4, a prompt over such a backbone, or "packed KIND", two texts in each row. Prints JSON: for
every method and mesh how far loss, gradient and so many steps (0: none) of Adafactor are from one device, and how a
kernel lies.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
# A program of several CPU devices that comes from the cache can wait for itself for ever (full tuning on 1,2,4 did).
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

from softprompt_jax.distributed import mesh as sharding
from softprompt_jax.methods import METHODS, Context, leaves, split
from softprompt_jax.methods.wrap import linear_of
from softprompt_jax.models.quantized import quantized
from softprompt_jax.optim.optimizers import Adafactor, Schedule, build
from softprompt_jax.run import Run
from softprompt_jax.training.step import make_step

TASK = {"name": "none", "source": {"kind": "files", "train": "none.jsonl"}}


SMALL = {"length": 3, "rank": 2, "width": 3, "hidden": 4, "layers": 1}  # where a method has such a setting


def packed(batch: dict[str, np.ndarray], padding: int) -> dict[str, np.ndarray]:
    """Return the same rows, each twice: beside each other in one row."""
    found = {name: np.concatenate([rows, rows], 1) for name, rows in batch.items()}
    for name, of in (("encoder", "encoder_tokens"), ("decoder", "decoder_targets")):
        real = batch[of] > padding
        found[f"{name}_segments"] = np.concatenate([real, 2 * real], 1).astype(np.int32)
    return found


def steps(of: str, sizes: tuple[int, ...] | None, kind: str, count: int):
    """Return the first loss and gradient, what has been trained after `count` steps, and a kernel's sharding."""
    twice, kind = kind.startswith("packed "), kind.removeprefix("packed ")
    # All families have 8 heads, and keys that the mesh divides.
    wide = {"num_heads": 8, "d_ff": 32} | ({} if of == "t5" else {"num_key_heads": 8 if of.startswith("gpt") else 4})
    model, full = tiny.model(of=of, prompt=3 if kind == "prompt" else 0, **wide), kind == "full"
    if kind in ("int8", "nf4"):  # a prompt over a quantised backbone
        model = quantized(tiny.model(of=of, prompt=3, **wide), kind)
    elif kind != "prompt":
        of_kind, _, made_of = kind.partition("+")
        small = {name: value for name, value in SMALL.items() if name in METHODS[of_kind].model_fields}
        small |= {"reparameterization": made_of} if made_of else {}
        context = Context(lambda text: [5 + len(word) for word in text.split()], frozenset({0, 1}))
        METHODS[of_kind](**small).attach(model, jax.random.key(0), context)
    # Where there is time, dropout is on: its masks must not depend on the mesh either.
    run = Run(**{"task": TASK, "dropout": 0.1 if count else 0.0, "z_loss": 1e-4, "batch_size": 16, "accumulate": 1})
    rows = 0 if model.prompt is None else len(model.prompt.table())
    batch = jax.tree.map(np.asarray, tiny.batch(rows=16, prompt=rows))
    if model.encoder is None:  # whose padding is -1, and whose answers begin with the context's last token
        batch = {name: np.where(part == 0, -1, part) for name, part in batch.items()}
        batch["decoder_inputs"][:, 0] = model.first_input(batch["encoder_tokens"])
    if twice:
        batch = packed(batch, model.settings.padding)
    with contextlib.ExitStack() as opened:
        if sizes is not None:
            mesh = sharding.Mesh(**dict(zip(sharding.AXES, sizes, strict=True))).build()
            opened.enter_context(jax.set_mesh(mesh))
        sharding.check_divisible(16, model.settings.num_key_heads, 16, 32)
        model = sharding.shard_model(model)
        parts, about = split(model), leaves(model)
        rate = 0.01 if full else 0.3
        kept = optax.GradientTransformation(lambda new: jax.tree.map(jnp.zeros_like, new), lambda g, *_: (g, g))
        adafactor = build(Adafactor(learning_rate=rate), Schedule().build(rate, 1), about)
        optimizer = optax.chain(kept, adafactor if count else optax.sgd(rate))  # less to compile

        def begin(trainable):
            return {"trainable": trainable, "optimizer": optimizer.init(trainable), "step": jnp.zeros((), int)}

        layout = sharding.state_sharding(jax.eval_shape(begin, parts.trainable), parts.trainable)
        state = jax.jit(lambda t: begin(jax.tree.map(jnp.copy, t)), out_shardings=layout)(parts.trainable)
        step = make_step(run, parts, optimizer, layout)
        found = []
        for _ in range(max(1, count)):
            state, measured = step(state, parts.frozen, sharding.shard_local_batch(batch), jax.random.key(7))
            if not found:
                found = [float(measured["loss"]), jax.tree.map(sharding.gather, state["optimizer"][0])]
        trained = jax.tree.map(sharding.gather, state["trainable"])
        query = linear_of(model.context_stack.layers.attention.query)
        return *found, trained, list(getattr(query.kernel[...].sharding, "spec", []))


def apart(one, other, together: bool = False) -> float:
    """Return the largest difference, relative to the largest value of each array, or of all `together`."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    largest = max(float(np.abs(a).max()) for a, _ in pairs)  # some gradients are 0, such as that of a bias of keys
    return max(float(np.abs(a - b).max() / (largest if together else max(1e-9, np.abs(a).max()))) for a, b in pairs)


def main() -> None:
    answer = {}
    for kind in sys.argv[2].split(","):
        of, count = sys.argv[1], int(sys.argv[3])
        single = steps(of, None, kind, count)
        for text in sys.argv[4:]:
            loss, gradient, trained, cut = steps(of, tuple(map(int, text.split(","))), kind, count)
            answer[f"{kind} {text}"] = {
                "loss": abs(loss - single[0]) / single[0],
                "gradient": apart(single[1], gradient, together=count == 0),
                "trained": apart(single[2], trained),
                "cut": cut,
            }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
