"""Many prompts and methods over decoder-only models and T5Gemma: mixed batches and slots answer as each by itself."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import random

import many_methods
import numpy as np
import pytest
import test_prompt_cache
import tiny
import tiny_lm
from safetensors.numpy import save_file

from softprompt_jax import PromptBank, UserError, generate, load_backbone, load_predictor
from softprompt_jax.data.tokenizer import TextSettings, load_tokenizer
from softprompt_jax.inference import prompt_cache
from softprompt_jax.inference.harness import ModelArguments
from softprompt_jax.inference.harness import load as harness_load
from softprompt_jax.models.causal_settings import LayerKind, Rope
from softprompt_jax.models.decode import Beam, Greedy, Sampling
from softprompt_jax.serve.engine import Engine, Job
from softprompt_jax.serve.limits import Limits
from softprompt_jax.serve.requests import Request, make_job

KINDS = (LayerKind(window=6, rope=Rope()), LayerKind(rope=Rope(base=1e6)))
WORDS = ["good", "bad"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "llama"
    return load_backbone(str(tiny_lm.folder(path, kinds=KINDS, pattern=(0, 1), tied=False)))


@pytest.fixture(scope="module")
def prompts():
    return {f"p{n}": 3 * np.random.default_rng(n).normal(size=(1 + n % 4, 32)).astype(np.float32) for n in range(6)}


@pytest.fixture(scope="module")
def alone(backbone, prompts):
    found = {}
    for name, prompt in prompts.items():
        texts, scores = generate(backbone, list(tiny_lm.TEXTS), prompt, max_tokens=5, scores=True)
        found |= {(text, name): pair for text, *pair in zip(tiny_lm.TEXTS, texts, scores, strict=True)}
    assert len({text for text, _ in found.values()}) > 6, "prompts that answer alike show nothing"
    return found


def test_a_mixed_batch_answers_as_each_prompt_by_itself(backbone, prompts, alone):
    bank = PromptBank(backbone)
    for name, rows in prompts.items():
        bank.add(name, rows)
    pairs = list(alone)
    random.Random(0).shuffle(pairs)
    texts, names = zip(*pairs, strict=True)
    found = bank.generate(list(texts), list(names), max_tokens=5)
    for pair, (text, score) in zip(pairs, found, strict=True):
        assert text == alone[pair][0]
        assert score == pytest.approx(alone[pair][1], abs=1e-4)


def run_engine(bank: PromptBank, requests: list[Request], **limits) -> tuple[Engine, list[Job]]:
    """Answer requests that are all there at once; return the stopped engine too."""
    pytest.importorskip("fastapi")
    defaults = {"slots": 4, "max_input_tokens": 32, "max_prompt_rows": 8, "max_tokens": 5, "timeout_s": 600}
    engine = Engine(bank, Limits(**defaults | limits))
    engine.start()
    try:
        waiting = []
        for request in requests:
            future: concurrent.futures.Future = concurrent.futures.Future()

            def notify(event, future=future):
                if event is not None:
                    future.set_result(event)

            waiting.append((make_job(request, engine, notify), future))
            engine.submit(waiting[-1][0])
        for _, future in waiting:
            assert future.result(600) is True
    finally:
        engine.stop()
    return engine, [job for job, _ in waiting]


@pytest.mark.slow
def test_the_slots_of_the_server_answer_as_each_prompt_by_itself(backbone, prompts, alone):
    bank = PromptBank(backbone)
    for name, rows in prompts.items():
        bank.add(name, rows)
    requests = [Request(inputs=text, prompt=name, words=WORDS, decoding=Greedy()) for text, name in alone]
    _, jobs = run_engine(bank, requests)
    for (text, name), job in zip(alone, jobs, strict=True):  # now that no other thread moves the bank's prompts
        answer, *words = job.answers
        assert bank.tokenizer.decode(answer.tokens) == alone[text, name][0]
        assert answer.score == pytest.approx(alone[text, name][1], abs=1e-3)
        expected = bank.score_words([text], [name], [WORDS], max_tokens=5)[0]
        np.testing.assert_allclose([word.score for word in words], expected, atol=1e-3)


@pytest.mark.slow
def test_the_server_reads_a_prompt_once_for_all_its_texts(backbone, prompts, alone, monkeypatch):
    read, read_keys = [], prompt_cache._keys_values
    monkeypatch.setattr(prompt_cache, "_keys_values", lambda *given: read.append(given) or read_keys(*given))
    bank = PromptBank(backbone)
    for name in ("p1", "p2"):
        bank.add(name, prompts[name])
    asked = [(text, name) for text, name in alone if name in ("p1", "p2")]
    requests = [Request(inputs=text, prompt=name) for text, name in asked]
    engine, _ = run_engine(bank, requests)
    assert len(read) == 2
    assert [bank.device.layout(name).lengths for name in ("p1", "p2")] == [(0, 0), (0, 0)]

    def answer(name: str) -> list[str]:
        found = bank.generate(list(tiny_lm.TEXTS), name, max_tokens=5)
        return [text for text, _ in found]

    bank.add("p1", prompts["p0"])  # shorter, in the place of another
    bank.add("p3", prompts["p3"])  # longer than those that it began with: read with each text
    assert answer("p1") == [alone[text, "p0"][0] for text in tiny_lm.TEXTS]
    assert answer("p3") == [alone[text, "p3"][0] for text in tiny_lm.TEXTS]
    assert len(read) == 3
    assert bank.device.layout("p3").lengths == (4, 0)
    engine.check_prompt("p3", bank.prompt("p3"))


@pytest.mark.slow
def test_slots_have_a_repetition_penalty_and_a_stop_text_of_their_own(backbone, prompts):
    bank = PromptBank(backbone)
    for name, rows in prompts.items():
        bank.add(name, rows)
    text, ways = (
        tiny_lm.TEXTS[0],
        [Greedy(repetition_penalty=0.05), Sampling(top_k=1, repetition_penalty=0.05), Greedy()],
    )
    asked = [(name, how) for name in prompts for how in ways]
    _, jobs = run_engine(bank, [Request(inputs=text, prompt=name, decoding=how) for name, how in asked])
    expected = [bank.generate([text], [name], max_tokens=5, decoding=how)[0] for name, how in asked]
    found = [bank.tokenizer.decode(job.answers[0].tokens) for job in jobs]
    assert found == [answer for answer, _ in expected]
    assert found[::3] == found[1::3]
    assert found[::3] != found[2::3]

    longest = max(jobs, key=lambda job: len(set(job.answers[0].tokens))).answers[0].tokens
    stop = bank.tokenizer.decode(longest[1:2])
    asked = next(pair for pair, job in zip(asked, jobs, strict=True) if job.answers[0].tokens == longest)
    prompt = bank.prompt(asked[0])
    bank.put("stops", dataclasses.replace(prompt, text=TextSettings(stop=stop)))
    _, (plain, stopped) = run_engine(
        bank, [Request(inputs=text, prompt=name, decoding=asked[1]) for name in (asked[0], "stops")]
    )
    assert plain.answers[0].tokens == longest
    assert stopped.answers[0].tokens == longest[: len(stopped.answers[0].tokens)]
    assert len(stopped.answers[0].tokens) <= 2
    assert stopped.answers[0].ended


@pytest.mark.slow
def test_a_word_with_an_end_in_it_does_not_keep_its_slot(backbone, prompts):
    bank = PromptBank(backbone)
    bank.add("p0", prompts["p0"])
    words = ["good<|im_end|>bad", "good"]
    _, (job,) = run_engine(bank, [Request(inputs="film", prompt="p0", words=words)], timeout_s=20, max_tokens=16)
    assert job.answers[1].ended


@pytest.mark.slow
def test_an_answer_ends_at_any_of_the_ends_that_a_config_states(backbone, prompts, tmp_path):
    text = tiny_lm.TEXTS[0]
    (free,) = generate(backbone, [load_tokenizer(backbone.folder, backbone.text_format).input_ids(text)], stop=False)
    other = free[2]
    expected = free[: free.index(other) + 1]
    path = tiny_lm.folder(tmp_path / "lm", kinds=KINDS, pattern=(0, 1), tied=False, other_eos=(other,))
    assert json.loads((path / "config.json").read_text())["eos_token_id"] == [2, other]
    ending = load_backbone(str(path))
    bank = PromptBank(ending)
    (found,) = generate(ending, [bank.tokenizer.input_ids(text)])
    assert found == expected
    bank.add("none", np.zeros((0, 32), np.float32))
    _, (job,) = run_engine(bank, [Request(inputs=text, prompt="none")])
    assert job.answers[0].tokens == expected
    assert job.answers[0].ended


@pytest.mark.slow
@pytest.mark.parametrize(("stated", "others"), [(None, ()), ([5, 7], (5, 7)), ([5, 2], (5,))])
def test_answers_end_at_the_tokenizers_end_where_a_config_states_another(tmp_path, stated, others):
    path = tiny_lm.folder(tmp_path / "lm", kinds=KINDS, pattern=(0, 1), tied=False)
    about = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(about | {"eos_token_id": stated}))
    save_file({"prompt": np.ones((2, 32), np.float32)}, tmp_path / "p.safetensors")
    backbone, how = load_backbone(str(path)), Sampling(temperature=3.0, samples=40)
    predictor = load_predictor(tmp_path / "p.safetensors", backbone, decoding=how)
    bank = PromptBank(backbone)
    bank.add("p", tmp_path / "p.safetensors")
    assert backbone.settings.eos == (stated[0] if stated else 0)  # stays as it was
    for model in (predictor.model, bank.backbone.model, harness_load(ModelArguments(backbone=str(path))).model):
        assert model.settings.eos == bank.tokenizer.eos_id == 2
        assert model.settings.other_eos == others
    answers = [answer.ids for each in predictor.scored(list(tiny_lm.TEXTS)) for answer in each]
    ended = [ids for ids in answers if {2, *others} & {*ids}]
    assert any(2 in ids for ids in ended)
    assert all(not {2, *others} & {*ids[:-1]} for ids in ended)
    assert any(0 in ids[:-1] for ids in answers)  # no end here


@pytest.mark.slow
def test_no_text_goes_past_the_positions_that_a_backbone_has_learned(tmp_path):
    gpt2 = tiny.model(of="gpt2", vocabulary_rows=416, eos=2, learned_positions=64)
    backbone = load_backbone(str(tiny_lm.folder(tmp_path / "gpt2", of=gpt2.settings)))
    text, bank = "film " * 100, PromptBank(backbone)
    bank.add("p", np.ones((2, 16), np.float32))
    ids = bank.tokenizer.input_ids(text)
    assert generate(backbone, [text], max_tokens=4, stop=False) == generate(
        backbone, [bank.tokenizer.decode(ids[:60])], max_tokens=4, stop=False
    )
    bank.generate([text], "p", max_tokens=4)
    assert bank.truncated == 1
    with pytest.raises(UserError, match=r"\d+ tokens; expected at most 60, so that with prompt and answer no position"):
        generate(backbone, [ids], max_tokens=4)
    with pytest.raises(UserError, match="64 positions; expected fewer than 64, which this backbone has learned"):
        bank.generate([text], "p", max_tokens=62)
    with pytest.raises(
        UserError, match="expected at most 64, which this backbone has learned; set --limit max_input_tokens"
    ):
        Engine(bank, Limits(slots=1, max_input_tokens=200))


FAMILIES = ("gemma2", "gpt2", "t5gemma")


@pytest.fixture(scope="module", params=FAMILIES)
def many(request, tmp_path_factory):
    encodes = request.param.startswith("t5gemma")
    methods = many_methods.METHODS | many_methods.MORE if encodes else many_methods.DECODER_ONLY
    return many_methods.write(tmp_path_factory.mktemp(request.param), methods, request.param)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [Greedy(), Beam(beams=3), Sampling(samples=2, seed=3, temperature=2.0)],
    ids=["greedy", "beam", "sampling"],
)
def test_answers_of_all_methods_are_those_of_each_by_itself(many, how):
    pairs = [(test_prompt_cache.TEXTS[number % 3], name) for number, name in enumerate(many.models)]
    test_prompt_cache.check(many, test_prompt_cache.bank_of(many), pairs, how)


@pytest.mark.slow
def test_a_context_is_scored_under_every_method_as_its_end_is_as_an_answer(many):
    if many.backbone.text_format.start is not None:
        pytest.skip("an encoder foretells no token of its text")
    pytest.importorskip("fastapi")
    bank = test_prompt_cache.bank_of(many)
    engine = Engine(bank, Limits(slots=4, max_input_tokens=40, max_prompt_rows=16, max_tokens=5))
    text, word = bank.tokenizer.input_ids(tiny_lm.TEXTS[0]), bank.tokenizer.target_ids("good")
    names = [name for name in many.models if not bank.prompt(name).layout.after.size]
    assert len(names) > 4
    found = []
    for name in names:
        own, others, values = engine.score_context(name, [*text, *word])
        found.append(float(own[-len(word) :].sum()))
        np.testing.assert_allclose(np.where(others == np.asarray([*text, *word])[:, None], values - own[:, None], 0), 0)
        assert (np.diff(values[1:]) <= 0).all()
    expected = bank.score_words([tiny_lm.TEXTS[0]] * len(names), names, [["good"]] * len(names), max_tokens=5)
    np.testing.assert_allclose(found, [score[0] for score in expected], atol=1e-4)


@pytest.mark.slow
def test_prefixes_and_factors_share_the_slots(many):
    bank = test_prompt_cache.bank_of(many, device_rows=12, device_extras=2)
    draw = random.Random(1)
    pairs = [(text, name) for text in tiny_lm.TEXTS[:3] for name in many.models]
    draw.shuffle(pairs)
    requests = [Request(inputs=text, prompt=name, max_tokens=draw.randint(2, 5)) for text, name in pairs]
    sampled = Sampling(samples=2, temperature=2.0, seed=8)
    for name in ("prefix placed, rows", "ia3 everywhere", "nothing"):
        requests.append(Request(inputs=tiny_lm.TEXTS[0], prompt=name, decoding=sampled, words=["good"]))
    _, jobs = run_engine(bank, requests, slots=8, max_input_tokens=48)
    eos = many.backbone.settings.eos
    for request, job in zip(requests, jobs, strict=True):
        ids, model = bank.tokenizer.encode(request.inputs), many.models[request.prompt]
        tokens, scores = many_methods.answered(model, ids, 5, request.decoding, 0)
        for found, row, score in zip(job.answers, tokens, scores, strict=False):  # behind them those to its words
            whole = [int(token) for token in row]
            whole = whole[: whole.index(eos) + 1] if eos in whole else whole
            assert found.tokens == whole[: request.max_tokens], request
            if found.tokens == whole:
                assert found.score == pytest.approx(float(score), abs=1e-4)
