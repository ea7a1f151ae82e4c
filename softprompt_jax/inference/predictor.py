"""Answers of one run or prompt: `load_predictor` for its folder or file, `generate` and `logits` for arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from softprompt_jax.assembly import Assembly, assemble_trained, backbone_of_prompts, layout_of, run_of
from softprompt_jax.checkpoints.artifact import Artifact, load_artifact
from softprompt_jax.checkpoints.backbone import Backbone
from softprompt_jax.config import UserError
from softprompt_jax.data.prompt_layout import PromptLayout
from softprompt_jax.data.seqio_source import Outputs, Seqio, check_vocabulary
from softprompt_jax.data.submission import check_server, write_submission
from softprompt_jax.data.task import Example, Task, input_text, iterate, within
from softprompt_jax.data.tokenized import TokenizedSet, tokenize
from softprompt_jax.data.tokenizer import Tokenizer, load_tokenizer
from softprompt_jax.inference.evaluate import DecodedAnswer, Decoder, score, wants_likelihoods
from softprompt_jax.inference.texts import answer_lines, check_texts, one_for_each
from softprompt_jax.methods import split
from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.models import decode
from softprompt_jax.models.decode import MAX_TOKENS, Decoding, Greedy
from softprompt_jax.models.t5 import T5
from softprompt_jax.run import Run
from softprompt_jax.tasks import load, resolve


def logits(
    backbone: Backbone,
    encoder_tokens: Int[Array | np.ndarray, "B T"],
    decoder_tokens: Int[Array | np.ndarray, "B U"],
    prompt: Float[Array | np.ndarray, "P D"] | None = None,
) -> Float[Array, "B U V"]:
    """Return float32 logits over the vocabulary at every decoder position.

    `encoder_tokens`: 0 is padding; the prompt stands before each row. `decoder_tokens` are decoder inputs, which are
    shifted already: the first is 0. Errors: UserError for tokens that are no integers or no ids of the vocabulary.
    """
    model, layout = _with_prompt(backbone.model, prompt)
    for tokens in (encoder_tokens, decoder_tokens):
        _check_ids(tokens, backbone.settings.vocabulary_rows)
    if len(encoder_tokens) != len(decoder_tokens):
        raise UserError(
            f"logits: {len(encoder_tokens)} rows of encoder tokens and {len(decoder_tokens)} of decoder tokens; "
            "expected as many"
        )
    batch = {"encoder_tokens": _prepend(layout, encoder_tokens), "decoder_inputs": jnp.asarray(decoder_tokens)}
    return _logits(model, batch)


def generate(
    backbone: Backbone,
    texts_or_tokens: Sequence[str] | Int[Array | np.ndarray, "B T"],
    prompt: Float[Array | np.ndarray, "P D"] | None = None,
    max_tokens: int = MAX_TOKENS,
    decoding: Decoding | None = None,
    forced: str | Sequence[str] | Int[Array | np.ndarray, "B F"] | None = None,
    scores: bool = False,
) -> Any:
    """Answer texts with texts, or tokens [B, T] with tokens [B, U].

    Tokens end with their EOS; 0 is padding. `decoding`: `Greedy()` (the default), `Beam(beams=4)` or
    `Sampling(top_p=0.9, samples=5)`. Beams and samples are N answers to each text: a list of lists, or tokens
    [B, N, U]; the best beam comes first. `forced` is what answers begin with: one text, a text for each, or tokens
    [B, F] (0: free). With `scores` a pair is returned: the answers, and their log-probabilities in the same shape
    (beams: divided by the length penalty).
    """
    how, one = decoding or Greedy(), isinstance(decoding, Greedy | None)
    model, layout = _with_prompt(backbone.model, prompt)
    if not isinstance(texts_or_tokens, np.ndarray | jax.Array):
        texts = check_texts(texts_or_tokens, "generate")
        if isinstance(forced, np.ndarray | jax.Array):
            raise UserError("generate: texts and forced as tokens; expected both as texts, or both as tokens")
        begun = one_for_each(forced or "", len(texts), "generate", "forced beginnings")
        predictor = Predictor(model, load_tokenizer(backbone.folder), None, max_tokens=max_tokens, decoding=how)
        made = predictor.scored(texts, begun)
        answers, values = ([[getattr(answer, part) for answer in each] for each in made] for part in ("text", "score"))
        found = [[each[0] for each in part] if one else part for part in (answers, values)]
    else:
        _check_ids(texts_or_tokens, backbone.settings.vocabulary_rows)
        if isinstance(forced, str | list):
            raise UserError("generate: tokens and forced as text; expected both as tokens, or both as texts")
        if forced is not None and (len(forced) != len(texts_or_tokens) or np.shape(forced)[1] >= max_tokens):
            raise UserError(
                f"generate: forced tokens of shape {list(np.shape(forced))}; expected [{len(texts_or_tokens)}, F] with "
                f"F under max_tokens, {max_tokens}"
            )
        forced = None if forced is None else jnp.asarray(forced, jnp.int32)
        made = map(np.asarray, _answers(model, _prepend(layout, texts_or_tokens), max_tokens, how, forced))
        found = [part[:, 0] if one else part for part in made]
    return tuple(found) if scores else found[0]


@dataclasses.dataclass
class Predictor:
    """A trained model with its tokenizer and its task."""

    model: T5
    tokenizer: Tokenizer
    task: Task | None
    max_input_tokens: int = 512
    max_tokens: int = MAX_TOKENS
    batch_size: int = 64
    truncated: int = 0  # inputs so far that were longer than `max_input_tokens`
    decoding: Decoding | None = None  # None: greedy
    target_sentinel: bool = False  # whether answers begin with <extra_id_0>, which label words do not
    step: int | None = None  # of the checkpoint that was read, where the run has not finished

    def __post_init__(self):
        self._parts = split(self.model)
        self._decoder = Decoder(self._parts, self.tokenizer, self.decoding)
        # The same few for every chunk of a stream, since each is compiled once: 16, 32, 64, ... tokens of text.
        lengths = {min(16 << doubling, self.max_input_tokens) for doubling in range(self.max_input_tokens.bit_length())}
        self._shapes = [(length, 2) for length in sorted(lengths)]

    def texts(self, texts: Sequence[str]) -> list[str]:
        """Return the prediction for each text, in order."""
        return [answers[0] for answers in self.answers(texts)]

    def answers(self, texts: Sequence[str], first: int = 0) -> list[list[str]]:
        """Return all answers to each text: the samples, or the beams from the best.

        Samples follow from the seed and a text's number, from `first` on.
        """
        return [[answer.text for answer in answers] for answers in self.scored(texts, first=first)]

    def scored(
        self, texts: Sequence[str], forced: Sequence[str] | None = None, first: int = 0
    ) -> list[list[DecodedAnswer]]:
        """Return all answers to each text with their tokens and scores; each begins with its text's `forced`."""
        examples = [Example(text, "") for text in check_texts(texts, "predict")]
        return self._answers(examples, self.task, forced, first)

    def _answers(
        self, examples: Sequence[Example], task: Task | None, forced: Sequence[str] | None = None, first: int = 0
    ) -> list[list[DecodedAnswer]]:
        if not examples:
            return []
        if self.target_sentinel and task is not None and task.predict_by != "decoding":
            raise UserError(
                f"predict_by {task.predict_by}: the run's answers begin with <extra_id_0>, which label words do not; "
                "expected predict_by decoding"
            )
        end = [self.tokenizer.eos_id]
        tokenized = self._tokenized(
            [dataclasses.replace(e, target="", ids=e.ids and (e.ids[0], end), cut=(e.cut[0], False)) for e in examples]
        )
        self.truncated += tokenized.truncated_inputs
        state, layout = (self._parts.trainable, self._parts.frozen), layout_of(self.model)
        limits = self.batch_size, self.max_tokens
        return self._decoder.answers(*state, tokenized, *limits, layout, self._shapes, task, forced, first)

    def _tokenized(self, examples: Sequence[Example]) -> TokenizedSet:
        rows = self.model.settings.vocabulary_rows
        return tokenize(examples, self.tokenizer, rows, self.max_input_tokens, self.max_tokens)

    def evaluate(self, task: Task, split_name: str) -> dict[str, float]:
        """Return the metrics of a task's split."""
        task = within(task, self.max_input_tokens, self.max_tokens)
        if isinstance(task.source, Seqio):
            check_vocabulary(task.source, self.tokenizer)
        examples, likelihoods = load(task, split_name), None
        if wants_likelihoods(task):
            state, layout = (self._parts.trainable, self._parts.frozen), layout_of(self.model)
            likelihoods = self._decoder.likelihoods(*state, self._tokenized(examples), self.batch_size, layout)
        first = [answers[0] for answers in self._answers(examples, task)]
        outputs = Outputs([answer.ids for answer in first], [answer.score for answer in first], likelihoods)
        return score(task, [answer.text for answer in first], examples, outputs)

    def submit(self, task: Task, split_name: str, folder: Path) -> tuple[Path, int]:
        """Write the predictions of a split for the benchmark's server; return the file and how many are no label."""
        check_server(task)  # before the long part
        examples = list(iterate(task, split_name, labelled=False))
        predictions = [answers[0].text for answers in self._answers(examples, task)]
        illegal = sum(prediction not in task.words for prediction in predictions) if task.words else 0
        return write_submission(task, examples, predictions, folder), illegal

    def lines(self, rows: Iterable[tuple[str, Any]], chunk: int = 1024) -> Iterator[dict[str, Any]]:
        """Yield each row of (where, fields) with its `prediction`, in order, a chunk at a time."""
        return answer_lines(rows, self._input, self.answers, chunk)

    def _input(self, row: Any, where: str) -> str:
        if not isinstance(row, dict):
            raise UserError(f"{where}: found {type(row).__name__}; expected a JSON object with the task's fields")
        if self.task is not None and (
            "inputs" not in row or any(f.partition(".")[0] in row for f in self.task.input_fields)
        ):
            return input_text(self.task, row, where)
        if not isinstance(row.get("inputs"), str):
            found = ", ".join(row) or "no field"
            raise UserError(f'{where}: no text \'inputs\'; found {found}; expected {{"inputs": "..."}}')
        return row["inputs"]


