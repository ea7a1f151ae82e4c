"""Questions of pre-training's instruction tasks: their phrasings, their pairs of answers, and examples made of both."""

# ruff: noqa: SIM905 - word lists read better as text
from __future__ import annotations

from collections.abc import Sequence
from random import Random

from softprompt_jax.pretraining.objectives import Example, Ids, Library


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
SAME = (
    ("same", "different"),
    ("yes", "no"),
    ("similar", "unrelated"),
    ("equivalent", "different"),
    ("duplicate", "not_duplicate"),
    ("true", "false"),
)


def one_field(draw: Random) -> str:
    """Draw the word before a single text, or none."""
    return draw.choice(_FIELDS)


def bare_word(library: Library, word: Ids) -> str:
    """Return a word without the punctuation around it."""
    return library.encoder.decode(word).strip(" .,;:!?\"'()[]“”‘’-`*")
