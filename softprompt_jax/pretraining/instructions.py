"""Made-up instruction tasks for pre-training: "instruction words: text" to a short answer.

A soft prompt found later by gradient descent plays the part of the instruction, so each task has several
phrasings, and yes/no answers come under many pairs of label words, sometimes named in the instruction.
Texts are the corpus and the dictionary; no evaluated set is involved. `TASKS`, at the end, lists them all.
"""

# ruff: noqa: SIM905 - word lists read better as text
from __future__ import annotations

import re
from random import Random

from softprompt_jax.pretraining import definitions, polarity
from softprompt_jax.pretraining.objectives import Example, Ids, Library, Objective
from softprompt_jax.pretraining.questions import PAIRS, SAME, YES_NO, bare_word, decide, join, one_field

# --------------------------------------------------------------------------- words and positions

_WHICH = {
    "first word": lambda words: words[0],
    "last word": lambda words: words[-1],
    "second word": lambda words: words[1],
    "first two words": lambda words: words[0] + words[1],
    "last two words": lambda words: words[-2] + words[-1],
    "longest word": lambda words: max(words, key=len),
}


def which_word(draw: Random, library: Library) -> Example | None:
    """First word, last word..."""
    ids = library.sentence(draw, 4, 30)
    words = library.words(ids)
    if len(words) < 3:
        return None
    name = draw.choice(list(_WHICH))
    question = draw.choice(("{}:", "the {}:", "find the {}:", "what is the {}?")).format(name)
    return join(library, question, one_field(draw), ids), _WHICH[name](words)


def neighbour(draw: Random, library: Library) -> Example | None:
    """The word after, or before, a word that stands once in the sentence."""
    ids = library.sentence(draw, 6, 30)
    words = library.words(ids)
    places = [i for i in range(1, len(words) - 1) if words.count(words[i]) == 1]
    if not places:
        return None
    place, after = draw.choice(places), draw.random() < 0.6
    questions = ("word after", "what comes after") if after else ("word before", "what comes before")
    answer = words[place + (1 if after else -1)]
    return join(library, draw.choice(questions), words[place], one_field(draw) or "text:", ids), answer


def contains(draw: Random, library: Library) -> Example | None:
    """Is a word in the text?"""
    ids, other = library.sentence(draw, 6, 40), library.sentence(draw, 6, 40)
    answer = draw.random() < 0.5
    present = {bare_word(library, word).lower() for word in library.words(ids)}
    source = ids if answer else other
    words = [word for word in (bare_word(library, word) for word in library.words(source)) if len(word) > 2]
    words = [word for word in words if (word.lower() in present) == answer]
    if not words:
        return None
    word = draw.choice(words)
    text = ("word:", word, "text:", ids) if draw.random() < 0.5 else ("text:", ids, "word:", word)
    questions = ("is the word in the text", "does the text contain the word", "is the word there")
    labels = (*YES_NO, ("found", "missing"), ("present", "absent"), ("in", "out"))
    return decide(draw, library, questions, labels, answer, *text)


def count(draw: Random, library: Library) -> Example | None:
    """How many times does a word stand in the text?"""
    ids = library.sentence(draw, 10, 60)
    words = [bare_word(library, word).lower() for word in library.words(ids)]
    wanted = draw.choice((1, 2, 2, 3, 3, 4))
    matching = sorted({word for word in words if word and words.count(word) == wanted})
    if not matching:
        return None
    question = draw.choice(("how many times:", "count the word:", "how often:"))
    answer = ("one", "two", "three", "four")[wanted - 1] if draw.random() < 0.5 else str(wanted)
    style = "in words:" if not answer.isdigit() else "in numbers:"
    return join(library, question, draw.choice(matching), style, ids), library.encode(answer)


def length(draw: Random, library: Library) -> Example | None:
    """Is the text short or long?"""
    answer = draw.random() < 0.5
    ids = library.sentence(draw, 4, 12) if answer else library.sentence(draw, 26, 60)
    if (len(ids) <= 12) != answer or (len(ids) >= 26) == answer:
        return None
    questions = ("is this short or long", "length", "how long is the text")
    return decide(draw, library, questions, (("short", "long"),), answer, one_field(draw), ids, bare=True)


def question_or_statement(draw: Random, library: Library) -> Example | None:
    """Is it a question? The question mark is taken away."""
    answer = draw.random() < 0.5
    for _ in range(400):
        ids = library.sentence(draw, 5, 30)
        text = library.encoder.decode(ids).rstrip("\"'”’ ")
        if text.endswith("?") == answer:
            break
    else:
        return None
    if draw.random() < 0.6:
        questions, labels = ("is this a question", "does it ask something"), (*YES_NO, ("question", "statement"))
    else:
        questions = ("kind of sentence", "question or statement", "what kind of sentence is it")
        labels = (("question", "statement"),)
    return decide(draw, library, questions, labels, answer, one_field(draw), library.encode(text.rstrip("?.! \"'”’")))


