"""Context distillation (Snell et al., 2022): the teacher is the same frozen model with a long text before every input.

A decoder-only model reads the text once: its keys and values stand before those of every input, where they are exact.
An encoder lets the text look at the input too, and reads both together every time.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from softprompt_jax.assembly import Assembly, layout_of, positions_of
from softprompt_jax.checkpoints import artifact
from softprompt_jax.config import UserError, cache_folder, values_hash
from softprompt_jax.data.examples import Example, known_target
from softprompt_jax.data.prompt_layout import NO_PROMPT, PromptLayout
from softprompt_jax.data.task import LABELLED, TEACHER, Distill, iterate
from softprompt_jax.data.tokenized import tokenize
from softprompt_jax.data.tokenizer import Tokenizer
from softprompt_jax.distributed import cloud_files, mesh
from softprompt_jax.distributed.multihost import run_on_process_0
from softprompt_jax.inference.evaluate import Batching, DecodedAnswer, Decoder
from softprompt_jax.methods import Split, split
from softprompt_jax.methods.prefix import KeysValues, Prefixes
from softprompt_jax.models.activations import activations
from softprompt_jax.models.decode import Decoding, Greedy, Sampling
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.run import Run


class Context(KeysValues):
    """What a teacher has read: the ids of a text, with what every input begins with before them.

    Of a decoder-only model there are its keys and values [L, C, GK] too.
    """

    def __init__(self, model: LanguageModel, ids: list[int], begin: int):
        self.ids, self.begin, self.length = tuple(ids), begin, len(ids)
        causal = model.encoder is None
        found = activations(model, model.word_rows(jnp.asarray(ids)), positioned=causal)
        keys, values = next(iter(found.values()))
        tokens = jnp.asarray([ids])
        batch = {"encoder_tokens": tokens, "decoder_inputs": model.first_input(tokens)[:, None]}
        said = mesh.gather(_logits(model, mesh.fill_batch(batch, model.settings.padding)))[0]
        # So that answers of other weights, those of the last layers and the head too, are not taken for those of these.
        seen = (np.asarray(part, np.float32).tobytes() for part in (values[-1], said))
        self.mark = hashlib.sha256(b"".join(seen)).hexdigest()
        self.keys: Any = nnx.Param(keys, axes=("prompt", "heads")) if causal else nnx.data(None)
        self.values: Any = nnx.Param(values, axes=("prompt", "heads")) if causal else nnx.data(None)


@jax.jit
def _logits(model: LanguageModel, batch: dict[str, Array]) -> Array:
    return model(batch)


def context_text(path: str) -> str:
    """Return the text in a file. Errors: UserError for a file that cannot be read."""
    try:
        return cloud_files.local(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"context {path}: cannot be read ({reason}); expected a text file in UTF-8") from None


def read_context(path: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the text in a file. Errors: UserError for a file without text."""
    text = context_text(path)
    ids = tokenizer.encode(text)
    if tokenizer.form.causal:  # as it stands before a word: "\n\n" may be one piece at the end and two before a word
        whole, word = (tokenizer.encode(each) for each in (f"{text}a", "a"))
        ids = whole[: -len(word)] if whole[-len(word) :] == word else ids
    if not ids or not text.strip():
        raise UserError(
            f"context {path}: is empty, so that the teacher would read what the student reads; expected a text"
        )
    return ids


def attach_context(run: Run, assembly: Assembly) -> None:
    """Give the model of a run with a teacher what the teacher has read, in place; other models stay as they are.

    Errors: UserError for a text that is too long, for methods that change the teacher, and for other places than before
    the input.
    """
    task, model, tokenizer = run.task, assembly.model, assembly.tokenizer
    if not isinstance(task, Distill):
        return
    if run.packing is not None or run.target_sentinel:
        raise UserError("task distill: found packing or target_sentinel; expected neither with a teacher; leave it out")
    layout = layout_of(model)
    if layout.after.size or layout.decoder.size:
        raise UserError("task distill: the prompt stands not only before the input; expected place: before")
    text, begin = read_context(task.context, tokenizer), list(tokenizer.begin) if model.encoder is None else []
    longest = len(begin) + len(text) + run.max_input_tokens + run.max_target_tokens
    most = positions_of(model.settings, assembly.tokenizer_folder) if model.encoder is None else None
    if most is not None and longest > most:
        raise UserError(
            f"context {task.context}: {len(text)} tokens, with an input and its answer up to {longest}; expected at "
            f"most {most}, the positions of this backbone; shorten it, or set max_input_tokens lower"
        )
    model.context = Context(_bare(model), [*begin, *text], len(begin))
    if split(teacher_of(model)).trainable:
        raise UserError(
            f"task distill: {', '.join(run.method_names)} changes the teacher too; expected a prompt or a prefix"
        )


def _bare(model: LanguageModel) -> LanguageModel:
    """Return a model without what stands before its texts."""
    model = nnx.merge(*nnx.split(model))
    for owner, name in ((model, "prompt"), *((s, n) for s in model.stacks.values() for n in ("prefix", "deep"))):
        setattr(owner, name, nnx.data(None))
    return model


