"""Contexts and continuations as evaluation harnesses ask for them: ids, log-probabilities, answers, what is cut."""

from __future__ import annotations

import json
import shutil
import sys

import jax
import numpy as np
import pytest
import tiny_lm
from flax import nnx

from softprompt_jax import Greedy, Sampling, UserError, generate, load_backbone, load_predictor, logits, train
from softprompt_jax.cli.harness import with_defaults
from softprompt_jax.inference.harness import ModelArguments, decoding_of, load
from softprompt_jax.inference.predictor import Predictor
from softprompt_jax.inference.scorer import Scorer
from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.models.decode import Beam
from softprompt_jax.run import Run

PAIRS = [("a warm film ", "positive"), ("review:", " great and funny"), ("two hours\n", " bad"), ("", "a film")]
PAIRS += [(text, " never get back .") for text in tiny_lm.TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lm.folder(tmp_path_factory.mktemp("lm") / "llama", chat=True, tied=False)


def scorer(backbone, rows=None, **settings) -> Scorer:
    """Return a scorer of a backbone under prompt rows [P, D]."""
    made = load(ModelArguments(backbone=str(backbone)))
    if rows is not None:
        attach_rows(made.model, rows)
    return Scorer(Predictor(made.model, made.reader, None), **settings)


def directly(backbone, pairs: list[tuple[list[int], list[int]]], rows=None) -> tuple[list[float], list[bool]]:
    """Return the log-probability of each continuation from `logits`, and whether it is greedy."""
    alone = load_backbone(backbone)
    if alone.model.encoder is None:
        found = logits(alone, [[*context, *own] for context, own in pairs], prompt=rows)
        first = [len(context) - 1 for context, _ in pairs]
    else:
        found = logits(alone, [context for context, _ in pairs], [[0, *own[:-1]] for _, own in pairs], prompt=rows)
        first = [0] * len(pairs)
    log_p = np.asarray(jax.nn.log_softmax(found))
    each = [row[start : start + len(own)] for row, start, (_, own) in zip(log_p, first, pairs, strict=True)]
    sums = [float(row[np.arange(len(own)), own].sum()) for row, (_, own) in zip(each, pairs, strict=True)]
    return sums, [bool((row.argmax(-1) == own).all()) for row, (_, own) in zip(each, pairs, strict=True)]


def rows_for(backbone, count=3) -> np.ndarray:
    width = load_backbone(backbone).settings.d_model
    return 2 * np.random.default_rng(5).normal(size=(count, width)).astype(np.float32)


@pytest.mark.parametrize("prompt", [False, True])
def test_scores_of_a_decoder_only_model_are_the_sums_of_its_logits(folder, prompt):
    rows = rows_for(folder) if prompt else None
    made = scorer(folder, rows)
    pairs = [made.pair(*pair) for pair in PAIRS]
    greedy = generate(load_backbone(folder), [pairs[0][0]], rows, max_tokens=3, stop=False)[0]
    pairs.append((pairs[0][0], list(greedy)))
    done: list[int] = []
    found = made.scores(pairs, done.append)
    assert sum(done) == len(pairs)
    expected, greedy = directly(folder, pairs, rows)
    assert [log_p for log_p, _ in found] == pytest.approx(expected, rel=1e-4)
    assert [best for _, best in found] == greedy
    assert found[-1][1]
    assert not found[0][1]
    in_threes = scorer(folder, rows, batch_size=3).scores(pairs)
    assert [log_p for log_p, _ in in_threes] == pytest.approx([log_p for log_p, _ in found], rel=1e-4)


@pytest.mark.parametrize("prompt", [False, True])
def test_scores_of_a_t5_are_the_sums_of_its_logits_with_eos_unless_it_shall_not_count(small, prompt):
    rows = rows_for(small.backbone) if prompt else None
    texts = [("the garden is warm today", " yes"), ("the old mill is rude", "no"), ("", "yes no")]
    for ends in (None, False):
        made = scorer(small.backbone, rows, ends=ends)
        pairs = [made.pair(*pair) for pair in texts]
        assert pairs[0][0] == made.reader.input_ids(texts[0][0])
        assert pairs[0][1] == [*made.reader.encode("yes"), *([] if ends is False else [1])]
        expected, greedy = directly(small.backbone, pairs, rows)
        found = made.scores(pairs)
        assert [log_p for log_p, _ in found] == pytest.approx(expected, rel=1e-4)
        assert [best for _, best in found] == greedy


def test_context_and_continuation_are_one_text_whose_spaces_belong_to_the_continuation(folder):
    made = scorer(folder)
    encode = made.reader.encode
    assert made.pair("a warm film ", "positive") == (encode("a warm film"), encode(" positive"))
    assert made.pair("a warm film", " positive") == (encode("a warm film"), encode(" positive"))
    assert made.pair("", " positive") == ([made.reader.prefix_id], encode(" positive"))
    assert made.context("") == [made.reader.prefix_id]
    for context, continuation in (("a film", ""), ("posi", "tive")):  # "positive" is one token
        with pytest.raises(UserError, match=f"continuation '{continuation}': has no token of its own"):
            made.pair(context, continuation)
    assert scorer(folder, ends=True).pair("a film", " good") == (encode("a film"), [*encode(" good"), 2])


def test_bos_stands_before_a_context_once_and_in_place_of_an_empty_one(tmp_path):
    path = tiny_lm.folder(tmp_path / "bos", tied=False)
    stored = json.loads((path / "tokenizer.json").read_text())
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (path / "tokenizer.json").write_text(json.dumps(stored))
    about = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(about | {"bos_token": "<|endoftext|>"}))
    made = scorer(path)
    encode = made.reader.encode
    assert made.pair("a film", " good") == ([0, *encode("a film")], encode(" good"))
    assert made.pair("<|endoftext|>a film", " good") == made.pair("a film", " good")
    assert made.pair("", " good") == ([0], encode(" good"))
    assert made.pair("", "<|endoftext|>good") == ([0], encode("good"))
    assert made.pair("  ", "good") == ([0], encode("  good"))


