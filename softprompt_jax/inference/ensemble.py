"""Several prompts of one task as one predictor: every batch holds each text once under every prompt.

The copies of a text differ in the ids of their prompt rows only (Lester et al., 2021, section 6), so that N prompts
cost one model in memory and one pass.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from softprompt_jax import config
from softprompt_jax.assembly import with_settings
from softprompt_jax.checkpoints import artifact, quantized_folder
from softprompt_jax.checkpoints.backbone import load_backbone
from softprompt_jax.config import UserError
from softprompt_jax.data import prompt_layout
from softprompt_jax.data.batches import evaluation_batches
from softprompt_jax.data.prompt_layout import Placement
from softprompt_jax.data.task import Example, Task
from softprompt_jax.data.tokenized import TokenizedSet, tokenize
from softprompt_jax.data.tokenizer import load_tokenizer
from softprompt_jax.distributed import mesh
from softprompt_jax.inference.evaluate import Decoder, mean_score, score
from softprompt_jax.inference.predictor import named_task
from softprompt_jax.methods import split
from softprompt_jax.methods.prompt import SoftPrompt
from softprompt_jax.models import decode
from softprompt_jax.run import Run
from softprompt_jax.tasks import load

_SCORED_EXAMPLES = 100_000  # of all bootstrap samples together
_NEVER = -1e9


@dataclasses.dataclass(frozen=True)
class Member:
    """A prompt of an ensemble, with what is known of it."""

    source: str
    rows: Float[np.ndarray, "P D"]
    metadata: dict[str, str]
    run: Run | None

    @property
    def place(self) -> str:
        """Where its rows stand."""
        return self.metadata.get("place", "before")

    @property
    def task(self) -> str | None:
        """The name of the task that it was trained on."""
        return self.metadata.get("task")


class Ensemble:
    """N prompts of one task over one backbone; answers by each, by majority, and by the mean of log-probabilities."""

    def __init__(
        self,
        sources: Sequence[str | Path],
        backbone: str | None = None,
        task: str | None = None,
        any_backbone: bool = False,
    ):
        """Load prompts (run folders or files). Errors: UserError for fewer than two, other tasks or other backbones."""
        self.members = [_read(source) for source in sources]
        self.task = _task(self.members, task)
        first = next((member.run for member in self.members if member.run is not None), None)
        source = backbone or (self.members[0].metadata.get("backbone") if first is None else first.backbone)
        if not isinstance(source, str):
            raise UserError(
                f"{self.members[0].source}: says no backbone; expected one; add --backbone with a folder or hub name"
            )
        dtype, quantize = ("float32", None) if first is None else (first.dtype, first.quantize)
        loaded = load_backbone(
            source, dtype, quantize=None if quantized_folder.is_quantized_folder(source) else quantize
        )
        for member in self.members:
            if not any_backbone:
                artifact.check_backbone(member.metadata, loaded.model, member.source, source)
        self.tokenizer, self._model = load_tokenizer(loaded.folder), with_settings(loaded.model, attention="plain")
        self._begun = [self.tokenizer.sentinel(0)] if first is not None and first.target_sentinel else []
        self._placement = self._attach()
        limits = (first.max_input_tokens, first.max_target_tokens) if first is not None else (512, 64)
        self.max_input_tokens, self.max_tokens = limits
        self.batch_size = first.evaluation_batch_size if first is not None else 64  # texts at a time, each N times
        self._parts = split(self._model)
        self._decoder = Decoder(self._parts, self.tokenizer, first.decoding if first is not None else None)

        @jax.jit
        def scored(trainable: Any, frozen: Any, tokens: jax.Array, before: jax.Array, words: jax.Array) -> jax.Array:
            model = self._parts.merge(trainable, frozen)
            each = jax.vmap(lambda t, b, w: decode.score_words(model, t[None], w, b[None])[0])
            return each(tokens, before, words)

        self._scored = scored

    def _attach(self) -> Placement:
        """Give the model all rows as one table, and return where those of each prompt stand; short ones are filled."""
        places = {member.place for member in self.members}
        lengths = [len(member.rows) for member in self.members]
        if len(places) > 1 or (places != {"before"} and len(set(lengths)) > 1):
            raise UserError(
                f"ensemble: found prompts of {lengths} rows, placed {', '.join(sorted(places))}; expected one place, "
                "and one length where that is not before the text; leave the others out"
            )
        width, first = self._model.settings.d_model, self._model.settings.vocabulary_rows
        ids, starts = [], np.cumsum([0, *lengths[:-1]])
        for member, start in zip(self.members, starts, strict=True):
            if member.rows.shape[1] != width:
                raise UserError(
                    f"{member.source}: rows of width {member.rows.shape[1]}; expected {width}, the backbone's"
                )
            length = len(member.rows) // prompt_layout.rows(member.place, 1)
            placed = prompt_layout.place(member.place, length, first, self.tokenizer.encode)
            moved = [[i + int(start) if i >= first else i for i in side] for side in dataclasses.astuple(placed)]
            # A short prompt begins with padding, which nothing sees; all distances behind it stay as they are.
            moved[0] = [0] * (max(lengths) - lengths[len(ids)]) + moved[0] if member.place == "before" else moved[0]
            ids.append(moved)
        rows = np.concatenate([member.rows for member in self.members])
        placed = Placement(*(tuple(map(tuple, side)) for side in zip(*ids, strict=True)))
        self._model.prompt = SoftPrompt(jnp.asarray(rows), 1.0, self.members[0].place, placed)
        return placed

    def answers(self, examples: Sequence[Example], task: Task | None = None) -> Answers:
        """Return what each prompt answers to each example, and how likely it holds what any of them says."""
        task, count = task or self.task, len(self.members)
        rows = self._model.settings.vocabulary_rows
        inputs = [dataclasses.replace(example, target="") for example in examples]
        each = tokenize(inputs, self.tokenizer, rows, self.max_input_tokens, self.max_tokens)
        tokens = _times(each, count)
        frozen, trainable = self._parts.frozen, self._parts.trainable
        found = self._decoder.predict(
            trainable, frozen, tokens, self.batch_size * count, self.max_tokens, self._placement, task=task
        )
        predicted = [found[start : start + count] for start in range(0, len(found), count)]
        # ---- the candidates of each example, and their log-probability under each prompt
        words = task.words if task is not None else None
        candidates = [words or list(dict.fromkeys(texts)) for texts in predicted]
        ids = [[self._ids(text) for text in texts] for texts in candidates]
        longest = max(len(word) for texts in ids for word in texts)
        table = np.zeros((len(examples), max(map(len, ids)), -(-longest // 4) * 4), np.int32)
        for row, texts in zip(table, ids, strict=True):
            for place, word in zip(row, texts, strict=False):
                place[: len(word)] = word
        scores = np.full((len(examples), count, table.shape[1]), _NEVER, np.float32)
        first, size = np.shape(self._placement.decoder)[-1], self.batch_size * count
        for batch, numbers in evaluation_batches(tokens, min(size, len(tokens)), self._placement):
            example, prompt = np.divmod(np.maximum(numbers, 0), count)
            given = mesh.shard_batch((batch["encoder_tokens"], batch["decoder_inputs"][:, :first], table[example]))
            log_p, real = mesh.gather(self._scored(trainable, frozen, *given)), numbers >= 0
            scores[example[real], prompt[real]] = log_p[real]
        for row, texts in zip(scores, candidates, strict=True):
            row[:, len(texts) :] = _NEVER
        return Answers(predicted, candidates, scores)

    def _ids(self, text: str) -> list[int]:
        ids = [*self._begun, *self.tokenizer.encode(text)]
        return [*ids[: self.max_tokens - 1], self.tokenizer.eos_id]

    def texts(self, texts: Sequence[str], by: str = "vote") -> list[str]:
        """Return one answer to each text, by "vote" or by "log_probability"."""
        found = self.answers([Example(text, "") for text in texts])
        return {"vote": found.vote, "log_probability": found.likeliest}[by]()


@dataclasses.dataclass(frozen=True)
class Answers:
    """What N prompts say to each of E examples: a text each, and the log-probabilities of the C candidates."""

    predicted: list[list[str]]  # E of N
    candidates: list[list[str]]  # E of at most C: the label words, or what any prompt has answered
    log_probabilities: Float[np.ndarray, "E N C"]

    def of(self, prompt: int) -> list[str]:
        """Return one prompt's answers."""
        return [texts[prompt] for texts in self.predicted]

    def vote(self) -> list[str]:
        """Return what most prompts say; of equally many the candidate with the higher mean log-probability."""
        chosen = []
        for texts, candidates, scores in zip(self.predicted, self.candidates, self._means(), strict=True):
            likely = dict(zip(candidates, scores.tolist(), strict=False))
            counts = Counter(texts)
            chosen.append(max(counts, key=lambda text: (counts[text], likely.get(text, -np.inf))))
        return chosen

    def likeliest(self) -> list[str]:
        """Return the candidate with the highest log-probability in the mean over prompts."""
        return [texts[best] for texts, best in zip(self.candidates, self._means().argmax(-1), strict=True)]

    def _means(self) -> Float[np.ndarray, "E C"]:
        return self.log_probabilities.mean(1)


