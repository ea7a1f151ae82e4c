"""What an experiment reads off finished prompts beside scores: a vote, neighbours in the vocabulary, mixed batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softprompt_jax.config import settings_hash
from softprompt_jax.run import UNHASHED_SETTINGS, Run

Values = dict[str, dict[str, list[float]]]  # line, column, a value for each seed
NEAREST = 5


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a grid, and where its score goes."""

    line: str
    point: str
    task: str
    seed: int
    read: str
    run: Run

    @property
    def name(self) -> str:
        """What the run is filed under."""
        return settings_hash(self.run, without=UNHASHED_SETTINGS)

    @property
    def label(self) -> str:
        """The run in words."""
        return ", ".join(filter(None, (self.line, self.point, self.task, f"seed {self.seed}")))


def by_line(members: Sequence[Member]) -> dict[str, list[Member]]:
    """Group members by their line."""
    found: dict[str, list[Member]] = {}
    for member in members:
        found.setdefault(member.line, []).append(member)
    return found


def ensemble(finished: Sequence[Member], grid: Sequence[Member], runs: Path) -> tuple[Values, dict[str, Any]]:
    """Let the seeds of a line vote on the test split, or on validation where there is none, once all are finished."""
    from softprompt_jax.inference.ensemble import Ensemble
    from softprompt_jax.inference.evaluate import mean_score, score
    from softprompt_jax.tasks import load, splits

    values: Values = {}
    wanted = {line: len(members) for line, members in by_line(grid).items()}
    for line, members in by_line(finished).items():
        if len(members) < wanted[line] or len(members) < 2:
            continue
        task = members[0].run.tasks[0]
        examples = load(task, "test" if "test" in splits(task) else "validation")
        found = Ensemble([runs / member.name for member in members]).answers(examples, task)
        alone = [mean_score(task, score(task, found.of(number), examples)) for number in range(len(members))]
        values[line] = {
            "average": alone,
            "best": [max(alone)],
            "majority vote": [mean_score(task, score(task, found.vote(), examples))],
            "mean log-probability": [mean_score(task, score(task, found.likeliest(), examples))],
        }
    return values, {}


def neighbours(finished: Sequence[Member], grid: Sequence[Member], runs: Path) -> tuple[Values, dict[str, Any]]:
    """Read prompts as pieces: the nearest of each row by cosine, whether those are label words, how unlike rows are.

    Columns: "label words found" is the share of the task's label words with a piece among the nearest of any row;
    "distinct nearest" the share of rows whose nearest piece no other row has; "cosine" that of the nearest piece.
    """
    from softprompt_jax.checkpoints.artifact import PROMPT_FILE, load_prompt
    from softprompt_jax.checkpoints.backbone import load_backbone
    from softprompt_jax.data.tokenizer import load_tokenizer

    values: Values = {}
    nearest: dict[str, list[list[str]]] = {}
    for line, members in by_line(finished).items():
        for member in members:
            assert isinstance(member.run.backbone, str)
            backbone = load_backbone(member.run.backbone)
            tokenizer = load_tokenizer(backbone.folder)
            table = np.asarray(backbone.model.embedding[...], np.float32)[: tokenizer.size]
            cosines = _directions(load_prompt(runs / member.name / PROMPT_FILE)) @ _directions(table).T
            cosines[:, sorted(tokenizer.special_ids)] = -1
            order = np.argsort(-cosines, axis=1)[:, :NEAREST]
            words = [set(tokenizer.encode(word)) for word in member.run.tasks[0].words or ()]
            near = set(order.flat)
            columns = values.setdefault(line, {})
            if words:
                columns.setdefault("label words found", []).append(
                    float(np.mean([bool(pieces & near) for pieces in words]))
                )
            columns.setdefault("distinct nearest", []).append(len(set(order[:, 0])) / len(order))
            columns.setdefault("cosine", []).append(float(cosines.max(1).mean()))
            nearest.setdefault(line, [[tokenizer.pieces[i].replace("▁", "") for i in row] for row in order[:8]])
    return values, {"nearest": nearest}


def _directions(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def mixed(finished: Sequence[Member], grid: Sequence[Member], runs: Path) -> tuple[Values, dict[str, Any]]:
    """Answer the tests of all tasks of a seed in common batches, and one task at a time; they must not differ.

    Columns: the score of each task when its texts stand among the others', and "same answers", the share of texts
    that get the same answer either way.
    """
    from softprompt_jax.inference.bank import PromptBank
    from softprompt_jax.inference.evaluate import mean_score, score
    from softprompt_jax.tasks import load, splits

    values: Values = {}
    for line, members in by_line(finished).items():
        for seed in sorted({member.seed for member in members}):
            members = [member for member in members if member.seed == seed]
            if len(members) < sum(member.line == line and member.seed == seed for member in grid):
                continue
            first = members[0].run
            bank = PromptBank(str(first.backbone), max_input_tokens=first.max_input_tokens, dtype=first.dtype)
            sets, longest = {}, 0
            for member in members:
                bank.add(member.task, runs / member.name)
                task = member.run.tasks[0]
                sets[member.task] = task, load(task, "test" if "test" in splits(task) else "validation")
                longest = max(longest, member.run.max_target_tokens)
            texts, names = [], []
            for name, (_, examples) in sets.items():
                texts += [example.input for example in examples]
                names += [name] * len(examples)
            order = np.random.default_rng(seed).permutation(len(texts))
            shuffled = bank.generate([texts[i] for i in order], [names[i] for i in order], longest)
            answers = dict(zip(order.tolist(), (answer for answer, _ in shuffled), strict=True))
            alone: list[str] = []
            for name in sets:
                own = [text for text, of in zip(texts, names, strict=True) if of == name]
                alone += [answer for answer, _ in bank.generate(own, name, longest)]
            columns = values.setdefault(line, {})
            for name, (task, examples) in sets.items():
                own = [answers[i] for i, of in enumerate(names) if of == name]
                columns.setdefault(name, []).append(mean_score(task, score(task, own, examples)))
            same = float(np.mean([answers[i] == answer for i, answer in enumerate(alone)]))
            columns.setdefault("same answers", []).append(same)
    return values, {}


MEASURES: dict[str, Callable[[Sequence[Member], Sequence[Member], Path], tuple[Values, dict[str, Any]]]] = {
    "ensemble": ensemble,
    "neighbours": neighbours,
    "mixed": mixed,
}