def test_what_is_longer_than_the_models_positions_is_cut_on_the_left_and_counted(tmp_path):
    path = tiny_lm.folder(
        tmp_path / "gpt2", family="gpt2", learned_positions=16, activation="gelu_tanh", gated=False, norm="layer",
        num_key_heads=4, attention_bias=True, output_bias=True, feed_forward_bias=True,
        kinds=({"rope": None},),
    )  # fmt: skip
    rows = rows_for(path, 4)
    made = scorer(path, rows)
    assert made.max_length == 12
    context, own = list(range(20, 50)), [7, 8, 9]
    ((log_p, _),) = made.scores([(context, own)])
    assert made.truncated == 1
    assert [log_p] == pytest.approx(directly(path, [(context[-10:], own)], rows)[0], rel=1e-4)
    assert made.scores([(context[-10:], own)])[0][0] == pytest.approx(log_p, rel=1e-5)
    assert made.truncated == 1
    answer = made.answers([context], 4)
    assert answer == made.answers([context[-8:]], 4)
    with pytest.raises(UserError, match="continuation of 13 tokens: expected at most 12"):
        made.scores([([5], list(range(13)))])
    with pytest.raises(UserError, match="max_gen_toks 12: leaves no room for a context"):
        made.answers([[5]], 12)
    with pytest.raises(UserError, match="max_length 13: with 4 rows of a prompt more than the 16 positions"):
        scorer(path, rows, max_length=13)
    assert scorer(path, rows, max_length=9).max_length == 9


def test_positions_are_those_of_config_json_or_as_many_as_the_harness_supposes(small, tmp_path):
    assert scorer(small.backbone).max_length == 2048
    copy = shutil.copytree(small.backbone, tmp_path / "t5")
    about = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(about | {"n_positions": 20}))
    made = scorer(copy, rows_for(copy))
    assert made.max_length == 17
    long, own = made.pair("the garden is warm " * 8, "yes")
    cut = [*long[-17:-1], made.reader.eos_id]  # EOS stays
    assert made.scores([(long, own)]) == made.scores([(cut, own)])
    assert made.truncated == 1


def test_answers_are_those_of_generate_with_their_space_cut_at_the_stop_texts(folder):
    rows = rows_for(folder)
    made, backbone = scorer(folder, rows), load_backbone(folder)
    contexts = [made.context(text) for text in tiny_lm.TEXTS]
    whole = made.answers(contexts, 12)
    expected = generate(backbone, contexts, rows, max_tokens=12)
    ends = {backbone.settings.eos}
    written = [made.reader.text_of([id_ for id_ in ids if id_ not in ends]) for ids in expected]
    assert whole == written
    assert len({*whole}) > 1
    stop = whole[0][3]
    assert made.answers(contexts, 12, stop=[stop, ""]) == [text.partition(stop)[0] for text in whole]
    drawn = made.answers(contexts[:1] * 4, 8, Sampling(temperature=3.0))
    assert len({*drawn}) > 1
    assert drawn == made.answers(contexts[:1] * 4, 8, Sampling(temperature=3.0))


def test_an_answer_ends_at_a_token_that_holds_a_stop_text(folder):
    made = scorer(folder)
    model = made._ending_at(["ing"])
    assert model.settings.ends == made.reader.pieces_with(["ing"])
    assert made.model.settings.ends == ()
    assert model.settings.ends
    assert all("ing" in made.reader.token_text(id_) for id_ in model.settings.ends)


def test_numbers_that_are_nan_are_an_error(folder):
    made = scorer(folder)
    made.model.embedding = nnx.Param(made.model.embedding[...] * np.nan, axes=("vocab", "embed"))
    with pytest.raises(UserError, match="its answers are NaN"):
        made.scores([([5, 6], [7])])
    with pytest.raises(UserError, match="its answers are NaN"):
        made.answers([[5, 6]], 4)


