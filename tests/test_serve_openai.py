"""OpenAI's protocol: what it answers is what the library answers; what it refuses has their shape."""

from __future__ import annotations

import dataclasses
import json
import re
import time

import jax
import numpy as np
import pytest
import served
import tiny_lm
from served import ask

from softprompt_jax import PromptBank, load_backbone, logits
from softprompt_jax.config import UserError
from softprompt_jax.data.tokenizer import TextSettings
from softprompt_jax.serve.engine import Engine
from softprompt_jax.serve.limits import Limits

TEXT, MOST, ROWS = "a warm film", 6, 416
LIMITS = {"slots": 8, "max_input_tokens": 26, "max_prompt_rows": 6, "max_tokens": MOST, "timeout_s": served.PATIENCE_S}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """An engine over a decoder-only model with a chat template."""
    path = tiny_lm.folder(tmp_path_factory.mktemp("lm") / "llama", chat=True, tied=False)
    bank = PromptBank(load_backbone(str(path)))
    for number in range(4):
        bank.add(f"p{number}", 3 * np.random.default_rng(number).normal(size=(1 + number, 32)).astype(np.float32))
    engine = Engine(bank, Limits(**LIMITS))
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def port(llama):
    with served.serving(llama) as port:
        yield port


@pytest.fixture(scope="module")
def t5_port(engine):
    with served.serving(engine) as port:
        yield port


def complete(port: int, chat: bool = False, **body) -> dict:
    status, answer, _ = ask(port, "POST", "/v1/chat/completions" if chat else "/v1/completions", body)
    assert status == 200, answer
    return answer


def chunks(port: int, chat: bool = False, **body) -> list[dict]:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    status, text, headers = ask(port, "POST", path, body | {"stream": True})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8"), text
    *events, last = [part.removeprefix("data: ") for part in text.strip().split("\n\n")]
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


def log_p(engine: Engine, name: str, ids: list[int]) -> np.ndarray:
    """Return the log-probabilities of what follows each of these ids [T, V]."""
    bank = engine.bank
    rows = bank.prompt(name).rows
    return np.asarray(jax.nn.log_softmax(logits(bank.backbone, [ids], prompt=rows if len(rows) else None)[0], axis=-1))