def teacher_of(model: LanguageModel) -> LanguageModel:
    """Return the frozen model behind the text that it has read; that of an encoder reads it with the input."""
    bare, context = _bare(model), model.context
    bare.context = nnx.data(None)
    if model.encoder is None:
        bare.decoder.prefix = Prefixes(context, None, model.settings.num_key_heads, positions=True)
    return bare


def teacher_logits(model: LanguageModel, batch: dict[str, Array]) -> Float[Array, "B U V"]:
    """Return the teacher's logits at the answers of a student's batch."""
    context, text = model.context, batch["encoder_tokens"][:, layout_of(model).lengths[0] :]
    if model.encoder is None:
        text = text[:, context.begin :]
    else:
        before = jnp.broadcast_to(jnp.asarray(context.ids, text.dtype), (text.shape[0], context.length))
        text = jnp.concatenate([before, text], 1)
    return teacher_of(model)(batch | {"encoder_tokens": text})


def answered(task: Distill, split_name: str, run: Run, assembly: Assembly, parts: Split) -> list[Example]:
    """Return the examples of a split with the ids of the teacher's answers, or of the rows' own.

    Each holds the teacher's answer among its fields, where it has been asked; its target is the row's or, where that
    has none, the teacher's answer. Of validation and test there are as many as are looked at.
    """
    where, tokenizer = f"task {task.name}: {split_name}", assembly.tokenizer
    examples = list(iterate(task, split_name, labelled=False))
    limits = run.evaluation_examples, run.result_examples
    if split_name != "train" and None not in limits:
        examples = examples[: max(limit for limit in limits if limit is not None)]
    if not examples:
        raise UserError(f"{where}: is empty; expected at least one input; give more rows")
    if (blank := next((n for n, one in enumerate(examples, start=1) if not one.input.strip()), None)) is not None:
        raise UserError(f"{where}: the input of row {blank} is empty; expected a text; complete or drop the row")
    targets = [known_target(task, one.fields, f"{where}: row {n}") for n, one in enumerate(examples, start=1)]
    given = split_name == "train" and task.answers == "given"
    asked = [n for n, target in enumerate(targets) if not given or target is None]
    how = Sampling(seed=run.seed) if split_name == "train" and task.answers != "greedy" else Greedy()
    texts = [examples[n].input for n in asked]
    made = dict(zip(asked, ask_teacher(texts, run, assembly, parts, how, task if task.choices else None), strict=True))
    found = []
    for number, (one, target) in enumerate(zip(examples, targets, strict=True)):
        answer = made.get(number)
        ids = tokenizer.target_ids(target or "") if answer is None else answer.ids
        fields = one.fields | {LABELLED: target is not None} | ({} if answer is None else {TEACHER: answer.text})
        whole = tokenizer.input_ids(one.input)
        read, cut = tokenizer.cut_input(whole, run.max_input_tokens), len(whole) > run.max_input_tokens
        shown = target if target is not None else (answer.text if answer else "")
        found.append(dataclasses.replace(one, target=shown, fields=fields, ids=(read, list(ids)), cut=(cut, False)))
    return found


def ask_teacher(
    texts: list[str], run: Run, assembly: Assembly, parts: Split, how: Decoding, task: Distill | None = None
) -> list[DecodedAnswer]:
    """Return the teacher's answer to each text, a label word where the task predicts by likelihood.

    What it has answered before is read from the cache.
    """
    if not texts:
        return []
    model = parts.merge(parts.trainable, parts.frozen)
    context, causal, tokenizer = model.context, model.encoder is None, copy.copy(assembly.tokenizer)
    if causal:
        tokenizer.begin = ()  # it stands before the context
    asked = {
        **{"texts": texts, "how": how.model_dump(), "words": task.choices if task else None, "mark": context.mark},
        **{"ids": context.ids, "text": run.text.model_dump(), "most": (run.max_input_tokens, run.max_target_tokens)},
        **{"begin": assembly.tokenizer.begin, "tokenizer": tokenizer.fingerprint, "by": task and task.predict_by},
    }
    path = cache_folder() / "answers" / f"{values_hash(asked)}.json"
    if (known := run_on_process_0(lambda: _read(path, len(texts)))) is not None:
        return [DecodedAnswer(*one) for one in known]
    examples, rows = [Example(text, "") for text in texts], model.settings.vocabulary_rows
    limit = run.max_input_tokens - context.begin
    tokenized = tokenize(examples, tokenizer, rows, limit, run.max_target_tokens)
    layout = NO_PROMPT if causal else PromptLayout(before=context.ids, end=model.text_end)
    teacher = split(teacher_of(model))
    batching = Batching(run.evaluation_batch_size, run.max_target_tokens, layout)
    decoder = Decoder(teacher, tokenizer, how)
    found = [one[0] for one in decoder.answers(teacher.trainable, teacher.frozen, tokenized, batching, task)]
    run_on_process_0(lambda: artifact.dump([[one.text, one.ids, one.score] for one in found], path))
    return found


def _read(path: Path, count: int) -> list[tuple[str, list[int], float]] | None:
    """Read stored answers: text, ids, score; None if there are none, or damaged ones."""
    try:
        found = [(text, ids, score) for text, ids, score in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return None
    return found if len(found) == count else None
