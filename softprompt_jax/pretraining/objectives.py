"""Objectives of pre-training on plain text: each makes one example, a pair (input ids, target ids) without EOS.

An objective takes the random draw and the library of texts, and may return None when what it drew does not fit. All of
them, the instruction tasks included, are listed in data.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import sentencepiece

from softprompt_jax.data.tokenizer import EXTRA_IDS
from softprompt_jax.pretraining.corpus import TextFile, TokenizedText, parse_entries, tokenize_file
from softprompt_jax.pretraining.lexicon import Lexicon

Ids = list[int]
Example = tuple[Ids, Ids]
Objective = Callable[[Random, "Library"], Example | None]


class Library:
    """The texts as token ids, and what objectives draw from them.

    Whitespace ends every SentencePiece piece, so the ids of texts joined by a space are their ids joined:
    nothing is tokenised twice. `max_input` and `max_target` leave room for EOS.
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
        pieces = [self.encoder.id_to_piece(i) for i in range(self.encoder.get_piece_size())]
        self.pieces = pieces
        self.begins_word = [piece.startswith("▁") for piece in pieces]
        self.first_sentinel = len(pieces) + 99  # <extra_id_0>; the others descend from it
        self.max_input, self.max_target, self.final_sentinel = max_input - 1, max_target - 1, final_sentinel
        self.lexicon = lexicon
        self.files = list(texts)
        self.texts: list[TokenizedText] = [tokenize_file(text, model, lexicon) for text in texts]
        shares = [len(t.tokens) * file.weight for t, file in zip(self.texts, self.files, strict=True)]
        self._all = _cumulative(shares)
        prose = [i for i, file in enumerate(self.files) if file.form == "text"] or list(range(len(self.files)))
        self._prose = _cumulative([share if i in prose else 0.0 for i, share in enumerate(shares)])
        self.polar = {good: self._polar_places(good) for good in (True, False)}
        self.polar_words = {
            good: [word for word, value in lexicon.valence.items() if (value > 0) == good and abs(value) >= 1.0]
            for good in (True, False)
        }
        self.entries = [entry for file in self.files if file.form == "dictionary" for entry in parse_entries(file.path)]
        self.synonyms = _synonyms(self.entries)
        self.synonym_words = list(self.synonyms)
        self.polar_entries = _polar_entries(self.entries, lexicon)
        adjectives = lexicon.adjectives.values()
        self.can_compose = min(adjectives, default=0) < -1.5 and max(adjectives, default=0) > 1.5

    def encode(self, text: str) -> Ids:
        """Return the ids of a short text; the same text is tokenised once."""
        return list(self._encoded(text))

    @functools.lru_cache(maxsize=200_000)  # noqa: B019 - lives as long as the process
    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(self.encoder.encode(text))

    def file(self, draw: Random, prose: bool = False) -> int:
        """Draw a file: its share is its tokens times its weight."""
        return int(np.searchsorted(self._prose if prose else self._all, draw.random(), side="right"))

    def passage(self, draw: Random, length: int) -> Ids:
        """Draw up to `length` tokens of running text, from the start of a sentence, inside one document."""
        text = self.texts[self.file(draw)]
        # A document in proportion to its length: through one of its sentences.
        sentence = draw.randrange(len(text.sentences) - 1)
        paragraph = int(np.searchsorted(text.paragraphs, sentence, side="right")) - 1
        document = int(np.searchsorted(text.documents, paragraph, side="right")) - 1
        end = int(text.sentences[text.paragraphs[text.documents[document + 1]]])
        start = int(text.sentences[sentence])
        return text.tokens[start : min(end, start + length)].tolist()

    def sentence(self, draw: Random, shortest: int = 5, longest: int = 40) -> Ids:
        """Draw a sentence of prose with so many tokens."""
        return self.sentence_at(*self.place(draw, shortest, longest))

    def place(self, draw: Random, shortest: int = 5, longest: int = 40) -> tuple[int, int]:
        """Draw (file, sentence) of a sentence of prose with so many tokens."""
        for _ in range(200):
            file = self.file(draw, prose=True)
            bounds = self.texts[file].sentences
            sentence = draw.randrange(len(bounds) - 1)
            if shortest <= bounds[sentence + 1] - bounds[sentence] <= longest:
                break
        return file, sentence

    def neutral(self, draw: Random) -> Ids:
        """Draw a short sentence of prose without clear valence."""
        while True:
            file, sentence = self.place(draw, 5, 25)
            if not self.texts[file].valence[sentence]:
                return self.sentence_at(file, sentence)

    def _polar_places(self, good: bool) -> np.ndarray:
        """Return int32 [n, 2], (file, sentence) of the prose sentences of one polarity and 5 to 70 tokens."""
        places = []
        for i, (file, text) in enumerate(zip(self.files, self.texts, strict=True)):
            lengths = np.diff(text.sentences)
            fits = (text.valence > 0) if good else (text.valence < 0)
            chosen = np.flatnonzero(fits & (lengths >= 5) & (lengths <= 70))
            contents = [text.tokens[text.sentences[k] : text.sentences[k + 1]].tobytes() for k in chosen]
            chosen = np.sort(
                np.asarray([chosen[k] for k in dict(zip(contents, range(len(chosen)), strict=True)).values()], np.int64)
            )
            # Files of little weight are thinned; of great weight repeated.
            repeat = round(4 * file.weight) if file.form == "text" else 0
            chosen = np.repeat(chosen, repeat // 4) if repeat >= 4 else chosen[:: 4 // repeat if repeat else 1]
            if repeat:
                places.append(np.stack([np.full(len(chosen), i), chosen], axis=1))
        return np.concatenate(places).astype(np.int32) if places else np.zeros((0, 2), np.int32)

    def sentence_at(self, file: int, sentence: int) -> Ids:
        """Return a sentence, cut to what fits into the input."""
        text = self.texts[file]
        start, end = text.sentences[sentence], text.sentences[sentence + 1]
        return text.tokens[start : min(end, start + self.max_input)].tolist()

    def words(self, ids: Ids) -> list[Ids]:
        """Split ids into words: every piece with a leading space begins one."""
        words: list[Ids] = []
        for id_ in ids:
            if self.begins_word[id_] or not words:
                words.append([])
            words[-1].append(id_)
        return words


def _synonyms(entries: Sequence[tuple[list[str], str]]) -> dict[str, list[str]]:
    """Return the single lower-case words that share a dictionary entry, by word; words of up to 3 senses only."""
    senses: dict[str, int] = {}
    found: dict[str, set[str]] = {}
    for words, _ in entries:
        words = [word for word in words if word.isalpha() and word.islower()]
        for word in words:
            senses[word] = senses.get(word, 0) + 1
            found.setdefault(word, set()).update(other for other in words if other != word)
    return {word: sorted(others) for word, others in found.items() if others and senses[word] <= 3}


def _polar_entries(entries: Sequence[tuple[list[str], str]], lexicon: Lexicon) -> dict[bool, list[tuple[str, str]]]:
    """Return (word, gloss) of words with a clear valence and of their synonyms, by polarity."""
    found: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for words, gloss in entries:
        values = [lexicon.valence[word] for word in words if word in lexicon.valence]
        about = lexicon.clear_valence(gloss)
        mean = sum(values) / len(values) if values else 0.0
        # The lexicon knows words, not senses: the gloss must not say the contrary.
        if abs(mean) >= 1.5 and about * mean >= 0 and len(gloss) < 200:
            found[mean > 0] += [(word, gloss) for word in words]
    return found


def _cumulative(shares: Sequence[float]) -> np.ndarray:
    total = np.cumsum(shares)
    return total / total[-1]


def _spans(draw: Random, length: int, rate: float, mean_span: float) -> list[int]:
    """Draw alternating lengths kept, masked, kept, masked...; their sum is `length` (Raffel et al., 2020)."""
    masked = min(max(round(length * rate), 1), length - 1)
    count = min(max(round(masked / mean_span), 1), masked, length - masked)

    def parts(total: int) -> list[int]:
        cuts = sorted(draw.sample(range(1, total), count - 1))
        return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]

    return [n for pair in zip(parts(length - masked), parts(masked), strict=True) for n in pair]


