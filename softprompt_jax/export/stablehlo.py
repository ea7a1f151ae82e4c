"""A trained model as one StableHLO program that needs JAX alone: tokens in, tokens out.

The folder that is written holds `program.stablehlo` (for `jax.export.deserialize`), `weights.safetensors`, the
tokenizer, `example.py` that runs it, and `program.json`, which says what goes in and comes out.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from safetensors.numpy import save_file

from softprompt_jax.assembly import layout_of
from softprompt_jax.config import UserError
from softprompt_jax.export.import_source import TOKENIZER_FILES
from softprompt_jax.methods import finish, split
from softprompt_jax.models import decode
from softprompt_jax.models.t5 import T5
from softprompt_jax.trees import flatten, unflatten

PLATFORMS = ("cpu", "cuda", "tpu")
_EXAMPLE = '''"""Runs the program beside this file: python example.py 37 5 12   (ids of a text by the tokenizer here)"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file

folder = Path(__file__).parent
program = export.deserialize(bytearray((folder / "program.stablehlo").read_bytes()))
inputs = [load_file(folder / "weights.safetensors"), np.array([[int(id) for id in sys.argv[1:]]], np.int32)]
if (folder / "prompt.npy").exists():
    inputs.append(np.load(folder / "prompt.npy"))
tokens, scores = jax.jit(program.call)(*inputs)
print(*[int(token) for token in tokens[0] if token > 1])
'''


@contextlib.contextmanager
def _file_names_only() -> Iterator[None]:
    """Let JAX write the names of source files without their folders, which would publish paths of this machine."""
    setting = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, setting)
    jax.config.update(setting, ".*/")
    try:
        yield
    finally:
        jax.config.update(setting, before)


def write_program(model: T5, tokenizer_folder: Path, to: Path, max_tokens: int, prompt_input: bool) -> None:
    """Write a model that decodes greedily as a program for CPU, GPU and TPU, whatever the batch and its length.

    The program takes the weights, ids of texts [B, T] (0 is padding; an EOS may be there or not) and, with
    `prompt_input`, prompt rows [P, D]; it returns tokens [B, U] up to EOS (then 0) and log-probabilities [B].
    Errors: UserError where there is no prompt that could be an input.
    """
    model = finish(model)
    model.encoder.layers.attention.implementation = "plain"  # the program runs on every platform
    layout = layout_of(model)
    if layout.tasks:
        raise UserError("export: has a prompt for each task; expected one; export one of the files in prompts/")
    if prompt_input and model.prompt is None:
        raise UserError("export: has no prompt that could be an input; expected one; leave --prompt-input out")
    parts = split(model)
    weights = flatten({"frozen": parts.frozen, "trainable": parts.trainable})
    rows = weights.pop("trainable.prompt.rows") if prompt_input else None

    def answer(weights: dict[str, Array], texts: Int[Array, "B T"], *prompt: Array) -> tuple[Array, Array]:
        given = {"trainable.prompt.rows": prompt[0]} if prompt else {}
        state = {"frozen": {}, "trainable": {}} | unflatten(weights | given)
        made = parts.merge(state["trainable"], state["frozen"])
        before = jnp.broadcast_to(jnp.asarray(layout.decoder), (texts.shape[0], layout.lengths[1]))
        return decode.greedy(made, layout.around_each(texts), max_tokens, decoder_prompt=before)

    batch, length = jax.export.symbolic_shape("B, T")
    arguments: list[Any] = [{name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()}]
    arguments.append(jax.ShapeDtypeStruct((batch, length), jnp.int32))
    if rows is not None:
        arguments.append(jax.ShapeDtypeStruct(rows.shape, rows.dtype))
    with _file_names_only():
        exported = jax.export.export(jax.jit(answer), platforms=PLATFORMS)(*arguments)
    to.mkdir(parents=True, exist_ok=True)
    (to / "program.stablehlo").write_bytes(exported.serialize())
    save_file({name: np.asarray(leaf) for name, leaf in weights.items()}, to / "weights.safetensors")
    if rows is not None:
        np.save(to / "prompt.npy", np.asarray(rows))
    else:
        (to / "prompt.npy").unlink(missing_ok=True)  # of an earlier export, which example.py would give to this one
    for pattern in TOKENIZER_FILES:
        for path in tokenizer_folder.glob(pattern):
            shutil.copy(path, to / path.name)
    about = {
        "takes": ["weights.safetensors as a dictionary", "ids of texts, int32 [B, T], 0 is padding"],
        "gives": [f"tokens, int32 [B, {max_tokens}], 1 ends an answer", "log-probabilities, float32 [B]"],
        "platforms": list(exported.platforms),
        "jax": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
    }
    if rows is not None:
        about["takes"].append(f"prompt rows, {rows.dtype} {list(rows.shape)}: prompt.npy, or another of this shape")
    (to / "program.json").write_text(json.dumps(about, indent=2) + "\n")
    (to / "example.py").write_text(_EXAMPLE)