def test_a_run_is_scored_as_it_was_trained_its_chat_template_and_prompt_included(folder, tmp_path):
    rows = [{"text": f"{text} {word}", "label": word} for text in tiny_lm.TEXTS[:3] for word in ("good", "bad")]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"kind": "files", "train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "validation.jsonl")}
    task = {"name": "toy", "source": source, "input": "{text}", "label_words": ["good", "bad"]}
    task["predict_by"] = "likelihood"
    values = {"backbone": str(folder), "task": task, "steps": 2, "batch_size": 4, "text": {"template": "chat"}}
    values |= {"methods": [{"kind": "prompt", "length": 3}], "max_input_tokens": 60, "max_target_tokens": 6}
    train(Run(**values), tmp_path / "bank" / "toy")
    for arguments in ({"run": str(tmp_path / "bank" / "toy")}, {"bank": str(tmp_path / "bank"), "prompt": "toy"}):
        made = load(ModelArguments(**arguments, eos=True))
        texts = [row["text"] for row in rows]
        pairs = [made.pair(text, f" {word}") for text in texts for word in ("good", "bad")]
        assert pairs[0] == (made.reader.input_ids(texts[0]), made.reader.target_ids("good"))
        found = np.asarray([log_p for log_p, _ in made.scores(pairs)]).reshape(-1, 2)
        chosen = [("good", "bad")[number] for number in found.argmax(-1)]
        predictor = load_predictor(tmp_path / "bank" / "toy")
        assert [answer.text for (answer,) in predictor.scored(texts)] == chosen
        assert found.max(-1) == pytest.approx([answer.score for (answer,) in predictor.scored(texts)], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "found nothing; expected run=RUN, bank=BANK,prompt=NAME, or backbone=NAME alone"),
        ({"run": "a", "bank": "b", "prompt": "c"}, "found run=a, bank=b, prompt=c; expected run=RUN"),
        ({"bank": "b"}, "found bank=b; expected run=RUN"),
        ({"run": "a", "dtype": "bfloat16"}, "found dtype or quantize with a run, which has its own"),
        ({"bank": "/no/such", "prompt": "c"}, "bank /no/such: no such folder"),
        ({"run": "/no/such"}, "/no/such"),
    ],
)
def test_arguments_that_name_nothing_or_too_much_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        load(ModelArguments(**arguments))


def test_a_prompt_that_the_bank_lacks_is_refused_with_those_it_has(tmp_path):
    np.save(tmp_path / "intents.npy", np.zeros((2, 32), np.float32))
    with pytest.raises(UserError, match=r"prompt 'intent': not in .*; found intents; did you mean intents"):
        load(ModelArguments(bank=str(tmp_path), prompt="intent", backbone="embedded"))


def test_ways_to_decode_are_read_as_hugging_face_names_them():
    assert decoding_of({"do_sample": False, "temperature": 0.7}) == Greedy()
    assert decoding_of({"temperature": 0.0, "repetition_penalty": 1.2}) == Greedy(repetition_penalty=1.2)
    assert decoding_of({"do_sample": True, "temperature": 0.5, "top_k": 0, "top_p": 0.9}) == Sampling(
        temperature=0.5, top_p=0.9
    )
    assert decoding_of({"temperature": 0.5}) == Sampling(temperature=0.5)
    assert decoding_of({"num_beams": 3, "do_sample": False}) == Beam(beams=3)
    for asked, message in (
        ({"num_beam": 3}, "generation_kwargs num_beam: not known here; .*did you mean num_beams"),
        ({"num_beams": 3, "do_sample": True}, "found num_beams and sampling"),
        ({"num_beams": 3, "repetition_penalty": 2.0}, "found num_beams and repetition_penalty"),
        ({"temperature": -1.0}, "generation_kwargs: temperature"),
    ):
        with pytest.raises(UserError, match=message):
            decoding_of(asked)


def test_without_lm_eval_one_line_says_what_to_install(refused, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    found = refused("lm-eval", "--model", "softprompt", "--tasks", "x")
    assert found == "softprompt: lm-eval: lm_eval is not installed; expected it; pip install lm_eval\n"


def test_our_model_and_a_batch_size_that_suits_it_are_added_to_a_run_that_names_none():
    model, size = ["--model", "softprompt"], ["--batch_size", "auto"]
    assert with_defaults(["run", "--tasks", "a"]) == ["run", "--tasks", "a", *model, *size]
    assert with_defaults(["--tasks", "a", "--batch_size=4"]) == ["--tasks", "a", "--batch_size=4", *model]
    assert with_defaults(["-M", "hf", "--tasks", "a", "b"]) == ["-M", "hf", "--tasks", "a", "b", *size]
    for given in ([], ["ls", "tasks"], ["run", "--help"], ["--config", "a.yaml"], ["-M", "softprompt", "-b", "4"]):
        assert with_defaults(given) == given
