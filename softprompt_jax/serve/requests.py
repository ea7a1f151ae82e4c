"""The request and the reply of /v1/generate."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, field_validator

from softprompt_jax import config
from softprompt_jax.config import Settings, UserError
from softprompt_jax.models.decode import EOS, Greedy, Sampling
from softprompt_jax.serve.engine import Answer, Engine, Job
from softprompt_jax.serve.limits import RequestError


class Request(Settings):
    """The body of /v1/generate."""

    inputs: str
    prompt: str
    max_tokens: int | None = Field(None, ge=0)  # longest answer in tokens; 0: only score the words
    decoding: Annotated[Greedy | Sampling, Field(discriminator="kind")] = Greedy()
    forced: str = ""  # beginning of the answer
    words: list[str] = Field([])  # answers to score
    stream: bool = False
    timeout_s: float | None = Field(None, gt=0)

    @field_validator("inputs", mode="before")
    @classmethod
    def _one_text(cls, inputs: Any) -> Any:
        if isinstance(inputs, list):
            raise ValueError("expected one text; send a request for each, they are answered together")
        return inputs

    @field_validator("decoding", mode="before")
    @classmethod
    def _one_hypothesis(cls, decoding: Any) -> Any:
        if isinstance(decoding, dict) and decoding.get("kind") == "beam":
            raise ValueError(
                "beams trade hypotheses at every step, while an answer in a running batch keeps its slot; "
                "expected greedy or sampling here, beams from `softprompt predict`"
            )
        return decoding


def parse(values: dict[str, Any]) -> Request:
    """Validate a JSON body. Errors: RequestError with the field that is missing, unknown or wrong."""
    fields = Request.model_fields
    for name in values:
        if name not in fields:
            hint = config.nearest(name, fields)
            raise RequestError(422, f"body: {name!r}: unknown field; expected {', '.join(fields)}{hint}")
    for name in ("inputs", "prompt"):
        if name not in values:
            raise RequestError(422, f'body: no field {name!r}; expected {{"inputs": "...", "prompt": "NAME"}}')
    return config.parse(Request, values, "body")


def make_job(request: Request, engine: Engine, notify: Callable[[Any], object]) -> Job:
    """Turn a request into work for the engine. Errors: RequestError with the HTTP status."""
    engine.check_open()  # before anything is tokenized
    limits, bank = engine.limits, engine.bank
    try:
        bank.prompt(request.prompt)
    except UserError as error:
        raise RequestError(404, str(error)) from None
    if not request.inputs.strip():
        raise RequestError(422, "inputs: found an empty text; expected some words")
    ids = bank.tokenizer.encode(request.inputs)
    if len(ids) >= limits.max_input_tokens:
        raise RequestError(
            422,
            f"inputs: {len(ids) + 1} tokens; expected at most {limits.max_input_tokens}, its end included; shorten it",
        )
    most = limits.max_tokens if request.max_tokens is None else request.max_tokens
    if most > limits.max_tokens:
        raise RequestError(422, f"max_tokens: found {most}; expected at most {limits.max_tokens}")
    if not most and not request.words:
        raise RequestError(422, "max_tokens: found 0 and no words; expected an answer or words to score")
    forced = bank.tokenizer.encode(request.forced) if request.forced else []
    if forced and len(forced) >= most:
        raise RequestError(422, f"forced: {len(forced)} tokens; expected fewer than max_tokens, {most}")
    sentinel = [bank.tokenizer.sentinel(0)] if bank.prompt(request.prompt).target_sentinel else []
    answers = [_word(word, sentinel, engine) for word in request.words]
    answers = (_generated(request.decoding, most, forced, engine) if most else []) + answers
    if len(answers) > limits.slots:
        raise RequestError(
            422, f"request: {len(answers)} samples and words; expected at most {limits.slots}, the server's slots"
        )
    time_s = min(limits.timeout_s, request.timeout_s or limits.timeout_s)
    return Job(request.prompt, ids, answers, time.monotonic() + time_s, notify, request.stream)


def _generated(how: Greedy | Sampling, most: int, forced: list[int], engine: Engine) -> list[Answer]:
    if isinstance(how, Greedy):
        return [Answer(most, forced)]
    if how.samples > engine.limits.slots:
        raise RequestError(
            422, f"decoding.samples: found {how.samples}; expected at most {engine.limits.slots}, the server's slots"
        )
    cuts = how.temperature, how.top_k or 0, how.top_p or 1.0
    return [Answer(most, forced, how.seed, number, *cuts) for number in range(how.samples)]


def _word(word: str, before: list[int], engine: Engine) -> Answer:
    ids = [*before, *engine.bank.tokenizer.encode(word), EOS]
    if len(ids) > engine.limits.max_tokens:
        raise RequestError(422, f"words: {word!r} has {len(ids)} tokens; expected at most {engine.limits.max_tokens}")
    return Answer(len(ids), ids)


def reply(request: Request, done: Job, engine: Engine) -> dict[str, Any]:
    """Return the JSON that answers a finished request."""
    made = len(done.answers) - len(request.words)
    answers = [
        {
            "text": engine.bank.tokenizer.decode(answer.tokens),
            "score": answer.score,
            "tokens": answer.tokens,
            "ended": bool(answer.tokens and answer.tokens[-1] == EOS),
        }
        for answer in done.answers[:made]
    ]
    scores = [answer.score for answer in done.answers[made:]]
    words = [{"word": word, "score": score} for word, score in zip(request.words, scores, strict=True)]
    best = max(words, key=lambda word: word["score"])["word"] if words else None
    return {
        "prompt": request.prompt,
        "prediction": answers[0]["text"] if answers else best,
        "answers": answers,
        "words": words,
        "best_word": best,
    }


class TextStream:
    """The texts of unfinished answers, piece by piece."""

    def __init__(self, engine: Engine, count: int):
        self._decode, self._sent = engine.bank.tokenizer.decode, [""] * count

    def new_pieces(self, answers: list[Answer]) -> list[tuple[int, str]]:
        """Return (answer, new text) for each answer that has grown; an incomplete character waits."""
        found = []
        for index, answer in enumerate(answers[: len(self._sent)]):
            text, old = self._decode(answer.tokens), self._sent[index]
            if len(text) > len(old) and text.startswith(old) and not text.endswith("\ufffd"):
                found.append((index, text[len(old) :]))
                self._sent[index] = text
        return found
