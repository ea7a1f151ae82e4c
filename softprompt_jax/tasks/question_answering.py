"""SQuAD (Rajpurkar et al., 2016) and the twelve sets of MRQA 2019 (Fisch et al., 2019), as T5 reads SQuAD.

Punctuation stands between spaces, in answers too. Rows come from rajpurkar/squad and from
mrqa-workshop/mrqa, which holds all sets and names them in the field `subset`
(huggingface.co/datasets/rajpurkar/squad and /mrqa-workshop/mrqa). The six sets out of the domain have a test
split only: a prompt trained on squad is scored on them (Lester et al., 2021, table 1).
"""

from __future__ import annotations

from typing import Any

from softprompt_jax.tasks.preparations import Row, pad_punctuation, preparation
from softprompt_jax.tasks.sources import Hub
from softprompt_jax.tasks.superglue import fields
from softprompt_jax.tasks.task import Task

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


def _task(name: str, source: Hub, **settings: Any) -> Task:
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
_SETS = {"squad": (_SQUAD, {})}
_SETS |= {f"mrqa_{name}": _mrqa(subset, ("train", "validation")) for name, subset in _IN_DOMAIN.items()}
_SETS |= {f"mrqa_{name}": _mrqa(subset, ("test",)) for name, subset in _OUT_OF_DOMAIN.items()}
TASKS = {name: _task(name, source, **settings) for name, (source, settings) in _SETS.items()}
