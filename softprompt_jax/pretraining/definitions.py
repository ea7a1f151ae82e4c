"""Made-up dictionary tasks for pre-training: words and their glosses, synonyms."""

from __future__ import annotations

from random import Random

from softprompt_jax.pretraining.objectives import Example, Library
from softprompt_jax.pretraining.questions import SAME, YES_NO, decide, join


def define(draw: Random, library: Library) -> Example | None:
    """Word to gloss, or gloss to word."""
    if not library.entries:
        return None
    words, gloss = draw.choice(library.entries)
    word = draw.choice(words)
    if draw.random() < 0.4:
        question = draw.choice(("define:", "definition of", "what is", "what does it mean?", "explain the word"))
        return join(library, question, word), library.encode(gloss)[: library.max_target]
    question = draw.choice(("which word means:", "find the word:", "word for:", "what is the word?", "name it:"))
    return join(library, question, gloss), library.encode(word)


def is_definition(draw: Random, library: Library) -> Example | None:
    """Is it the definition of the word, or another's?"""
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
    questions = ("is this a definition of the word", "does the word mean this", "is this the meaning", "does it fit")
    labels = (*YES_NO, ("fits", "different"), ("same", "different"))
    return decide(draw, library, questions, labels, answer, "word:", draw.choice(words), "definition:", gloss)


def synonym(draw: Random, library: Library) -> Example | None:
    """Do two words mean the same?"""
    if not library.synonym_words:
        return None
    word = draw.choice(library.synonym_words)
    answer = draw.random() < 0.5
    other = draw.choice(library.synonyms[word] if answer else library.synonyms[draw.choice(library.synonym_words)])
    if other == word or (not answer and other in library.synonyms[word]):
        return None
    questions = ("do the words mean the same", "same meaning", "compare the words", "are the words alike")
    return decide(draw, library, questions, SAME, answer, "word1:", word, "word2:", other)
