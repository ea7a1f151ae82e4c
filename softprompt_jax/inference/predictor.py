"""Answers of one run or prompt: `load_predictor` for its folder or file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from softprompt_jax.assembly import (
    Assembly,
    assemble_trained,
    backbone_of_prompts,
    ended_by,
    layout_of,
    longest_input,
    own_mesh,
    run_of,
)
from softprompt_jax.checkpoints.artifact import Artifact, load_artifact
from softprompt_jax.checkpoints.backbone import Backbone
from softprompt_jax.config import UserError
from softprompt_jax.data.buckets import Shape
from softprompt_jax.data.examples import Example, input_text
from softprompt_jax.data.metrics import Outputs
from softprompt_jax.data.submission import check_server, write_submission
from softprompt_jax.data.task import Task, iterate, with_limits
from softprompt_jax.data.tokenized import TokenizedSet, tokenize
from softprompt_jax.data.tokenizer import PLAIN, Tokenizer, load_tokenizer
from softprompt_jax.distributed import mesh as sharding
from softprompt_jax.distributed.multihost import run_on_process_0
from softprompt_jax.inference.evaluate import Batching, DecodedAnswer, Decoder, score, wants_likelihoods
from softprompt_jax.inference.shares import CHUNK
from softprompt_jax.inference.texts import answer_lines, check_texts
from softprompt_jax.methods import split
from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.models.decode import MAX_TOKENS, Decoding
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.run import Run
from softprompt_jax.tasks import load, resolve
from softprompt_jax.trust import check_task


@dataclass
class Predictor:
    """A trained model with its tokenizer and its task."""

    model: LanguageModel
    tokenizer: Tokenizer
    task: Task | None
    max_input_tokens: int = 512
    max_tokens: int = MAX_TOKENS
    batch_size: int = 64
    truncated: int = 0  # inputs so far that were longer than `max_input_tokens`
    decoding: Decoding | None = None  # None: greedy
    target_sentinel: bool = False  # whether answers begin with <extra_id_0>, which label words do not
    step: int | None = None  # of the checkpoint that was read, where the run has not finished
    source: str | None = None  # file whose settings state `task`, if its data must be checked first (trust.py)
    mesh: jax.sharding.Mesh | None = None  # devices that the model is cut over; None: one

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
        asked = (replace(e, target="", ids=e.ids and (e.ids[0], end), cut=(e.cut[0], False)) for e in examples)
        tokenized = self._tokenized([*asked])
        self.truncated += tokenized.truncated_inputs
        how, state = self._batching(self._shapes), (self._parts.trainable, self._parts.frozen)
        with sharding.entered(self.mesh):
            return self._decoder.answers(*state, tokenized, how, task, forced, first)

    def _batching(self, shapes: list[Shape] | None = None) -> Batching:
        return Batching(self.batch_size, self.max_tokens, layout_of(self.model), shapes)

    def _tokenized(self, examples: Sequence[Example]) -> TokenizedSet:
        settings, others = self.model.settings, self.max_tokens + sum(layout_of(self.model).lengths)
        most = longest_input(settings, self.max_input_tokens, others)
        return tokenize(examples, self.tokenizer, settings.vocabulary_rows, most, self.max_tokens)

    def evaluate(self, task: Task, split_name: str, limit: int | None = None) -> dict[str, float]:
        """Return the metrics of a task's split, or of its first `limit` examples."""
        task = with_limits(self._checked(task), self.max_input_tokens, self.max_tokens)
        task.source.check(self.tokenizer, metrics=False)
        examples, likelihoods = load(task, split_name)[:limit], None
        if wants_likelihoods(task):
            state, tokenized = (self._parts.trainable, self._parts.frozen), self._tokenized(examples)
            with sharding.entered(self.mesh):
                likelihoods = self._decoder.likelihoods(*state, tokenized, self._batching())
        first = [answers[0] for answers in self._answers(examples, task)]
        outputs = Outputs([answer.ids for answer in first], [answer.score for answer in first], likelihoods)
        return score(task, [answer.text for answer in first], examples, outputs)

    def submit(self, task: Task, split_name: str, folder: Path) -> tuple[Path, int]:
        """Write the predictions of a split for the benchmark's server; return the file and how many are no label."""
        check_server(self._checked(task))  # before the long part
        examples = list(iterate(task, split_name, labelled=False))
        predictions = [answers[0].text for answers in self._answers(examples, task)]
        illegal = sum(prediction not in task.words for prediction in predictions) if task.words else 0
        return Path(run_on_process_0(lambda: str(write_submission(task, examples, predictions, folder)))), illegal

    def _checked(self, task: Task) -> Task:
        """Return a task whose rows may be read: another than the file's own, or one that ships with us."""
        own = self.task is not None and task.source == self.task.source
        return check_task(task, self.source, trust=False) if own and self.source is not None else task

    def lines(
        self, rows: Iterable[tuple[str, Any]], chunk: int = CHUNK, share: tuple[int, int] = (0, 1)
    ) -> Iterator[dict[str, Any]]:
        """Yield each row of (where, fields) with its `prediction`, in order, a chunk at a time.

        `share`: process `index` of `count` answers every `count`th chunk, from `index` on. A row whose answer is NaN
        has an `error`, and null as its prediction.
        """

        def answers(texts: list[str], first: int) -> list[list[tuple[str, float]]]:
            return [[(answer.text, answer.score) for answer in each] for each in self.scored(texts, first=first)]

        return answer_lines(rows, self._input, answers, chunk, share)

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


