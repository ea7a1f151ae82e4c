"""Made-up tasks of sentiment for pre-training: is a sentence, a made-up opinion, a word or a definition good or bad?"""

from __future__ import annotations

from random import Random

from softprompt_jax.pretraining import opinions
from softprompt_jax.pretraining.objectives import Example, Ids, Library, decide
from softprompt_jax.pretraining.phrases import PAIRS, pick


def _ask(draw: Random, library: Library, good: bool, ids: Ids | str) -> Example:
    """Ask for the polarity of a text, or whether it is positive, or whether it is negative."""
    field = pick(draw, "opinion field")
    form = draw.random()
    if form < 0.7:
        return decide(draw, library, "sentiment", good, field, ids)
    if form < 0.87:
        return decide(draw, library, "is positive", good, field, ids)
    return decide(draw, library, "is negative", not good, field, ids)


def sentiment_sentence(draw: Random, library: Library) -> Example | None:
    """Is a sentence of the corpus, whose words agree in the lexicon, good or bad? Both are equally frequent."""
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
    """Is a made-up opinion good or bad? Some stand beside a second one or beside a sentence that is neither."""
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
    """Is a word good or bad, or are two or three words?"""
    good = draw.random() < 0.5
    words = library.polar_words[good]
    if not words:
        return None
    return _ask(draw, library, good, " ".join(draw.choice(words) for _ in range(draw.choice((1, 1, 1, 2, 3)))))


def sentiment_gloss(draw: Random, library: Library) -> Example | None:
    """Is a word good or bad by its definition, which stands alone or beside the word?"""
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
        question = pick(draw, "better word" if wanted else "worse word")
        first, second = draw.sample((good, bad), 2)
        return library.join(question, first, "or", second), library.encode(good if wanted else bad)
    best_first = draw.random() < 0.5
    texts = [opinions.compose(draw, library.lexicon, good) for good in (best_first, not best_first)]
    a, b = draw.choice(PAIRS)
    return decide(draw, library, "better opinion", best_first, a, texts[0], b, texts[1])


def same_sentiment(draw: Random, library: Library) -> Example | None:
    """Are two opinions both good, or both bad?"""
    if not library.can_compose:
        return None
    answer, good = draw.random() < 0.5, draw.random() < 0.5
    a, b = draw.choice(PAIRS)
    first = opinions.compose(draw, library.lexicon, good)
    second = opinions.compose(draw, library.lexicon, good if answer else not good)
    return decide(draw, library, "same sentiment", answer, a, first, b, second)