def ensemble(
    sources: Sequence[str | Path],
    task: str | None = None,
    split: str = "validation",
    backbone: str | None = None,
    any_backbone: bool = False,
) -> dict[str, Any]:
    """Score prompts of one task by themselves and together on a split, in one pass over it.

    Returned: `prompts`, the metrics of each; `average` over them with the sample standard deviation; `best`, the one
    with the highest mean metric on this split, as the paper's table has it; `vote` and `log_probability`, the two ways
    to join them. The sd of these three is that of the score over bootstrap samples of the examples.
    """
    joined = Ensemble(sources, backbone, task, any_backbone)
    chosen = joined.task
    if chosen is None:
        raise UserError(f"{sources[0]}: says no task; expected one; add --task NAME")
    examples = load(chosen, split)
    found = joined.answers(examples, chosen)
    each = [found.of(prompt) for prompt in range(len(joined.members))]
    scores = [score(chosen, texts, examples) for texts in each]
    names = [name for name in scores[0] if name != "count"]
    best = max(range(len(scores)), key=lambda index: mean_score(chosen, scores[index]))

    def measured(texts: list[str]) -> dict[str, Any]:
        whole, samples = score(chosen, texts, examples), _bootstrap(chosen, texts, examples)
        return {name: {"value": whole[name], "sd": float(np.std(samples[name], ddof=1))} for name in names}

    return {
        "task": chosen.name,
        "split": split,
        "count": len(examples),
        "prompts": [{"source": m.source} | own for m, own in zip(joined.members, scores, strict=True)],
        "average": {
            name: {
                "value": float(np.mean([own[name] for own in scores])),
                "sd": float(np.std([own[name] for own in scores], ddof=1)),
            }
            for name in names
        },
        "best": {"source": joined.members[best].source} | measured(each[best]),
        "vote": measured(found.vote()),
        "log_probability": measured(found.likeliest()),
    }


