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

from softprompt_jax.assembly import layout_of
from softprompt_jax.checkpoints.tensors import write_one_by_one
from softprompt_jax.config import UserError
from softprompt_jax.export.import_source import tokenizer_files
from softprompt_jax.files import writable
from softprompt_jax.methods import finish, split
from softprompt_jax.models import decode
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.trees import flatten, unflatten

PLATFORMS = ("cpu", "cuda", "tpu")
_EXAMPLE = Path(__file__).parent / "example.txt"


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


def write_program(model: LanguageModel, tokenizer_folder: Path, to: Path, max_tokens: int, prompt_input: bool) -> None:
    """Write a model that decodes greedily as a program for CPU, GPU and TPU, whatever the batch and its length.

    The program takes the weights, ids of texts [B, T] (padded by the model's padding; an encoder's EOS may be there or
    not) and, with `prompt_input`, prompt rows [P, D]; it returns tokens [B, U] up to EOS (then padding) and
    log-probabilities [B].
    Errors: UserError where there is no prompt that could be an input.
    """
    model = finish(model)
    for stack in model.stacks.values():
        stack.layers.attention.implementation = "plain"  # the program runs on every platform
    layout, padding, eos = layout_of(model), model.settings.padding, model.settings.eos
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
        return decode.greedy(made, layout.around_each(texts, padding), max_tokens, decoder_prompt=before)

    batch, length = jax.export.symbolic_shape("B, T")
    arguments: list[Any] = [{name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()}]
    arguments.append(jax.ShapeDtypeStruct((batch, length), jnp.int32))
    if rows is not None:
        arguments.append(jax.ShapeDtypeStruct(rows.shape, rows.dtype))
    with _file_names_only():
        exported = jax.export.export(jax.jit(answer), platforms=PLATFORMS)(*arguments)
    about = {
        "takes": ["weights.safetensors as a dictionary", f"ids of texts, int32 [B, T], {padding} is padding"],
        "gives": [f"tokens, int32 [B, {max_tokens}], {eos} ends an answer", "log-probabilities, float32 [B]"],
        "platforms": list(exported.platforms),
        "jax": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
    }
    with writable(to, folder=True):
        (to / "prompt.npy").unlink(missing_ok=True)  # of an earlier export, which example.py would give to this one
        if rows is not None:
            np.save(to / "prompt.npy", np.asarray(rows))
            about["takes"].append(f"prompt rows, {rows.dtype} {list(rows.shape)}: prompt.npy, or another of this shape")
        (to / "program.stablehlo").write_bytes(exported.serialize())
        write_one_by_one(to / "weights.safetensors", weights)
        for path in tokenizer_files(tokenizer_folder, required=False):
            shutil.copy(path, to / path.name)
        (to / "program.json").write_text(json.dumps(about, indent=2) + "\n")
        example = _EXAMPLE.read_text(encoding="utf-8").replace("PADDING", str(padding)).replace("EOS", str(eos))
        (to / "example.py").write_text(example, encoding="utf-8")
