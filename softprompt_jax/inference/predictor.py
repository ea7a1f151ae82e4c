"""Use what was trained: from a run folder or a prompt file to text, and the plain functions behind it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from softprompt_jax import config
from softprompt_jax.assembly import assemble, prompt_ids
from softprompt_jax.checkpoints import artifact, quantized_folder
from softprompt_jax.checkpoints.backbone import Backbone, load_backbone
from softprompt_jax.config import UserError
from softprompt_jax.data.examples import Example, input_text
from softprompt_jax.data.metrics import Outputs
from softprompt_jax.data.prompt_layout import Placement
from softprompt_jax.data.submission import check_server, write_submission
from softprompt_jax.data.task import Task, iterate, with_limits
from softprompt_jax.data.tokenized import TokenizedSet, tokenize
from softprompt_jax.data.tokenizer import Tokenizer, load_tokenizer
from softprompt_jax.distributed import cloud_files
from softprompt_jax.inference.evaluate import Answer, Decoder, score, wants_likelihoods
from softprompt_jax.methods import put_trained, split
from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.models import decode
from softprompt_jax.models.decode import Decoding, Greedy
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

    `encoder_tokens`: 0 is padding; the prompt goes before each row. `decoder_tokens` are decoder
    inputs, already shifted (the first is 0), under a causal mask only.
    """
    model, ids = _with_prompt(backbone.model, prompt)
    for tokens in (encoder_tokens, decoder_tokens):
        _check_ids(tokens, backbone.settings.vocabulary_rows)
    batch = {"encoder_tokens": _prepend(ids, encoder_tokens), "decoder_inputs": jnp.asarray(decoder_tokens)}
    return _logits(model, batch)


def generate(
    backbone: Backbone,
    texts_or_tokens: Sequence[str] | Int[Array | np.ndarray, "B T"],
    prompt: Float[Array | np.ndarray, "P D"] | None = None,
    max_tokens: int = 32,
    decoding: Decoding | None = None,
    forced: str | Sequence[str] | Int[Array | np.ndarray, "B F"] | None = None,
    scores: bool = False,
) -> Any:
    """Decode: texts give texts, tokens [B, T] (0 is padding, with their EOS) give tokens [B, U].

    `decoding`: `Greedy()` (the default), `Beam(beams=4)` or `Sampling(top_p=0.9, samples=5)`. The latter two give N
    answers to each text (a list, or tokens [B, N, U]), of beams the best first. `forced`: what answers begin with, a
    text for all, one for each, or tokens [B, F] (0: free). With `scores` a pair is returned, of the answers and their
    scores in the same lists, or float32 [B] or [B, N]: log-probabilities, of beams penalised ones.
    """
    how, one = decoding or Greedy(), isinstance(decoding, Greedy | None)
    model, ids = _with_prompt(backbone.model, prompt)
    if not isinstance(texts_or_tokens, np.ndarray | jax.Array):
        texts = list(texts_or_tokens)
        begun = [forced or ""] * len(texts) if isinstance(forced, str | None) else list(forced)
        if any(not isinstance(text, str) for text in [*texts, *begun]):
            raise UserError("generate: expected a list of texts, or an integer array [B, T] of tokens; forced alike")
        if len(begun) != len(texts):
            raise UserError(f"generate: {len(texts)} texts and {len(begun)} forced; expected one for each text")
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
        made = map(np.asarray, _answers(model, _prepend(ids, texts_or_tokens), max_tokens, how, forced))
        found = [part[:, 0] if one else part for part in made]
    return tuple(found) if scores else found[0]


