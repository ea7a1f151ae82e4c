"""Objectives of pre-training on plain text. Each makes one example: a pair (input ids, target ids) without EOS.

An objective takes the random generator `draw` and the library of texts. It returns None if the text that it drew does
not suit it. data.py lists all objectives, those of the instruction tasks included.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import sentencepiece

from softprompt_jax.data.tokenizer import EXTRA_IDS
from softprompt_jax.pretraining.corpus import TextFile, TokenizedText, read_documents, tokenize_file
from softprompt_jax.pretraining.lexicon import Lexicon, by_polarity, parse_entry
from softprompt_jax.pretraining.phrases import QUESTIONS, WORDS, pick

Ids = list[int]
Example = tuple[Ids, Ids]
Objective = Callable[[Random, "Library"], Example | None]


class Library:
    """The texts as token ids, and the parts of them that objectives draw.

    A SentencePiece piece never crosses a space. So the ids of two texts with a space between them are the ids of the
    first and then those of the second, and no text has to be tokenised twice. The attributes `max_input` and
    `max_target` are one less than the arguments, which leaves room for EOS.
    """

    def __init__(
        self,
        texts: Sequence[TextFile],
        tokenizer_folder: str | Path,
        lexicon: Lexicon,
        max_input: int,
        max_target: int,
        final_sentinel: bool = True,
    ):
        model = Path(tokenizer_folder) / "spiece.model"
        self.encoder = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.pieces = [self.encoder.id_to_piece(i) for i in range(self.encoder.get_piece_size())]
        self.begins_word = [piece.startswith("▁") for piece in self.pieces]
        self.first_sentinel = len(self.pieces) + 99  # <extra_id_0>; the others descend from it
        self.max_input, self.max_target, self.final_sentinel = max_input - 1, max_target - 1, final_sentinel
        self.lexicon, self.files = lexicon, list(texts)
        self.texts: list[TokenizedText] = [tokenize_file(text, model, lexicon) for text in texts]
        shares = [len(t.tokens) * file.weight for t, file in zip(self.texts, self.files, strict=True)]
        self._all = _cumulative(shares)
        prose = [i for i, file in enumerate(self.files) if file.form == "text"] or list(range(len(self.files)))
        self._prose = _cumulative([share if i in prose else 0.0 for i, share in enumerate(shares)])
        self.polar = {good: self._polar_places(good) for good in (True, False)}
        self.polar_words = by_polarity(lexicon.valence, 1.0)
        dictionaries = [read_documents(file.path) for file in self.files if file.form == "dictionary"]
        lines = (line for documents in dictionaries for document in documents for line in document)
        self.entries = [(words, gloss) for words, gloss in map(parse_entry, lines) if words]
        self.synonyms = _synonyms(self.entries)
        self.synonym_words = list(self.synonyms)
        self.polar_entries = _polar_entries(self.entries, lexicon)
        self.can_compose = all(lexicon.strong_adjectives.values())

    def encode(self, text: str) -> Ids:
        """Return the ids of a short text. A text that comes again is not tokenised again."""
        return list(self._encoded(text))

    @functools.lru_cache(maxsize=200_000)  # noqa: B019 - lives as long as the process
    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(self.encoder.encode(text))

    def join(self, *parts: str | Ids) -> Ids:
        """Return the ids of all parts, texts and ids, as one text with spaces between them."""
        return [id_ for part in parts for id_ in (self.encode(part) if isinstance(part, str) else part)]

    def bare_word(self, word: Ids) -> str:
        """Return a word without the punctuation around it."""
        return self.encoder.decode(word).strip(" .,;:!?\"'()[]“”‘’-`*")

    def file(self, draw: Random, prose: bool = False) -> int:
        """Draw the number of a file. Each has a share of the number of its tokens times its weight."""
        return int(np.searchsorted(self._prose if prose else self._all, draw.random(), side="right"))

    def passage(self, draw: Random, length: int) -> Ids:
        """Draw up to `length` tokens of running text that begin with a sentence and stay in one document."""
        text = self.texts[self.file(draw)]
        # Every sentence is as likely as any other, so a document is the more likely the longer it is.
        sentence = draw.randrange(len(text.sentences) - 1)
        paragraph = int(np.searchsorted(text.paragraphs, sentence, side="right")) - 1
        document = int(np.searchsorted(text.documents, paragraph, side="right")) - 1
        end = int(text.sentences[text.paragraphs[text.documents[document + 1]]])
        start = int(text.sentences[sentence])
        return text.tokens[start : min(end, start + length)].tolist()

    def sentence(self, draw: Random, shortest: int = 5, longest: int = 40) -> Ids:
        """Draw a sentence of prose that has `shortest` to `longest` tokens; one that has not after 200 attempts."""
        return self.sentence_at(*self.place(draw, shortest, longest))

    def place(self, draw: Random, shortest: int = 5, longest: int = 40) -> tuple[int, int]:
        """Draw a sentence as `sentence` does, and return the number of its file and its own number in the file."""
        for _ in range(200):
            file = self.file(draw, prose=True)
            bounds = self.texts[file].sentences
            sentence = draw.randrange(len(bounds) - 1)
            if shortest <= bounds[sentence + 1] - bounds[sentence] <= longest:
                break
        return file, sentence

    def neutral(self, draw: Random) -> Ids:
        """Draw a short sentence of prose that is neither clearly good nor clearly bad."""
        while True:
            file, sentence = self.place(draw, 5, 25)
            if not self.texts[file].valence[sentence]:
                return self.sentence_at(file, sentence)

    def _polar_places(self, good: bool) -> np.ndarray:
        """Return int32 [n, 2], the places of the sentences of prose of one polarity that have 5 to 70 tokens."""
        places = []
        for i, (file, text) in enumerate(zip(self.files, self.texts, strict=True)):
            lengths = np.diff(text.sentences)
            fits = (text.valence > 0) if good else (text.valence < 0)
            chosen = np.flatnonzero(fits & (lengths >= 5) & (lengths <= 70))
            contents = {text.tokens[text.sentences[k] : text.sentences[k + 1]].tobytes(): k for k in chosen}
            chosen = np.asarray(sorted(contents.values()), np.int64)  # the last of equal sentences
            # A file of weight 2 gives its sentences twice, one of weight 0.5 every second sentence.
            repeat = round(4 * file.weight) if file.form == "text" else 0
            chosen = np.repeat(chosen, repeat // 4) if repeat >= 4 else chosen[:: 4 // repeat if repeat else 1]
            if repeat:
                places.append(np.stack([np.full(len(chosen), i), chosen], axis=1))
        return np.concatenate(places).astype(np.int32) if places else np.zeros((0, 2), np.int32)

    def sentence_at(self, file: int, sentence: int) -> Ids:
        """Return the ids of a sentence, cut to the length of the input."""
        text = self.texts[file]
        start, end = text.sentences[sentence], text.sentences[sentence + 1]
        return text.tokens[start : min(end, start + self.max_input)].tolist()

    def words(self, ids: Ids) -> list[Ids]:
        """Split ids into words. Every piece with a space at its beginning begins a word."""
        words: list[Ids] = []
        for id_ in ids:
            if self.begins_word[id_] or not words:
                words.append([])
            words[-1].append(id_)
        return words


def _synonyms(entries: Sequence[tuple[list[str], str]]) -> dict[str, list[str]]:
    """Return, for each word of lower-case letters, the others in its dictionary entries; for 3 senses at most."""
    senses: Counter[str] = Counter()
    found: dict[str, set[str]] = defaultdict(set)
    for words, _ in entries:
        words = [word for word in words if word.isalpha() and word.islower()]
        senses.update(words)
        for word in words:
            found[word] |= {*words} - {word}
    return {word: sorted(others) for word, others in found.items() if others and senses[word] <= 3}


def _polar_entries(entries: Sequence[tuple[list[str], str]], lexicon: Lexicon) -> dict[bool, list[tuple[str, str]]]:
    """Return (word, gloss) of the dictionary's entries that are clearly good (True) or clearly bad (False)."""
    found: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for words, gloss in entries:
        values = [lexicon.valence[word] for word in words if word in lexicon.valence]
        about = lexicon.clear_valence(gloss)
        mean = sum(values) / len(values) if values else 0.0
        # The lexicon does not tell the senses of a word apart. The gloss does, so it must not say the contrary.
        if abs(mean) >= 1.5 and about * mean >= 0 and len(gloss) < 200:
            found[mean > 0] += [(word, gloss) for word in words]
    return found


