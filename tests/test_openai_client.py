"""The Python client of OpenAI against the server: one answer, streams, 32 prompts at once, scores, what is refused."""

from __future__ import annotations

import asyncio
import math
import re
from pathlib import Path

import numpy as np
import pytest
import served
import tiny_lm

from softprompt_jax import PromptBank, load_backbone
from softprompt_jax.serve.engine import Engine
from softprompt_jax.serve.limits import Limits

openai = pytest.importorskip("openai", reason="see make test-http")
pytestmark = pytest.mark.http
GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guides.md"
TOKEN, MANY = "s3cret", 32
TEXTS = [f"{tiny_lm.TEXTS[number % 4]} {number}" for number in range(MANY)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An engine over 32 prompts of a decoder-only model with a chat template."""
    bank = PromptBank(
        load_backbone(str(tiny_lm.folder(tmp_path_factory.mktemp("lm") / "llama", chat=True, tied=False)))
    )
    for number in range(MANY):
        bank.add(f"p{number}", 3 * np.random.default_rng(number).normal(size=(1 + number % 4, 32)).astype(np.float32))
    bank.add("intents", np.random.default_rng(99).normal(size=(4, 32)).astype(np.float32))
    limits = {"slots": 32, "max_input_tokens": 56, "max_prompt_rows": 8, "max_tokens": 16}
    engine = Engine(bank, Limits(**limits, timeout_s=served.PATIENCE_S))
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def address(engine):
    with served.serving(engine, TOKEN) as port:
        yield f"http://127.0.0.1:{port}/v1"


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=address, api_key=TOKEN, max_retries=0) as client:
        yield client


def alone(engine, text: str, name: str) -> str:
    return engine.call(lambda: engine.bank.generate([text], name, max_tokens=8)).result(served.PATIENCE_S)[0][0]


def test_models_and_answers(client, engine):
    names = {model.id for model in client.models.list()}
    assert names == {"llama", *engine.bank.names}
    assert client.models.retrieve("p3").owned_by == "softprompt"
    found = client.completions.create(model="p3", prompt=TEXTS[0], max_tokens=8, temperature=0, logprobs=2)
    assert found.choices[0].text.strip() == alone(engine, TEXTS[0], "p3")
    assert len(found.choices[0].logprobs.top_logprobs) == found.usage.completion_tokens
    chat = client.chat.completions.create(
        model="p3", messages=[{"role": "user", "content": "a film"}], logprobs=True, top_logprobs=3, temperature=0
    )
    assert chat.choices[0].message.role == "assistant"
    assert all(len(token.top_logprobs) == 3 for token in chat.choices[0].logprobs.content)


def test_32_texts_of_one_request_and_32_prompts_at_once_are_answered_as_each_alone(address, engine):
    ways = {"max_tokens": 8, "temperature": 0}

    async def ask() -> tuple:
        async with openai.AsyncOpenAI(base_url=address, api_key=TOKEN, max_retries=0) as client:
            several = client.completions.create(model="p5", prompt=TEXTS, **ways)
            each = [
                client.completions.create(model=f"p{number}", prompt=text, **ways) for number, text in enumerate(TEXTS)
            ]
            return await asyncio.gather(several, *each)

    several, *each = asyncio.run(ask())
    assert [choice.index for choice in several.choices] == [*range(MANY)]
    assert [choice.text.strip() for choice in several.choices] == [alone(engine, text, "p5") for text in TEXTS]
    expected = [alone(engine, text, f"p{number}") for number, text in enumerate(TEXTS)]
    assert [one.choices[0].text.strip() for one in each] == expected
    assert len(set(expected)) > 8, "prompts that answer alike show nothing"


def test_32_streams_at_once_tell_the_same_as_whole_answers(address, engine):
    messages = [{"role": "user", "content": "a film"}]

    async def text_of(client, number: int) -> tuple[str, str, int]:
        stream = await client.completions.create(
            model=f"p{number}", prompt=TEXTS[number], max_tokens=8, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        found = [chunk async for chunk in stream]
        reasons = [chunk.choices[0].finish_reason for chunk in found if chunk.choices]
        assert set(reasons[:-1]) == {None}
        return "".join(chunk.choices[0].text for chunk in found[:-1]), reasons[-1], found[-1].usage.completion_tokens

    async def ask() -> tuple:
        async with openai.AsyncOpenAI(base_url=address, api_key=TOKEN, max_retries=0) as client:
            found = await asyncio.gather(*(text_of(client, number) for number in range(MANY)))
            stream = await client.chat.completions.create(model="p1", messages=messages, stream=True, temperature=0)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return found, "".join(pieces)

    found, chat = asyncio.run(ask())
    for number, (text, reason, tokens) in enumerate(found):
        assert text.strip() == alone(engine, TEXTS[number], f"p{number}")
        assert (reason == "length") == (tokens == 8)
    with openai.OpenAI(base_url=address, api_key=TOKEN) as client:
        whole = client.chat.completions.create(model="p1", messages=messages, temperature=0)
    assert chat == whole.choices[0].message.content


def test_scores_as_an_evaluation_harness_asks_for_them(client, engine):
    """Ids of context and continuation, `echo`, a token that is thrown away: what such programs send."""
    bank = engine.bank
    context, words = bank.tokenizer.input_ids(TEXTS[1]), ["positive", "negative", "good"]
    ids = [[*context, *bank.tokenizer.target_ids(word)[:-1]] for word in words]
    found = client.completions.create(
        model="p7", prompt=ids, echo=True, max_tokens=1, logprobs=1, temperature=0, seed=1234
    )
    ending = [[*context, *bank.word_ids("p7", word)] for word in words]
    ended = client.completions.create(model="p7", prompt=ending, echo=True, max_tokens=0, logprobs=0)
    expected = engine.call(lambda: bank.score_words([TEXTS[1]], "p7", [words])).result(served.PATIENCE_S)[0]
    for choice, whole, sent, score in zip(found.choices, ended.choices, ids, expected, strict=True):
        told = choice.logprobs
        assert len(told.tokens) == len(sent) + 1
        assert told.token_logprobs[0] is None
        own = told.token_logprobs[len(context) : -1]
        assert whole.logprobs.token_logprobs[len(context) : -1] == pytest.approx(own, abs=1e-4)
        assert sum(whole.logprobs.token_logprobs[len(context) :]) == pytest.approx(score, abs=1e-3)
        for token, top, log_p in zip(told.tokens[1:], told.top_logprobs[1:], told.token_logprobs[1:], strict=True):
            assert top[token] == pytest.approx(log_p, abs=1e-4)
            assert all(math.isfinite(value) for value in top.values())


def test_what_is_refused_is_the_clients_own_error(client, address):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="p99", prompt="film")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="p1", prompt="film " * 200)
    assert (long.value.param, "expected at most 56" in long.value.message) == ("prompt", True)
    with pytest.raises(openai.BadRequestError, match="top_logprobs: found without logprobs"):
        client.chat.completions.create(model="p1", messages=[{"role": "user", "content": "x"}], top_logprobs=2)
    other = openai.OpenAI(base_url=address, api_key="wrong", max_retries=0)
    with other, pytest.raises(openai.AuthenticationError):
        other.models.list()


def test_a_stream_that_fails_is_the_clients_error(client, engine, monkeypatch):
    real = engine._advance
    calls = iter(range(100))

    def failing() -> None:
        if next(calls) == 2:
            monkeypatch.setattr(engine, "_advance", real)
            raise MemoryError("no room")
        real()

    monkeypatch.setattr(engine, "_advance", failing)
    with pytest.raises(openai.APIError, match="failed \\(MemoryError\\)"):
        list(client.completions.create(model="p1", prompt="film", max_tokens=16, temperature=0, stream=True))


def test_the_lines_of_the_guide_run_as_printed(address, monkeypatch, capsys):
    section = GUIDE.read_text(encoding="utf-8").split("## Serve to OpenAI clients")[1].split("\n## ")[0]
    assert "export OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=" in section
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out.count("\n") >= 4
