"""The texts of pre-training: reading their files, finding sentences, and the cache of their tokens."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import sentencepiece

from softprompt_jax.config import Settings, UserError, cache_folder
from softprompt_jax.files import written_whole
from softprompt_jax.pretraining.lexicon import Lexicon, parse_entry

CACHE_VERSION = 2  # raise when what `tokenize_file` writes changes
CANARY = "canary GUID"  # mark of benchmarks such as BIG-bench: no model may be pre-trained on a text with it


class TextFile(Settings):
    """A text file with one paragraph a line and an empty line between documents; plain, `.gz` or `.xz`."""

    path: str
    weight: float = pydantic.Field(1.0, gt=0)  # frequency with which its characters are drawn, relative to other files
    kind: str = ""  # kind of text, such as news, for the task that asks for it
    form: Literal["text", "dictionary"] = "text"  # form of its lines, in a dictionary 'word, word: gloss.'


_ABBREVIATIONS = r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bvs)(?<!\be\.g)(?<!\bi\.e)(?<!\b[A-Z])"
_SENTENCE_END = re.compile(_ABBREVIATIONS + r"""[.!?]+["'”’)\]]*(\s+)(?=["'“‘(\[]*[A-Z0-9])""")


def read_documents(path: str | Path) -> Iterator[list[str]]:
    """Yield each document as a list of its paragraphs; each run of white space in them becomes one space."""
    path = Path(path)
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            paragraphs = (" ".join(line.split()) for line in lines)
            for is_text, group in itertools.groupby(paragraphs, key=bool):
                document = list(group)
                if marked := [paragraph for paragraph in document if CANARY in paragraph]:
                    raise UserError(
                        f"{path}: holds a benchmark's canary ({marked[0][:80]!r}); expected text that may be trained "
                        "on; leave the benchmark out of it"
                    )
                if is_text:
                    yield document
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a text file, one paragraph a line") from None
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected UTF-8 text, plain, .gz or .xz") from None


def split_sentences(paragraph: str) -> list[str]:
    """Return the sentences of a paragraph, as well as a pattern finds them. Only white space between them is lost."""
    spaces = [match.span(1) for match in _SENTENCE_END.finditer(paragraph)]
    starts, ends = [0, *(end for _, end in spaces)], [*(start for start, _ in spaces), len(paragraph)]
    return [paragraph[start:end] for start, end in zip(starts, ends, strict=True) if start < end]


@dataclass(frozen=True)
class TokenizedText:
    """One text file as token ids, and where its parts begin.

    tokens: uint16 [N]. Sentence i is tokens[sentences[i] : sentences[i + 1]]. Paragraph j has the sentences from
    paragraphs[j] to paragraphs[j + 1], document k the paragraphs from documents[k] to documents[k + 1].
    valence: int8 [number of sentences], as `Lexicon.clear_valence` gives it.
    """

    tokens: np.ndarray
    sentences: np.ndarray
    paragraphs: np.ndarray
    documents: np.ndarray
    valence: np.ndarray


def tokenize_file(text: TextFile, model: Path, lexicon: Lexicon) -> TokenizedText:
    """Return the file's tokens, from the cache or computed. The cache's key is a hash of all that they depend on."""
    try:
        content = Path(text.path).read_bytes()
    except OSError as error:
        raise UserError(f"{text.path}: {error.strerror}; expected a text file, one paragraph a line") from None
    key = hashlib.sha256()
    for part in (content, model.read_bytes(), lexicon.fingerprint.encode(), f"{text.form} {CACHE_VERSION}".encode()):
        key.update(hashlib.sha256(part).digest())
    path = cache_folder() / "texts" / f"{key.hexdigest()[:24]}.npz"
    if not path.is_file():
        arrays = _tokenize(text, model, lexicon)
        with written_whole(path, shared=True) as part:
            np.savez(part, allow_pickle=False, **arrays)
    with np.load(path) as arrays:
        return TokenizedText(**{name: arrays[name] for name in arrays.files})


def _tokenize(text: TextFile, model: Path, lexicon: Lexicon) -> dict[str, np.ndarray]:
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(model))
    if encoder.vocab_size() > 1 << 16:
        raise UserError(f"{model}: {encoder.vocab_size()} pieces; expected at most 65,536 for pre-training")
    tokens: list[np.ndarray] = []
    lengths: list[int] = []
    paragraphs, documents, valence = [0], [0], []
    for document in read_documents(text.path):
        sentences: list[str] = []
        for paragraph in document:
            if text.form == "dictionary":
                words, gloss = parse_entry(paragraph)
                pieces = [f"{', '.join(words)}: {gloss}."] if words else []
            else:
                pieces = split_sentences(paragraph)
            sentences += pieces
            if pieces:
                paragraphs.append(paragraphs[-1] + len(pieces))
        ids = encoder.encode(sentences) if sentences else []
        lengths += map(len, ids)
        tokens += [np.asarray(row, np.uint16) for row in ids]
        valence += [lexicon.clear_valence(sentence) for sentence in sentences]
        documents.append(len(paragraphs) - 1)
    if not lengths:
        raise UserError(f"{text.path}: no text in the file; expected one paragraph a line")
    return {
        "tokens": np.concatenate(tokens),
        "sentences": np.cumsum([0, *lengths], dtype=np.int64),
        "paragraphs": np.asarray(paragraphs, np.int64),
        "documents": np.asarray(documents, np.int64),
        "valence": np.clip(valence, -127, 127).astype(np.int8),
    }