def _cumulative(shares: Sequence[float]) -> np.ndarray:
    total = np.cumsum(shares)
    return total / total[-1]


def _spans(draw: Random, length: int, rate: float, mean_span: float) -> list[int]:
    """Draw the lengths of stretches that are kept and masked by turns; their sum is `length` (Raffel et al., 2020)."""
    masked = min(max(round(length * rate), 1), length - 1)
    count = min(max(round(masked / mean_span), 1), masked, length - masked)

    def parts(total: int) -> list[int]:
        cuts = sorted(draw.sample(range(1, total), count - 1))
        return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]

    return [n for pair in zip(parts(length - masked), parts(masked), strict=True) for n in pair]


def _mask(library: Library, ids: Ids, lengths: Sequence[int]) -> Example:
    """Put a sentinel for every second stretch of these lengths; the target has each sentinel and then its stretch."""
    inputs: Ids = []
    targets: Ids = []
    position, sentinel = 0, library.first_sentinel
    for i, length in enumerate(lengths[: 2 * (EXTRA_IDS - library.final_sentinel)]):  # as far as there are sentinels
        stretch = ids[position : position + length]
        position += length
        if i % 2:
            inputs.append(sentinel)
            targets += [sentinel, *stretch]
            sentinel -= 1
        else:
            inputs += stretch
    inputs += ids[position:]
    if library.final_sentinel:
        targets.append(sentinel)
    return inputs, targets


