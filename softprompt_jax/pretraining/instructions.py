"""Made-up instruction tasks for pre-training: "instruction words: text" to a short answer.

A soft prompt found later by gradient descent plays the part of the instruction, so each task has several
phrasings, and yes/no answers come under many pairs of label words, sometimes named in the instruction.
Texts are the corpus and the dictionary; no evaluated set is involved.
"""

# ruff: noqa: SIM905 - word lists read better as text
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

from softprompt_jax.pretraining.objectives import Example, Ids, Library, objective

Task = Callable[[Random, Library], Example | None]
TASKS: dict[str, tuple[Task, float]] = {}


def task(weight: float) -> Callable[[Task], Task]:
    """Register an instruction task: an objective of its own, and with `weight` a part of `instructions`."""

    def register(function: Task) -> Task:
        TASKS[function.__name__] = objective(function), weight
        return function

    return register


@objective
def instructions(draw: Random, library: Library) -> Example | None:
    """One of the instruction tasks of this module, by weight."""
    names = list(TASKS)
    name = draw.choices(names, [TASKS[name][1] for name in names])[0]
    return TASKS[name][0](draw, library)


# --------------------------------------------------------------------------- putting examples together


def join(library: Library, *parts: str | Ids) -> Ids:
    """Concatenate texts and ids as if the words had been joined by spaces."""
    ids: Ids = []
    for part in parts:
        ids += library.encode(part) if isinstance(part, str) else part
    return ids


_FIELDS = ("sentence:", "text:", "input:", "sentence:", "")
PAIRS = (
    ("sentence1:", "sentence2:"),
    ("sentence1:", "sentence2:"),
    ("sentence 1:", "sentence 2:"),
    ("first:", "second:"),
    ("text1:", "text2:"),
    ("a:", "b:"),
)


def decide(
    draw: Random,
    library: Library,
    questions: Sequence[str],
    labels: Sequence[tuple[str, str]],
    answer: bool,
    *text: str | Ids,
    bare: bool = False,
) -> Example:
    """Ask a question with two answers; `labels` are (if true, if false).

    A fifth of the questions name the options. Those that do not are answered in the first pair, so that the
    words of the answer always follow from the question; very rarely the question assigns two unrelated words.
    `bare`: the options alone may stand for the question, as they say what is asked.
    """
    question = draw.choice(questions)
    form = draw.random()
    if form < 0.8:
        pair = labels[0]
        question = draw.choice((f"{question}:", f"{question}:", f"{question}?", question))
    elif form < 0.98:
        pair = draw.choice(labels)
        first, second = draw.sample(pair, 2)
        question = draw.choice(_OPTIONS + _BARE if bare else _OPTIONS).format(q=question, first=first, second=second)
    else:
        first, second = draw.sample(_CODES, 2)
        pair = (first, second)
        question = draw.choice(_CODED).format(
            q=question, first=first, second=second, true=labels[0][0], false=labels[0][1]
        )
    return join(library, question, *text), library.encode(pair[0] if answer else pair[1])


_OPTIONS = (
    "{q}: {first} or {second}?",
    "{first} or {second}? {q}:",
    "{q}? answer {first} or {second}:",
    "{q} ({first}, {second}):",
)
_BARE = ("{first} or {second}:", "{first} or {second}?", "choose {first} or {second}:")
_CODED = ("{q}? {first} if {true}, {second} if {false}:", "{q}? say {first} for {true} and {second} for {false}:")
_CODES = tuple(
    """a b one two red blue green white black up down left right sun moon dog cat tree water fire stone house
    ham spam north south apple bread high low real fake""".split()
)
YES_NO = (("yes", "no"), ("true", "false"), ("right", "wrong"))


def one_field(draw: Random) -> str:
    """Draw the word before a single text, or none."""
    return draw.choice(_FIELDS)


def _plain(library: Library, word: Ids) -> str:
    """Return a word without the punctuation around it."""
    return library.encoder.decode(word).strip(" .,;:!?\"'()[]“”‘’-`*")