def surface(draw: Random, library: Library) -> Example | None:
    """Has the text a number, capitals, a quotation, a name?"""
    answer = draw.random() < 0.5
    name = draw.choice(list(_SURFACE))
    for _ in range(200):
        ids = library.sentence(draw, 6, 36)
        text = library.encoder.decode(ids)
        if bool(_SURFACE[name](text)) == answer:
            break
    else:
        return None
    questions = (f"is there {name} in the text", f"does it contain {name}", f"has the text {name}")
    return decide(draw, library, questions, (*YES_NO, ("found", "missing")), answer, one_field(draw), ids)


_SURFACE = {
    "a number": re.compile(r"\d").search,
    "a word in capitals": re.compile(r"\b[A-Z]{3,}\b").search,
    "an exclamation mark": lambda text: "!" in text,
    "a question mark": lambda text: "?" in text,
    "a quotation": lambda text: any(mark in text for mark in '"“”'),
    "money": re.compile(r"[$£€]").search,
    "a comma": lambda text: "," in text,
    "a name": re.compile(r"(?<=[a-z] )[A-Z][a-z]+").search,
}


def kind_of_text(draw: Random, library: Library) -> Example | None:
    """From which kind of source is the text? Kinds are equally frequent."""
    kinds = sorted({file.kind for file in library.files if file.kind})
    if len(kinds) < 2:
        return None
    kind = draw.choice(kinds)
    file = draw.choice([i for i, file in enumerate(library.files) if file.kind == kind])
    text = library.texts[file]
    sentence = draw.randrange(len(text.sentences) - 1)
    start = int(text.sentences[sentence])
    ids = text.tokens[start : start + draw.randint(15, 70)].tolist()
    if draw.random() < 0.4:
        other = draw.choice([other for other in kinds if other != kind])
        first, second = draw.sample((kind, other), 2)
        return join(library, f"{first} or {second}?", one_field(draw), ids), library.encode(kind)
    if draw.random() < 0.5:
        answer = draw.random() < 0.5
        asked = kind if answer else draw.choice([other for other in kinds if other != kind])
        questions = (f"is this from a {asked}", f"is it a {asked}", f"is the text a {asked}")
        return decide(draw, library, questions, YES_NO, answer, one_field(draw), ids)
    question = draw.choice(("kind of text:", "what kind of text is this?", "genre:", "source:"))
    return join(library, question, one_field(draw), ids), library.encode(kind)


# --------------------------------------------------------------------------- pairs of sentences

_SAME_QUESTIONS = (
    "do the sentences say the same",
    "same meaning",
    "compare the sentences",
    "is the meaning the same",
    "are they alike",
    "compare",
)


def same_meaning(draw: Random, library: Library) -> Example | None:
    """Does the second sentence say what the first says? A changed copy, against another sentence nearby."""
    file, place = library.place(draw, 6, 36)
    ids = library.sentence_at(file, place)
    answer = draw.random() < 0.5
    if answer:
        other = _changed(draw, library, ids)
    elif draw.random() < 0.5:
        # Half the different ones share most words: one content word or number is another.
        other = _contradicted(draw, library, ids)
        other = _changed(draw, library, other) if other and draw.random() < 0.5 else other
    else:
        count = len(library.texts[file].sentences) - 1
        near = place + draw.choice((-3, -2, -1, 1, 2, 3))
        other = library.sentence_at(file, near if 0 <= near < count else (place + 5) % count)[:40]
        if draw.random() < 0.5:
            other = _changed(draw, library, other)
    if not other or other == ids:
        return None
    if draw.random() < 0.5:
        ids, other = other, ids
    first, second = draw.choice(PAIRS)
    return decide(draw, library, _SAME_QUESTIONS, SAME, answer, first, ids, second, other)


_LITTLE = frozenset(
    "the a an of and to in that is was for it with as on be at by this his her had not are but from or have".split()
)


def _changed(draw: Random, library: Library, ids: Ids) -> Ids:
    """Say it a little differently: drop little words, use synonyms, move the first part, change the case."""
    words = [list(word) for word in library.words(ids)]
    kept: list[Ids] = []
    for word in words:
        plain = bare_word(library, word)
        if plain.lower() in _LITTLE and draw.random() < 0.35:
            continue
        synonyms = library.synonyms.get(plain.lower()) if draw.random() < 0.6 else None
        if synonyms and len(plain) > 3 and plain.islower():
            text = library.encoder.decode(word)
            synonym = library.encode(text.replace(plain, draw.choice(synonyms)))
            kept.append(synonym if len(synonym) <= len(word) + 1 else word)  # rare words have many pieces
        elif draw.random() < 0.06:
            continue
        else:
            kept.append(word)
    if draw.random() < 0.3 and len(kept) > 6:
        commas = [i + 1 for i, word in enumerate(kept[:-3]) if library.pieces[word[-1]].endswith(",") and i > 1]
        if commas:
            cut = draw.choice(commas)
            kept = kept[cut:] + kept[:cut]
    if draw.random() < 0.25:
        return library.encode(library.encoder.decode([i for word in kept for i in word]).lower())
    return [i for word in kept for i in word]


