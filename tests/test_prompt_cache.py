"""Prompts, prefixes and factors of many runs in one batch answer as each by itself; the device holds those in use."""

from __future__ import annotations

import json

import jax.numpy as jnp
import many_methods
import numpy as np
import pytest

from softprompt_jax import PromptBank
from softprompt_jax.checkpoints.artifact import TRAINED_FILE, read_metadata, save_prompt, write_tensors
from softprompt_jax.config import UserError
from softprompt_jax.models import per_example
from softprompt_jax.models.decode import Beam, Decoding, Greedy, Sampling

TEXTS = ["the garden is warm", "the night train is slow today", "the old mill is rude and far away"]
TOKENS = 5


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return many_methods.write(tmp_path_factory.mktemp("many"), many_methods.METHODS)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return many_methods.write(tmp_path_factory.mktemp("more"), many_methods.METHODS | many_methods.MORE)


def bank_of(many: many_methods.Many, names=None, **settings) -> PromptBank:
    bank = PromptBank(many.backbone, **settings)
    for name in names or many.models:
        none = np.zeros((0, many.backbone.settings.d_model), np.float32)
        bank.add(name, none if name == "nothing" else many.folder / name)
    return bank


def expected(many: many_methods.Many, bank: PromptBank, text: str, name: str, how: Decoding, number: int):
    tokens, scores = many_methods.answered(many.models[name], bank.tokenizer.encode(text), TOKENS, how, number)
    padding = many.backbone.settings.padding
    return [bank.tokenizer.decode([int(token) for token in row if token > padding]) for row in tokens], scores


def check(many: many_methods.Many, bank: PromptBank, pairs: list[tuple[str, str]], how: Decoding) -> None:
    """Compare a bank's answers with those of each run's own model."""
    texts, names = zip(*pairs, strict=True)
    seen = set()
    for number, found in enumerate(bank.answers(texts, names, TOKENS, how)):
        answers, scores = expected(many, bank, texts[number], names[number], how, number)
        assert [answer for answer, _ in found] == answers, names[number]
        np.testing.assert_allclose([score for _, score in found], scores, rtol=1e-5, atol=1e-5)
        seen.add((texts[number], round(found[0][1], 3)))
    assert len(seen) == len(pairs), "methods that answer alike show nothing"


@pytest.mark.slow
def test_a_batch_of_methods_answers_as_each_by_itself(many):
    check(many, bank_of(many), [(TEXTS[number % 3], name) for number, name in enumerate(many.models)], Greedy())


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [Greedy(), Beam(beams=3), Sampling(samples=2, seed=3, temperature=2.0)],
    ids=["greedy", "beam", "sampling"],
)
def test_answers_of_all_methods_are_those_of_each_by_itself(more, how):
    check(more, bank_of(more), [(TEXTS[number % 3], name) for number, name in enumerate(more.models)], how)


@pytest.mark.slow
def test_extras_that_do_not_fit_on_the_device_take_turns(more):
    names = ["prefix", "ia3", "prefix longer", "rows", "prefix placed", "nothing"]
    bank = bank_of(more, names, device_extras=2)
    first = bank.generate(TEXTS[:1] * 6, names, TOKENS)
    assert len(set(first)) > 3
    for _ in range(2):
        assert [bank.generate(TEXTS[:1], name, TOKENS)[0][0] for name in names[::-1]] == [a for a, _ in first[::-1]]
    assert len(bank.device._entries) == len(set(bank.device._entries.values())) == 2


@pytest.mark.slow
def test_the_device_holds_what_it_says(many):
    bank = bank_of(many, ["prefix", "ia3"], device_rows=64, device_extras=3)
    assert bank.device.nbytes == 64 * 16 * 4  # extras have nothing before the first is used
    bank.load({"prefix"})
    floats = [2 * depth * 2 * 16 for depth in (2, 3, 3)]  # keys and values of two in encoder, decoder, cross attention
    factors = 2 * (16 + 16 + 32) + 3 * (16 + 16 + 16 + 16 + 32)
    one = 4 * (sum(floats) + factors + len(floats))
    assert bank.device.nbytes == 64 * 16 * 4 + 4 * one  # three and the entry that is nothing
    for number in range(5):
        bank.add(str(number), many.folder / "prefix")
        bank.load({str(number)})
    assert bank.device.nbytes == 64 * 16 * 4 + 4 * one
    assert len(bank.device._entries) == 3


