"""Made-up instruction tasks for pre-training: an instruction and a text as the input, a short answer as the target.

A soft prompt, which is trained later, takes the place of the instruction. So each task has several phrasings, and its
answers are many pairs of label words, which some of the instructions name. The texts are those of the corpus and the
dictionary; no set that models are evaluated on is used. `TASKS`, at the end, lists all tasks.
"""

from __future__ import annotations

import re
from random import Random

from softprompt_jax.pretraining import polarity
from softprompt_jax.pretraining.objectives import Example, Ids, Library, Objective, decide, flat
from softprompt_jax.pretraining.phrases import PAIRS, WEIGHTS, WORDS, pick

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
    """Which is the first word, the last, the longest?"""
    ids = library.sentence(draw, 4, 30)
    words = library.words(ids)
    if len(words) < 3:
        return None
    name = draw.choice(list(_WHICH))
    question = pick(draw, "which word").format(name)
    return library.join(question, pick(draw, "field"), ids), _WHICH[name](words)


def neighbour(draw: Random, library: Library) -> Example | None:
    """Which word stands after, or before, a word that is once in the sentence?"""
    ids = library.sentence(draw, 6, 30)
    words = library.words(ids)
    places = [i for i in range(1, len(words) - 1) if words.count(words[i]) == 1]
    if not places:
        return None
    place, after = draw.choice(places), draw.random() < 0.6
    answer = words[place + (1 if after else -1)]
    question = pick(draw, "word after" if after else "word before")
    return library.join(question, words[place], pick(draw, "field") or "text:", ids), answer


def contains(draw: Random, library: Library) -> Example | None:
    """Is a word in the text?"""
    ids, other = library.sentence(draw, 6, 40), library.sentence(draw, 6, 40)
    answer = draw.random() < 0.5
    present = {library.bare_word(word).lower() for word in library.words(ids)}
    source = ids if answer else other
    words = [word for word in (library.bare_word(word) for word in library.words(source)) if len(word) > 2]
    words = [word for word in words if (word.lower() in present) == answer]
    if not words:
        return None
    word = draw.choice(words)
    text = ("word:", word, "text:", ids) if draw.random() < 0.5 else ("text:", ids, "word:", word)
    return decide(draw, library, "contains", answer, *text)


def count(draw: Random, library: Library) -> Example | None:
    """How many times does a word stand in the text?"""
    ids = library.sentence(draw, 10, 60)
    words = [library.bare_word(word).lower() for word in library.words(ids)]
    wanted = draw.choice((1, 2, 2, 3, 3, 4))
    matching = sorted({word for word in words if word and words.count(word) == wanted})
    if not matching:
        return None
    question = pick(draw, "count")
    answer = WORDS["numbers"][wanted - 1] if draw.random() < 0.5 else str(wanted)
    style = "in words:" if not answer.isdigit() else "in numbers:"
    return library.join(question, draw.choice(matching), style, ids), library.encode(answer)


def length(draw: Random, library: Library) -> Example | None:
    """Is the text short or long?"""
    answer = draw.random() < 0.5
    ids = library.sentence(draw, 4, 12) if answer else library.sentence(draw, 26, 60)
    if (len(ids) <= 12) != answer or (len(ids) >= 26) == answer:
        return None
    return decide(draw, library, "length", answer, pick(draw, "field"), ids)


def question_or_statement(draw: Random, library: Library) -> Example | None:
    """Is the sentence, without its last mark, a question?"""
    answer = draw.random() < 0.5
    for _ in range(400):
        ids = library.sentence(draw, 5, 30)
        text = library.encoder.decode(ids).rstrip("\"'”’ ")
        if text.endswith("?") == answer:
            break
    else:
        return None
    question = "is a question" if draw.random() < 0.6 else "kind of sentence"
    return decide(draw, library, question, answer, pick(draw, "field"), text.rstrip("?.! \"'”’"))


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
    return decide(draw, library, "surface", answer, pick(draw, "field"), ids, thing=name)


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
    """Of which kind is the text? Every kind is as frequent as any other."""
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
        return library.join(f"{first} or {second}?", pick(draw, "field"), ids), library.encode(kind)
    if draw.random() < 0.5:
        answer = draw.random() < 0.5
        asked = kind if answer else draw.choice([other for other in kinds if other != kind])
        return decide(draw, library, "is of the kind", answer, pick(draw, "field"), ids, kind=asked)
    return library.join(pick(draw, "kind of text"), pick(draw, "field"), ids), library.encode(kind)


# --------------------------------------------------------------------------- pairs of sentences

_LITTLE = frozenset(WORDS["little words"])


def same_meaning(draw: Random, library: Library) -> Example | None:
    """Do two sentences say the same? If so, one is a changed copy; if not, a contradiction or a sentence nearby."""
    file, place = library.place(draw, 6, 36)
    ids = library.sentence_at(file, place)
    answer = draw.random() < 0.5
    if answer:
        other = _changed(draw, library, ids)
    elif draw.random() < 0.5:
        # Half of those that differ have most words in common: some content words are others.
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
    return decide(draw, library, "same meaning", answer, first, ids, second, other)


