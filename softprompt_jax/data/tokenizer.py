"""The tokenizer of a backbone: text to ids and back, the same object for every kind of source.

A folder that holds only `spiece.model` is read by SentencePiece itself (fast to start, no
transformers), one of a ByT5 needs no file at all; everything else, and hub names, by transformers' `AutoTokenizer`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from softprompt_jax.config import UserError

BYTE_EXTRA_IDS = 125  # of ByT5, whose table has 384 rows
EXTRA_IDS = 100  # sentinels a T5 tokenizer puts after its pieces, `<extra_id_0>` highest
SENTINEL = re.compile(r"\s*<extra_id_(\d+)>\s*")
_BARESENTINEL = re.compile(r"<extra_id_(\d+)>")


class Tokenizer:
    """Text to ids and back.

    `pieces` lists every piece by id; `pad_id`, `eos_id`, `unk_id` and the sentinels are the
    `special_ids`, which `decode` skips. `fingerprint` changes whenever an encoding might.
    """

    def __init__(self, source: str, pieces: Sequence[str], pad_id: int, eos_id: int, unk_id: int, fingerprint: str):
        self.source, self.pieces, self.fingerprint = source, list(pieces), fingerprint
        self.pad_id, self.eos_id, self.unk_id = pad_id, eos_id, unk_id
        numbered = [(SENTINEL.fullmatch(piece.removeprefix("▁")), id_) for id_, piece in enumerate(self.pieces)]
        self._sentinels = {int(match.group(1)): id_ for match, id_ in numbered if match}
        self.special_ids = frozenset({pad_id, eos_id, unk_id, *self._sentinels.values()})

    @property
    def size(self) -> int:
        """Number of ids, sentinels included; a backbone's table may have more rows."""
        return len(self.pieces)

    @property
    def sentinels(self) -> int:
        """Number of sentinels."""
        return len(self._sentinels)

    def sentinel(self, index: int) -> int:
        """Return the id of `<extra_id_INDEX>`."""
        if index not in self._sentinels:
            raise UserError(f"{self.source}: no <extra_id_{index}>; the tokenizer has {self.sentinels} sentinels")
        return self._sentinels[index]

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of several texts, without EOS."""
        raise NotImplementedError

    def beginnings(self, texts: Sequence[str], most: int) -> Int[np.ndarray, "N F"]:
        """Return the ids that answers of `most` tokens must begin with, padded by 0 to one of few widths F."""
        ids = [self.encode(text) if text else [] for text in texts]
        longest = max(map(len, ids), default=0)
        if longest and longest >= most:
            raise UserError(f"forced: {longest} tokens; expected fewer than the answer may have, {most}")
        made = np.zeros((len(ids), min(most, 1 << max(longest - 1, 0).bit_length())), np.int32)
        for row, one in zip(made, ids, strict=True):
            row[: len(one)] = one
        return made

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text up to the first EOS; specials and ids past the last piece are skipped."""
        kept = []
        for id_ in map(int, ids):
            if id_ == self.eos_id:
                break
            if 0 <= id_ < self.size and id_ not in self.special_ids:
                kept.append(id_)
        return self._text(kept).strip() if kept else ""

    def _text(self, ids: list[int]) -> str:
        raise NotImplementedError