# --------------------------------------------------------------------------- words and positions

_WHICH = {
    "first word": lambda words: words[0],
    "last word": lambda words: words[-1],
    "second word": lambda words: words[1],
    "first two words": lambda words: words[0] + words[1],
    "last two words": lambda words: words[-2] + words[-1],
    "longest word": lambda words: max(words, key=len),
}


@task(2.0)
def which_word(draw: Random, library: Library) -> Example | None:
    """First word, last word..."""
    ids = library.sentence(draw, 4, 30)
    words = library.words(ids)
    if len(words) < 3:
        return None
    name = draw.choice(list(_WHICH))
    question = draw.choice(("{}:", "the {}:", "find the {}:", "what is the {}?")).format(name)
    return join(library, question, one_field(draw), ids), _WHICH[name](words)


@task(2.0)
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


@task(2.0)
def contains(draw: Random, library: Library) -> Example | None:
    """Is a word in the text?"""
    ids, other = library.sentence(draw, 6, 40), library.sentence(draw, 6, 40)
    answer = draw.random() < 0.5
    present = {_plain(library, word).lower() for word in library.words(ids)}
    source = ids if answer else other
    words = [word for word in (_plain(library, word) for word in library.words(source)) if len(word) > 2]
    words = [word for word in words if (word.lower() in present) == answer]
    if not words:
        return None
    word = draw.choice(words)
    text = ("word:", word, "text:", ids) if draw.random() < 0.5 else ("text:", ids, "word:", word)
    questions = ("is the word in the text", "does the text contain the word", "is the word there")
    labels = (*YES_NO, ("found", "missing"), ("present", "absent"), ("in", "out"))
    return decide(draw, library, questions, labels, answer, *text)


@task(1.0)
def count(draw: Random, library: Library) -> Example | None:
    """How many times does a word stand in the text?"""
    ids = library.sentence(draw, 10, 60)
    words = [_plain(library, word).lower() for word in library.words(ids)]
    wanted = draw.choice((1, 2, 2, 3, 3, 4))
    matching = sorted({word for word in words if word and words.count(word) == wanted})
    if not matching:
        return None
    question = draw.choice(("how many times:", "count the word:", "how often:"))
    answer = ("one", "two", "three", "four")[wanted - 1] if draw.random() < 0.5 else str(wanted)
    style = "in words:" if not answer.isdigit() else "in numbers:"
    return join(library, question, draw.choice(matching), style, ids), library.encode(answer)


@task(1.0)
def length(draw: Random, library: Library) -> Example | None:
    """Is the text short or long?"""
    answer = draw.random() < 0.5
    ids = library.sentence(draw, 4, 12) if answer else library.sentence(draw, 26, 60)
    if (len(ids) <= 12) != answer or (len(ids) >= 26) == answer:
        return None
    questions = ("is this short or long", "length", "how long is the text")
    return decide(draw, library, questions, (("short", "long"),), answer, one_field(draw), ids, bare=True)


@task(1.5)
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


@task(1.5)
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


@task(1.5)
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

SAME = (
    ("same", "different"),
    ("yes", "no"),
    ("similar", "unrelated"),
    ("equivalent", "different"),
    ("duplicate", "not_duplicate"),
    ("true", "false"),
)
_SAME_QUESTIONS = (
    "do the sentences say the same",
    "same meaning",
    "compare the sentences",
    "is the meaning the same",
    "are they alike",
    "compare",
)


@task(6.0)
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
        plain = _plain(library, word)
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
    content = [i for i, word in enumerate(words) if len(_plain(library, word)) > 3]
    others = [word for word in library.words(library.sentence(draw, 10, 40)) if len(_plain(library, word)) > 3]
    if len(content) < 2 or len(others) < 4:
        return None
    for i in draw.sample(content, max(2, round(len(content) * draw.uniform(0.4, 0.9)))):
        words[i] = draw.choice(others)
    return [i for word in words for i in word]


@task(2.5)
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


@task(2.5)
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


@task(1.5)
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