def span_corruption(draw: Random, library: Library) -> Example | None:
    """Mask 15% of a passage in spans of 3 pieces on average, as T5 did (Raffel et al., 2020, section 3.1.4)."""
    # A sentinel for every 3 masked pieces makes the text a tenth shorter. So a passage of 1.1 times the length fits.
    ids = library.passage(draw, int(library.max_input * draw.choice((0.35, 0.7, 1.1, 1.1))))
    if len(ids) < 6:
        return None
    return _mask(library, ids, _spans(draw, len(ids), 0.15, 3.0))


def short_spans(draw: Random, library: Library) -> Example | None:
    """Mask one to three single words of a sentence, an easy task from which the decoder learns to read the encoder."""
    words = library.words(library.sentence(draw, 6, 40))
    if len(words) < 4:
        return None
    # Two neighbours are never masked both, so that each sentinel stands for one word.
    chosen = sorted(draw.sample(range(1, len(words)), min(draw.randint(1, 3), len(words) // 3)))
    chosen = [word for i, word in enumerate(chosen) if i == 0 or word - chosen[i - 1] > 1]
    lengths, start = [], 0
    for word in chosen:
        lengths += [sum(map(len, words[start:word])), len(words[word])]
        start = word + 1
    return _mask(library, flat(words), lengths)


def copy(draw: Random, library: Library) -> Example | None:
    """Repeat a sentence, or the part of it between two sentinels."""
    words = library.words(library.sentence(draw, 4, min(22, library.max_target)))
    if draw.random() < 0.5 or len(words) < 4:
        return library.encode(pick(draw, "copy")) + flat(words), flat(words)
    start, end = sorted(draw.sample(range(len(words) + 1), 2))
    first, second = library.first_sentinel, library.first_sentinel - 1
    marked = [*flat(words[:start]), first, *flat(words[start:end]), second, *flat(words[end:])]
    return library.encode(pick(draw, "copy marked")) + marked, flat(words[start:end])


def word_order(draw: Random, library: Library) -> Example | None:
    """Put the shuffled words of a short sentence in order."""
    words = library.words(library.sentence(draw, 4, min(14, library.max_target)))
    shuffled = draw.sample(words, len(words))
    return library.encode(pick(draw, "word order")) + flat(shuffled), flat(words)


def prefix_lm(draw: Random, library: Library) -> Example | None:
    """Continue a passage: its first part is the input, the rest the target. LM adaptation (Lester et al., 2021)."""
    ids = library.passage(draw, library.max_input + library.max_target)
    longest = min(len(ids) - 3, library.max_input)
    if longest < 3:
        return None
    split = draw.randint(3, longest)
    return ids[:split], ids[split : split + library.max_target]


def decide(draw: Random, library: Library, name: str, answer: bool, /, *text: str | Ids, **asked_for: str) -> Example:
    """Ask the question `name` of phrases.yaml about a text; `asked_for` fills the fields of its phrasings.

    A fifth of the questions name the two possible answers. All others are answered with the first pair of words, so
    that a question always tells in which words to answer. One question in fifty assigns two unrelated words.
    """
    question = QUESTIONS[name]
    asked, pair = draw.choice(question.asked).format(**asked_for), question.answers[0]
    form = draw.random()
    if form < 0.8:
        asked = draw.choice((f"{asked}:", f"{asked}:", f"{asked}?", asked))
    elif form < 0.98:
        pair = draw.choice(question.answers)
        first, second = draw.sample(pair, 2)
        options = WORDS["options"] + (WORDS["bare options"] if question.bare else ())
        asked = draw.choice(options).format(q=asked, first=first, second=second)
    else:
        true, false = pair
        pair = first, second = draw.sample(WORDS["codes"], 2)
        asked = pick(draw, "coded").format(q=asked, first=first, second=second, true=true, false=false)
    return library.join(asked, *text), library.encode(pair[0] if answer else pair[1])


def flat(words: Sequence[Ids]) -> Ids:
    """Return the ids of words one after the other."""
    return [id_ for word in words for id_ in word]


PLAIN = (span_corruption, short_spans, copy, word_order, prefix_lm)