class _SentencePiece(Tokenizer):
    def __init__(self, path: Path):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{path}: not a SentencePiece model ({' '.join(str(error).split())}); expected T5's spiece.model"
            ) from None
        model = self._model
        pieces = [model.id_to_piece(id_) for id_ in range(model.get_piece_size())]
        if not any(SENTINEL.fullmatch(piece.removeprefix("▁")) for piece in pieces):
            pieces += [f"<extra_id_{EXTRA_IDS - 1 - index}>" for index in range(EXTRA_IDS)]
        digest = hashlib.sha256(b"sentencepiece" + path.read_bytes()).hexdigest()
        super().__init__(str(path), pieces, model.pad_id(), model.eos_id(), model.unk_id(), digest)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [self._encode(_valid(text)) for text in texts]

    def _encode(self, text: str) -> list[int]:
        if "<extra_id_" not in text:
            return self._model.encode(text)
        # A sentinel swallows the spaces around it, as in transformers.
        ids: list[int] = []
        for position, part in enumerate(SENTINEL.split(text)):
            ids += [self.sentinel(int(part))] if position % 2 else self._model.encode(part)
        return ids

    def _text(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class _Bytes(Tokenizer):
    """ByT5's tokenizer (Xue et al., 2022): ids are three specials, the bytes of UTF-8, then the sentinels."""

    def __init__(self, source: str):
        sentinels = [f"<extra_id_{index}>" for index in range(BYTE_EXTRA_IDS)]
        pieces = ["<pad>", "</s>", "<unk>", *map(chr, range(256)), *sentinels]
        super().__init__(source, pieces, 0, 1, 2, hashlib.sha256(b"bytes").hexdigest())

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [self._encode(_valid(text)) for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for position, part in enumerate(_BARESENTINEL.split(text)):  # the spaces around it are bytes of their own
            ids += [self.sentinel(int(part))] if position % 2 else [byte + 3 for byte in part.encode()]
        return ids

    def _text(self, ids: list[int]) -> str:
        return bytes(id_ - 3 for id_ in ids).decode(errors="ignore")


class _Transformers(Tokenizer):
    def __init__(self, source: str, tokenizer):
        self._tokenizer = tokenizer
        size = len(tokenizer)
        pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(range(size)))]
        special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "unk")}
        for name, id_ in special.items():
            if id_ is None:
                raise UserError(f"{source}: the tokenizer has no {name} token; expected a T5 tokenizer")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        state = backend.to_str() if backend is not None else f"{type(tokenizer).__name__} {pieces}"
        ids = special["pad"], special["eos"], special["unk"]
        super().__init__(source, pieces, *ids, hashlib.sha256(state.encode()).hexdigest())

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        texts = [_valid(text) for text in texts]
        if not texts:
            return []
        return self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _valid(text: str) -> str:
    """Replace half of a surrogate pair by "?": JSON may hold one, but no tokenizer accepts it."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """Load the tokenizer of a backbone from a folder (Hugging Face layout, or only `spiece.model`) or a hub name.

    Raises UserError when the folder holds no tokenizer, when the hub cannot be reached and the
    name is not cached, and when padding or EOS have no id.
    """
    folder = Path(source)
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        transformers_files = names & {"tokenizer.json", "tokenizer_config.json"}
        if not transformers_files and "spiece.model" in names:
            tokenizer: Tokenizer = _SentencePiece(folder / "spiece.model")
        elif transformers_files:
            tokenizer = _automatic(str(source), "a folder with tokenizer.json, tokenizer_config.json or spiece.model")
        elif _is_byt5(folder / "config.json") or _is_byt5(folder / "quantized.json"):
            tokenizer = _Bytes(str(source))
        else:
            raise UserError(
                f"{source}: no tokenizer in the folder; expected tokenizer.json, tokenizer_config.json or "
                "spiece.model; copy the backbone's tokenizer files there"
            )
    elif folder.is_absolute() or folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise UserError(f"{source}: no such folder; expected a folder with a tokenizer or a hub name")
    else:
        tokenizer = _automatic(str(source), "a folder, or a hub name that is cached or within reach")
    if tokenizer.pad_id != 0:
        # Masks and batches take 0 for padding throughout; every published T5 does.
        raise UserError(
            f"{source}: padding has id {tokenizer.pad_id}; expected 0 as in every T5; use its own tokenizer"
        )
    if tokenizer.eos_id != 1:  # where answers end, everywhere
        raise UserError(f"{source}: EOS has id {tokenizer.eos_id}; expected 1 as in every T5; use its own tokenizer")
    return tokenizer


def _is_byt5(config: Path) -> bool:
    """Tell whether a model reads bytes; its tokenizer needs no file, and that of the hub has only settings."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        rows = values.get("vocab_size") or values.get("settings", {}).get("vocabulary_rows")  # of a quantised backbone
        return values.get("tokenizer_class") == "ByT5Tokenizer" or rows == 259 + BYTE_EXTRA_IDS
    except (OSError, ValueError, AttributeError):
        return False


def _automatic(source: str, expected: str) -> Tokenizer:
    try:
        with _only_errors():
            from transformers import AutoTokenizer

            found = AutoTokenizer.from_pretrained(source)
        return _Transformers(source, found)
    except UserError:
        raise
    except Exception as error:  # transformers raises nearly anything for a folder it cannot read
        lines = str(error).split("\n")
        raise UserError(f"{source}: no tokenizer could be loaded ({lines[0]}); expected {expected}") from None


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Log only errors inside: transformers reports the absence of torch, the hub's client each of its retries."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