def _contradicted(draw: Random, library: Library, ids: Ids) -> Ids | None:
    """Say something else with nearly the same words: content words come from another sentence."""
    words = library.words(ids)
    content = [i for i, word in enumerate(words) if len(bare_word(library, word)) > 3]
    others = [word for word in library.words(library.sentence(draw, 10, 40)) if len(bare_word(library, word)) > 3]
    if len(content) < 2 or len(others) < 4:
        return None
    for i in draw.sample(content, max(2, round(len(content) * draw.uniform(0.4, 0.9)))):
        words[i] = draw.choice(others)
    return [i for word in words for i in word]


def right_order(draw: Random, library: Library) -> Example | None:
    """Do two neighbouring sentences stand in their order?"""
    file, place = library.place(draw, 5, 38)
    if place + 2 > len(library.texts[file].sentences) - 1:
        return None
    first, second = library.sentence_at(file, place), library.sentence_at(file, place + 1)
    if len(second) > 42 or len(second) < 5:
        return None
    answer = draw.random() < 0.5
    if not answer:
        first, second = second, first
    a, b = draw.choice(PAIRS)
    questions = ("are the sentences in order", "is the order right", "do they stand in the right order")
    labels = (("yes", "no"), ("original", "swapped"), ("right", "wrong"))
    return decide(draw, library, questions, labels, answer, a, first, b, second)


def follows(draw: Random, library: Library) -> Example | None:
    """Does the second sentence come from just after the first, or from elsewhere in the file?"""
    file, place = library.place(draw, 6, 40)
    answer = draw.random() < 0.5
    size = len(library.texts[file].sentences) - 1
    other = place + 1 if answer else draw.randrange(size)
    if other >= size:
        return None
    second = library.sentence_at(file, other)
    if not 5 <= len(second) <= 42:
        return None
    a, b = draw.choice(PAIRS)
    questions = ("does the second follow the first", "do they belong together", "is it the next sentence")
    labels = (("yes", "no"), ("related", "unrelated"), ("together", "apart"))
    return decide(draw, library, questions, labels, answer, a, library.sentence_at(file, place), b, second)


def broken(draw: Random, library: Library) -> Example | None:
    """Is the sentence good English, or are its words mixed up?"""
    words = library.words(library.sentence(draw, 6, 36))
    answer = draw.random() < 0.5
    if not answer:
        start = draw.randrange(max(1, len(words) - 4))
        part = words[start : start + draw.randint(3, 8)]
        mixed = draw.sample(part, len(part))
        if mixed == part:
            return None
        words[start : start + len(part)] = mixed
    questions = ("is the sentence correct", "is it good english", "is the grammar right", "is it well formed")
    labels = (("yes", "no"), ("acceptable", "unacceptable"), ("correct", "wrong"), ("good", "bad"))
    return decide(draw, library, questions, labels, answer, one_field(draw), [i for word in words for i in word])


# --------------------------------------------------------------------------- all of them

# Each task and its weight in `instructions`. The order is part of what a seed draws.
TASKS: dict[str, tuple[Objective, float]] = {
    function.__name__: (function, weight)
    for function, weight in (
        (which_word, 2.0),
        (neighbour, 2.0),
        (contains, 2.0),
        (count, 1.0),
        (length, 1.0),
        (question_or_statement, 1.5),
        (surface, 1.5),
        (kind_of_text, 1.5),
        (same_meaning, 6.0),
        (right_order, 2.5),
        (follows, 2.5),
        (broken, 1.5),
        (definitions.define, 1.5),
        (definitions.is_definition, 2.5),
        (definitions.synonym, 1.5),
        (polarity.sentiment_sentence, 7.0),
        (polarity.sentiment_composed, 7.0),
        (polarity.sentiment_word, 2.5),
        (polarity.sentiment_gloss, 2.0),
        (polarity.better, 1.5),
        (polarity.same_sentiment, 1.5),
    )
}


def instructions(draw: Random, library: Library) -> Example | None:
    """One of `TASKS`, by weight."""
    name = draw.choices(list(TASKS), [weight for _, weight in TASKS.values()])[0]
    return TASKS[name][0](draw, library)
