"""Several prompts of one task as one predictor: a bank that is asked each text under every prompt.

The copies of a text differ in the ids of their prompt rows only (Lester et al., 2021, section 6), so that N prompts
cost one model in memory and one pass.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float

from softprompt_jax.assembly import backbone_of_prompts, own_mesh, run_of
from softprompt_jax.checkpoints.artifact import Artifact, load_artifact
from softprompt_jax.config import UserError
from softprompt_jax.data.task import Example, Task
from softprompt_jax.distributed.mesh import AnyMesh, entered, make_mesh
from softprompt_jax.inference.bank import PromptBank
from softprompt_jax.inference.bank_folder import check_artifact
from softprompt_jax.inference.evaluate import mean_score, score
from softprompt_jax.inference.predictor import named_task
from softprompt_jax.models.decode import MAX_TOKENS
from softprompt_jax.tasks import load

_SCORED_EXAMPLES = 100_000  # of all bootstrap samples together
_NEVER = -1e9


class Ensemble:
    """N prompts of one task over one backbone; answers by each, by majority, and by the mean of log-probabilities."""

    def __init__(
        self,
        sources: Sequence[str | Path],
        backbone: str | None = None,
        task: str | None = None,
        any_backbone: bool = False,
        trust: bool = False,
        mesh: AnyMesh | None = None,
    ):
        """Load prompts (run folders or files); `trust` and `mesh` as in `load_predictor`.

        Errors: UserError for fewer than two, other tasks or other backbones.
        """
        devices = make_mesh(mesh)  # before anything is read
        self.members = [load_artifact(source) for source in sources]
        for member in self.members:
            check_artifact(member.source, member)
        runs = [run_of(member) for member in self.members]
        run = next((run for run in runs if run is not None), None)
        self.task = _task(self.members, task, trust)
        self.max_tokens = run.max_target_tokens if run is not None else MAX_TOKENS
        self._decoding = run.decoding if run is not None else None
        with entered(make_mesh(None, own_mesh(self.members)) if mesh is None else devices):
            loaded = backbone_of_prompts(self.members, runs, backbone, trust)
        self.bank = PromptBank(
            loaded,
            device_rows=max(1024, sum(len(member.rows) for member in self.members if member.rows is not None)),
            batch_size=len(sources) * (run.evaluation_batch_size if run is not None else 64),
            max_input_tokens=run.max_input_tokens if run is not None else 512,
            device_extras=len(sources),
            any_backbone=any_backbone,
        )
        for member in self.members:
            self.bank.add(member.source, member, trust)

    def answers(self, examples: Sequence[Example], task: Task | None = None) -> EnsembleAnswers:
        """Return what each prompt answers to each example, and how likely it holds what any of them says."""
        task, count = task or self.task, len(self.members)
        texts = [text for e in examples for text in [e.input if e.ids is None else e.ids[0]] * count]
        names = [member.source for member in self.members] * len(examples)
        labels = [] if task is None else task.words or []
        predict_by = task.predict_by if task is not None and labels else "decoding"
        predicted: list[list[str]] = []
        if predict_by == "decoding":
            found = [each[0][0] for each in self.bank.answers(texts, names, self.max_tokens, self._decoding)]
            predicted = [found[start : start + count] for start in range(0, len(found), count)]
        candidates = [labels] * len(examples) if labels else [list(dict.fromkeys(each)) for each in predicted]
        words = [of_text for of_text in candidates for _ in range(count)]
        own = self.bank.score_words(texts, names, words, self.max_tokens)
        scores = np.full((len(examples), count, max(map(len, candidates))), _NEVER, np.float32)
        for row, values in zip(scores.reshape(-1, scores.shape[2]), own, strict=True):
            row[: len(values)] = values
        if predict_by != "decoding":
            per_token = predict_by == "likelihood_per_token"
            lengths = [len(self.bank.word_ids(names[0], word)) if per_token else 1 for word in labels]
            predicted = [[labels[best] for best in of_text] for of_text in (scores / lengths).argmax(-1)]
        return EnsembleAnswers(predicted, candidates, scores)

    def texts(self, texts: Sequence[str], by: str = "vote") -> list[str]:
        """Return one answer to each text, by "vote" or by "log_probability"."""
        found = self.answers([Example(text, "") for text in texts])
        return {"vote": found.vote, "log_probability": found.likeliest}[by]()


@dataclasses.dataclass(frozen=True)
class EnsembleAnswers:
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


class Metric(TypedDict):
    """A metric and its standard deviation: over the prompts, or over bootstrap samples of the examples."""

    value: float
    sd: float


class EnsembleScores(TypedDict):
    """What `ensemble` returns. The sd of an `average` is that of the prompts, all others that of the examples."""

    task: str
    split: str
    count: int
    prompts: list[dict[str, Any]]  # `source` and metrics of each
    average: dict[str, Metric]
    best: dict[str, Any]  # `source` and Metrics of the prompt with the highest mean on this split, as in the paper
    vote: dict[str, Metric]  # of what most prompts say
    log_probability: dict[str, Metric]  # of the candidate with the highest mean over the prompts


def ensemble(
    sources: Sequence[str | Path],
    task: str | None = None,
    split: str = "validation",
    backbone: str | None = None,
    any_backbone: bool = False,
    trust: bool = False,
    mesh: AnyMesh | None = None,
    limit: int | None = None,
) -> EnsembleScores:
    """Score prompts of one task by themselves and together on a split, in one pass over it, on a `mesh` of devices.

    `limit`: on the first so many examples only.
    """
    joined = Ensemble(sources, backbone, task, any_backbone, trust, mesh)
    chosen = joined.task
    if chosen is None:
        raise UserError(f"{sources[0]}: says no task; expected one; add --task NAME")
    examples = load(chosen, split)[:limit]
    found = joined.answers(examples, chosen)
    each = [found.of(prompt) for prompt in range(len(joined.members))]
    scores = [score(chosen, texts, examples) for texts in each]
    names = [name for name in scores[0] if name != "count"]
    best = max(range(len(scores)), key=lambda index: mean_score(chosen, scores[index]))

    def metric(name: str, value: float, samples: Sequence[dict[str, float]]) -> Metric:
        return {"value": value, "sd": float(np.std([sample[name] for sample in samples], ddof=1))}

    def measured(texts: list[str]) -> dict[str, Metric]:
        whole, samples = score(chosen, texts, examples), _bootstrap(chosen, texts, examples)
        return {name: metric(name, whole[name], samples) for name in names}

    return {
        "task": chosen.name,
        "split": split,
        "count": len(examples),
        "prompts": [{"source": m.source} | own for m, own in zip(joined.members, scores, strict=True)],
        "average": {name: metric(name, float(np.mean([own[name] for own in scores])), scores) for name in names},
        "best": {"source": joined.members[best].source} | measured(each[best]),
        "vote": measured(found.vote()),
        "log_probability": measured(found.likeliest()),
    }


def _bootstrap(task: Task, texts: list[str], examples: list[Example]) -> list[dict[str, float]]:
    """Return the metrics of 20 to 200 samples of the examples, with replacement, the same for equally many."""
    count = len(examples)
    drawn = np.random.default_rng(0).integers(0, count, (int(np.clip(_SCORED_EXAMPLES // count, 20, 200)), count))
    return [score(task, [texts[i] for i in sample], [examples[i] for i in sample]) for sample in drawn]


def _task(members: Sequence[Artifact], name: str | None, trust: bool) -> Task | None:
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
    found = (named_task(member.source, name, trust) for member in members)
    return next((task for task in found if task is not None), None)
