"""Words and their polarity, dictionary entries: what the made-up tasks of pre-training know.

The word lists are fetched by package and checksum when pre-training data are built; none is part of
this project.
"""

# ruff: noqa: SIM905 - word lists read better as text
from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from softprompt_jax.data.packages import Package, fetch_members

# 2,918 senses of English adjectives, by Tom De Smedt and Walter Daelemans; its header says PDDL (public domain).
PATTERN = Package(
    package="textblob",
    version="0.20.1",
    form="wheel",
    sha256="f957699169a3e7b9a03a504883111b7b6973679496b9af959db2f74ee2449977",
    members=["textblob/en/en-sentiment.xml"],
    reader="none",
)
# AFINN-165 (Nielsen, 2011), 3,382 words; the data's own licence file says ODbL 1.0.
AFINN = Package(
    package="afinn",
    version="0.1",
    form="sdist",
    sha256="cf2f728ccc6f2974f2f27e2110e4c05a0133a2f14a40387c463a8c9fdd4ab61b",
    members=["afinn-0.1/afinn/data/AFINN-en-165.txt"],
    reader="none",
)

NEGATIONS = frozenset(
    "not no never neither nor nothing nobody none hardly barely without cannot lacks lack lacking isn't wasn't "
    "aren't weren't don't doesn't didn't won't wouldn't can't couldn't shouldn't haven't hasn't hadn't ain't".split()
)
_WORD = re.compile(r"[a-z]+(?:['’-][a-z]+)*")
_EXAMPLE = re.compile(r'\s*[;:,]?\s*["“].*$')


class Lexicon:
    """Valences of words, about -5 to 5; `adjectives` are those that can stand before a noun."""

    def __init__(self, valence: Mapping[str, float], adjectives: Iterable[str] = ()):
        self.valence = dict(valence)
        self.adjectives = {word: self.valence[word] for word in sorted(adjectives) if word in self.valence}
        self.fingerprint = hashlib.sha256(repr(sorted(self.valence.items())).encode()).hexdigest()

    def clear_valence(self, sentence: str) -> int:
        """Return the sentence's valence where it is clear, else 0: negations flip, what follows "but" counts more."""
        words = [word.replace("’", "'") for word in _WORD.findall(sentence.lower())]
        but = max((i for i, word in enumerate(words) if word in ("but", "however")), default=-1)
        total = size = 0.0
        for i, word in enumerate(words):
            value = self.valence.get(word, 0.0)
            if value:
                value *= -0.7 if any(before in NEGATIONS for before in words[max(0, i - 3) : i]) else 1.0
                value *= 0.4 if i < but else 1.0
                total += value
                size += abs(value)
        clear = abs(total) >= 3.0 and abs(total) >= 0.75 * size and abs(total) >= 0.15 * len(words)
        return round(total) if clear else 0


def fetch_lexicon() -> Lexicon:
    """Fetch the two word lists and merge them; words on which they disagree are left out."""
    return read_lexicon(*(next(iter(fetch_members(source).values())).decode() for source in (PATTERN, AFINN)))


def read_lexicon(pattern: str, afinn: str) -> Lexicon:
    """Merge the text of `en-sentiment.xml` (polarity -1 to 1, per sense) and of AFINN (-5 to 5)."""
    senses: dict[str, list[float]] = defaultdict(list)
    adjectives = set()
    for form, pos, polarity in re.findall(r'<word form="([^"]+)".*?pos="(\w+)".*?polarity="([-\d.]+)"', pattern):
        senses[form].append(float(polarity))
        if pos == "JJ":
            adjectives.add(form)
    ours = {word: 5 * sum(values) / len(values) for word, values in senses.items()}
    theirs = {}
    for line in afinn.splitlines():
        word, _, value = line.partition("\t")
        if value and _WORD.fullmatch(word):
            theirs[word] = float(value)
    merged = {}
    for word in sorted(ours.keys() | theirs.keys()):
        values = [source[word] for source in (ours, theirs) if word in source]
        if _WORD.fullmatch(word) and all(v > 0 for v in values) | all(v < 0 for v in values):
            mean = sum(values) / len(values)
            if abs(mean) >= 0.75:
                merged[word] = round(mean, 2)
    return Lexicon(merged, adjectives)


def parse_entry(line: str) -> tuple[list[str], str]:
    """Split "word, word: gloss; "example"." into its words and the gloss, without the usage examples."""
    words, colon, gloss = line.partition(": ")
    gloss = _EXAMPLE.sub("", gloss).strip(" .;,")
    if not colon or len(gloss) < 4:
        return [], ""
    return words.split(", "), gloss