def named_task(source: str | Path, name: str | None, trust: bool = False) -> Task | None:
    """Return the task of this name: one that the settings of `source` state, or one that is known by it.

    Without a name that of the settings, if there is one. Errors: UserError for data that need `trust` (trust.py).
    """
    run = run_of(load_artifact(source))
    own = [task for task in (run.tasks if run else []) if name in (task.name, None)]
    if len(own) == 1:
        return check_task(own[0], str(source), trust)
    return None if name is None else resolve(name)


def load_predictor(
    source: str | Path,
    backbone: str | Backbone | None = None,
    task: str | None = None,
    decoding: Decoding | None = None,
    any_backbone: bool = False,
    trust: bool = False,
    mesh: sharding.AnyMesh | None = None,
) -> Predictor:
    """Load a run folder, finished or not, or a prompt file (`.npy` needs `backbone`, a name or the loaded model).

    Of an unfinished run the best checkpoint is taken, or else the latest; `step` says which. `task` names one of a
    mixture's; `decoding` is the run's if not given. A prompt on another backbone than its own is refused, unless
    `any_backbone`. `trust`: do what the settings ask for, though it may be read, fetched or imported from anywhere.
    `mesh` divides weights and batches among devices, by default as the run says; the answers are those of one device.
    """
    devices = sharding.make_mesh(mesh)  # before anything is read
    artifact = load_artifact(source)
    run = run_of(artifact)
    if isinstance(backbone, Backbone):
        if mesh is not None:
            raise UserError(f"{source}: found a loaded backbone and a mesh; expected one; give load_backbone the mesh")
        devices = backbone.mesh
    elif mesh is None:
        devices = sharding.make_mesh(None, own_mesh([artifact]))
    with sharding.entered(devices):
        if artifact.rows is not None and (run is None or backbone or isinstance(run.backbone, str)):
            assembly = _with_rows(artifact, run, backbone, any_backbone, trust)
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
            assembly = assemble_trained(artifact, run, backbone, any_backbone, trust)
            if run.own_prompts and number is not None:
                assembly.model.prompt.layout = assembly.layout.of_task(number)
                run = run.model_copy(update={"task": run.tasks[number]})
        how: dict[str, Any] = {"decoding": decoding, "step": artifact.step, "source": None if trust else str(source)}
        how["mesh"] = sharding.current_mesh()
        if run is None:
            return Predictor(assembly.model, assembly.tokenizer, None, **how)
        chosen = run.tasks[0] if len(run.tasks) == 1 else None
        how |= {"decoding": decoding or run.decoding, "target_sentinel": run.target_sentinel}
        limits = run.max_input_tokens, run.max_target_tokens, run.evaluation_batch_size
        return Predictor(assembly.model, assembly.tokenizer, chosen, *limits, **how)


def _with_rows(
    artifact: Artifact, run: Run | None, backbone: str | Backbone | None, any_backbone: bool, trust: bool
) -> Assembly:
    """Put a prompt's rows on its backbone; one that is loaded stays as it is, and shares its weights."""
    given = isinstance(backbone, Backbone)
    loaded = backbone if given else backbone_of_prompts([artifact], [run], backbone, trust)
    if not any_backbone:
        artifact.check_backbone(loaded.fingerprint(), loaded.identity)
    tokenizer = load_tokenizer(loaded.folder, loaded.text_format, PLAIN if run is None else run.text)
    model = ended_by(loaded.model, tokenizer)
    attach_rows(model, artifact.prompt, artifact.place, tokenizer.encode)
    return Assembly(sharding.shard_model(model), tokenizer, loaded.identity, loaded.folder)
