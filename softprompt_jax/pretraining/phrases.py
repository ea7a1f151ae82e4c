"""The words and phrasings of the text generator, read from phrases.yaml."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Annotated, Any

import pydantic

from softprompt_jax import config
from softprompt_jax.data.packages import Package


def _split(value: Any) -> Any:
    return value.split() if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], pydantic.BeforeValidator(_split), pydantic.Field(min_length=1)]
Pair = Annotated[tuple[str, str], pydantic.BeforeValidator(_split)]


class Question(config.Settings):
    """A question with two answers; phrases.yaml says what each part is."""

    asked: Words
    answers: Annotated[tuple[Pair, ...], pydantic.Field(min_length=1)]
    bare: bool = False


class _Phrases(config.Settings):
    words: dict[str, Words]
    pairs: tuple[Pair, ...]
    questions: dict[str, Question]
    instructions: dict[str, float]
    lexicons: dict[str, Package]


_FILE = Path(__file__).with_name("phrases.yaml")
_PHRASES = config.parse(_Phrases, config.read(_FILE), _FILE.name)
WORDS, PAIRS, QUESTIONS, LEXICONS = _PHRASES.words, _PHRASES.pairs, _PHRASES.questions, _PHRASES.lexicons
WEIGHTS = _PHRASES.instructions


def pick(draw: Random, name: str, good: bool | None = None) -> str:
    """Draw one of the words called `name`, or of "good `name`" or "bad `name`"."""
    return draw.choice(WORDS[name if good is None else f"{'good' if good else 'bad'} {name}"])
