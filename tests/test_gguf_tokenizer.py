"""Tokenizers out of GGUF files give the ids of the tokenizers that the files were made from."""

from __future__ import annotations

import io
import json

import gguf_file
import numpy as np
import pytest
import sentencepiece
import tiny_lm
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from softprompt_jax import UserError
from softprompt_jax.checkpoints.gguf import open_gguf
from softprompt_jax.checkpoints.gguf_tokenizer import tokenizer_files
from softprompt_jax.data.tokenizer import TextFormat, load_tokenizer

TEXTS = (
    "Hello world! 123",
    "  leading and trailing  ",
    "tabs\t\tand\nlines\n\n\n  end \n",
    "naïve Café déjà-vu, Ünïcödé 日本語 한국어 🙂👍🏽 x² ½",
    "١٢٣ and 3.14159, 1000000 or 2025",
    "it's I'LL don't WE'VE she'd",
    "e\u0301 is not composed, \u00e9 is",
    "a\u00a0b\u2003c\u200bd",
    "def f(x):\n    return x ** 2  # square",
    "<b>not special</b> <|nor this|>",
    "aaaa aaaaaaa abababab",
    " ",
    "▁ is a piece of its own",
)
SPECIAL = ("<|im_start|>user\nHello 12<|im_end|>\n", "a<|endoftext|> b")


def folder_of(tmp_path, metadata, name="made"):
    """Write the tokenizer of a file with these metadata into a folder."""
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file.pack(metadata, {}))
    (tmp_path / name).mkdir()
    for file, text in tokenizer_files(open_gguf(path)).items():
        (tmp_path / name / file).write_text(text, encoding="utf-8")
    return tmp_path / name


def trained(cut) -> tokenizers.Tokenizer:
    """Train byte-level BPE with this way of cutting words out of texts."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = cut, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*TEXTS, *tiny_lm.TEXTS] * 3, trainer)
    return made


def metadata_of(made: tokenizers.Tokenizer, pre: str):
    about = json.loads(made.to_str())["model"]
    pieces = sorted(about["vocab"], key=about["vocab"].get)
    return gguf_file.tokenizer_metadata(pre) | {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": np.array([3] * 3 + [1] * (len(pieces) - 3), "<i4"),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in about["merges"]],
    }


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])


@pytest.mark.parametrize(("pre", "cut"), [("gpt-2", BYTES), ("default", BYTES), ("smollm", DIGITS)])
def test_byte_level_pieces_are_those_of_the_tokenizer_it_was_made_from(tmp_path, pre, cut):
    made = trained(cut)
    found = AutoTokenizer.from_pretrained(folder_of(tmp_path, metadata_of(made, pre)))
    for text in (*TEXTS, *SPECIAL):
        assert found(text)["input_ids"] == made.encode(text).ids, text
        assert found.decode(found(text)["input_ids"]) == text


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_byte_level_pieces_are_those_of_transformers(tmp_path, pre):
    metadata = metadata_of(trained(BYTES), pre)
    pieces, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    found = AutoTokenizer.from_pretrained(folder_of(tmp_path, metadata))
    if pre == "qwen2":
        pairs = [tuple(merge.split(" ")) for merge in merges]
        expected = Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=pairs)._tokenizer
        expected.add_special_tokens(pieces[:3])
    else:
        about = {"tokenizer_type": "gpt2", "pre_tokenizer_type": pre, "tokens": pieces, "merges": merges}
        about["token_type"] = metadata["tokenizer.ggml.token_type"].tolist()
        expected = convert_gguf_tokenizer("llama", about)[0]
    begin = [1] if pre == "llama-bpe" else []
    for text in (*TEXTS, *SPECIAL):
        assert found(text)["input_ids"] == begin + expected.encode(text, add_special_tokens=False).ids, text
    composed = pre == "qwen2"
    tokenizer = load_tokenizer(tmp_path / "made", TextFormat(-1, None, None))
    assert tokenizer.begin == tuple(begin)
    assert tokenizer.decode(tokenizer.encode("e\u0301 1")) == ("\u00e9 1" if composed else "e\u0301 1")


def pieces_of(**settings):
    """Train SentencePiece's BPE as Llama's was."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, *tiny_lm.TEXTS] * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.98,
        minloglevel=2,
        **settings,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(made, own=(), **changes):
    """Return the metadata of a model, as llama.cpp's converter states them."""
    pieces, scores, kinds = [], [], []
    for id_ in range(made.get_piece_size()):
        piece, kind = made.id_to_piece(id_), 1
        for number, is_it in ((2, made.is_unknown), (3, made.is_control), (5, made.is_unused), (6, made.is_byte)):
            kind = number if is_it(id_) else kind
        if piece in own:
            piece, kind = piece.replace("▁", " "), 4
        pieces.append(piece)
        scores.append(-1000.0 if kind == 4 else made.get_score(id_))
        kinds.append(kind)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": np.array(scores, "<f4"),
        "tokenizer.ggml.token_type": np.array(kinds, "<i4"),
        "tokenizer.ggml.bos_token_id": made.bos_id(),
        "tokenizer.ggml.eos_token_id": made.eos_id(),
        "tokenizer.ggml.unknown_token_id": made.unk_id(),
    } | changes


