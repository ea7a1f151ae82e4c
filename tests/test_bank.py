"""Many prompts over one model: any mix in a batch answers as one at a time; the device holds those in use."""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from small_runs import write_backbone

from softprompt_jax import PromptBank, generate, load_backbone
from softprompt_jax.checkpoints.artifact import load_prompt, save_prompt, write_tensors
from softprompt_jax.config import UserError, parse
from softprompt_jax.inference import programs
from softprompt_jax.models.decode import Beam, Greedy, Sampling
from softprompt_jax.run import Run

WIDTH = 16
TEXTS = ["the garden is warm", "the night train is slow today", "the corner shop", "the old mill is rude and far away"]


@pytest.fixture(scope="module")
def backbone(small):
    return load_backbone(str(small.backbone))


def rows(length: int, seed: int = 0) -> np.ndarray:
    return 3 * np.random.default_rng(seed).normal(size=(length, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def prompts() -> dict[str, np.ndarray]:
    return {f"p{n}": rows(1 + n % 4, n) for n in range(9)}


@pytest.fixture(scope="module")
def alone(backbone, prompts) -> dict[tuple[str, str], str]:
    """What each prompt answers to each text by itself."""
    found = {}
    for name, prompt in prompts.items():
        for text, answer in zip(TEXTS, generate(backbone, TEXTS, prompt, max_tokens=4), strict=True):
            found[text, name] = answer
    assert len(set(found.values())) > 6, "prompts that answer alike show nothing"
    return found


def bank_of(backbone, prompts, **settings) -> PromptBank:
    bank = PromptBank(backbone, **settings)
    for name, prompt in prompts.items():
        bank.add(name, prompt)
    return bank


def asked(bank, pairs) -> list[str]:
    texts, names = zip(*pairs, strict=True)
    return [answer for answer, _ in bank.generate(texts, names, max_tokens=4)]


def test_a_mixed_batch_answers_as_each_prompt_by_itself(backbone, prompts, alone):
    bank = bank_of(backbone, prompts)
    pairs = list(alone)
    random.Random(0).shuffle(pairs)
    assert asked(bank, pairs) == [alone[pair] for pair in pairs]


def test_scores_do_not_depend_on_the_company(backbone, prompts):
    bank = bank_of(backbone, prompts)
    pairs = [(text, name) for text in TEXTS for name in prompts]
    texts, names = zip(*pairs, strict=True)
    together = [score for _, score in bank.generate(texts, names, max_tokens=4)]
    apart = [bank.generate([text], name, max_tokens=4)[0][1] for text, name in pairs[::5]]
    np.testing.assert_allclose(together[::5], apart, rtol=1e-5, atol=1e-5)


def test_prompts_that_do_not_fit_on_the_device_take_turns(backbone, prompts, alone):
    bank = bank_of(backbone, prompts, device_rows=9, batch_size=3)
    pairs = 2 * list(alone)
    random.Random(1).shuffle(pairs)
    assert asked(bank, pairs) == [alone[pair] for pair in pairs]
    held = sorted(int(row) for places in bank.device._places.values() for row in places)
    assert sorted([*held, *bank.device._free]) == list(range(9))  # no row is lost, none is held twice


def test_a_prompt_can_be_replaced_and_removed_while_others_stay(backbone, prompts, alone):
    bank = bank_of(backbone, prompts)
    text = TEXTS[0]
    assert asked(bank, [(text, "p2")]) == [alone[text, "p2"]]
    bank.add("p2", prompts["p7"])
    bank.remove("p3")
    assert asked(bank, [(text, "p2"), (text, "p5")]) == [alone[text, "p7"], alone[text, "p5"]]
    assert "p3" not in bank.names
    with pytest.raises(UserError, match="not in the bank"):
        bank.generate([text], "p3")


@pytest.mark.slow
def test_prompts_of_other_places_share_a_batch(backbone, tmp_path):
    places = {"before": 2, "after": 3, "both": 4, "{prompt:1} {text} is {prompt:2}": 3}
    bank, expected = PromptBank(backbone), {}
    for number, (place, length) in enumerate(places.items()):
        prompt = rows(length, 50 + number)
        save_prompt(prompt, tmp_path / f"{number}.safetensors", {"place": place})
        bank.add(str(number), tmp_path / f"{number}.safetensors")
        from softprompt_jax.inference.predictor import load_predictor

        predictor = load_predictor(tmp_path / f"{number}.safetensors", str(backbone.folder))
        predictor.max_tokens = 4
        for text, answer in zip(TEXTS, predictor.texts(TEXTS), strict=True):
            expected[text, str(number)] = answer
    assert asked(bank, list(expected)) == list(expected.values())


@pytest.mark.slow
def test_ten_thousand_prompts_cost_their_own_bytes(backbone):
    """Beside the rows a prompt costs a few hundred bytes, however long it is; the device keeps its table."""
    count, length = 10_000, 32
    bank = PromptBank(backbone, device_rows=1024)
    prompt = rows(length)
    bank.add("first", prompt)
    tracemalloc.start()
    for number in range(count):
        bank.add(str(number), prompt + number)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    own = count * prompt.nbytes
    assert own <= held < own + 1000 * count
    assert bank.device.nbytes == 1024 * WIDTH * 4
    assert len(asked(bank, [(TEXTS[0], str(number)) for number in range(0, count, 500)])) == 20
    assert bank.device.nbytes == 1024 * WIDTH * 4
    np.testing.assert_array_equal(bank.prompt("9999").rows, prompt + 9999)


@pytest.mark.slow
def test_a_bank_decodes_as_it_is_told(backbone, prompts):
    bank, names = bank_of(backbone, prompts, batch_size=3), ["p1", "p6", "p3", "p4"]
    for how in (Beam(beams=3), Sampling(samples=3, seed=5, temperature=3.0)):
        found = bank.answers(TEXTS, names, 4, how)
        assert [each[0] for each in found] == bank.generate(TEXTS, names, 4, how)
        for number, (text, name) in enumerate(zip(TEXTS, names, strict=True)):
            (alone,) = bank.answers([text], name, 4, how, first=number)
            assert [answer for answer, _ in found[number]] == [answer for answer, _ in alone]
            np.testing.assert_allclose([s for _, s in found[number]], [s for _, s in alone], rtol=1e-5, atol=1e-5)
        expected, scores = generate(backbone, TEXTS[:1], prompts["p1"], 4, how, scores=True)
        assert [answer for answer, _ in found[0]] == expected[0]
        np.testing.assert_allclose([score for _, score in found[0]], scores[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_answers_begin_with_what_is_forced_on_each(backbone, prompts):
    bank = bank_of(backbone, prompts)
    for how in (None, Beam(beams=2)):
        found = bank.generate(TEXTS[:3], ["p1", "p6", "p3"], 5, how, ["the old", "", "warm tea"])
        assert found[0][0].startswith("the old")
        assert found[2][0].startswith("warm tea")
        np.testing.assert_allclose(found[1][1], bank.generate([TEXTS[1]], "p6", 5, how)[0][1], rtol=1e-5)
    with pytest.raises(UserError, match=r"3 texts and 1 forced beginnings; expected one for each text"):
        bank.generate(TEXTS[:3], "p1", 5, forced=["the"])
    with pytest.raises(UserError, match=r"forced: 2 tokens; expected fewer than the answer may have, 2"):
        bank.generate(TEXTS[:3], "p1", 2, forced="the old")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda bank: bank.generate(["x"], "p22"), "prompt 'p22': not in the bank; .*did you mean p2"),
        (lambda bank: bank.generate(["x", "y"], ["p2"]), "2 texts and 1 prompt names"),
        (lambda bank: bank.add("wide", np.zeros((3, WIDTH + 1), np.float32)), "the width of backbone"),
        (lambda bank: bank.add("long", np.zeros((70, WIDTH), np.float32)), "at most the bank's 64 device_rows"),
        (lambda bank: bank.remove("p99"), "not in the bank"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(backbone, prompts, call, message):
    with pytest.raises(UserError, match=message):
        call(bank_of(backbone, prompts, device_rows=64))


def test_a_prompt_of_another_backbone_is_refused(prompt_run):
    with pytest.raises(UserError, match=r"expected the same backbone|the width of backbone"):
        PromptBank("embedded").add("stranger", prompt_run)


def test_a_folder_of_prompts_and_runs_is_a_bank(backbone, prompt_run, tmp_path, capsys, monkeypatch):
    from softprompt_jax.cli.main import app

    prompt = load_prompt(prompt_run)
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "run").symlink_to(prompt_run)
    np.save(tmp_path / "bank" / "other.npy", rows(2))
    lines = [{"inputs": text, "prompt": name} for text in TEXTS for name in ("run", "other")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    app(
        ["predict", str(tmp_path / "bank"), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")],
        prog_name="softprompt",
    )
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [{k: line[k] for k in ("inputs", "prompt")} for line in found] == lines
    for name, own in (("run", prompt), ("other", rows(2))):
        answers = generate(backbone, TEXTS, own, max_tokens=64)
        assert [line["prediction"] for line in found if line["prompt"] == name] == answers


@pytest.mark.slow
def test_a_bank_on_the_command_line_decodes_as_it_is_told(prompt_run, tmp_path, softprompt):
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "run").symlink_to(prompt_run)
    lines = [{"inputs": text, "prompt": "run", "forced": "no"} for text in TEXTS]
    stdin = "".join(json.dumps(line) + "\n" for line in lines).encode()
    code, out, err = softprompt("predict", tmp_path / "bank", "--decoding", "{kind: beam, beams: 2}", stdin=stdin)
    assert code == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert [line["prediction"] for line in found] == [line["answers"][0] for line in found]
    assert all(len(line["answers"]) == 2 and line["prediction"].startswith("no") for line in found)


def test_an_empty_folder_is_no_bank(tmp_path: Path):
    with pytest.raises(UserError, match="no prompt; expected"):
        PromptBank.open(tmp_path)


def test_two_prompts_of_one_name_are_refused(prompt_run, tmp_path):
    shutil.copytree(prompt_run, tmp_path / "one")
    shutil.copy(prompt_run / "prompt.safetensors", tmp_path / "one.safetensors")
    with pytest.raises(UserError, match=r"two prompts of the name 'one'; expected one of each; rename one.safetensors"):
        PromptBank.open(tmp_path)


def test_a_prompt_of_another_backbone_is_taken_if_one_says_so(prompt_run, tmp_path):
    other = write_backbone(tmp_path / "other", seed=1)
    bank = PromptBank(str(other), any_backbone=True)
    bank.add("stranger", prompt_run)
    assert bank.names == ["stranger"]


def test_a_file_whose_settings_are_broken_is_one_line(backbone, tmp_path):
    write_tensors({"a": np.zeros(2, np.float32)}, tmp_path / "a.safetensors", {"settings": "{"})
    with pytest.raises(UserError, match=r"a.safetensors: its settings are not JSON"):
        PromptBank(backbone).add("a", tmp_path / "a.safetensors")


def test_the_fingerprint_is_computed_once_for_all_prompts(small, prompt_run, tmp_path, monkeypatch):
    from softprompt_jax.checkpoints import backbone as module

    calls, fingerprint = [], module.fingerprint
    monkeypatch.setattr(module, "fingerprint", lambda model: calls.append(1) or fingerprint(model))
    for number in range(5):
        shutil.copy(prompt_run / "prompt.safetensors", tmp_path / f"{number}.safetensors")
    assert len(PromptBank.open(tmp_path)) == 5
    assert len(calls) == 1


def test_runs_that_no_bank_can_hold_are_all_named_at_once(prompt_run, full_run, tmp_path):
    for name, run in (("mine", prompt_run), ("whole", full_run), ("again", full_run)):
        (tmp_path / name).symlink_to(run)
    with pytest.raises(UserError) as error:
        PromptBank.open(tmp_path)
    reason = "full changes the model for every text, so that it cannot be in a bank"
    assert f"again: {reason}; whole: {reason}; expected prompts" in str(error.value)
    assert "leave these out" in str(error.value)
    assert "mine" not in str(error.value).replace(str(tmp_path), "")


def test_an_uploaded_run_is_judged_before_anything_is_attached(backbone, full_run, monkeypatch):
    bank = PromptBank(backbone, any_backbone=True)
    bank.backbone.fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr("softprompt_jax.methods.attach", lambda *_: pytest.fail("attached"))
        with pytest.raises(UserError, match="prompt odd: full changes the model for every text"):
            bank.read("odd", full_run / "trained.safetensors")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"kind": "prompt", "length": 1_000_000_000},
            "holds 96 numbers, and its settings say prompt of length 1000000000",
        ),
        ({"kind": "prefix", "network": None, "length": 96}, r"does not fit its settings .* for decoder.*\[1, 96, 16\]"),
    ],
)
def test_settings_that_ask_for_more_than_the_file_holds_are_refused(backbone, small, tmp_path, method, message):
    run = parse(Run, small.short | {"methods": [method]}, "test")
    arrays = {"encoder.prefix.attention.keys": np.zeros((1, 6, 16), np.float32)}
    write_tensors(arrays, tmp_path / "odd.safetensors", {"settings": json.dumps(run.model_dump(mode="json"))})
    with pytest.raises(UserError, match=message):
        PromptBank(backbone).read("odd", tmp_path / "odd.safetensors")


@pytest.mark.slow
def test_words_are_scored_as_forced_answers_are(backbone, prompts, tmp_path):
    bank = bank_of(backbone, prompts)
    for number, place in enumerate(("decoder", "both")):
        save_prompt(rows(4, 90 + number), tmp_path / f"{place}.safetensors", {"place": place})
        bank.add(place, tmp_path / f"{place}.safetensors")
    names = ["p1", "decoder", "both", "p6"]
    words = [["the old mill", "warm"], ["warm"], ["the garden", "warm", "dull"], ["warm", "the old mill"]]
    scores = bank.score_words(TEXTS, names, words)
    assert [len(row) for row in scores] == [2, 1, 3, 2]
    for text, name, of_text, row in zip(TEXTS, names, words, scores, strict=True):
        _, model, tokens, before = bank._on_device(np.array([0]), [[*bank.tokenizer.encode(text), 1]], [name])
        for word, score in zip(of_text, row, strict=True):
            forced = np.asarray([bank.word_ids(name, word)], np.int32)
            rest = tokens, before, np.zeros(1, np.int32), forced
            _, expected = programs.answers(model, Greedy(), forced.shape[1], *rest)
            assert score == pytest.approx(float(expected[0, 0]), abs=1e-4)
