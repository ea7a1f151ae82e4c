"""What a template cannot say: how a row of a data set becomes rows with the fields of a template, and answers labels.

A preparation takes a row and the name of its split and returns rows: none, one, or (in training) one
per answer. Outside training it returns exactly one, since every question is answered once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]
Preparation = Callable[[Row, str], list[dict[str, Any]]]
Postprocessor = Callable[[str, str], str]
PREPARATIONS: dict[str, Preparation] = {}
POSTPROCESSORS: dict[str, Postprocessor] = {}
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_SPACES = re.compile(r"[ \t\n\f\r]+")


def preparation(name: str) -> Callable[[Preparation], Preparation]:
    """Register `function(row, split) -> rows` as the preparation called `name`; a ValueError says what does not fit."""

    def register(function: Preparation) -> Preparation:
        PREPARATIONS[name] = function
        return function

    return register


def postprocessor(name: str) -> Callable[[Postprocessor], Postprocessor]:
    """Register `function(prediction, target) -> answer`, applied to predictions before they are scored."""

    def register(function: Postprocessor) -> Postprocessor:
        POSTPROCESSORS[name] = function
        return function

    return register


def one_space(text: str) -> str:
    """Make one space of each run of white space."""
    return _SPACES.sub(" ", text)


def pad_punctuation(text: str) -> str:
    """Put spaces around ASCII punctuation, as T5 does for SQuAD (Raffel et al., 2020)."""
    return one_space(_PUNCTUATION.sub(r" \1 ", text))