@pytest.mark.slow
def test_a_longer_prefix_that_comes_later_makes_the_tables_grow(more):
    bank = bank_of(more, ["prefix"])
    before = bank.generate(TEXTS, "prefix", TOKENS)
    bank.add("longer", more.folder / "prefix longer")
    both = bank.generate(TEXTS * 2, ["prefix"] * 3 + ["longer"] * 3, TOKENS)
    assert [answer for answer, _ in both[:3]] == [answer for answer, _ in before]
    assert bank.device._tables["prefix decoder"].shape[3] == 5


def test_an_entry_holds_what_is_shorter_and_nothing():
    prefix, placed = np.ones((2, 1, 2, 4), np.float32), np.ones((2, 1, 1, 4), np.float32)
    shapes = per_example.union_shapes(
        {"prefix encoder": (2, 1, 3, 4)}, {"prefix encoder": prefix, "positioned encoder": placed}
    )
    shapes = per_example.union_shapes(
        shapes, {"positioned encoder": np.ones((2, 1, 3, 4)), "outputs decoder.layers.x": np.ones((1, 5))}
    )
    entry = per_example.table_entry(shapes, {"prefix encoder": prefix, "positioned encoder": placed})
    assert (entry["count prefix encoder"], entry["count positioned encoder"]) == (2, 1)
    assert entry["prefix encoder"][0, 0, :, 0].tolist() == [1, 1, 0]
    assert entry["positioned encoder"][0, 0, :, 0].tolist() == [0, 0, 1]  # next to the text
    assert (entry["outputs decoder.layers.x"] == 1).all()
    rows = per_example.gather(per_example.empty_tables(shapes, 4), jnp.zeros(2, jnp.int32))
    assert per_example.prefix_lengths(rows, "encoder") == (3, 3)
    assert list(per_example.decoder_factors(rows)) == ["outputs decoder.layers.x"]


def test_a_folder_of_runs_and_their_files_is_a_bank(many, tmp_path):
    (tmp_path / "prefix.safetensors").write_bytes((many.folder / "prefix" / TRAINED_FILE).read_bytes())
    (tmp_path / "ia3").symlink_to(many.folder / "ia3")
    save_prompt(np.ones((2, 16), np.float32), tmp_path / "rows.safetensors", {})
    bank = PromptBank.open(tmp_path)
    assert bank.names == ["ia3", "prefix", "rows"]
    assert bank.prompt("prefix").task == "moods"
    assert bank.prompt("prefix").label_words == ("yes", "no")
    assert bank.prompt("ia3").layout.lengths == (0, 0)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            [{"kind": "lora"}],
            "lora changes the model for every text, so that it cannot be in a bank; expected a prompt",
        ),
        ([{"kind": "p_tuning_v2", "length": 2}], "methods: p_tuning_v2 changes the model for every text"),
        ([{"kind": "ia3"}, {"kind": "prefix", "network": None}], "does not fit its settings"),
        (None, "holds neither a prompt nor a run's settings"),
    ],
)
def test_what_no_row_of_a_batch_can_have_alone_is_one_line(many, tmp_path, methods, message):
    metadata = read_metadata(many.folder / "ia3" / TRAINED_FILE)
    if methods and methods[0]["kind"] != "ia3":
        many_methods.write_runs(tmp_path, many.backbone, many.task, {"odd": methods})
        (tmp_path / "odd" / "prompt.safetensors").unlink(missing_ok=True)
        path = tmp_path / "odd"
    else:
        settings = json.loads(metadata["settings"]) | {"methods": methods}
        told = {"fingerprint": metadata["fingerprint"]} | ({"settings": json.dumps(settings)} if methods else {})
        arrays = {"encoder.layers.attention.key.factors": np.ones((2, 16), np.float32)}
        path = tmp_path / "odd.safetensors"
        write_tensors(arrays, path, told)
    with pytest.raises(UserError, match=f"prompt odd: .*{message}") as error:
        bank_of(many, ["nothing"]).add("odd", path)
    assert "\n" not in str(error.value)
