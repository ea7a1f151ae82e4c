"""The tokenizer of a GGUF file as a Hugging Face tokenizer: `tokenizer.json` and `tokenizer_config.json`.

Two kinds are known: byte-level BPE (`tokenizer.ggml.model: gpt2`), whose way of cutting words out of a text
`tokenizer.ggml.pre` names, and SentencePiece's BPE with scores (`llama`).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from softprompt_jax.checkpoints.gguf import Gguf
from softprompt_jax.config import UserError, first_line

_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6  # kinds of pieces
_SPACE = "▁"
# Regular expressions that cut words out of a text, as the models' makers published them; None: GPT-2's own.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_WORDS = {
    **dict.fromkeys(("default", "gpt-2", "smollm")),
    **dict.fromkeys(_LLAMA3_NAMES, _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
}
_SPECIALS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' name: GGUF's
_LONGEST = 512  # characters of a piece of SentencePiece; the pairs of longer ones would take too much memory


def tokenizer_files(file: Gguf) -> dict[str, str]:
    """Return the text of each file of a tokenizer by its name.

    Errors: UserError for metadata that are missing or wrong, and for a kind of tokenizer that is not known here.
    """
    pieces = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(pieces, list) or not pieces:
        raise _wrong(file, "no tokenizer.ggml.tokens", "the tokenizer's pieces")
    vocabulary = {piece: id_ for id_, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise _wrong(file, f"{len(pieces) - len(vocabulary)} pieces stand twice in tokenizer.ggml.tokens", "each once")
    table = file.infos.get("token_embd.weight")
    if table is not None and table.shape[0] < len(pieces):
        raise _wrong(file, f"{len(pieces)} pieces for {table.shape[0]} embeddings", "at most as many")
    kinds = _array(file, "tokenizer.ggml.token_type", len(pieces), "iu")
    kind = file.text("tokenizer.ggml.model")
    ids = {name: _special(file, key, len(pieces)) for name, key in _SPECIALS.items()}
    if kind not in _BUILDERS:
        raise _wrong(file, f"tokenizer.ggml.model is {kind[:80]!r}", f"one of {', '.join(_BUILDERS)}")
    try:
        made = _BUILDERS[kind](file, vocabulary, kinds, ids)
        for special, numbered in ((True, kinds == _CONTROL), (False, kinds == _USER_DEFINED)):
            found = [pieces[id_] for id_ in np.flatnonzero(numbered) if pieces[id_]]
            added = [tokenizers.AddedToken(piece, special=special, normalized=False) for piece in found]
            (made.add_special_tokens if special else made.add_tokens)(added)
        # Where a file does not say, Llama's texts begin with BOS.
        bos = _added(file, "bos", ids, kind == "llama" or _pre(file) in _LLAMA3_NAMES)
        eos = _added(file, "eos", ids, False)
        if bos or eos:
            ends = {pieces[id_]: id_ for id_ in (*bos, *eos)}
            single = [*(pieces[id_] for id_ in bos), "$A", *(pieces[id_] for id_ in eos)]
            made.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(ends.items()))
    except UserError:
        raise
    except Exception as error:  # `tokenizers` raises bare exceptions
        raise _wrong(file, f"the tokenizer cannot be made ({first_line(error)[:200]})", "pieces that fit") from None
    if made.get_vocab_size() != len(pieces):
        raise _wrong(file, f"{made.get_vocab_size()} ids come from {len(pieces)} pieces", "one for each")
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": pieces[id_] for name, id_ in ids.items() if id_ is not None},
        "add_bos_token": bool(bos),
        "add_eos_token": bool(eos),
        "clean_up_tokenization_spaces": False,
    }
    template = file.text("tokenizer.chat_template", "")
    if template:
        about["chat_template"] = template
    return {
        "tokenizer.json": made.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(about, indent=2, ensure_ascii=False) + "\n",
    }


def _wrong(file: Gguf, found: str, expected: str) -> UserError:
    return UserError(f"{file.where}: {found}; expected {expected}; import with --tokenizer FOLDER for another one")


def _array(file: Gguf, key: str, length: int, kinds: str) -> np.ndarray:
    """Return an array of the metadata with a number for each piece."""
    found = file.metadata.get(key)
    if not isinstance(found, np.ndarray) or len(found) != length or found.dtype.kind not in kinds:
        raise _wrong(file, f"no {key} of {length} numbers", "one for each of tokenizer.ggml.tokens")
    return found


def _special(file: Gguf, name: str, pieces: int) -> int | None:
    """Return the id of a special piece, None where the file states none."""
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.metadata:
        return None
    found = file.number(key, least=0)
    if found >= pieces:
        raise _wrong(file, f"{key} is {found}", f"an id below {pieces}")
    return found


def _added(file: Gguf, name: str, ids: dict[str, int | None], default: bool) -> list[int]:
    """Return the id that every text begins or ends with, in a list that may be empty."""
    if not file.flag(f"tokenizer.ggml.add_{name}_token", default):
        return []
    found = ids[name]
    if found is None:
        raise _wrong(file, f"no tokenizer.ggml.{name}_token_id", "one, since texts are to have it")
    return [found]


def _pre(file: Gguf) -> str:
    return file.text("tokenizer.ggml.pre", "")


def _byte_level(
    file: Gguf, vocabulary: dict[str, int], kinds: np.ndarray, ids: dict[str, int | None]
) -> tokenizers.Tokenizer:
    """Make GPT-2's kind of tokenizer: bytes as characters, words, merges in their order."""
    pre, merges = _pre(file), file.metadata.get("tokenizer.ggml.merges")
    if pre not in _WORDS:
        found = f"tokenizer.ggml.pre is {pre[:80]!r}" if pre else "no tokenizer.ggml.pre"
        raise _wrong(file, found, f"one of {', '.join(_WORDS)}")
    if not isinstance(merges, list):
        raise _wrong(file, "no tokenizer.ggml.merges", "the merges of byte-level BPE")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := next((pair for pair in pairs if len(pair) != 2), None):
        raise _wrong(file, f"the merge {' '.join(wrong)[:80]!r} is no pair", "two pieces and a space between")
    model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in _LLAMA3_NAMES)  # pyright: ignore[reportArgumentType]
    made = tokenizers.Tokenizer(model)
    words = _WORDS[pre]
    if words is not None:
        parts = [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        parts = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    made.decoder = decoders.ByteLevel()
    if "qwen" in pre:  # llama.cpp leaves it out, the makers' own tokenizer has it
        made.normalizer = normalizers.NFC()
    return made


def _sentencepiece(
    file: Gguf, vocabulary: dict[str, int], kinds: np.ndarray, ids: dict[str, int | None]
) -> tokenizers.Tokenizer:
    """Make SentencePiece's BPE: two neighbours merge where together they are a piece, the highest score first."""
    for key in ("tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.remove_extra_whitespaces"):
        if key in file.metadata and file.metadata[key] is not False:
            raise _wrong(file, f"{key} is there", "a tokenizer that leaves texts as they are")
    scores = _array(file, "tokenizer.ggml.scores", len(vocabulary), "f")
    spelled = {piece for piece, id_ in vocabulary.items() if kinds[id_] == _NORMAL}
    if max(map(len, spelled), default=0) > _LONGEST:
        raise _wrong(file, f"a piece is longer than {_LONGEST} characters", "a SentencePiece vocabulary")
    merges = [
        (-float(scores[vocabulary[piece]]), vocabulary[piece[:cut]], vocabulary[piece[cut:]])
        for piece in spelled
        for cut in range(1, len(piece))
        if piece[:cut] in spelled and piece[cut:] in spelled
    ]
    pieces = list(vocabulary)
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(pieces[left], pieces[right]) for _, left, right in sorted(merges)],
            unk_token=None if ids["unk"] is None else pieces[ids["unk"]],
            fuse_unk=True,
            byte_fallback=bool((kinds == _BYTE).any()),
        )
    )
    prefixed = file.flag("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend(_SPACE)] if prefixed else []
    made.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*text, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])
    return made


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