@dataclasses.dataclass
class Predictor:
    """A trained model with its tokenizer and its task."""

    model: T5
    tokenizer: Tokenizer
    task: Task | None
    max_input_tokens: int = 512
    max_tokens: int = 64
    batch_size: int = 64
    truncated: int = 0  # inputs so far that were longer than `max_input_tokens`
    decoding: Decoding | None = None  # greedy
    target_sentinel: bool = False  # whether answers begin with <extra_id_0>, which label words do not

    def __post_init__(self):
        self._parts = split(self.model)
        self._decoder = Decoder(self._parts, self.tokenizer, self.decoding)
        # The same few for every chunk of a stream, since each is compiled once: 16, 32, 64, ... tokens of text.
        lengths = {min(16 << doubling, self.max_input_tokens) for doubling in range(self.max_input_tokens.bit_length())}
        self._shapes = [(length, 2) for length in sorted(lengths)]

    def texts(self, texts: Sequence[str]) -> list[str]:
        """Return the prediction for each text, in order."""
        return self._predict([Example(text, "") for text in texts], self.task)

    def answers(self, texts: Sequence[str], first: int = 0) -> list[list[str]]:
        """Return all answers to each text: the samples, or the beams from the best.

        Samples follow from the seed and a text's number, from `first` on.
        """
        return [[answer.text for answer in answers] for answers in self.scored(texts, first=first)]

    def scored(self, texts: Sequence[str], forced: Sequence[str] | None = None, first: int = 0) -> list[list[Answer]]:
        """Return all answers to each text with tokens and scores; they begin with what is forced on each."""
        return self._answers([Example(text, "") for text in texts], self.task, forced, first)

    def _predict(self, examples: Sequence[Example], task: Task | None) -> list[str]:
        return [answers[0].text for answers in self._answers(examples, task)]

    def _answers(
        self, examples: Sequence[Example], task: Task | None, forced: Sequence[str] | None = None, first: int = 0
    ) -> list[list[Answer]]:
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
        trainable, frozen, ids = self._parts.trainable, self._parts.frozen, prompt_ids(self.model)
        limits = self.batch_size, self.max_tokens
        return self._decoder.answers(trainable, frozen, tokenized, *limits, ids, self._shapes, task, forced, first)

    def _tokenized(self, examples: Sequence[Example]) -> TokenizedSet:
        rows = self.model.settings.vocabulary_rows
        return tokenize(examples, self.tokenizer, rows, self.max_input_tokens, self.max_tokens)

    def evaluate(self, task: Task, split_name: str) -> dict[str, float]:
        """Return the metrics of a task's split."""
        task = with_limits(task, self.max_input_tokens, self.max_tokens)
        task.source.check(self.tokenizer, metrics=False)
        examples, likelihoods = load(task, split_name), None
        if wants_likelihoods(task):
            parts, ids = (self._parts.trainable, self._parts.frozen), prompt_ids(self.model)
            likelihoods = self._decoder.likelihoods(*parts, self._tokenized(examples), self.batch_size, ids)
        first = [answers[0] for answers in self._answers(examples, task)]
        outputs = Outputs([answer.ids for answer in first], [answer.score for answer in first], likelihoods)
        return score(task, [answer.text for answer in first], examples, outputs)

    def submit(self, task: Task, split_name: str, folder: Path) -> tuple[Path, int]:
        """Write the predictions of a split for the benchmark's server; return the file and how many are no label."""
        check_server(task)  # before the long part
        examples = list(iterate(task, split_name, labelled=False))
        predictions = self._predict(examples, task)
        illegal = sum(prediction not in task.words for prediction in predictions) if task.words else 0
        return write_submission(task, examples, predictions, folder), illegal

    def lines(self, rows: Iterable[tuple[str, Any]], chunk: int = 1024) -> Iterator[dict[str, Any]]:
        """Yield each row of (where, fields) with its `prediction`, in order, a chunk at a time."""
        pending: list[tuple[Any, str]] = []
        done = 0
        for where, row in rows:
            pending.append((row, self._input(row, where)))
            if len(pending) == chunk:
                yield from self._answered(pending, done)
                done, pending = done + len(pending), []
        yield from self._answered(pending, done)

    def _answered(self, pending: list[tuple[Any, str]], first: int) -> Iterator[dict[str, Any]]:
        for (row, _), answers in zip(pending, self.answers([text for _, text in pending], first), strict=True):
            yield {**row, "prediction": answers[0], **({"answers": answers} if len(answers) > 1 else {})}

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
    settings = cloud_files.local(source) / "config.yaml"
    own = config.parse(Run, config.read(settings), str(settings)).tasks if settings.exists() else []
    return next((task for task in own if task.name == name), None) or resolve(name)


def load_predictor(
    source: str | Path,
    backbone: str | None = None,
    task: str | None = None,
    decoding: Decoding | None = None,
    any_backbone: bool = False,
) -> Predictor:
    """Load a finished run folder, or a prompt file (`.npy` needs `backbone`).

    `task` names one of a mixture's; `decoding` is the run's if not given. A prompt on another backbone than its own
    is refused, unless `any_backbone`.
    """
    predictor = _load(source, backbone, task, any_backbone)
    return predictor if decoding is None else dataclasses.replace(predictor, decoding=decoding)