def noise(count: int) -> list[str]:
    rng, letters = np.random.default_rng(1), list("aab  eé.1\n🙂o")
    return ["".join(rng.choice(letters, int(rng.integers(1, 40)))) for _ in range(count)]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_pieces_are_its_own(tmp_path, prefix):
    made = pieces_of(add_dummy_prefix=prefix)
    changes = {} if prefix else {"tokenizer.ggml.add_space_prefix": False}
    found = AutoTokenizer.from_pretrained(folder_of(tmp_path, sentencepiece_metadata(made, **changes)))
    for text in (*TEXTS, *noise(300)):
        assert found(text)["input_ids"] == [made.bos_id(), *made.encode(text)], text
        assert found.decode(found(text)["input_ids"], skip_special_tokens=True) == text.replace("▁", " ")


def test_pieces_of_the_user_stay_whole_as_gemmas_do(tmp_path):
    own = ["▁▁", "▁▁▁", "▁▁▁▁", "\n\n", "<b>"]
    made = pieces_of(add_dummy_prefix=False, user_defined_symbols=own)
    changes = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    found = AutoTokenizer.from_pretrained(folder_of(tmp_path, sentencepiece_metadata(made, own, **changes)))
    for text in (*TEXTS, *noise(300), "a <b>x</b>   y\n\n\n    z"):
        text = text.replace("▁", "_")
        assert found(text)["input_ids"] == made.encode(text), text
        assert found.decode(found(text)["input_ids"]) == text


def test_a_chat_template_comes_along(tmp_path):
    found = AutoTokenizer.from_pretrained(folder_of(tmp_path, gguf_file.tokenizer_metadata()))
    chat = found.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>Hi<|im_end|>"
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")


def without(name):
    found = gguf_file.tokenizer_metadata()
    del found[f"tokenizer.ggml.{name}"]
    return found


def changed(**changes):
    return gguf_file.tokenizer_metadata() | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no tokenizer.ggml.tokens"),
        (changed(model="t5"), "tokenizer.ggml.model is 't5'; expected one of gpt2, llama; import with --tokenizer"),
        (changed(pre="falcon"), "tokenizer.ggml.pre is 'falcon'; expected one of default, gpt-2, smollm, llama-bpe"),
        (without("pre"), "no tokenizer.ggml.pre; expected one of default"),
        (without("merges"), "no tokenizer.ggml.merges"),
        (changed(merges=["abc"]), "the merge 'abc' is no pair"),
        (changed(merges=["q zz"]), "the tokenizer cannot be made"),
        (changed(tokens=["a", "a"]), "1 pieces stand twice"),
        (changed(token_type=np.array([1], "<i4")), "no tokenizer.ggml.token_type of"),
        (changed(eos_token_id=1 << 20), "tokenizer.ggml.eos_token_id is 1048576; expected an id below"),
        (changed(add_bos_token=1), "is of type int; expected true or false"),
        (without("bos_token_id") | {"tokenizer.ggml.add_bos_token": True}, "no tokenizer.ggml.bos_token_id; expected"),
        (changed(model="llama"), "no tokenizer.ggml.scores of"),
        (changed(model="llama", precompiled_charsmap=np.zeros(3, "u1")), "tokenizer.ggml.precompiled_charsmap is th"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_named(tmp_path, metadata, message):
    with pytest.raises(UserError) as error:
        folder_of(tmp_path, metadata)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