def _changed(draw: Random, library: Library, ids: Ids) -> Ids:
    """Say the same a little differently: leave out little words, use synonyms, move the first part, change the case."""
    words = [list(word) for word in library.words(ids)]
    kept: list[Ids] = []
    for word in words:
        plain = library.bare_word(word)
        if plain.lower() in _LITTLE and draw.random() < 0.35:
            continue
        synonyms = library.synonyms.get(plain.lower()) if draw.random() < 0.6 else None
        if synonyms and len(plain) > 3 and plain.islower():
            text = library.encoder.decode(word)
            synonym = library.encode(text.replace(plain, draw.choice(synonyms)))
            kept.append(synonym if len(synonym) <= len(word) + 1 else word)  # one with many more pieces is a rare word
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
        return library.encode(library.encoder.decode(flat(kept)).lower())
    return flat(kept)


def _contradicted(draw: Random, library: Library, ids: Ids) -> Ids | None:
    """Say something else with nearly the same words: some content words are taken from another sentence."""
    words = library.words(ids)
    content = [i for i, word in enumerate(words) if len(library.bare_word(word)) > 3]
    others = [word for word in library.words(library.sentence(draw, 10, 40)) if len(library.bare_word(word)) > 3]
    if len(content) < 2 or len(others) < 4:
        return None
    for i in draw.sample(content, max(2, round(len(content) * draw.uniform(0.4, 0.9)))):
        words[i] = draw.choice(others)
    return flat(words)


def right_order(draw: Random, library: Library) -> Example | None:
    """Are two neighbouring sentences in the order of the text?"""
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
    return decide(draw, library, "right order", answer, a, first, b, second)


def follows(draw: Random, library: Library) -> Example | None:
    """Does the second sentence follow the first in the text, or is it from elsewhere in the file?"""
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
    return decide(draw, library, "follows", answer, a, library.sentence_at(file, place), b, second)


def broken(draw: Random, library: Library) -> Example | None:
    """Is the sentence good English, or are some of its words mixed up?"""
    words = library.words(library.sentence(draw, 6, 36))
    answer = draw.random() < 0.5
    if not answer:
        start = draw.randrange(max(1, len(words) - 4))
        part = words[start : start + draw.randint(3, 8)]
        mixed = draw.sample(part, len(part))
        if mixed == part:
            return None
        words[start : start + len(part)] = mixed
    return decide(draw, library, "correct", answer, pick(draw, "field"), flat(words))


# --------------------------------------------------------------------------- the dictionary


def define(draw: Random, library: Library) -> Example | None:
    """What does a word mean, or which word has this meaning?"""
    if not library.entries:
        return None
    words, gloss = draw.choice(library.entries)
    word = draw.choice(words)
    if draw.random() < 0.4:
        return library.join(pick(draw, "define"), word), library.encode(gloss)[: library.max_target]
    return library.join(pick(draw, "defined word"), gloss), library.encode(word)


def is_definition(draw: Random, library: Library) -> Example | None:
    """Is it the definition of the word, or of another word?"""
    if not library.entries:
        return None
    place, answer = draw.randrange(len(library.entries)), draw.random() < 0.5
    words, gloss = library.entries[place]
    if not answer:
        near = draw.randrange(max(0, place - 50), min(len(library.entries), place + 50))
        other = near if draw.random() < 0.3 else draw.randrange(len(library.entries))
        if set(library.entries[other][0]) & set(words):
            return None
        gloss = library.entries[other][1]
    return decide(draw, library, "is definition", answer, "word:", draw.choice(words), "definition:", gloss)


def synonym(draw: Random, library: Library) -> Example | None:
    """Do two words mean the same?"""
    if not library.synonym_words:
        return None
    word = draw.choice(library.synonym_words)
    answer = draw.random() < 0.5
    other = draw.choice(library.synonyms[word] if answer else library.synonyms[draw.choice(library.synonym_words)])
    if other == word or (not answer and other in library.synonyms[word]):
        return None
    return decide(draw, library, "synonym", answer, "word1:", word, "word2:", other)


# --------------------------------------------------------------------------- all of them

TASKS: dict[str, Objective] = {
    function.__name__: function
    for function in (
        *(which_word, neighbour, contains, count, length, question_or_statement, surface, kind_of_text, same_meaning),
        *(right_order, follows, broken, define, is_definition, synonym),
        *(polarity.sentiment_sentence, polarity.sentiment_composed, polarity.sentiment_word, polarity.sentiment_gloss),
        *(polarity.better, polarity.same_sentiment),
    )
}


def instructions(draw: Random, library: Library) -> Example | None:
    """Make an example of one of `TASKS`, drawn by weight."""
    (name,) = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))
    return TASKS[name](draw, library)
