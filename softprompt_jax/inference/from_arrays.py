"""`generate` and `logits`: answers and numbers of a backbone under rows of a prompt that is an array."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from softprompt_jax.assembly import ended_by, layout_of, longest_input
from softprompt_jax.checkpoints.backbone import Backbone
from softprompt_jax.config import UserError
from softprompt_jax.data.prompt_layout import PromptLayout
from softprompt_jax.data.tokenizer import load_tokenizer
from softprompt_jax.distributed import mesh as sharding
from softprompt_jax.inference import programs
from softprompt_jax.inference.predictor import Predictor
from softprompt_jax.inference.programs import DeviceModel
from softprompt_jax.inference.texts import check_texts, one_for_each, until
from softprompt_jax.methods import Trainable
from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.models.causal import CausalLM
from softprompt_jax.models.decode import MAX_TOKENS, Beam, Decoding, Greedy, Sampling
from softprompt_jax.models.language_model import LanguageModel

Rows = Float[Array | np.ndarray, "P D"]  # of a prompt
Tokens = Int[Array | np.ndarray, "B _"]  # one row a text
Ids = Sequence[Sequence[int]]  # of each text
_NO_EOS = -2  # an id that no answer has


def logits(
    backbone: Backbone,
    tokens: Tokens | Ids,
    decoder_tokens: Tokens | Ids | None = None,
    prompt: Rows | None = None,
) -> Float[Array, "B S V"]:
    """Return float32 logits over the vocabulary: at every position of a decoder-only model's text, or of the decoder.

    Tokens are rows padded by -1 (or by 0 where the vocabulary has 0 as padding, as T5's), or lists of ids. The prompt
    stands before each row and has no logits. `decoder_tokens`, of an encoder-decoder alone, are decoder inputs, which
    are shifted already: the first is the model's start, 0 for a T5. Errors: UserError for tokens that are no integers
    or no ids of the vocabulary, and for decoder tokens that a model does not take or lacks.
    """
    alone = backbone.model.encoder is None
    if (decoder_tokens is None) != alone:
        wanted = "no decoder tokens, since" if alone else "decoder tokens, which"
        raise UserError(f"logits: expected {wanted} the model {'has no' if alone else 'has a'} decoder")
    contexts = _as_rows(tokens, backbone.settings.vocabulary_rows)
    if decoder_tokens is None:
        found, before = _sharded_logits(backbone, prompt, contexts)
        return found[:, before:]
    inputs = _as_rows(decoder_tokens, backbone.settings.vocabulary_rows)
    if len(contexts) != len(inputs):
        raise UserError(
            f"logits: {len(contexts)} rows of encoder tokens and {len(inputs)} of decoder tokens; expected as many"
        )
    return _sharded_logits(backbone, prompt, contexts, decoder_inputs=jnp.asarray(inputs))[0]


@overload
def generate(
    backbone: Backbone,
    texts_or_tokens: Sequence[str],
    prompt: Rows | None = None,
    max_tokens: int = MAX_TOKENS,
    decoding: Greedy | None = None,
    forced: str | Sequence[str] | None = None,
    scores: Literal[False] = False,
    stop: bool | str | Sequence[str] = True,
) -> list[str]: ...
@overload
def generate(
    backbone: Backbone,
    texts_or_tokens: Sequence[str],
    prompt: Rows | None = None,
    max_tokens: int = MAX_TOKENS,
    decoding: Greedy | None = None,
    forced: str | Sequence[str] | None = None,
    *,
    scores: Literal[True],
    stop: bool | str | Sequence[str] = True,
) -> tuple[list[str], list[float]]: ...
@overload
def generate(
    backbone: Backbone,
    texts_or_tokens: Sequence[str],
    prompt: Rows | None = None,
    max_tokens: int = MAX_TOKENS,
    decoding: Beam | Sampling = ...,
    forced: str | Sequence[str] | None = None,
    scores: Literal[False] = False,
    stop: bool | str | Sequence[str] = True,
) -> list[list[str]]: ...
@overload
def generate(
    backbone: Backbone,
    texts_or_tokens: Sequence[str],
    prompt: Rows | None = None,
    max_tokens: int = MAX_TOKENS,
    decoding: Beam | Sampling = ...,
    forced: str | Sequence[str] | None = None,
    *,
    scores: Literal[True],
    stop: bool | str | Sequence[str] = True,
) -> tuple[list[list[str]], list[list[float]]]: ...
@overload
def generate(
    backbone: Backbone,
    texts_or_tokens: Ids,
    prompt: Rows | None = None,
    max_tokens: int = MAX_TOKENS,
    decoding: Greedy | None = None,
    forced: None = None,
    scores: Literal[False] = False,
    stop: bool | str | Sequence[str] = True,
) -> list[list[int]]: ...
@overload
def generate(
    backbone: Backbone,
    texts_or_tokens: Tokens,
    prompt: Rows | None = None,
    max_tokens: int = MAX_TOKENS,
    decoding: Decoding | None = None,
    forced: Tokens | None = None,
    scores: Literal[False] = False,
    stop: bool | str | Sequence[str] = True,
) -> NDArray[np.int32]: ...
@overload
def generate(
    backbone: Backbone,
    texts_or_tokens: Tokens,
    prompt: Rows | None = None,
    max_tokens: int = MAX_TOKENS,
    decoding: Decoding | None = None,
    forced: Tokens | None = None,
    *,
    scores: Literal[True],
    stop: bool | str | Sequence[str] = True,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...
def generate(
    backbone: Backbone,
    texts_or_tokens: Sequence[str] | Ids | Tokens,
    prompt: Rows | None = None,
    max_tokens: int = MAX_TOKENS,
    decoding: Decoding | None = None,
    forced: str | Sequence[str] | Tokens | None = None,
    scores: bool = False,
    stop: bool | str | Sequence[str] = True,
) -> Any:
    """Answer texts with texts, tokens [B, T] with tokens [B, U], or lists of ids with lists of ids.

    An encoder's tokens end with their EOS. Padding is -1, or 0 where the vocabulary has 0 as padding. With `stop` false
    no answer ends before `max_tokens`; with `stop` as texts an answer is cut where the first of them begins (its score
    stays that of all its tokens). `decoding`: `Greedy()` (the default), `Beam(beams=4)` or
    `Sampling(top_p=0.9, samples=5)`. Beams and samples are N answers to each text: a list of lists, or tokens
    [B, N, U]; the best beam comes first. `forced` is what answers begin with: one text, a text for each, or tokens
    [B, F] (padding: free). With `scores` a pair is returned: the answers, and their log-probabilities in the same shape
    (beams: divided by the length penalty).
    """
    how, one = decoding or Greedy(), isinstance(decoding, Greedy | None)
    with sharding.entered(backbone.mesh):
        model, layout = _with_prompt(backbone.model, prompt)
        if stop is False:
            model.settings = model.settings.model_copy(update={"eos": _NO_EOS, "other_eos": (), "ends": ()})
        as_lists = isinstance(texts_or_tokens, list | tuple) and len(texts_or_tokens) > 0
        as_lists = as_lists and all(map(_is_ids, texts_or_tokens))
        if not isinstance(texts_or_tokens, np.ndarray | jax.Array) and not as_lists:
            texts = check_texts(texts_or_tokens, "generate")
            if isinstance(forced, np.ndarray | jax.Array):
                raise UserError("generate: texts and forced as tokens; expected both as texts, or both as tokens")
            begun = one_for_each(forced or "", len(texts), "generate", "forced beginnings")
            tokenizer = load_tokenizer(backbone.folder, backbone.text_format)
            model = model if stop is False else ended_by(model, tokenizer)
            predictor = Predictor(model, tokenizer, None, max_tokens=max_tokens, decoding=how, mesh=backbone.mesh)
            made = predictor.scored(texts, begun)
            answers, values = (
                [[getattr(answer, part) for answer in each] for each in made] for part in ("text", "score")
            )
            if not isinstance(stop, bool):
                answers = [[until(answer, stop) for answer in each] for each in answers]
            found = [[each[0] for each in part] if one else part for part in (answers, values)]
        else:
            rows = _as_rows(texts_or_tokens, backbone.settings.vocabulary_rows)
            if not isinstance(stop, bool):
                raise UserError("generate: tokens and stop as text; expected texts, or stop true or false")
            if isinstance(forced, str | list):
                raise UserError("generate: tokens and forced as text; expected both as tokens, or both as texts")
            if forced is not None and (len(forced) != len(rows) or np.shape(forced)[1] >= max_tokens):
                raise UserError(
                    f"generate: forced tokens of shape {list(np.shape(forced))}; expected [{len(rows)}, F] with "
                    f"F under max_tokens, {max_tokens}"
                )
            forced = None if forced is None else jnp.asarray(forced, jnp.int32)
            most = longest_input(model.settings, rows.shape[1], max_tokens + sum(layout.lengths))
            if most < rows.shape[1]:
                raise UserError(
                    f"generate: {rows.shape[1]} tokens; expected at most {most}, so that with prompt and answer no "
                    "position is past those that this backbone has learned"
                )
            tokens, numbers = _prepend(layout, rows), jnp.arange(len(rows))
            asked = sharding.fill_batch((tokens, numbers, forced), model.settings.padding)
            made = programs.answers(DeviceModel.of(model, Trainable), how, max_tokens, asked[0], None, *asked[1:])
            found = [part[: len(rows), 0] if one else part[: len(rows)] for part in map(sharding.gather, made)]
            if as_lists:
                found = [_as_lists(found[0], model.settings.padding), found[1].tolist()]
    return tuple(found) if scores else found[0]


def _with_prompt(model: LanguageModel, prompt: Any) -> tuple[LanguageModel, PromptLayout]:
    """Return a model with the prompt attached, leaving the given one as it is."""
    model = nnx.merge(*nnx.split(model))
    if prompt is not None:
        attach_rows(model, prompt)
    return sharding.shard_model(model), layout_of(model)


def _as_rows(tokens: Any, rows: int) -> Any:
    """Return tokens [B, T], of lists padded by -1.

    Errors: UserError for what are no ids, and for ids past the embedding table, which would be read as prompt rows.
    """
    if not isinstance(tokens, np.ndarray | jax.Array):
        ids = [list(row) for row in tokens]
        if not all(map(_is_ids, ids)) or not all(ids) or min(min(row) for row in ids) < 0:
            raise UserError("tokens: found lists that hold no ids; expected lists of integers from 0 on, none empty")
        tokens = np.asarray([*itertools.zip_longest(*ids, fillvalue=-1)], np.int32).reshape(-1, len(ids)).T
    if not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens: found {tokens.dtype}; expected integers, the ids of tokens")
    if tokens.size and not isinstance(tokens, Tracer) and (largest := int(tokens.max())) >= rows:
        raise UserError(f"tokens: found the id {largest}; expected ids under {rows}, the rows of the embedding")
    return tokens


def _is_ids(text: Any) -> bool:
    return isinstance(text, list | tuple | np.ndarray) and all(isinstance(id_, int | np.integer) for id_ in text)


def _as_lists(tokens: np.ndarray, padding: int) -> Any:
    """Return the ids of each answer, without padding, as nested lists."""
    return [_as_lists(row, padding) for row in tokens] if tokens.ndim > 1 else tokens[tokens > padding].tolist()


def _prepend(layout: PromptLayout, tokens: Any) -> Int[Array, "B PT"]:
    """Put the prompt's ids before rows of tokens, which may be traced, and are taken as they are."""
    if layout.after.size or layout.decoder.size:
        raise UserError("tokens: the prompt stands not only before them; expected texts, or a prompt placed before")
    tokens = jnp.asarray(tokens, jnp.int32)
    before = jnp.broadcast_to(layout.before[0], (tokens.shape[0], layout.before.shape[1]))
    return jnp.concatenate([before, tokens], 1)


def _sharded_logits(backbone: Backbone, prompt: Any, contexts: Any, **others: Any) -> tuple[Array, int]:
    """Return logits at every position, those of the prompt before a text included, and how many these are."""
    with sharding.entered(backbone.mesh):
        model, layout = _with_prompt(backbone.model, prompt)
        batch = {"encoder_tokens": _prepend(layout, contexts)} | others
        found = _logits(model, sharding.fill_batch(batch, model.settings.padding))
        return found if len(found) == len(contexts) else found[: len(contexts)], layout.before.shape[1]


@jax.jit
def _logits(model: LanguageModel, batch: dict[str, Array]) -> Array:
    if isinstance(model, CausalLM):
        return model.project(model.decoder.norm(model.run(batch["encoder_tokens"])[0]))
    return model(batch)
