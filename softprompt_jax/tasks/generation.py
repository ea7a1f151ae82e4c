"""Summaries and translations as T5 reads them (Raffel et al., 2020).

Schemas: huggingface.co/datasets/abisee/cnn_dailymail, /EdinburghNLP/xsum (a script repository: its
conversion to parquet is read), /wmt/wmt14 and /wmt/wmt16 (a field `translation` with a text per language).
"""

from __future__ import annotations

from softprompt_jax.data.sources import Hub
from softprompt_jax.data.task import Task

_ROUGE = ["rouge1", "rouge2", "rougeLsum"]
_LANGUAGES = {"cs": "Czech", "de": "German", "en": "English", "fr": "French", "ro": "Romanian", "ru": "Russian"}
# Data set, its configuration, and the two directions' languages; names are wmt14_en_de and the like.
_PAIRS = (
    ("wmt14", "de-en"),
    ("wmt14", "fr-en"),
    ("wmt16", "ro-en"),
    ("wmt16", "cs-en"),
    ("wmt16", "ru-en"),
)


def _summary(name: str, source: Hub, article: str, summary: str) -> Task:
    return Task(
        name=name,
        source=source,
        input=f"{{{article}}}",
        prefix="summarize: ",
        target=f"{{{summary}}}",
        metrics=_ROUGE,
    )


def _translation(year: str, config: str, source: str, target: str) -> Task:
    return Task(
        name=f"{year}_{source}_{target}",
        source=Hub(name=f"wmt/{year}", config=config),
        input=f"{{translation.{source}}}",
        prefix=f"translate {_LANGUAGES[source]} to {_LANGUAGES[target]}: ",
        target=f"{{translation.{target}}}",
        metrics=["bleu"],
    )


_ALL = [
    _summary("cnn_dailymail", Hub(name="abisee/cnn_dailymail", config="3.0.0"), "article", "highlights"),
    _summary("xsum", Hub(name="EdinburghNLP/xsum", config="default", converted=True), "document", "summary"),
]
for _year, _config in _PAIRS:
    _first, _second = _config.split("-")
    _ALL += [_translation(_year, _config, _second, _first), _translation(_year, _config, _first, _second)]
TASKS = {task.name: task for task in _ALL}
