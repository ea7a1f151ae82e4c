"""From a run or a prompt file to text, and the plain functions: order, padding, prompts, what is refused."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import shutil
from inspect import unwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import ROWS, rows, write_backbone

import softprompt_jax
from softprompt_jax import PromptBank, UserError, generate, load_backbone, load_predictor, load_prompt, logits, train
from softprompt_jax.checkpoints.artifact import save_prompt
from softprompt_jax.config import parse
from softprompt_jax.data.tokenizer import load_tokenizer
from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.models.decode import Sampling
from softprompt_jax.run import Run, read_decoding

pytestmark = pytest.mark.usefixtures("own_cache")
TEXTS = [row["text"] for row in rows()[:20]]


@pytest.fixture(scope="module")
def backbone(small):
    return load_backbone(small.backbone)


@pytest.fixture(scope="module")
def predictor(full_run):
    return load_predictor(full_run)


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)


TOKENS = np.array([[5, 6, 7, 1, 0, 0], [8, 9, 10, 11, 12, 1]], np.int32)
DECODER = np.array([[0, 5, 6], [0, 7, 8]], np.int32)


# -------------------------------------------------------------------------------------- plain functions


def test_public_names_are_what_they_say():
    for name in softprompt_jax.__all__:
        importlib.import_module(f"softprompt_jax.{softprompt_jax._MODULE_OF[name]}")
        assert not isinstance(getattr(softprompt_jax, name), type(softprompt_jax)), name
    from softprompt_jax import train

    assert callable(train)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = softprompt_jax.nonsense


def test_type_checkers_see_the_public_names_where_they_are_imported_from():
    tree = ast.parse(Path(softprompt_jax.__file__).read_text())
    seen = {
        alias.name: node.module.removeprefix("softprompt_jax.")
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    assert seen == softprompt_jax._MODULE_OF
    assert sorted(softprompt_jax.__all__) == sorted(seen)
    assert (Path(softprompt_jax.__file__).parent / "py.typed").exists()


def test_logits_are_float32_over_the_vocabulary(backbone):
    found = logits(backbone, TOKENS, DECODER)
    assert found.shape == (2, 3, ROWS)
    assert found.dtype == jnp.float32
    assert logits(load_backbone(backbone.folder, "bfloat16"), TOKENS, DECODER).dtype == jnp.float32


def test_prompt_goes_before_each_row_as_virtual_ids(backbone, prompt):
    model = load_backbone(backbone.folder).model
    attach_rows(model, prompt)
    virtual = np.concatenate([np.tile(np.arange(ROWS, ROWS + 3, dtype=np.int32), (2, 1)), TOKENS], 1)
    expected = model({"encoder_tokens": jnp.asarray(virtual), "decoder_inputs": jnp.asarray(DECODER)})
    np.testing.assert_allclose(logits(backbone, TOKENS, DECODER, prompt), expected, atol=1e-5)


def test_prompt_of_embedding_rows_equals_those_tokens(backbone):
    rows_of_tokens = np.asarray(backbone.model.embedding[...])[[20, 21]]
    longer = np.concatenate([np.tile(np.array([20, 21], np.int32), (2, 1)), TOKENS], 1)
    found = logits(backbone, TOKENS, DECODER, rows_of_tokens)
    np.testing.assert_allclose(found, logits(backbone, longer, DECODER), atol=1e-5)


def test_prompt_leaves_the_backbone_as_it_was(backbone, prompt):
    before = logits(backbone, TOKENS, DECODER)
    assert not np.allclose(logits(backbone, TOKENS, DECODER, prompt), before)
    np.testing.assert_array_equal(logits(backbone, TOKENS, DECODER), before)
    assert backbone.model.prompt is None


@pytest.mark.parametrize("with_prompt", [False, True])
def test_row_with_padding_equals_the_row_without(backbone, prompt, with_prompt):
    rows_of_prompt = prompt if with_prompt else None
    alone = logits(backbone, TOKENS[:1, :4], DECODER[:1], rows_of_prompt)
    np.testing.assert_allclose(logits(backbone, TOKENS, DECODER, rows_of_prompt)[:1], alone, atol=1e-5)
    tokens = generate(backbone, TOKENS, rows_of_prompt, max_tokens=5)
    np.testing.assert_array_equal(tokens[:1], generate(backbone, TOKENS[:1, :4], rows_of_prompt, max_tokens=5))


def test_decoder_sees_no_later_token(backbone):
    other = DECODER.copy()
    other[:, 2] = 30
    found, changed = logits(backbone, TOKENS, DECODER), logits(backbone, TOKENS, other)
    np.testing.assert_allclose(found[:, :2], changed[:, :2], atol=1e-6)
    assert not np.allclose(found[:, 2], changed[:, 2])


def test_generating_is_the_most_likely_next_token_each_time(backbone, prompt):
    tokens = generate(backbone, TOKENS, prompt, max_tokens=4)
    assert tokens.shape == (2, 4)
    decoder = np.concatenate([np.zeros((2, 1), np.int32), tokens[:, :-1]], 1)
    best = np.asarray(logits(backbone, TOKENS, decoder, prompt).argmax(-1))
    for row, expected in zip(tokens, best, strict=True):
        end = int(np.argmax(row == 1)) + 1 if (row == 1).any() else 4
        np.testing.assert_array_equal(row[:end], expected[:end])
        assert not row[end:].any()


def test_scores_are_log_probabilities_and_answers_begin_as_forced(backbone, prompt):
    forced = np.asarray([[20, 0], [21, 22]], np.int32)
    tokens, scores = generate(backbone, TOKENS, prompt, 4, forced=forced, scores=True)
    assert tokens[0, 0] == 20
    assert tokens[1, :2].tolist() == [21, 22]
    decoder = np.concatenate([np.zeros((2, 1), np.int32), tokens[:, :-1]], 1)
    log_p = jax.nn.log_softmax(logits(backbone, TOKENS, decoder, prompt))
    log_p = np.take_along_axis(np.asarray(log_p), tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores, (log_p * (tokens != 0)).sum(-1), atol=1e-5)
    texts, text_scores = generate(backbone, TEXTS[:2], prompt, 4, forced=["warm", ""], scores=True)
    assert texts[0].startswith("warm")
    free, free_scores = generate(backbone, TEXTS[1:2], prompt, 4, scores=True)
    assert texts[1:] == free
    np.testing.assert_allclose(text_scores[1:], free_scores, atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "forced", "message"),
    [
        (TEXTS[:2], ["warm"], "2 texts and 1 forced beginnings; expected one for each text"),
        (TEXTS[:2], np.ones((2, 1), np.int32), "texts and forced as tokens; expected both as texts"),
        (TOKENS, "warm", "tokens and forced as text"),
        (
            TOKENS,
            np.ones((2, 4), np.int32),
            r"forced tokens of shape \[2, 4\]; expected \[2, F\] with F under max_tokens",
        ),
        (TEXTS[:1], "the garden is warm", "forced: 4 tokens; expected fewer than the answer may have, 4"),
    ],
)
def test_a_beginning_that_does_not_fit_is_one_line(backbone, texts, forced, message):
    with pytest.raises(UserError, match=message):
        generate(backbone, texts, None, 4, forced=forced)


@pytest.mark.slow
def test_texts_give_texts_as_their_tokens_would(backbone, prompt):
    tokenizer = load_tokenizer(backbone.folder)
    found = generate(backbone, TEXTS[:3], prompt, max_tokens=4)
    for text, answer in zip(TEXTS[:3], found, strict=True):
        tokens = np.array([[*tokenizer.encode(text), 1]], np.int32)
        assert tokenizer.decode(generate(backbone, tokens, prompt, max_tokens=4)[0].tolist()) == answer
    assert generate(backbone, []) == []


@pytest.mark.parametrize("call", ["generate", "bank", "predictor"])
def test_one_text_in_the_place_of_a_list_is_refused(backbone, predictor, call):
    ask = {
        "generate": lambda text: generate(backbone, text),
        "bank": lambda text: PromptBank(backbone).generate(text, "any"),
        "predictor": predictor.texts,
    }[call]
    with pytest.raises(UserError, match=r"found one text, 'the garden'; expected a list of texts") as error:
        ask("the garden")
    assert "\n" not in str(error.value)


def test_a_prompt_of_nan_is_refused(backbone, prompt, prompt_run, tmp_path):
    broken = np.where(np.arange(3)[:, None] == 1, np.nan, prompt).astype(np.float32)
    save_prompt(broken, tmp_path / "p.safetensors", {})
    for ask in (
        lambda: generate(backbone, TEXTS[:1], broken),
        lambda: PromptBank(backbone).add("p", broken),
        lambda: load_prompt(tmp_path / "p.safetensors"),
    ):
        with pytest.raises(UserError, match="finite"):
            ask()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: unwrap(logits)(b, TOKENS + 0.5, DECODER), "tokens: found float64; expected integers"),
        (
            lambda b: unwrap(logits)(b, TOKENS[:1], DECODER),
            "1 rows of encoder tokens and 2 of decoder tokens; expected",
        ),
        (lambda b: unwrap(generate)(b, [["the", "garden"]]), "found list among the texts; expected a list of texts"),
    ],
)
def test_what_types_refuse_under_test_only_is_one_line(backbone, call, message):
    with pytest.raises(UserError, match=message):
        call(backbone)


def test_logits_can_be_differentiated_in_the_prompt(backbone, prompt):
    gradient = jax.grad(lambda rows: logits(backbone, TOKENS, DECODER, rows).sum())(jnp.asarray(prompt))
    assert gradient.shape == prompt.shape
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda b: logits(b, TOKENS + ROWS, DECODER), f"found the id {ROWS + 12}; expected ids under {ROWS}"),
        (lambda b: logits(b, TOKENS, DECODER + ROWS), "expected ids under"),
        (lambda b: generate(b, TOKENS + ROWS), "expected ids under"),
        (lambda b: logits(b, TOKENS, DECODER, np.zeros((3, 8), np.float32)), "expected [P, 16]"),
        (lambda b: load_prompt("nowhere.npy"), "nowhere.npy: no such file"),
    ],
)
def test_what_does_not_fit_is_one_line(backbone, call, expected):
    with pytest.raises(UserError) as error:
        call(backbone)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------- runs and prompt files


def test_prompt_is_the_same_from_every_source(prompt_run, tmp_path):
    expected = load_prompt(prompt_run)
    assert expected.dtype == np.float32
    np.save(tmp_path / "p.npy", expected)
    for source in (prompt_run / "prompt.safetensors", str(prompt_run), tmp_path / "p.npy"):
        np.testing.assert_array_equal(load_prompt(source), expected)


def test_run_and_its_prompt_file_answer_alike(prompt_run, small):
    expected = generate(load_backbone(small.backbone), TEXTS, load_prompt(prompt_run), max_tokens=4)
    assert load_predictor(prompt_run).texts(TEXTS) == expected
    assert load_predictor(prompt_run / "prompt.safetensors").texts(TEXTS) == expected
    assert load_predictor(prompt_run / "prompt.safetensors", str(small.backbone)).texts(TEXTS) == expected


def test_predictions_keep_the_order(predictor):
    texts = [*sorted(TEXTS, key=len), TEXTS[0] + " today" * 3, ""]
    assert predictor.texts(texts) == [predictor.texts([text])[0] for text in texts]
    assert set(predictor.texts(TEXTS)) == {"yes", "no"}


def test_lines_are_answered_a_chunk_at_a_time(predictor):
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield f"line {number}", {"text": TEXTS[number % 20], "id": number}

    answers = list(itertools.islice(predictor.lines(endless(), chunk=8), 10))
    assert [answer["id"] for answer in answers] == list(range(10))
    assert [answer["prediction"] for answer in answers] == predictor.texts(TEXTS[:10])
    assert len(taken) == 16


def test_row_keeps_its_fields_whatever_they_hold(predictor):
    row = {"text": "the café is 😀 \ud83d today", "n": [1, None], "é": {"a": 0.5}}
    ((answer),) = predictor.lines([("here", row)])
    assert answer == row | {"prediction": answer["prediction"]}
    assert list(predictor.lines([])) == []


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1], "here: found list; expected a JSON object with the task's fields"),
        ({}, "here: no field 'text'"),
        ({"txt": "a"}, "here: no field 'text'; found txt; did you mean txt?"),
        ({"text": None}, "here: the field 'text' is empty"),
        ({"inputs": 3}, "here: no text 'inputs'; found inputs"),
    ],
)
def test_row_that_does_not_fit_is_one_line(predictor, row, expected):
    with pytest.raises(UserError) as error:
        list(predictor.lines([("here", row)]))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_inputs_is_text_as_it_is(predictor):
    rows_in = [{"inputs": TEXTS[0]}, {"inputs": TEXTS[0], "id": 7}, {"text": TEXTS[0], "inputs": "other"}]
    answers = [line["prediction"] for line in predictor.lines(("here", row) for row in rows_in)]
    assert answers == predictor.texts(TEXTS[:1]) * 3


def test_long_inputs_are_cut_and_counted(full_run):
    predictor = load_predictor(full_run)
    long = TEXTS[0] + " dull" * 30
    cut = " ".join(long.split()[:11])  # 12 tokens with EOS
    assert predictor.texts([long, TEXTS[1]])[0] == predictor.texts([cut])[0]
    assert predictor.truncated == 1


# ------------------------------------------------------------------------------------------- refused


def test_run_without_a_checkpoint_is_one_line(prompt_run, tmp_path):
    (tmp_path / "config.yaml").write_bytes((prompt_run / "config.yaml").read_bytes())
    with pytest.raises(UserError, match="has no checkpoint yet; expected one; wait for the run's first"):
        load_predictor(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"it is not a run folder\); expected the folder of a run"):
        load_predictor(tmp_path)


def unfinished(run, folder):
    """Copy a run as it was before it had finished."""
    shutil.copytree(run, folder)
    for name in ("result.json", "trained.safetensors", "prompt.safetensors"):
        (folder / name).unlink(missing_ok=True)
    return folder


def test_an_unfinished_run_answers_from_its_best_checkpoint(prompt_run, tmp_path, softprompt):
    folder = unfinished(prompt_run, tmp_path / "runs" / "mine")
    best = json.loads((prompt_run / "result.json").read_text())["best_step"]
    predictor = load_predictor(folder)
    assert predictor.step == best
    assert predictor.texts(TEXTS) == load_predictor(prompt_run).texts(TEXTS)
    bank = PromptBank.open(folder.parent)
    assert bank.prompt("mine").step == best
    np.testing.assert_array_equal(bank.prompt("mine").rows, load_prompt(prompt_run))
    with pytest.raises(UserError, match=f"its run has not finished, it is at step {best}"):
        load_prompt(folder)
    code, out, err = softprompt("eval", folder)
    assert code == 0, err
    assert json.loads(out)["count"] == 16
    assert f"has not finished; step {best} is used" in err


def test_prompt_of_another_backbone_is_one_line(prompt_run, tmp_path):
    other = write_backbone(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"trained on backbone .* used on .*; expected the same backbone"):
        load_predictor(prompt_run / "prompt.safetensors", str(other))
    asked = load_predictor(prompt_run / "prompt.safetensors", str(other), any_backbone=True)
    assert len(asked.texts(["the garden is warm"])) == 1
    wider = write_backbone(tmp_path / "wider", width=24)
    np.save(tmp_path / "p.npy", load_prompt(prompt_run))
    with pytest.raises(UserError, match=r"prompt: found shape \[3, 16\]; expected \[P, 24\]"):
        load_predictor(tmp_path / "p.npy", str(wider))


def test_prompt_without_a_backbone_is_one_line(prompt_run, tmp_path):
    np.save(tmp_path / "p.npy", load_prompt(prompt_run))
    with pytest.raises(UserError, match=r"p.npy: says no backbone; expected one; add --backbone"):
        load_predictor(tmp_path / "p.npy")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.safetensors", b"\x00" * 40, "not a complete safetensors file"),
        ("p.safetensors", b"", "not a complete safetensors file"),
        ("p.npy", b"nonsense", "not a .npy array"),
        ("p.npy", b"", "not a .npy array"),
    ],
)
def test_broken_prompt_file_is_one_line(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected) as error:
        load_predictor(tmp_path / name)
    assert "\n" not in str(error.value)


def test_prompt_file_whose_settings_are_broken_is_one_line(prompt_run, tmp_path):
    for settings in ("{", json.dumps({"task": "sentiment_movie", "lenght": 3})):
        save_prompt(load_prompt(prompt_run), tmp_path / "p.safetensors", {"settings": settings})
        with pytest.raises(UserError, match=r"not JSON|unknown setting"):
            load_predictor(tmp_path / "p.safetensors")


@pytest.mark.slow
def test_backbone_that_moved_can_be_given(small, tmp_path, monkeypatch):
    settings = small.full | {"backbone": "backbone", "steps": 2}
    with monkeypatch.context() as patch:
        patch.chdir(small.folder)
        softprompt_jax.train(parse(softprompt_jax.Run, settings, "test"), tmp_path / "run")
        expected = load_predictor(tmp_path / "run").texts(TEXTS[:3])
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(UserError, match="backbone backbone: "):
            load_predictor(tmp_path / "run")
        assert load_predictor(tmp_path / "run", str(small.backbone)).texts(TEXTS[:3]) == expected


@pytest.mark.slow
def test_generate_searches_and_samples(small):
    from softprompt_jax.models.decode import Beam, Greedy, Sampling

    backbone, texts = softprompt_jax.load_backbone(small.backbone), ["the garden is warm", "the old mill"]
    prompt = 3 * np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    beams = softprompt_jax.generate(backbone, texts, prompt, 3, Beam(beams=3))
    assert [len(answers) for answers in beams] == [3, 3]
    samples = softprompt_jax.generate(backbone, texts, prompt, 3, Sampling(samples=4, temperature=3.0))
    assert samples == softprompt_jax.generate(backbone, texts, prompt, 3, Sampling(samples=4, temperature=3.0))
    assert samples != softprompt_jax.generate(backbone, texts, prompt, 3, Sampling(samples=4, temperature=3.0, seed=1))
    assert [len(answers) for answers in samples] == [4, 4]
    tokens = np.asarray([[5, 6, 1]])
    assert softprompt_jax.generate(backbone, tokens, prompt, 3, Beam(beams=3)).shape == (1, 3, 3)
    sure = softprompt_jax.generate(backbone, texts, prompt, 3, Sampling(top_k=1))
    assert [answer for (answer,) in sure] == softprompt_jax.generate(backbone, texts, prompt, 3, Greedy())
    beams, scores = softprompt_jax.generate(backbone, texts, prompt, 3, Beam(beams=3), "warm", scores=True)
    assert all(answer.startswith("warm") for each in beams for answer in each)
    assert np.shape(scores) == (2, 3)
    assert (np.diff(scores) <= 0).all()


def test_a_run_can_be_asked_by_beams(small, prompt_run):
    predictor = softprompt_jax.load_predictor(prompt_run, decoding=read_decoding("{kind: beam, beams: 3}"))
    (line,) = predictor.lines([("here", {"text": "the garden is warm"})])
    assert len(line["answers"]) == 3
    assert line["prediction"] == line["answers"][0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bean", "kind 'bean' is unknown; expected one of 'greedy'.*did you mean beam"),
        ("{kind: beam, beans: 2}", "did you mean beams"),
        ("{", "not YAML"),
    ],
)
def test_a_decoding_that_is_none_is_told_in_one_line(text, message):
    with pytest.raises(UserError, match=message):
        read_decoding(text)


def test_samples_of_a_long_stream_do_not_repeat(full_run):
    sampling = Sampling(temperature=50.0, samples=4)
    predictor = load_predictor(full_run, decoding=sampling)
    lines = [("here", {"text": TEXTS[0]})] * 16
    in_one, in_four = ([line["answers"] for line in predictor.lines(lines, chunk)] for chunk in (16, 4))
    assert in_four == in_one
    assert in_one[:4] != in_one[4:8]


def test_what_a_run_has_trained_wants_its_own_backbone(small, full_run, tmp_path):
    own = parse(Run, small.short | {"methods": [{"kind": "ia3"}], "steps": 2}, "test")
    train(own, tmp_path / "run")
    other = write_backbone(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"trained on backbone .* expected the same backbone"):
        load_predictor(tmp_path / "run", str(other))
    load_predictor(tmp_path / "run", str(other), any_backbone=True)
    load_predictor(full_run, str(other))  # which brings all weights


def test_label_words_are_not_ranked_without_the_sentinel_that_answers_begin_with(small, tmp_path):
    train(parse(Run, small.short | {"target_sentinel": True, "steps": 2}, "test"), tmp_path / "run")
    predictor = load_predictor(tmp_path / "run")
    task = predictor.task.model_copy(update={"predict_by": "likelihood"})
    with pytest.raises(UserError, match="answers begin with <extra_id_0>, which label words do not"):
        predictor.evaluate(task, "validation")