def test_each_prompt_and_the_bare_backbone_is_a_model(port):
    found = ask(port, "GET", "/v1/models")[1]
    assert [one["id"] for one in found["data"]] == ["llama", "p0", "p1", "p2", "p3"]
    assert [one["parent"] for one in found["data"]] == [None, *["llama"] * 4]
    assert ask(port, "GET", "/v1/models/p2")[1] == found["data"][3]
    status, told, _ = ask(port, "GET", "/v1/models/p9")
    assert (status, told["error"]["code"], told["error"]["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize("name", ["p2", "llama"])
def test_tokens_of_an_answer_have_the_log_probabilities_of_a_forward_pass(port, llama, name):
    found = complete(port, model=name, prompt=TEXT, temperature=0, max_tokens=4, logprobs=3)
    (choice,), told = found["choices"], found["choices"][0]["logprobs"]
    reader, text = llama.bank.reader(name), llama.bank.tokenizer.input_ids(TEXT)
    ids = [next(id_ for id_ in range(ROWS) if reader.token_text(id_) == token) for token in told["tokens"]]
    expected = log_p(llama, name, [*text, *ids])[len(text) - 1 :]
    np.testing.assert_allclose(told["token_logprobs"], expected[range(len(ids)), ids], atol=1e-4)
    for step, (id_, top) in enumerate(zip(ids, told["top_logprobs"], strict=True)):
        best = [*np.argsort(-expected[step])[:3].tolist(), id_]
        assert list(top) == list(dict.fromkeys(reader.token_text(other) for other in best))
        assert id_ == best[0]  # at temperature 0
        np.testing.assert_allclose([top[reader.token_text(other)] for other in best], expected[step][best], atol=1e-4)
    assert choice["text"] == reader.text_of(ids)
    for at, token in zip(told["text_offset"], told["tokens"], strict=True):
        assert choice["text"][at:].startswith(token) or token not in choice["text"]  # a part of a character
    assert found["usage"] == {"prompt_tokens": len(text), "completion_tokens": 4, "total_tokens": len(text) + 4}
    expected_text = llama.bank.generate([TEXT], name, max_tokens=4)[0][0]
    assert (choice["text"].strip(), choice["finish_reason"]) == (expected_text, "length")


@pytest.mark.parametrize("name", ["p3", "llama"])
def test_an_echo_tells_the_log_probabilities_of_the_text(port, llama, name):
    ids = llama.bank.tokenizer.input_ids(TEXT)
    expected = log_p(llama, name, ids)
    for prompt in (TEXT, ids):
        found = complete(port, model=name, prompt=prompt, max_tokens=0, echo=True, logprobs=2)
        (choice,) = found["choices"]
        told = choice["logprobs"]
        assert (choice["text"], told["tokens"], told["text_offset"]) == (TEXT, ["a", " warm", " film"], [0, 1, 6])
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        np.testing.assert_allclose(told["token_logprobs"][1:], expected[range(len(ids) - 1), ids[1:]], atol=1e-4)
        for place, top in enumerate(told["top_logprobs"][1:]):
            assert max(top.values()) == pytest.approx(expected[place].max(), abs=1e-4)
            assert len(top) in (2, 3)
    both = complete(port, model=name, prompt=[TEXT, "good"], max_tokens=2, echo=True, logprobs=0, temperature=0)
    plain = complete(port, model=name, prompt=[TEXT, "good"], max_tokens=2, temperature=0)
    for echoed, alone, text in zip(both["choices"], plain["choices"], (TEXT, "good"), strict=True):
        assert echoed["text"] == text + alone["text"]
        assert len(echoed["logprobs"]["tokens"]) == len(llama.bank.tokenizer.input_ids(text)) + 2
    assert complete(port, model=name, prompt=TEXT, max_tokens=0, echo=True)["choices"][0]["logprobs"] is None


def test_scoring_takes_no_longer_than_a_request_may(port, llama, monkeypatch):
    body = {"model": "p2", "prompt": [TEXT] * 40, "max_tokens": 0, "echo": True, "logprobs": 0}
    assert ask(port, "POST", "/v1/completions", body)[0] == 200
    monkeypatch.setattr(llama, "warm_scores", lambda *_: time.sleep(0.1))
    monkeypatch.setattr(llama, "limits", llama.limits.model_copy(update={"timeout_s": 1}))
    with served.serving(llama) as port:
        status, told, _ = ask(port, "POST", "/v1/completions", body)
    assert (status, "took longer than 1 s" in told["error"]["message"]) == (504, True)


def test_a_text_is_scored_as_words_are(port, llama):
    """The sum over an answer's tokens is the score that /v1/generate gives a word, without its end."""
    text, word = llama.bank.tokenizer.input_ids(TEXT), llama.bank.tokenizer.target_ids("good")
    body = {"inputs": TEXT, "prompt": "p2", "words": ["good"], "max_tokens": 0}
    score = ask(port, "POST", "/v1/generate", body)[1]["words"][0]["score"]
    told = complete(port, model="p2", prompt=[*text, *word], max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert sum(told["logprobs"]["token_logprobs"][-len(word) :]) == pytest.approx(score, abs=1e-4)


def test_samples_follow_the_seed_and_the_place_in_the_list(port):
    ways = {"model": "p1", "temperature": 2, "max_tokens": 4}
    first = complete(port, prompt=[TEXT, TEXT], n=3, seed=5, **ways)["choices"]
    again = complete(port, prompt=[TEXT, TEXT], n=3, seed=5, **ways)["choices"]
    assert [choice["text"] for choice in first] == [choice["text"] for choice in again]
    assert [choice["index"] for choice in first] == [*range(6)]
    assert first[0]["text"] != first[3]["text"]
    assert complete(port, prompt=TEXT, n=3, seed=6, **ways)["choices"][0]["text"] == first[3]["text"]
    whole = [complete(port, prompt=TEXT, seed=seed, **ways)["choices"][0]["text"] for seed in (2.0**53, 2**53)]
    assert whole[0] == whole[1]  # 9007199254740992.0 is an integer of JSON Schema
    unseeded = {complete(port, prompt=TEXT, **ways)["choices"][0]["text"] for _ in range(6)}
    assert len(unseeded) > 1


def test_a_stream_tells_the_same_in_pieces(port):
    ways = {"model": "p1", "prompt": [TEXT, "good"], "n": 2, "seed": 3, "logprobs": 1, "echo": True}
    whole = complete(port, **ways)
    found = chunks(port, **ways, stream_options={"include_usage": True})
    assert (found[-1]["choices"], found[-1]["usage"]) == ([], whole["usage"])
    assert len(found) > 10
    for expected in whole["choices"]:
        mine = [one["choices"][0] for one in found[:-1] if one["choices"][0]["index"] == expected["index"]]
        assert "".join(one["text"] for one in mine) == expected["text"]
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + [expected["finish_reason"]]
        for key, values in expected["logprobs"].items():
            joined = [value for one in mine for value in one["logprobs"][key]]
            if key == "token_logprobs":
                np.testing.assert_allclose(joined[1:], values[1:], atol=1e-4)
            elif key != "top_logprobs":
                assert joined == values


def test_an_answer_ends_before_a_stop_text_that_several_tokens_make(port, llama):
    ways = {"model": "p1", "prompt": TEXT, "temperature": 0, "logprobs": 0}
    whole = complete(port, **ways)["choices"][0]
    assert (len(whole["logprobs"]["tokens"]), whole["finish_reason"]) == (MOST, "length")
    offset = whole["logprobs"]["text_offset"][3]
    stop = whole["text"][offset - 1 : offset + 1]  # the end of a token and the beginning of the next
    at = whole["text"].index(stop)
    found = complete(port, **ways, stop=["never", stop])
    (choice,) = found["choices"]
    assert (choice["text"], choice["finish_reason"]) == (whole["text"][:at], "stop")
    assert found["usage"]["completion_tokens"] < MOST
    assert all(place < at for place in choice["logprobs"]["text_offset"])
    pieces = [one["choices"][0]["text"] for one in chunks(port, **ways, stop=stop)]
    assert "".join(pieces) == choice["text"]
    assert (llama.waiting, llama.working) == (0, 0)
    prompt = llama.bank.prompt("p1")
    own = dataclasses.replace(prompt, text=TextSettings(stop=stop))
    llama.call(lambda: llama.bank.put("stops", own)).result(served.PATIENCE_S)
    try:
        assert complete(port, **ways | {"model": "stops"})["choices"][0]["text"] == choice["text"]
    finally:
        llama.call(lambda: llama.bank.remove("stops")).result(served.PATIENCE_S)


def test_a_message_is_read_as_a_run_with_the_chat_template_reads_an_input(port, llama):
    tokenizer = llama.bank.tokenizer
    one = [{"role": "user", "content": TEXT}]
    assert tokenizer.chat_ids(one) == tokenizer.reading(TextSettings(template="chat")).input_ids(TEXT)
    several = [{"role": "system", "content": "good"}, *one, {"role": "assistant", "content": "bad"}, *one]
    own = tokenizer._tokenizer.apply_chat_template(several, add_generation_prompt=True, return_dict=False)
    assert tokenizer.chat_ids(several) == own
    parts = [{"role": "user", "content": [{"type": "text", "text": "a warm"}, {"type": "text", "text": " film"}]}]
    asked = {"chat": True, "model": "p2", "temperature": 0, "max_tokens": 3}
    found = complete(port, messages=parts, logprobs=True, top_logprobs=2, **asked)
    plain = complete(port, model="p2", prompt=tokenizer.chat_ids(one), temperature=0, max_tokens=3)
    message = found["choices"][0]["message"]
    assert (message["role"], message["content"]) == ("assistant", plain["choices"][0]["text"])
    told = found["choices"][0]["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in told] == [2, 2, 2]
    assert all(token["top_logprobs"][0]["logprob"] == token["logprob"] for token in told)  # at temperature 0
    assert bytes(byte for token in told for byte in token["bytes"] or []).decode() == message["content"]
    deltas = [one["choices"][0]["delta"] for one in chunks(port, messages=one, **asked)]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]


def test_a_template_that_refuses_a_conversation_is_one_line(llama):
    reader = llama.bank.tokenizer.reading(TextSettings())
    reader._tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(UserError, match=r"its chat template refuses this \(roles must alternate\)"):
            reader.chat_ids([{"role": "user", "content": TEXT}])
    finally:
        reader._tokenizer.chat_template = tiny_lm.CHAT


def test_an_encoder_decoder_completes_but_echoes_nothing(t5_port, engine):
    text = "the garden is warm"
    found = complete(t5_port, model="p4", prompt=[text, "the old mill"], temperature=0, logprobs=2)
    expected = engine.call(lambda: engine.bank.generate([text, "the old mill"], "p4", served.TOKENS))
    for choice, (answer, score) in zip(found["choices"], expected.result(served.PATIENCE_S), strict=True):
        assert choice["text"].strip() == answer
        assert sum(choice["logprobs"]["token_logprobs"]) == pytest.approx(score, abs=1e-4)
    bare = engine.bank.bare
    assert complete(t5_port, model=bare, prompt=text, temperature=0)["choices"][0]["text"] is not None
    body = {"model": "p4", "prompt": text, "echo": True, "max_tokens": 0}
    status, told, _ = ask(t5_port, "POST", "/v1/completions", body)
    assert (status, told["error"]["param"]) == (400, "echo")
    messages = [{"role": "user", "content": text}]
    status, told, _ = ask(t5_port, "POST", "/v1/chat/completions", {"model": "p4", "messages": messages})
    assert (status, "has no chat template" in told["error"]["message"]) == (404, True)
    described = ask(t5_port, "GET", "/openapi.json")[1]["paths"]
    assert ("/v1/completions" in described, "/v1/chat/completions" in described) == (True, False)


GOOD = {"model": "p1", "prompt": TEXT}


@pytest.mark.parametrize(
    ("change", "status", "param", "message"),
    [
        ({"model": "p11"}, 404, "model", r"model 'p11': not here; found llama, p0, .*did you mean p1"),
        ({"prompt": " "}, 400, "prompt", "prompt: found an empty text"),
        ({"prompt": []}, 400, "prompt", "expected a text, a list of texts, its ids, or a list of lists of ids"),
        ({"prompt": ["a", [1]]}, 400, "prompt", "expected a text, a list of texts"),
        ({"prompt": [416]}, 400, "prompt", "found the id 416; expected ids from 0 to 415"),
        ({"prompt": "film " * 40}, 400, "prompt", r"prompt: \d+ tokens; expected at most 26"),
        ({"max_tokens": 7}, 400, "max_tokens", "found 7; expected at most 6; .*--limit max_tokens=7"),
        ({"max_tokens": 0}, 400, "max_tokens", "found 0 without echo"),
        ({"n": 9}, 400, "n", "n: found 9; expected at most 8, the server's slots"),
        ({"best_of": 2}, 400, "best_of", "best_of: found 2; expected n, 1"),
        ({"logprobs": 6}, 400, "logprobs", "logprobs: found 6"),
        ({"stop": ["a"] * 5}, 400, "stop", "stop"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "found 0.5; input should be 0"),
        ({"tools": []}, 400, "tools", "'tools': unknown field; expected model, "),
        ({"temperature": "warm"}, 400, "temperature", "temperature: found 'warm'"),
    ],
)
def test_what_cannot_be_answered_is_told_in_their_shape(port, change, status, param, message):
    found, told, _ = ask(port, "POST", "/v1/completions", GOOD | change)
    assert (found, list(told["error"])) == (status, ["message", "type", "param", "code"])
    assert (told["error"]["type"], told["error"]["param"]) == ("invalid_request_error", param)
    assert re.search(message, told["error"]["message"]), told
    assert "\n" not in told["error"]["message"]


def test_what_is_neutral_is_taken(port):
    neutral = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "best_of": 1,
        "user": "x",
        "stop": None,
    }
    assert complete(port, **GOOD, **neutral)["object"] == "text_completion"
    assert complete(port, **GOOD, temperature=0, top_p=0, top_k=3, repetition_penalty=1.2)["choices"]