def named_task(source: str | Path, name: str) -> Task:
    """Return the task of this name: one of the run's, if `source` is a run folder, or one that is known by it."""
    run = run_of(load_artifact(source))
    return next((task for task in run.tasks if task.name == name), None) or resolve(name) if run else resolve(name)


def load_predictor(
    source: str | Path,
    backbone: str | None = None,
    task: str | None = None,
    decoding: Decoding | None = None,
    any_backbone: bool = False,
) -> Predictor:
    """Load a run folder, finished or not, or a prompt file (`.npy` needs `backbone`).

    Of an unfinished run the best checkpoint is taken, or else the latest; `step` says which. `task` names one of a
    mixture's; `decoding` is the run's if not given. A prompt on another backbone than its own is refused, unless
    `any_backbone`.
    """
    artifact = load_artifact(source)
    run = run_of(artifact)
    if artifact.rows is not None and (run is None or backbone or isinstance(run.backbone, str)):
        assembly = _with_rows(artifact, run, backbone, any_backbone)
    elif run is None:
        raise UserError(f"{source}: holds neither a prompt nor a run's settings; expected either")
    else:
        number = next((number for number, each in enumerate(run.tasks) if each.name == task), None)
        if run.own_prompts and number is None:
            names = ", ".join(each.name for each in run.tasks)
            files = f", or give its file, such as {artifact.own_prompts[0]}" if artifact.own_prompts else ""
            raise UserError(
                f"{source}: has a prompt for each task ({names}); expected the name of one of them; say which "
                f"task{files}"
            )
        assembly = assemble_trained(artifact, run, backbone, any_backbone)
        if run.own_prompts and number is not None:
            assembly.model.prompt.layout = assembly.layout.of_task(number)
            run = run.model_copy(update={"task": run.tasks[number]})
    how: dict[str, Any] = {"decoding": decoding, "step": artifact.step}
    if run is None:
        return Predictor(assembly.model, assembly.tokenizer, None, **how)
    chosen = run.tasks[0] if len(run.tasks) == 1 else None
    how |= {"decoding": decoding or run.decoding, "target_sentinel": run.target_sentinel}
    limits = run.max_input_tokens, run.max_target_tokens, run.evaluation_batch_size
    return Predictor(assembly.model, assembly.tokenizer, chosen, *limits, **how)


