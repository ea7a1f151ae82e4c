"""Text files for pre-training: reading, sentences, and the token cache."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import sentencepiece

from softprompt_jax.config import Settings, UserError, cache_folder
from softprompt_jax.pretraining.lexicon import Lexicon, parse_entry

CACHE_VERSION = 2  # raise when what `tokenize_file` writes changes
CANARY = "canary GUID"  # BIG-bench's: such text must not be in what models are pre-trained on


class TextFile(Settings):
    """A text file: one paragraph a line, an empty line ends a document; plain, `.gz` or `.xz`."""

    path: str
    weight: float = pydantic.Field(1.0, gt=0, description="how often its characters are drawn, relative to others'")
    kind: str = pydantic.Field("", description="kind of text in words ('news'), for the task that asks it")
    form: Literal["text", "dictionary"] = pydantic.Field("text", description="dictionary: lines 'word, word: gloss.'")


_ABBREVIATIONS = r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bvs)(?<!\be\.g)(?<!\bi\.e)(?<!\b[A-Z])"
_SENTENCE_END = re.compile(_ABBREVIATIONS + r"""[.!?]+["'”’)\]]*(\s+)(?=["'“‘(\[]*[A-Z0-9])""")


def read_documents(path: str | Path) -> Iterator[list[str]]:
    """Yield each document as its list of paragraphs, whitespace collapsed."""
    path = Path(path)
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    paragraphs: list[str] = []
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                line = " ".join(line.split())
                if CANARY in line:
                    raise UserError(
                        f"{path}: holds a benchmark's canary ({line[:80]!r}); expected text that may be trained on; "
                        "leave the benchmark out of it"
                    )
                if line:
                    paragraphs.append(line)
                elif paragraphs:
                    yield paragraphs
                    paragraphs = []
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a text file, one paragraph a line") from None
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected UTF-8 text, plain, .gz or .xz") from None
    if paragraphs:
        yield paragraphs


def split_sentences(paragraph: str) -> list[str]:
    """Split at sentence ends; approximate, and lossless but for the whitespace between sentences."""
    sentences, start = [], 0
    for match in _SENTENCE_END.finditer(paragraph):
        sentences.append(paragraph[start : match.start(1)])
        start = match.end(1)
    sentences.append(paragraph[start:])
    return [sentence for sentence in sentences if sentence]


def parse_entries(path: str | Path) -> Iterator[tuple[list[str], str]]:
    """Yield (words, gloss) of every usable line of a dictionary file."""
    for document in read_documents(path):
        for line in document:
            words, gloss = parse_entry(line)
            if words:
                yield words, gloss


@dataclass(frozen=True)
class TokenizedText:
    """One text file as token ids, and where its parts begin.

    tokens: uint16 [N]; sentence i is tokens[sentences[i] : sentences[i + 1]]; paragraph j is sentences
    paragraphs[j] : paragraphs[j + 1]; document k is paragraphs documents[k] : documents[k + 1].
    valence: int8 [number of sentences], the sum over the lexicon's words, 0 where it is not clear.
    """

    tokens: np.ndarray
    sentences: np.ndarray
    paragraphs: np.ndarray
    documents: np.ndarray
    valence: np.ndarray


def tokenize_file(text: TextFile, model: Path, lexicon: Lexicon) -> TokenizedText:
    """Return the file's tokens, from the cache or computed; the key is the content of everything involved."""
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
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
            np.savez(part, allow_pickle=False, **arrays)
        os.replace(part.name, path)
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
