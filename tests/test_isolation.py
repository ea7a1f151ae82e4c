"""Requests cannot touch one another: what a hostile prompt leaves or makes changes no bit of another's answer."""

from __future__ import annotations

import dataclasses
import json
import math
import queue
import random
import threading

import jax.numpy as jnp
import many_methods
import numpy as np
import pytest
import test_prompt_cache
import tiny
import tiny_lm

from softprompt_jax import PromptBank, UserError, load_backbone, load_predictor
from softprompt_jax.models.decode import Beam, Greedy, Sampling
from softprompt_jax.serve.engine import Engine
from softprompt_jax.serve.limits import Limits, RequestError
from softprompt_jax.serve.requests import Request, make_job, reply

TEXTS = ["the garden is warm", "the night train is slow today", "the corner shop", "the old mill"]
EXTREME = {
    "h0": lambda rows: np.full_like(rows, 3e38),
    "h1": lambda rows: np.where(rows > 0, 1e38, -1e38).astype(np.float32),
    "h2": lambda rows: rows * np.float32(1e16),
    "h3": lambda rows: np.full_like(rows, np.inf),  # no file may hold it; here it stands for answers that become NaN
    "h4": lambda rows: np.full_like(rows, np.nan),
}
BROKEN = ("h3", "h4")


def add_hostile(bank: PromptBank) -> None:
    for number, (name, made) in enumerate(EXTREME.items()):
        like = bank.prompt(f"p{number}")
        bank.put(name, dataclasses.replace(like, rows=made(like.rows)))


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Prompts over a T5 of several layers (what is NaN behind the first reaches the caches), with hostile ones."""
    bank = PromptBank(many_methods.write_backbone(tmp_path_factory.mktemp("t5")), device_rows=64)
    for number in range(8):
        rows = 3 * np.random.default_rng(number).normal(size=(1 + number % 3, 16)).astype(np.float32)
        bank.add(f"p{number}", rows)
    add_hostile(bank)
    return bank


@pytest.fixture(scope="module")
def hostile(bank):
    """An engine of two compiled lengths, so that a short context may follow a long one in a slot."""
    made = Engine(bank, Limits(slots=8, max_input_tokens=36, max_prompt_rows=4, max_tokens=6, timeout_s=900))
    made.start()
    yield made
    made.stop()


def together(engine, requests: list[Request]) -> list[dict | RequestError]:
    """Answer requests that join at once, the first in slot 0, from place 0 of the ring on."""
    held, pending = threading.Event(), []
    begun = engine._state.pointer
    engine.call(lambda: setattr(engine, "_state", engine._state._replace(pointer=jnp.zeros_like(begun))))
    engine.call(held.wait)
    for request in requests:
        news: queue.SimpleQueue = queue.SimpleQueue()
        work = make_job(request, engine, news.put)
        engine.submit(work)
        pending.append((request, work, news))
    held.set()
    found = []
    for request, work, news in pending:
        event = news.get(timeout=900)
        found.append(event if isinstance(event, RequestError) else reply(request, work))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_random_hostile_neighbours_change_no_bit_of_an_answer(hostile, seed):
    """At the same time in other slots, and before in the same slot; slot 0 is a neighbour's, so that shapes agree."""
    draw = random.Random(seed)
    places = {0, *draw.sample(range(1, 8), 4)}
    names = [draw.choice(sorted(EXTREME)) if place in places else f"p{draw.randrange(8)}" for place in range(8)]
    ways = [Greedy(), Sampling(temperature=1.5, top_p=0.9, seed=seed)]
    asked = [
        Request(inputs=draw.choice(TEXTS), prompt=name, decoding=draw.choice(ways), max_tokens=draw.randint(2, 6))
        for name in names
    ]
    asked[0] = asked[0].model_copy(update={"inputs": "warm " * 33})  # of the longer length, as its whole group then
    harmless = [
        request.model_copy(update={"prompt": request.prompt.replace("h", "p"), "decoding": Greedy()})
        if place in places
        else request
        for place, request in enumerate(asked)
    ]
    after = [Request(inputs=text, prompt=f"p{draw.randrange(8)}", words=["yes"]) for text in TEXTS]
    found = {}
    for kind, requests in (("hostile", asked), ("harmless", harmless)):
        hostile.call(hostile._reset).result(900)
        found[kind] = together(hostile, requests), together(hostile, after)
    for place, name in enumerate(names):
        mine, expected = (found[kind][0][place] for kind in ("hostile", "harmless"))
        if name in BROKEN:
            assert isinstance(mine, RequestError)
            assert (mine.status, "its answers are NaN" in str(mine)) == (422, True)
        elif place in places:
            assert math.isfinite(mine["answers"][0]["score"])
        else:
            assert mine == expected
    assert found["hostile"][1] == found["harmless"][1]
    assert (hostile.waiting, hostile.working) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["t5", "gpt2", "gemma2", "t5gemma"])
