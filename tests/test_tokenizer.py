"""Tokenizers of a folder: SentencePiece alone and transformers agree, specials are where T5 has them."""

from __future__ import annotations

import json
import logging
import os
import shutil

import pytest

from softprompt_jax.config import UserError
from softprompt_jax.data.tokenizer import load_tokenizer

TEXTS = [
    "a quick brown fox",
    "  two   spaces ",
    "",
    "\ttab\nline",
    "naïve café",
    "smile 😀 x",
    "keep <extra_id_0> these <extra_id_12>apart",
    "<extra_id_1><extra_id_2>",
    "long words " * 500,
]


@pytest.fixture(scope="module")
def spiece_folder(tmp_path_factory):
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    words = "a quick brown fox jumps over the lazy dog while naïve café guests keep these long words apart"
    lines = [" ".join(words.split()[i % 7 :: i % 3 + 1]) for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "spiece"),
        vocab_size=40,
        model_type="unigram",
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    return folder


@pytest.fixture(scope="module")
def transformers_folder(spiece_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    shutil.copy(spiece_folder / "spiece.model", folder)
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sentencepiece_alone_and_transformers_agree(spiece_folder, transformers_folder):
    plain, full = load_tokenizer(spiece_folder), load_tokenizer(transformers_folder)
    assert plain.pieces == full.pieces
    assert plain.special_ids == full.special_ids
    assert plain.encode_batch(TEXTS) == full.encode_batch(TEXTS)
    for ids in plain.encode_batch(TEXTS):
        assert plain.decode(ids) == full.decode(ids)


def test_sentinels_follow_the_pieces_from_the_top_down(spiece_folder):
    tokenizer = load_tokenizer(spiece_folder)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert tokenizer.size == 140
    assert [tokenizer.sentinel(i) for i in (0, 1, 99)] == [139, 138, 40]
    assert tokenizer.pieces[139] == "<extra_id_0>"
    assert tokenizer.special_ids == {0, 1, 2, *range(40, 140)}
    with pytest.raises(UserError, match="no <extra_id_100>; the tokenizer has 100 sentinels"):
        tokenizer.sentinel(100)


def test_decoding_ends_at_eos_and_skips_what_is_no_text(spiece_folder):
    tokenizer = load_tokenizer(spiece_folder)
    ids = tokenizer.encode("brown fox")
    assert tokenizer.decode([0, tokenizer.sentinel(3), *ids, 1, *ids]) == "brown fox"
    assert tokenizer.decode([*ids, 140, 9999, -1]) == "brown fox"  # rows of the embedding past the last piece
    assert tokenizer.decode([]) == tokenizer.decode([1]) == ""


def test_encoding_a_batch_equals_encoding_one_by_one(spiece_folder):
    tokenizer = load_tokenizer(spiece_folder)
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_fingerprint_follows_the_model_not_the_folder(spiece_folder, tmp_path):
    shutil.copy(spiece_folder / "spiece.model", tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(spiece_folder).fingerprint


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_bytes_are_a_tokenizer_too(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}', encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.size == 384
    assert tokenizer.decode(tokenizer.encode("é 😀")) == "é 😀"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (None, "no such folder; expected a folder with a tokenizer or a hub name"),
        ({}, "no tokenizer in the folder; expected tokenizer.json, tokenizer_config.json or spiece.model"),
        ({"config.json": "{}"}, "no tokenizer in the folder"),
        ({"spiece.model": "nonsense"}, "not a SentencePiece model"),
        ({"tokenizer.json": "nonsense"}, "no tokenizer could be loaded"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_invalid_folder_is_one_line(tmp_path, files, expected):
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=expected) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_loading_leaves_the_process_as_it_was(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("[]")
    names = ("transformers", "huggingface_hub")
    before = dict(os.environ), [logging.getLogger(name).level for name in names], logging.root.manager.disable
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)
    assert (dict(os.environ), [logging.getLogger(name).level for name in names], logging.root.manager.disable) == before


def test_hub_name_out_of_reach_is_one_line():
    with pytest.raises(UserError, match=r"^nobody/nothing: no tokenizer could be loaded \([^\n]*$"):
        load_tokenizer("nobody/nothing")


def test_byt5_needs_no_file_and_agrees_with_transformers(tmp_path):
    from transformers import ByT5Tokenizer

    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 384}), encoding="utf-8")
    ours, theirs = load_tokenizer(tmp_path), ByT5Tokenizer()
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True).strip()
    assert (ours.size, ours.pad_id, ours.eos_id, ours.unk_id) == (len(theirs), 0, 1, 2)
    assert ours.sentinel(0) == theirs.convert_tokens_to_ids("<extra_id_0>")
    assert ours.decode([75, 104, 255, 1, 75]) == "He"  # half a character is left out
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 32128}), encoding="utf-8")
    with pytest.raises(UserError, match="no tokenizer in the folder"):
        load_tokenizer(tmp_path)


def test_the_released_sentencepiece_file_alone_suffices(shared_fixtures, tmp_path):
    shutil.copy(shared_fixtures / "released" / "t5_spiece.model", tmp_path / "spiece.model")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("positive") == [1465]
    assert tokenizer.encode("Hello world") == [8774, 296]
    assert (tokenizer.size, tokenizer.sentinel(0), tokenizer.sentinel(99)) == (32100, 32099, 32000)