def _load(source: str | Path, backbone: str | None, task: str | None, any_backbone: bool) -> Predictor:
    path = cloud_files.local(source)
    if path.is_dir():
        settings, result = path / "config.yaml", path / "result.json"
        if not settings.exists() or not result.exists():
            found = "an unfinished run" if settings.exists() else "no run"
            raise UserError(
                f"{source}: {found}; expected the folder of a finished run; finish it with the same command"
            )
        run = config.parse(Run, config.read(settings), str(settings))
        number = next((number for number, each in enumerate(run.tasks) if each.name == task), None)
        if run.own_prompts and number is None:
            names = ", ".join(each.name for each in run.tasks)
            raise UserError(
                f"{source}: has a prompt for each task ({names}); expected the name of one of them; "
                f"say which task, or give its file, such as {artifact.own_prompt_file(path, run.tasks[0].name)}"
            )
        if (path / artifact.PROMPT_FILE).exists() and (backbone or isinstance(run.backbone, str)):
            return _from_prompt(path / artifact.PROMPT_FILE, run, backbone, any_backbone)
        run = run.finished()
        assembly = assemble(run if backbone is None else run.model_copy(update={"backbone": backbone}))
        trained, metadata = artifact.load_trained(path / artifact.TRAINED_FILE)
        put_trained(assembly.model, trained, str(path / artifact.TRAINED_FILE))
        if not any_backbone:
            artifact.check_backbone(metadata, assembly.model, str(path), assembly.identity)
        if run.own_prompts and number is not None:
            assembly.model.prompt.placement = assembly.model.prompt.placement.of_task(number)
            run = run.model_copy(update={"task": run.tasks[number]})
        return _predictor(assembly.model, assembly.tokenizer, run)
    _, metadata = artifact.read_prompt(path)
    try:
        run = config.parse(Run, json.loads(metadata["settings"]), str(path)) if "settings" in metadata else None
    except ValueError as error:
        raise UserError(f"{path}: its settings are not JSON ({error}); expected those of a run; export again") from None
    return _from_prompt(path, run, backbone, any_backbone)


def _from_prompt(path: Path, run: Run | None, backbone: str | None, any_backbone: bool) -> Predictor:
    rows, metadata = artifact.read_prompt(path)
    source = backbone or (metadata.get("backbone") if run is None else run.backbone)
    if not isinstance(source, str):
        raise UserError(f"{path}: says no backbone; expected one; add --backbone with a folder or hub name")
    dtype, quantize = ("float32", None) if run is None else (run.dtype, run.quantize)
    loaded = load_backbone(source, dtype, quantize=None if quantized_folder.is_quantized_folder(source) else quantize)
    if not any_backbone:
        artifact.check_backbone(metadata, loaded.model, str(path), source)
    tokenizer = load_tokenizer(loaded.folder)
    attach_rows(loaded.model, rows, metadata.get("place", "before"), tokenizer.encode)
    return _predictor(loaded.model, tokenizer, run)


def _predictor(model: T5, tokenizer: Tokenizer, run: Run | None) -> Predictor:
    if run is None:
        return Predictor(model, tokenizer, None)
    task = run.tasks[0] if len(run.tasks) == 1 else None
    limits = run.max_input_tokens, run.max_target_tokens, run.evaluation_batch_size
    return Predictor(model, tokenizer, task, *limits, decoding=run.decoding, target_sentinel=run.target_sentinel)


def _with_prompt(model: T5, prompt: Any) -> tuple[T5, Placement | None]:
    """Return a model with the prompt attached, leaving the given one as it is."""
    model = nnx.merge(*nnx.split(model))
    if prompt is not None:
        attach_rows(model, prompt)
    return model, prompt_ids(model)


def _check_ids(tokens: Any, rows: int) -> None:
    """Refuse text ids past the embedding table, which would silently read prompt rows."""
    if tokens.size and not isinstance(tokens, Tracer) and (largest := int(tokens.max())) >= rows:
        raise UserError(f"tokens: found the id {largest}; expected ids under {rows}, the rows of the embedding")


def _prepend(placement: Placement | None, tokens: Any) -> Int[Array, "B PT"]:
    tokens = jnp.asarray(tokens, jnp.int32)
    if placement is None:
        return tokens
    if len(placement.after) or len(placement.decoder):
        raise UserError("tokens: the prompt stands not only before them; expected texts, or a prompt placed before")
    ids = jnp.asarray(placement.before, jnp.int32)
    return jnp.concatenate([jnp.broadcast_to(ids, (tokens.shape[0], len(ids))), tokens], 1)


@jax.jit
def _logits(model: T5, batch: dict[str, Array]) -> Array:
    return model(batch)


@functools.partial(jax.jit, static_argnames=("max_tokens", "how"))
def _answers(model: T5, tokens: Array, max_tokens: int, how: Decoding, forced: Array | None) -> tuple[Array, Array]:
    return decode.answers(model, tokens, max_tokens, how, jnp.arange(len(tokens)), None, forced)
