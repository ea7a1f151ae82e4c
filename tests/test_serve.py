"""The engine: requests that join and leave a running batch are answered as each would be alone; none is lost."""

from __future__ import annotations

import dataclasses
import json
import queue
import random
import threading
import time

import jax
import jax.numpy as jnp
import many_methods
import numpy as np
import pytest
from flax import nnx

from softprompt_jax import PromptBank, UserError, generate, load_backbone, logits
from softprompt_jax.checkpoints.artifact import save_prompt
from softprompt_jax.data.prompt_layout import EOS
from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.models import decode
from softprompt_jax.models.decode import Sampling
from softprompt_jax.serve.app import generated
from softprompt_jax.serve.engine import Engine, Job
from softprompt_jax.serve.jobs import Answer
from softprompt_jax.serve.limits import Limits, RequestError
from softprompt_jax.serve.requests import Request, TextStream, make_job, reply

WIDTH, TOKENS = 16, 6
LIMITS = {"slots": 8, "max_input_tokens": 16, "max_prompt_rows": 12, "max_tokens": TOKENS, "timeout_s": 900}
TEXTS = [
    "the garden is warm",
    "the night train is slow today",
    "the corner shop",
    "the old mill is rude and far away on market days",
]


def rows(length: int, seed: int) -> np.ndarray:
    return 3 * np.random.default_rng(seed).normal(size=(length, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def backbone(small):
    return load_backbone(str(small.backbone))


@pytest.fixture(scope="module")
def prompts() -> dict[str, np.ndarray]:
    return {f"p{number}": rows(1 + number % 3, number) for number in range(64)}


@pytest.fixture(scope="module")
def engine(backbone, prompts, tmp_path_factory):
    bank = PromptBank(backbone, device_rows=24)  # room for a part of the prompts: they take turns on the device
    for name, prompt in prompts.items():
        bank.add(name, prompt)
    for place in ("both", "decoder"):
        file = tmp_path_factory.mktemp("prompts") / f"{place}.safetensors"
        save_prompt(rows(4, 99), file, {"place": place})
        bank.add(place, file)
    made = Engine(bank, Limits(**LIMITS))
    made.start()
    yield made
    made.stop()


def asked(engine: Engine, *requests: Request) -> list[dict]:
    """Answer requests that are all there at once."""
    pending = []
    for request in requests:
        news: queue.SimpleQueue = queue.SimpleQueue()
        work = make_job(request, engine, news.put)
        engine.submit(work)
        pending.append((request, work, news))
    found = []
    for request, work, news in pending:
        while (event := news.get(timeout=900)) is None:
            pass
        if isinstance(event, RequestError):
            raise event
        found.append(reply(request, work))
    return found


def whole(row: np.ndarray) -> list[int]:
    """Return an answer's tokens up to its end."""
    tokens = [int(token) for token in row]
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


def tokens_of(engine: Engine, text: str) -> np.ndarray:
    ids = [*engine.bank.tokenizer.encode(text), EOS]
    return np.asarray([ids + [0] * (LIMITS["max_input_tokens"] - len(ids))], np.int32)


@pytest.fixture(scope="module")
def alone(engine, backbone, prompts) -> dict[tuple[str, str], list[int]]:
    """What each prompt answers to each text by itself, all other prompts absent."""
    batch = np.concatenate([tokens_of(engine, text) for text in TEXTS])
    found = {}
    for name, prompt in prompts.items():
        for text, answer in zip(TEXTS, generate(backbone, batch, prompt, TOKENS), strict=True):
            found[text, name] = whole(answer)
    assert len({tuple(answer) for answer in found.values()}) > 20, "prompts that answer alike show nothing"
    return found


@pytest.mark.slow
def test_requests_of_64_prompts_are_answered_as_each_alone(engine, alone):
    """Nothing is lost or crossed, whatever joins and leaves meanwhile: threads ask in an order of their own."""
    draw, wrong, answered = random.Random(0), [], []
    pairs = [(draw.choice(TEXTS), name) for name in engine.bank.names if name.startswith("p")]
    pairs += draw.sample(list(alone), 56)
    draw.shuffle(pairs)

    def client(seed: int) -> None:
        draw, mine = random.Random(seed), pairs[seed::3]
        while mine:
            taken, mine = mine[: (many := draw.randint(1, 24))], mine[many:]
            requests = [Request(inputs=text, prompt=name, max_tokens=draw.randint(1, TOKENS)) for text, name in taken]
            for request, answer in zip(requests, asked(engine, *requests), strict=True):
                expected = alone[request.inputs, request.prompt][: request.max_tokens]
                answered.append((request.inputs, request.prompt))
                if answer["answers"][0]["tokens"] != expected or answer["prompt"] != request.prompt:
                    wrong.append((request, answer, expected))

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(3)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert not wrong
    assert sorted(answered) == sorted(pairs)
    assert (engine.waiting, engine.working) == (0, 0)
    assert sorted(engine._free) == list(range(LIMITS["slots"]))


@pytest.mark.slow
def test_scores_are_those_of_a_forward_pass(engine, backbone, prompts):
    text, words = TEXTS[1], ["yes", "no", "the garden"]
    (found,) = asked(engine, Request(inputs=text, prompt="p5", words=words))
    for heard in [*found["words"], found["answers"][0]]:
        ids = heard.get("tokens") or [*engine.bank.tokenizer.encode(heard["word"]), EOS]
        inputs = np.asarray([[0, *ids[:-1]]], np.int32)
        log_p = jax.nn.log_softmax(logits(backbone, tokens_of(engine, text), inputs, prompts["p5"])[0])
        assert heard["score"] == pytest.approx(float(log_p[np.arange(len(ids)), ids].sum()), abs=1e-4)
    best = max(found["words"], key=lambda word: word["score"])["word"]
    assert found["best_word"] == best
    (only,) = asked(engine, Request(inputs=text, prompt="p5", words=words, max_tokens=0))
    assert (only["prediction"], only["answers"]) == (best, [])


@pytest.mark.slow
def test_samples_are_those_of_predict(engine, backbone, prompts):
    how = Sampling(temperature=1.3, top_k=12, top_p=0.9, samples=3, seed=4)
    company = [Request(inputs=text, prompt=f"p{number}") for number, text in enumerate(TEXTS)]
    expected = generate(backbone, tokens_of(engine, TEXTS[0]), prompts["p7"], TOKENS, how)[0]
    for _ in range(engine.ring):  # wherever in the ring they begin
        asked(engine, Request(inputs=TEXTS[0], prompt="p1", max_tokens=1))
        found, *_ = asked(engine, Request(inputs=TEXTS[0], prompt="p7", decoding=how), *company)
        assert [answer["tokens"] for answer in found["answers"]] == [whole(row) for row in expected]


@pytest.mark.parametrize("place", ["both", "decoder"])
def test_prompts_on_the_decoders_side_share_the_slots(engine, backbone, place):
    model = nnx.merge(*nnx.split(backbone.model))
    attach_rows(model, rows(4, 99), place)
    layout = model.prompt.layout
    encoder = np.asarray([layout.around(tokens_of(engine, text)[0]) for text in TEXTS], np.int32)
    decoder = np.repeat(layout.decoder, len(TEXTS), 0)
    run = jax.jit(lambda model, encoder, decoder: decode.greedy(model, encoder, TOKENS, decoder_prompt=decoder))
    outputs, scores = run(model, encoder, decoder)
    found = asked(engine, *(Request(inputs=text, prompt=name) for text in TEXTS for name in (place, "p3")))[::2]
    for answer, output, score in zip(found, np.asarray(outputs), scores, strict=True):
        assert answer["answers"][0]["tokens"] == whole(output)
        assert answer["answers"][0]["score"] == pytest.approx(float(score), abs=1e-4)


def test_an_answer_begins_with_what_is_forced(engine):
    (found,) = asked(engine, Request(inputs=TEXTS[0], prompt="p1", forced="the garden"))
    assert found["prediction"].startswith("the garden")
    assert len(found["answers"][0]["tokens"]) > 2


def test_pieces_of_a_watched_answer_make_up_the_whole(engine):
    request, news = Request(inputs=TEXTS[0], prompt="p4", stream=True), queue.SimpleQueue()
    work = make_job(request, engine, lambda event: news.put((event, list(work.answers[0].tokens))))
    engine.submit(work)
    pieces, seen = TextStream([engine.bank.reader("p1").decode]), []
    while True:
        event, tokens = news.get(timeout=900)
        seen.append(len(tokens))
        work_so_far = [type(work.answers[0])(TOKENS, tokens=tokens)]
        pieces.new_pieces(work_so_far)
        if event is True:
            break
    assert seen == sorted(seen)
    assert len(set(seen)) == len(tokens), "a token at a time"
    assert pieces.sent[0] == reply(request, work)["prediction"]


def test_a_cancelled_request_leaves_its_slot_to_others(engine, alone):
    seen: list = []
    for text, name in list(alone)[:40]:
        work = make_job(Request(inputs=text, prompt=name), engine, seen.append)
        engine.submit(work)
        engine.cancel(work)
    (text, name), expected = next(iter(alone.items()))
    (found,) = asked(engine, Request(inputs=text, prompt=name))
    assert found["answers"][0]["tokens"] == expected
    assert (engine.waiting, engine.working) == (0, 0)


def test_a_cancelled_call_is_not_made_and_fails_no_request(engine, capfd):
    held, ran = threading.Event(), []
    before = engine.call(held.wait)
    cancelled = engine.call(lambda: ran.append(1))
    assert cancelled.cancel()
    held.set()
    assert before.result(900)
    assert engine.call(lambda: ran).result(900) == []
    assert "Traceback" not in capfd.readouterr().err


def test_a_prompt_removed_while_a_request_waits_is_told(engine, prompts):
    engine.call(lambda: engine.bank.add("brief", prompts["p3"])).result(900)
    heard: queue.SimpleQueue = queue.SimpleQueue()
    work = make_job(Request(inputs=TEXTS[0], prompt="brief"), engine, heard.put)
    engine.call(lambda: engine.bank.remove("brief")).result(900)
    engine.submit(work)
    event = heard.get(timeout=900)
    assert (event.status, "not in the bank" in str(event)) == (404, True)


def test_a_prompt_removed_while_a_request_is_worked_on_still_answers_it(engine, prompts):
    request = Request(inputs=TEXTS[0], prompt="brief", stream=True)
    engine.call(lambda: engine.bank.add("brief", prompts["p3"])).result(900)
    heard: queue.SimpleQueue = queue.SimpleQueue()
    work = make_job(request, engine, heard.put)
    engine.submit(work)
    assert heard.get(timeout=900) is None  # it has its first token
    engine.call(lambda: engine.bank.remove("brief")).result(900)
    while (event := heard.get(timeout=900)) is None:
        pass
    assert event is True
    (expected,) = asked(engine, Request(inputs=TEXTS[0], prompt="p3"))
    assert reply(request, work)["prediction"] == expected["prediction"]
    events = "".join(generated(request)(True, [work]))
    assert json.dumps({"answer": 0, "text": expected["prediction"]}) in events


class EndsLate(Answer):
    """An answer whose last token comes just after it was asked whether it is done."""

    @property
    def done(self) -> bool:
        if len(self.tokens) == 2:
            self.tokens.append(3)
            return False
        return super().done


def test_a_stream_loses_no_end_and_sends_no_part_of_a_stop_text():
    words = {1: "a", 2: "b", 3: "EN", 4: "#", 5: "c"}

    def decode(ids):
        return "".join(words[id_] for id_ in ids).partition("##")[0]

    late, pieces = EndsLate(3, tokens=[1, 2]), TextStream([decode], ["END"])
    assert "".join(text for _ in range(3) for _, text in pieces.new_pieces([late])) == "abEN"
    growing, pieces, sent = Answer(5), TextStream([decode], ["##"]), ""
    for token in (1, 5, 4, 4, 2):
        growing.tokens.append(token)
        sent += "".join(text for _, text in pieces.new_pieces([growing]))
    assert sent == "ac"


def test_late_requests_and_a_full_queue_are_told(backbone, prompts):
    bank = PromptBank(backbone, device_rows=24)
    bank.add("p1", prompts["p1"])
    small = Engine(bank, Limits(**LIMITS | {"max_waiting": 2, "timeout_s": 0.05}))
    small._thread = threading.Thread(target=time.sleep, args=(0.5,))  # nothing is answered meanwhile
    small._thread.start()
    heard: queue.SimpleQueue = queue.SimpleQueue()
    request = Request(inputs="the garden", prompt="p1")
    for _ in range(2):
        small.submit(make_job(request, small, heard.put))
    with pytest.raises(RequestError, match="2 requests wait already") as refused:
        small.submit(make_job(request, small, heard.put))
    assert refused.value.status == 429
    small._thread.join()
    small._drop_late()
    assert [heard.get_nowait().status for _ in range(2)] == [504, 504]


def test_a_failing_step_is_told_and_the_next_request_answered(engine, alone, monkeypatch, capsys):
    real, (text, name) = engine._advance, next(iter(alone))

    def failing() -> None:
        monkeypatch.setattr(engine, "_advance", real)
        raise MemoryError("no room")

    monkeypatch.setattr(engine, "_advance", failing)
    with pytest.raises(RequestError, match="failed \\(MemoryError\\)"):
        asked(engine, Request(inputs=text, prompt=name))
    (found,) = asked(engine, Request(inputs=text, prompt=name))
    assert found["answers"][0]["tokens"] == alone[text, name]
    assert "no room" in capsys.readouterr().err


def test_an_engine_that_cannot_begin_again_tells_everyone_and_takes_nothing_more(
    backbone, prompts, monkeypatch, capsys
):
    bank = PromptBank(backbone, device_rows=24)
    bank.add("p1", prompts["p1"])
    dying = Engine(bank, Limits(**LIMITS | {"max_waiting": 20}))
    request, heard, held = Request(inputs="the garden", prompt="p1"), queue.SimpleQueue(), threading.Event()
    dying.start()
    dying.call(lambda: held.wait(900))  # so that all of them have come before the failing step

    def no_room(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(dying, "_advance", no_room)
    monkeypatch.setattr(dying, "_reset", no_room)
    works = [make_job(request, dying, heard.put) for _ in range(LIMITS["slots"] + 4)]  # more than there are slots
    for work in works:
        dying.submit(work)
    held.set()
    events = [heard.get(timeout=60) for _ in works]
    dying._thread.join(60)
    assert {event.status for event in events} <= {500, 503}
    assert sum(event.status == 503 for event in events) >= 4, "those in the queue"
    assert (dying.status, dying.waiting, dying.working) == ("failed", 0, 0)
    for late in (lambda: make_job(request, dying, print), lambda: dying.submit(works[0]), lambda: dying.call(print)):
        with pytest.raises(RequestError, match="its engine has failed") as error:
            late()
        assert error.value.status == 503
    assert capsys.readouterr().err.count("MemoryError: no room") >= 2
    dying.stop()  # and does not wait


def test_a_call_that_waits_for_a_dying_engine_is_told(backbone, prompts, monkeypatch, capsys):
    bank = PromptBank(backbone, device_rows=24)
    bank.add("p1", prompts["p1"])
    dying = Engine(bank, Limits(**LIMITS))
    dying._waiting.append(job_of_nothing := Job("p1", [5], [], time.monotonic() + 900, print))
    future = dying.call(print)
    dying._fail_for_good()
    assert isinstance(future.exception(60), RequestError)
    assert job_of_nothing not in dying._waiting


def test_random_keys_are_made_by_the_engines_thread(engine, monkeypatch):
    threads, real = [], engine._rngs
    monkeypatch.setattr(engine, "_rngs", lambda seed: (threads.append(threading.current_thread()), real(seed))[1])
    asked(engine, Request(inputs=TEXTS[0], prompt="p1", decoding=Sampling(samples=2, seed=3)))
    assert threads == [engine._thread]


@pytest.mark.parametrize(
    ("settings", "status", "message"),
    [
        ({"prompt": "p640"}, 404, "prompt 'p640': not in the bank; .*did you mean p64|did you mean"),
        ({"inputs": " \n"}, 422, "inputs: found an empty text; expected some words"),
        ({"inputs": "the garden " * 20}, 422, "inputs: 41 tokens; expected at most 16"),
        ({"max_tokens": 7}, 422, "max_tokens: found 7; expected at most 6"),
        ({"max_tokens": 0}, 422, "found 0 and no words"),
        ({"forced": "the garden is warm and far away"}, 422, "forced: 7 tokens; expected fewer than max_tokens, 6"),
        ({"words": ["the old mill is rude and far away"]}, 422, "has 9 tokens; expected at most 6"),
        ({"words": ["yes"] * 8}, 422, "9 samples and words; expected at most 8"),
        ({"decoding": Sampling(samples=9)}, 422, "9 samples and words; expected at most 8, .* decoding.samples"),
    ],
)
def test_what_cannot_be_answered_is_told_in_one_line(engine, settings, status, message):
    with pytest.raises(RequestError, match=message) as error:
        make_job(Request(**{"inputs": "the garden", "prompt": "p2"} | settings), engine, print)
    assert error.value.status == status
    assert "\n" not in str(error.value)


def test_a_prompt_too_long_for_the_compiled_shapes_is_refused(engine):
    with pytest.raises(RequestError, match="prompt long: 13 ids around a text; expected at most 12"):
        engine.check_prompt("long", engine.bank.read("long", rows(13, 0)))


def test_cuts_by_row_are_those_of_all_rows():
    log_p = jnp.asarray(np.random.default_rng(0).normal(size=(6, 40)), jnp.float32)
    cuts = [(None, None), (5, None), (None, 0.6), (7, 0.8), (100, 1.0), (1, 0.1)]
    top_k = jnp.asarray([k or 0 for k, _ in cuts])
    top_p = jnp.asarray([p or 1.0 for _, p in cuts])
    found = decode.likely(log_p, top_k, top_p)
    for row, (k, p) in enumerate(cuts):
        np.testing.assert_array_equal(found[row : row + 1], decode.likely(log_p[row : row + 1], k, p))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return many_methods.write(tmp_path_factory.mktemp("many"), many_methods.METHODS | many_methods.MORE)


@pytest.mark.slow
def test_prefixes_and_factors_share_the_slots(many):
    """Requests of all kinds come and go; the device has room for the extras of two, so that they take turns too."""
    bank = PromptBank(many.backbone, device_rows=12, device_extras=2)
    for name in many.models:
        bank.add(name, np.zeros((0, WIDTH), np.float32) if name == "nothing" else many.folder / name)
    mixed = Engine(bank, Limits(**LIMITS))
    mixed.start()
    draw = random.Random(1)
    pairs = [(text, name) for text in TEXTS for name in many.models]
    draw.shuffle(pairs)
    requests = [Request(inputs=text, prompt=name, max_tokens=draw.randint(2, TOKENS)) for text, name in pairs]
    sampled = Sampling(samples=2, temperature=2.0, seed=8)
    few = ["prefix placed, rows", "ia3 everywhere", "nothing"]
    requests += [Request(inputs=TEXTS[0], prompt=name, decoding=sampled, words=["yes"]) for name in few]
    heard = [answer for start in range(0, len(requests), 20) for answer in asked(mixed, *requests[start : start + 20])]
    for request, answer in zip(requests, heard, strict=True):
        ids, model = bank.tokenizer.encode(request.inputs), many.models[request.prompt]
        tokens, scores = many_methods.answered(model, ids, TOKENS, request.decoding, 0)
        for found, row, score in zip(answer["answers"], tokens, scores, strict=True):
            assert found["tokens"] == whole(row)[: request.max_tokens], request
            if found["tokens"] == whole(row):
                assert found["score"] == pytest.approx(float(score), abs=1e-4)
    longer = dataclasses.replace(bank.prompt("prefix"), extras={"prefix encoder": np.zeros((2, 2, 9, 16), np.float32)})
    with pytest.raises(RequestError, match="prompt longer: has a prefix, an offset or factors for which this server"):
        mixed.check_prompt("longer", longer)
    mixed.stop()


def test_a_stopped_engine_takes_nothing_more(backbone, prompts):
    bank = PromptBank(backbone, device_rows=24)
    bank.add("p1", prompts["p1"])
    stopped = Engine(bank, Limits(**LIMITS))
    with pytest.raises(RequestError, match="is stopping") as error:
        make_job(Request(inputs="x", prompt="p1"), stopped, print)
    assert error.value.status == 503


def test_a_bank_that_names_no_backbone_is_one_line(tmp_path):
    np.save(tmp_path / "a.npy", rows(2, 0))
    with pytest.raises(UserError, match="its prompts name none; expected one backbone"):
        PromptBank.open(tmp_path)