def _with_rows(artifact: Artifact, run: Run | None, backbone: str | None, any_backbone: bool) -> Assembly:
    """Put a prompt's rows on its backbone."""
    loaded = backbone_of_prompts([artifact], [run], backbone)
    if not any_backbone:
        artifact.check_backbone(loaded.fingerprint(), loaded.identity)
    tokenizer = load_tokenizer(loaded.folder)
    attach_rows(loaded.model, artifact.prompt, artifact.place, tokenizer.encode)
    return Assembly(loaded.model, tokenizer, loaded.identity, loaded.folder)


def _with_prompt(model: T5, prompt: Any) -> tuple[T5, PromptLayout]:
    """Return a model with the prompt attached, leaving the given one as it is."""
    model = nnx.merge(*nnx.split(model))
    if prompt is not None:
        attach_rows(model, prompt)
    return model, layout_of(model)


def _check_ids(tokens: Any, rows: int) -> None:
    """Refuse what are no ids, and ids past the embedding table, which would be read as prompt rows."""
    if not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens: found {tokens.dtype}; expected integers, the ids of tokens")
    if tokens.size and not isinstance(tokens, Tracer) and (largest := int(tokens.max())) >= rows:
        raise UserError(f"tokens: found the id {largest}; expected ids under {rows}, the rows of the embedding")


def _prepend(layout: PromptLayout, tokens: Any) -> Int[Array, "B PT"]:
    """Put the prompt's ids before rows of tokens, which may be traced, and are taken as they are."""
    if layout.after.size or layout.decoder.size:
        raise UserError("tokens: the prompt stands not only before them; expected texts, or a prompt placed before")
    tokens = jnp.asarray(tokens, jnp.int32)
    before = jnp.broadcast_to(layout.before[0], (tokens.shape[0], layout.before.shape[1]))
    return jnp.concatenate([before, tokens], 1)


@jax.jit
def _logits(model: T5, batch: dict[str, Array]) -> Array:
    return model(batch)


@functools.partial(jax.jit, static_argnames=("max_tokens", "how"))
def _answers(model: T5, tokens: Array, max_tokens: int, how: Decoding, forced: Array | None) -> tuple[Array, Array]:
    return decode.answers(model, tokens, max_tokens, how, jnp.arange(len(tokens)), None, forced)
