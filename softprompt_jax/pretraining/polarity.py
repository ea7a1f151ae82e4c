"""Made-up sentiment tasks for pre-training: sentences by a lexicon, opinions from a grammar, words, glosses."""

from __future__ import annotations

from random import Random

from softprompt_jax.pretraining import opinions
from softprompt_jax.pretraining.objectives import Example, Ids, Library
from softprompt_jax.pretraining.questions import PAIRS, YES_NO, decide, join

POLARITY = (
    ("positive", "negative"),
    ("positive", "negative"),
    ("good", "bad"),
    ("good", "bad"),
    ("great", "terrible"),
    ("happy", "sad"),
    ("like", "dislike"),
)
_FEELING = (
    "sentiment",
    "what is the sentiment",
    "classify the sentiment",
    "how does it sound",
    "feeling",
    "tone",
    "opinion",
    "what does the writer feel",
)
_IS_POSITIVE = ("is this positive", "is it good", "does it sound happy", "does the writer like it", "is it praise")
_IS_NEGATIVE = ("is this negative", "is it bad", "does it complain", "does the writer dislike it")
_OPINION_FIELDS = ("sentence:", "text:", "review:", "message:", "comment:", "post:", "", "")


def _ask(draw: Random, library: Library, good: bool, ids: Ids | str) -> Example:
    """Ask for the polarity of a text in one of many ways."""
    field = draw.choice(_OPINION_FIELDS)
    form = draw.random()
    if form < 0.7:
        return decide(draw, library, _FEELING, POLARITY, good, field, ids, bare=True)
    if form < 0.87:
        return decide(draw, library, _IS_POSITIVE, YES_NO, good, field, ids)
    return decide(draw, library, _IS_NEGATIVE, YES_NO, not good, field, ids)


def sentiment_sentence(draw: Random, library: Library) -> Example | None:
    """Polarity of a sentence of the corpus in which the words of the lexicon agree; classes are balanced."""
    good = draw.random() < 0.5
    places = library.polar[good]
    if not len(places):
        return None
    file, place = places[draw.randrange(len(places))]
    ids = library.sentence_at(int(file), int(place))[:80]
    if draw.random() < 0.2:
        ids = library.encode(library.encoder.decode(ids).lower())
    return _ask(draw, library, good, ids)


def sentiment_composed(draw: Random, library: Library) -> Example | None:
    """Polarity of a made-up opinion: negation, contrast, things that lack something; now and then beside a sentence."""
    if not library.can_compose:
        return None
    good = draw.random() < 0.5
    ids = library.encode(opinions.compose(draw, library.lexicon, good))
    if draw.random() < 0.3:
        more = library.encode(opinions.compose(draw, library.lexicon, good))
        ids = ids + more
    if draw.random() < 0.25:
        plain = library.neutral(draw)
        ids = plain + ids if draw.random() < 0.5 else ids + plain
    return _ask(draw, library, good, ids)


def sentiment_word(draw: Random, library: Library) -> Example | None:
    """Polarity of one word, or of two or three of the same polarity."""
    good = draw.random() < 0.5
    words = library.polar_words[good]
    if not words:
        return None
    return _ask(draw, library, good, " ".join(draw.choice(words) for _ in range(draw.choice((1, 1, 1, 2, 3)))))


def sentiment_gloss(draw: Random, library: Library) -> Example | None:
    """Polarity of a word of the lexicon, from its definition (with or without the word)."""
    good = draw.random() < 0.5
    entries = library.polar_entries[good]
    if not entries:
        return None
    word, gloss = draw.choice(entries)
    return _ask(draw, library, good, gloss if draw.random() < 0.6 else f"{word}: {gloss}")


def better(draw: Random, library: Library) -> Example | None:
    """Which of two words, or two opinions, is better (or worse)?"""
    if not library.can_compose:
        return None
    if draw.random() < 0.6:
        good, bad = draw.choice(library.polar_words[True]), draw.choice(library.polar_words[False])
        wanted = draw.random() < 0.5
        question = draw.choice(("which is better:", "better word:") if wanted else ("which is worse:", "worse word:"))
        first, second = draw.sample((good, bad), 2)
        return join(library, question, first, "or", second), library.encode(good if wanted else bad)
    best_first = draw.random() < 0.5
    texts = [opinions.compose(draw, library.lexicon, good) for good in (best_first, not best_first)]
    a, b = draw.choice(PAIRS)
    questions = ("which is better", "which one is more positive", "the better one")
    return decide(draw, library, questions, (("first", "second"),), best_first, a, texts[0], b, texts[1])


def same_sentiment(draw: Random, library: Library) -> Example | None:
    """Have two opinions the same polarity?"""
    if not library.can_compose:
        return None
    answer, good = draw.random() < 0.5, draw.random() < 0.5
    a, b = draw.choice(PAIRS)
    first = opinions.compose(draw, library.lexicon, good)
    second = opinions.compose(draw, library.lexicon, good if answer else not good)
    questions = ("do they feel the same", "same sentiment", "do they agree")
    return decide(draw, library, questions, (("same", "different"), ("yes", "no")), answer, a, first, b, second)