def _mask(library: Library, ids: Ids, lengths: Sequence[int]) -> Example:
    """Replace every second stretch of `lengths` by a sentinel; the target lists sentinel, stretch, sentinel..."""
    inputs: Ids = []
    targets: Ids = []
    position, sentinel = 0, library.first_sentinel
    for i, length in enumerate(lengths[: 2 * (EXTRA_IDS - library.final_sentinel)]):  # no more than there are sentinels
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
    """Mask 15% of a passage in spans of 3 pieces on average; as T5 (Raffel et al., 2020, section 3.1.4)."""
    # Masking 15% in spans of 3 shortens by a tenth: so much more text fits.
    ids = library.passage(draw, int(library.max_input * draw.choice((0.35, 0.7, 1.1, 1.1))))
    if len(ids) < 6:
        return None
    return _mask(library, ids, _spans(draw, len(ids), 0.15, 3.0))


def short_spans(draw: Random, library: Library) -> Example | None:
    """Mask one to three single words of one sentence: an easy start for reading the encoder."""
    words = library.words(library.sentence(draw, 6, 40))
    if len(words) < 4:
        return None
    # Never two neighbours: each sentinel stands for one word.
    chosen = sorted(draw.sample(range(1, len(words)), min(draw.randint(1, 3), len(words) // 3)))
    chosen = [word for i, word in enumerate(chosen) if i == 0 or word - chosen[i - 1] > 1]
    lengths, start = [], 0
    for word in chosen:
        lengths += [sum(map(len, words[start:word])), len(words[word])]
        start = word + 1
    return _mask(library, [i for word in words for i in word], lengths)


def copy(draw: Random, library: Library) -> Example | None:
    """Repeat the sentence, or only the part between two sentinels."""
    words = library.words(library.sentence(draw, 4, min(22, library.max_target)))
    if draw.random() < 0.5 or len(words) < 4:
        return library.encode(draw.choice(_COPY)) + _flat(words), _flat(words)
    start, end = sorted(draw.sample(range(len(words) + 1), 2))
    first, second = library.first_sentinel, library.first_sentinel - 1
    marked = [*_flat(words[:start]), first, *_flat(words[start:end]), second, *_flat(words[end:])]
    return library.encode(draw.choice(_MARKED)) + marked, _flat(words[start:end])


_COPY = ("copy:", "repeat:", "say it again:", "repeat the sentence:", "copy the text:", "the same text:")
_MARKED = ("copy the marked part:", "marked words:", "what is marked:", "extract the marked text:")


def word_order(draw: Random, library: Library) -> Example | None:
    """Put the shuffled words of a short sentence in order."""
    words = library.words(library.sentence(draw, 4, min(14, library.max_target)))
    shuffled = draw.sample(words, len(words))
    instruction = draw.choice(("put the words in order:", "order the words:", "make a sentence of these words:"))
    return library.encode(instruction) + _flat(shuffled), _flat(words)


def prefix_lm(draw: Random, library: Library) -> Example | None:
    """Split a passage: the first part in, the rest out; the LM adaptation of Lester et al. (2021)."""
    ids = library.passage(draw, library.max_input + library.max_target)
    longest = min(len(ids) - 3, library.max_input)
    if longest < 3:
        return None
    split = draw.randint(3, longest)
    return ids[:split], ids[split : split + library.max_target]


def _flat(words: Sequence[Ids]) -> Ids:
    return [id_ for word in words for id_ in word]