def _bootstrap(task: Task, texts: list[str], examples: list[Example]) -> dict[str, list[float]]:
    """Return the metrics of 20 to 200 samples of the examples, with replacement, the same for equally many."""
    draw, count = np.random.default_rng(0), len(examples)
    found: dict[str, list[float]] = {}
    for _ in range(int(np.clip(_SCORED_EXAMPLES // count, 20, 200))):
        drawn = draw.integers(0, count, count)
        sample = score(task, [texts[i] for i in drawn], [examples[i] for i in drawn])
        for name, value in sample.items():
            found.setdefault(name, []).append(value)
    return found


def _read(source: str | Path) -> Member:
    rows, metadata = artifact.read_prompt(source)
    try:
        run = config.parse(Run, json.loads(metadata["settings"]), str(source)) if "settings" in metadata else None
    except ValueError as error:
        raise UserError(
            f"{source}: its settings are not JSON ({error}); expected those of a run; export again"
        ) from None
    return Member(str(source), rows, metadata, run)


def _task(members: Sequence[Member], name: str | None) -> Task | None:
    """Return the task of an ensemble, if its prompts are two or more, all different and of one task and backbone."""
    sources = [str(Path(member.source).absolute()) for member in members]
    if len(members) < 2 or len(set(sources)) < len(sources):
        found = f"{len(members)} prompt" if len(members) < 2 else "a prompt twice"
        raise UserError(
            f"ensemble: found {found}; expected two or more different ones; add run folders or prompt files"
        )
    for what in ("task", "fingerprint"):
        known = {member.metadata[what]: member for member in members if what in member.metadata}
        if len(known) > 1:
            one, other = list(known.values())[:2]
            shown = "backbone" if what == "fingerprint" else what
            raise UserError(
                f"{other.source}: trained on {shown} {other.metadata.get(shown)} ({other.metadata[what]}), "
                f"{one.source} on {one.metadata.get(shown)} ({one.metadata[what]}); expected one {shown} for all"
            )
    if name is not None:
        return named_task(members[0].source, name)
    run = next((member.run for member in members if member.run is not None), None)
    return run.tasks[0] if run is not None and len(run.tasks) == 1 else None


def _times(tokens: TokenizedSet, count: int) -> TokenizedSet:
    """Return every example so many times in a row, the copies numbered as tasks from 0."""
    lengths = np.repeat(tokens.lengths, count, axis=0)
    offsets = np.concatenate([np.zeros((1, 2), np.int64), lengths.cumsum(0)])
    return TokenizedSet(
        np.concatenate([np.tile(tokens.input(index), count) for index in range(len(tokens))]),
        offsets[:, 0],
        np.concatenate([np.tile(tokens.target(index), count) for index in range(len(tokens))]),
        offsets[:, 1],
        tokens.vocabulary_rows,
        tasks=np.tile(np.arange(count, dtype=np.int32), len(tokens)),
    )