def test_hostile_prefixes_and_factors_change_no_bit_of_an_answer(tmp_path, of):
    """Of every family and kind, by finite numbers alone, in slots and in a batch."""
    encodes = of.startswith("t5")
    methods = many_methods.METHODS | many_methods.MORE if encodes else many_methods.DECODER_ONLY
    many = many_methods.write(tmp_path, methods, of)
    bank, draw, text = test_prompt_cache.bank_of(many), random.Random(0), test_prompt_cache.TEXTS[0]
    good = list(many.models)
    for name in good:
        like = bank.prompt(name)
        extras = {key: np.where(part > 0, 3e38, -3e38).astype(np.float32) for key, part in like.extras.items()}
        bank.put(f"bad {name}", dataclasses.replace(like, rows=np.full_like(like.rows, 1e38), extras=extras))
    engine = Engine(bank, Limits(slots=8, max_input_tokens=48, max_prompt_rows=8, max_tokens=5, timeout_s=900))
    engine.start()
    try:
        refused = 0
        for _ in range(0, len(good), 4):
            names = [name for pair in zip(draw.sample(good, 4), draw.sample(good, 4), strict=True) for name in pair]
            asked = [Request(inputs=text, prompt=("bad " * (place % 2 == 0)) + n) for place, n in enumerate(names)]
            tame = [request.model_copy(update={"prompt": n}) for request, n in zip(asked, names, strict=True)]
            found = {}
            for kind, requests in (("hostile", asked), ("harmless", tame)):
                engine.call(engine._reset).result(900)
                found[kind] = together(engine, requests), together(engine, tame[::-1])
            assert found["hostile"][0][1::2] == found["harmless"][0][1::2]
            assert found["hostile"][1] == found["harmless"][1]
            refused += sum(isinstance(one, RequestError) for one in found["hostile"][0])
            texts, named = [text] * 8, [request.prompt for request in asked]
            assert bank.answers(texts, named, 5)[1::2] == bank.answers(texts, names, 5)[1::2]
        assert refused, "answers that never become NaN show little"
    finally:
        engine.stop()


@pytest.mark.parametrize(
    "how", [Greedy(), Beam(beams=2), Sampling(samples=2, seed=5)], ids=["greedy", "beam", "sample"]
)
def test_hostile_rows_of_a_batch_change_no_bit_of_another(bank, how):
    draw = random.Random(1)
    names = [draw.choice(bank.names) for _ in range(12)]
    texts, tame = [draw.choice(TEXTS) for _ in names], [name.replace("h", "p") for name in names]
    assert {name[0] for name in names} == {"h", "p"}
    found, expected = (bank.answers(texts, each, 6, how) for each in (names, tame))
    scored, wanted = (bank.score_words(texts, each, [["yes", "no"]] * len(texts)) for each in (names, tame))
    for number, name in enumerate(names):
        if name.startswith("p"):
            assert found[number] == expected[number]
            np.testing.assert_array_equal(scored[number], wanted[number])
        if name in BROKEN:
            assert [text for text, _ in found[number]] == [""] * len(found[number])
            assert all(math.isnan(score) for _, score in found[number])
    lines = bank.lines((("here", {"inputs": text, "prompt": name}) for text, name in zip(texts, names, strict=True)), 6)
    for name, line in zip(names, lines, strict=True):
        assert ("error" in line) == (name in BROKEN) == (line["prediction"] is None)


@pytest.mark.slow
def test_predict_gives_lines_of_an_extreme_prompt_an_error_and_answers_the_others(softprompt, tmp_path):
    """A GPT-2's LayerNorm makes NaN of finite rows; a T5's RMSNorm does not."""
    backbone = tiny_lm.folder(
        tmp_path / "gpt2", tiny.settings("gpt2", vocabulary_rows=416, eos=2, learned_positions=96)
    )
    bank, lines = tmp_path / "bank", [{"inputs": tiny_lm.TEXTS[0], "prompt": name} for name in ("good", "bad", "good")]
    bank.mkdir()
    width = tiny.settings("gpt2").d_model
    rows = np.random.default_rng(0).normal(size=(2, width)).astype(np.float32)
    np.save(bank / "good.npy", rows)
    np.save(bank / "bad.npy", np.full_like(rows, 1e38))
    command = ["predict", bank, "--backbone", backbone]
    code, out, err = softprompt(*command, stdin="".join(json.dumps(line) + "\n" for line in lines).encode())
    told = [json.loads(line) for line in out.splitlines()]
    assert code == 2
    assert "1 lines have no prediction; prompt bad: its answers are NaN" in err
    assert [line["prediction"] is None for line in told] == [False, True, False]
    assert told[0]["prediction"] == told[2]["prediction"]


def test_finite_is_checked_after_the_cast(small, tmp_path):
    bank = PromptBank(load_backbone(str(small.backbone)))
    rows = np.full((2, 16), 1e300)
    with pytest.raises(UserError, match="prompt wide: holds NaN or infinity"):
        bank.add("wide", rows)
    np.save(tmp_path / "wide.npy", rows)
    for read in (lambda file: bank.add("wide", file), lambda file: load_predictor(file, str(small.backbone))):
        with pytest.raises(UserError, match=r"wide\.npy: not an array of finite numbers in float32"):
            read(tmp_path / "wide.npy")
