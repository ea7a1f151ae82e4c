"""The tokenizer of a backbone: text to ids and back, the same object for every kind of source.

A folder that holds only `spiece.model` is read by SentencePiece itself (fast to start, no
transformers), one of a ByT5 needs no file at all; everything else, and hub names, by transformers' `AutoTokenizer`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field

from softprompt_jax.config import Settings, UserError, first_line
from softprompt_jax.files import check_files

BYTE_EXTRA_IDS = 125  # of ByT5, whose table has 384 rows
EXTRA_IDS = 100  # sentinels a T5 tokenizer puts after its pieces, `<extra_id_0>` highest
SENTINEL = re.compile(r"\s*<extra_id_(\d+)>\s*")


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """How the texts of a task become what a model reads. The default is a T5's.

    `padding` fills batches; `start` is the first input of an answer, None: the context's last token (decoder-only
    models, whose contexts have no EOS). `eos` ends answers; None: the tokenizer's.
    """

    padding: int = 0
    start: int | None = 0
    eos: int | None = 1

    @property
    def causal(self) -> bool:
        """Whether context and answer are one text."""
        return self.start is None


T5_FORMAT = TextFormat()


class TextSettings(Settings):
    """How inputs and targets become the text that a model reads; most are for decoder-only models."""

    template: Literal["plain", "chat"] = "plain"  # text around an input: none, or the chat template of the tokenizer
    # with the input as the user's message and the target as the answer
    target_prefix: str | None = None  # text between an input and its target; null: a space for decoder-only models
    # without chat template, else nothing
    cut: Literal["right", "left"] = "right"  # side on which an input over the limit loses tokens
    stop: str | None = Field(default=None, min_length=1)  # text at which an answer ends, besides EOS
    bos: bool = Field(default=True, exclude_if=lambda value: value)  # BOS before an input, where the tokenizer has one;
    # false: behind a prefix that is a text, which begins with it


PLAIN = TextSettings()


class Tokenizer:
    """Text to ids and back.

    `pieces` lists every piece by id; `stop_ids` end an answer as EOS does; `pad_id`, `eos_id`, `unk_id` and the
    sentinels are the `special_ids`, which `decode` skips. `prefix_id`, BOS or else EOS, stands in for a context.
    `fingerprint` changes whenever an encoding might. `form` says what the model reads, `bos` are the ids that the
    tokenizer puts before a text of a decoder-only model, `begin` and `end` those before and behind every input,
    `target_prefix` is the text before every target.
    """

    form = T5_FORMAT
    text = PLAIN
    bos: tuple[int, ...] = ()
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = (1,)
    target_prefix = ""
    _mark = SENTINEL  # a sentinel swallows the spaces around it, as in transformers

    def __init__(self, source: str, pieces: Sequence[str], pad_id: int, eos_id: int, unk_id: int, fingerprint: str):
        self.source, self.pieces, self.fingerprint = source, list(pieces), fingerprint
        self.pad_id, self.eos_id, self.unk_id, self.prefix_id = pad_id, eos_id, unk_id, eos_id
        numbered = [(SENTINEL.fullmatch(piece.removeprefix("▁")), id_) for id_, piece in enumerate(self.pieces)]
        self._sentinels = {int(match.group(1)): id_ for match, id_ in numbered if match}
        self.special_ids = frozenset({pad_id, eos_id, unk_id, *self._sentinels.values()})

    def use(self, form: TextFormat, text: TextSettings) -> None:
        """Read texts as a model and a run want them.

        Errors: UserError for a chat template that the tokenizer has not.
        """
        self.form, self.text = form, text
        self.bos = self._bos() if form.causal else ()
        self.begin, self.end = self.bos if text.bos else (), () if form.causal else (self.eos_id,)
        prefix = " " if form.causal else ""
        if text.template == "chat":
            before, behind = self._chat()
            self.begin, self.end, prefix = tuple(self.encode(before)), tuple(self.encode(behind)), ""
        self.target_prefix = prefix if text.target_prefix is None else text.target_prefix
        self.stop_ids = self.pieces_with([] if text.stop is None else [text.stop])

    def reading(self, text: TextSettings) -> Tokenizer:
        """Return the same tokenizer with other settings; no file is read. Errors: as `use`."""
        other = copy.copy(self)
        other.use(self.form, text)
        return other

    def _bos(self) -> tuple[int, ...]:
        """Return the ids that the tokenizer puts before a text."""
        return ()

    def _chat(self) -> tuple[str, str]:
        """Return what the tokenizer's chat template puts before and behind a user's message."""
        before, behind = self._around_messages([{"role": "user"}])
        return before, behind

    def chat_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return what a model reads of a conversation, each message a `role` and its `content`, up to its next answer.

        One message of a user is read as an input with the template `chat` is. Errors: UserError where the tokenizer has
        no chat template, or where it does not take these messages.
        """
        texts = self._around_messages(messages)
        contents = [*(message["content"] for message in messages), ""]
        pieces = [piece for pair in zip(texts, contents, strict=True) for piece in pair]
        return [id_ for ids in self.encode_batch(pieces) for id_ in ids]

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return False

    def _around_messages(self, messages: Sequence[dict[str, str]]) -> list[str]:
        """Return what the chat template puts before, between and behind the contents of messages."""
        marks = [f"[TEXT {number}]" for number in range(len(messages))]
        whole = self.chat_text([message | {"content": mark} for message, mark in zip(messages, marks, strict=True)])
        parts = re.split(r"(\[TEXT \d+\])", whole)
        if parts[1::2] != marks:
            raise UserError(f"{self.source}: its chat template does not hold each message once; expected plain text")
        return parts[::2]

    def chat_text(self, messages: Sequence[dict[str, str]], next_answer: bool = True) -> str:
        """Return a conversation as the chat template writes it, up to its next answer, or within its last message.

        Errors: as `chat_ids`.
        """
        raise UserError(f"{self.source}: the tokenizer has no chat template; expected one; set text.template to plain")

    @property
    def size(self) -> int:
        """Number of ids, sentinels included; a backbone's table may have more rows."""
        return len(self.pieces)

    def piece_texts(self) -> list[str]:
        """Return every piece as SentencePiece writes it, with "▁" for a space, whatever kind of vocabulary it is."""
        return self.pieces

    def token_text(self, id_: int) -> str:
        """Return what one token writes; of a special one, or of a part of a character, the name of its piece."""
        return self.pieces[id_].replace("▁", " ") if id_ < self.size else f"<{id_}>"

    def sentinel(self, index: int) -> int:
        """Return the id of `<extra_id_INDEX>`."""
        return self._numbered(str(index))

    def _numbered(self, digits: str) -> int:
        index = int(digits) if len(digits) < 10 else -1  # of thousands of digits int() is an error
        if index not in self._sentinels:
            known = len(self._sentinels)
            raise UserError(f"{self.source}: no <extra_id_{digits[:20]}>; the tokenizer has {known} sentinels")
        return self._sentinels[index]

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of several texts, without EOS."""
        return [self._encode(_valid(text)) for text in texts]

    def _encode(self, text: str) -> list[int]:
        if "<extra_id_" not in text:
            return self._plain_ids(text)
        ids: list[int] = []
        for position, part in enumerate(self._mark.split(text)):
            ids += [self._numbered(part)] if position % 2 else self._plain_ids(part)
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        """Return the ids of a text without sentinels."""
        raise NotImplementedError

    def input_ids(self, text: str) -> list[int]:
        """Return what a model reads of an input: with EOS for an encoder, with BOS where one is wanted."""
        return self.input_batch([text])[0]

    def input_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Return what a model reads of each input."""
        return [[*self.begin, *ids, *self.end] for ids in self.encode_batch(texts)]

    def target_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Return each answer as a model is to write it, with EOS."""
        return [[*ids, self.eos_id] for ids in self.encode_batch(self.target_prefix + text for text in texts)]

    def target_ids(self, text: str) -> list[int]:
        """Return an answer as a model is to write it, with EOS."""
        return self.target_batch([text])[0]

    def cut_input(self, ids: Sequence[int], limit: int) -> list[int]:
        """Return the ids of an input, shortened to the limit on the side that the settings say.

        What stands before and behind every input stays. Errors: UserError where nothing of the text would be left.
        """
        if len(ids) <= limit:
            return list(ids)
        first, last = len(self.begin), len(ids) - len(self.end)
        kept = limit - first - len(self.end)
        if kept < 1 and len(self.begin) + len(self.end) > 1:
            raise UserError(
                f"max_input_tokens {limit}: the {len(ids) - last + first} tokens around every input leave no room for "
                "text; expected more; raise max_input_tokens"
            )
        where = slice(last - kept, last) if self.text.cut == "left" else slice(first, first + kept)
        return [*self.begin, *ids[where], *self.end]

    def beginnings(self, begun: Sequence[str | list[int]], most: int) -> Int[np.ndarray, "N F"]:
        """Return the ids that answers of `most` tokens must begin with, texts or ids, padded to one of few widths F."""
        ids = [(self.target_ids(one)[:-1] if one else []) if isinstance(one, str) else one for one in begun]
        longest = max(map(len, ids), default=0)
        if longest and longest >= most:
            raise UserError(f"forced: {longest} tokens; expected fewer than the answer may have, {most}")
        made = np.full((len(ids), min(most, 1 << max(longest - 1, 0).bit_length())), self.form.padding, np.int32)
        for row, one in zip(made, ids, strict=True):
            row[: len(one)] = one
        return made

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text up to the first EOS or stop text, without the spaces around it."""
        text = self.text_of(ids)
        return (text if self.text.stop is None else text.partition(self.text.stop)[0]).strip()

    def text_of(self, ids: Iterable[int], past_eos: bool = False) -> str:
        """Return the whole text up to the first EOS, or past it; specials and ids past the last piece are skipped."""
        kept = []
        for id_ in map(int, ids):
            if id_ == self.eos_id and not past_eos:
                break
            if 0 <= id_ < self.size and id_ not in self.special_ids:
                kept.append(id_)
        return self._text(kept) if kept else ""

    def pieces_with(self, stops: Sequence[str]) -> tuple[int, ...]:
        """Return the pieces that hold one of the texts whole; what is written may also have it in parts."""
        wanted = [stop.replace(" ", "▁") for stop in stops]
        pieces = enumerate(self.piece_texts()) if wanted else ()
        return tuple(id_ for id_, text in pieces if any(stop in text for stop in wanted))

    def text_behind(self, context: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text of ids behind those of a context, with the space that it may begin with."""
        last = [id_ for id_ in context[-1:] if self.form.causal and id_ not in self.special_ids]
        return self.text_of([*last, *ids])[len(self.text_of(last)) :]

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

    def _plain_ids(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _text(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class _Bytes(Tokenizer):
    """ByT5's tokenizer (Xue et al., 2022): ids are three specials, the bytes of UTF-8, then the sentinels."""

    def __init__(self, source: str):
        sentinels = [f"<extra_id_{index}>" for index in range(BYTE_EXTRA_IDS)]
        pieces = ["<pad>", "</s>", "<unk>", *map(chr, range(256)), *sentinels]
        super().__init__(source, pieces, 0, 1, 2, hashlib.sha256(b"bytes").hexdigest())

    _mark = re.compile(r"<extra_id_(\d+)>")  # the spaces around it are bytes of their own

    def _plain_ids(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def _text(self, ids: list[int]) -> str:
        return bytes(id_ - 3 for id_ in ids).decode(errors="ignore")


class _Transformers(Tokenizer):
    def __init__(self, source: str, tokenizer):
        self._tokenizer = tokenizer
        size = len(tokenizer)
        pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(range(size)))]
        special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "unk")}
        if special["eos"] is None:
            raise UserError(f"{source}: the tokenizer has no eos token; expected one, with which answers end")
        special = {name: -1 if id_ is None else id_ for name, id_ in special.items()}  # a missing pad token is common
        backend = getattr(tokenizer, "backend_tokenizer", None)
        state = backend.to_str() if backend is not None else f"{type(tokenizer).__name__} {pieces}"
        ids = special["pad"], special["eos"], special["unk"]
        super().__init__(source, pieces, *ids, hashlib.sha256(state.encode()).hexdigest())
        self.special_ids |= frozenset(tokenizer.all_special_ids)
        self.prefix_id = self.eos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def piece_texts(self) -> list[str]:
        decode = self._decode_bytes
        return self.pieces if decode is None else [decode([piece]).replace(" ", "▁") for piece in self.pieces]

    def token_text(self, id_: int) -> str:
        decode = self._decode_bytes
        if decode is None or id_ >= self.size or id_ in self.special_ids:
            return super().token_text(id_)
        text = decode([self.pieces[id_]])
        return self.pieces[id_] if "\ufffd" in text else text

    @functools.cached_property
    def _decode_bytes(self) -> Any:
        """The function from pieces to text where these are bytes, else None."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None or "ByteLevel" not in str(backend.decoder) else backend.decoder.decode

    def _bos(self) -> tuple[int, ...]:
        plain, whole = (self._tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
        return tuple(whole[: whole.index(plain[0])]) if plain[0] in whole else ()

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def chat_text(self, messages: Sequence[dict[str, str]], next_answer: bool = True) -> str:
        if not self.has_chat_template:
            return super().chat_text(messages)
        ending = {"add_generation_prompt": next_answer, "continue_final_message": not next_answer}
        try:
            return self._tokenizer.apply_chat_template([*messages], tokenize=False, **ending)
        except Exception as error:  # the template's own, such as for roles that it does not know
            raise UserError(f"{self.source}: its chat template refuses this ({first_line(error)})") from None

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


def load_tokenizer(
    source: str | os.PathLike[str], form: TextFormat = T5_FORMAT, text: TextSettings = PLAIN
) -> Tokenizer:
    """Load the tokenizer of a backbone from a folder (Hugging Face layout, or only `spiece.model`) or a hub name.

    `form`: what the backbone reads. `text`: how a run wants inputs and targets to be put.

    Raises UserError when the folder holds no tokenizer, when the hub cannot be reached and the
    name is not cached, and when padding or EOS have no id.
    """
    folder = Path(source)
    if folder.is_dir():
        check_files(folder)
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
    tokenizer.use(form, text)
    wanted = [("EOS", tokenizer.eos_id, form.eos)] if form.eos is not None else []
    for name, found, expected in [("padding", tokenizer.pad_id, 0)] * (form.padding == 0) + wanted:
        if found != expected:
            raise UserError(
                f"{source}: {name} has id {found}; expected {expected} as in the backbone; use its own tokenizer"
            )
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
    before = logging.root.manager.disable
    # Only errors: transformers reports the absence of torch, the hub's client each of its retries.
    logging.disable(max(before, logging.WARNING))
    try:
        from transformers import AutoTokenizer

        return _Transformers(source, AutoTokenizer.from_pretrained(source))
    except UserError:
        raise
    except Exception as error:  # transformers raises nearly anything for a folder it cannot read
        raise UserError(f"{source}: no tokenizer could be loaded ({first_line(error)}); expected {expected}") from None
    finally:
        logging.disable(before)
