"""SQuAD (Rajpurkar et al., 2016) and the twelve sets of MRQA 2019 (Fisch et al., 2019), as T5 reads SQuAD.

Punctuation stands between spaces, in answers too. Rows come from rajpurkar/squad and from
mrqa-workshop/mrqa, which holds all sets and names them in the field `subset`
(huggingface.co/datasets/rajpurkar/squad and /mrqa-workshop/mrqa). The six sets out of the domain have a test
split only: a prompt trained on squad is scored on them (Lester et al., 2021, table 1).

Without a hub: `squad_dev` is SQuAD's development set, its articles split anew (CC BY-SA 4.0), and `squadshifts_*` are
four test sets in its form, of other texts (Miller et al., 2020; CC BY 4.0). Both come with bigbench (358 MB, fetched
once), which marks its data by a canary: they are for tasks, never for text that models are pre-trained on. Rows keep
the canary, and pre-training refuses text that holds it (corpus.py).
"""

from __future__ import annotations

import json
from typing import Any

from softprompt_jax.config import UserError
from softprompt_jax.data.packages import SPLITS, Package, reader, split_rows
from softprompt_jax.data.preprocessors import Row, pad_punctuation, preparation
from softprompt_jax.data.sources import Hub
from softprompt_jax.data.task import Task
from softprompt_jax.tasks.superglue import fields

_IN_DOMAIN = {
    "squad": "SQuAD",
    "newsqa": "NewsQA",
    "triviaqa": "TriviaQA-web",
    "searchqa": "SearchQA",
    "hotpotqa": "HotpotQA",
    "natural_questions": "NaturalQuestionsShort",
}
_OUT_OF_DOMAIN = {
    "bioasq": "BioASQ",
    "drop": "DROP",
    "duorc": "DuoRC.ParaphraseRC",
    "race": "RACE",
    "relation_extraction": "RelationExtraction",
    "textbookqa": "TextbookQA",
}


@preparation("squad")
def prepare_squad(row: Row, split: str) -> list[dict[str, Any]]:
    """Pad the punctuation of question, context and answers; the target is the first answer."""
    answers = row.get("answers") or []
    answers = [pad_punctuation(text) for text in (answers["text"] if isinstance(answers, dict) else answers)]
    texts = {name: pad_punctuation(row[name]) for name in ("question", "context")}
    return [{**row, **texts, "answers": answers, "target": answers[0] if answers else ""}]


_MEMBER = "bigbench-1.0.0/bigbench/benchmark_tasks/squad_shifts/{}.json"
_SHIFTS = {
    "squad": "squaddev_v1.1",
    "wiki": "new_wiki_v1.0",
    "nyt": "nyt_v1.0",
    "reddit": "reddit_v1.0",
    "amazon": "amazon_reviews_v1.0",
}


@reader("squadshifts")
def read_squadshifts(members: dict[str, bytes], part: str) -> dict[str, list[dict[str, Any]]]:
    """Turn a file in SQuAD's form into rows: of the development set three splits, whole articles in each; else test."""
    if part not in _SHIFTS:
        raise UserError(f"bigbench: no part {part!r}; expected one of {', '.join(_SHIFTS)}")
    content = json.loads(members[_MEMBER.format(_SHIFTS[part])])
    rows = [
        {
            **{"title": article["title"], "context": paragraph["context"], "question": asked["question"]},
            **{"id": asked["id"], "canary": content["canary"]},
            "answers": {name: [answer[name] for answer in asked["answers"]] for name in ("text", "answer_start")},
        }
        for article in content["data"]
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]
    return split_rows(rows, 1000, 1000, lambda row: row["title"]) if part == "squad" else {"test": rows}


def _shift(part: str) -> Package:
    return Package(
        package="bigbench",
        version="1.0.0",
        form="sdist",
        sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
        members=[_MEMBER.format(file) for file in _SHIFTS.values()],  # all with one download
        reader="squadshifts",
        part=part,
        splits=SPLITS if part == "squad" else ("test",),
    )


def _task(name: str, source: Hub | Package, **settings: Any) -> Task:
    return Task(
        name=name,
        source=source,
        input=fields("question", "context"),
        one_space=True,
        target="{target}",
        prepare="squad",
        answers_field="answers",
        metrics=["squad_f1", "exact_match"],
        **settings,
    )


def _mrqa(subset: str, splits: tuple[str, ...]) -> tuple[Hub, dict[str, Any]]:
    return Hub(name="mrqa-workshop/mrqa", splits={split: split for split in splits}), {"keep": {"subset": subset}}


_SQUAD = Hub(name="rajpurkar/squad", splits={"train": "train", "validation": "validation"})
_SETS: dict[str, tuple[Hub | Package, dict[str, Any]]] = {"squad": (_SQUAD, {}), "squad_dev": (_shift("squad"), {})}
_SETS |= {f"squadshifts_{part}": (_shift(part), {}) for part in _SHIFTS if part != "squad"}
_SETS |= {f"mrqa_{name}": _mrqa(subset, ("train", "validation")) for name, subset in _IN_DOMAIN.items()}
_SETS |= {f"mrqa_{name}": _mrqa(subset, ("test",)) for name, subset in _OUT_OF_DOMAIN.items()}
TASKS = {name: _task(name, source, **settings) for name, (source, settings) in _SETS.items()}
