"""The request and the reply of /v1/generate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import Field, field_validator

from softprompt_jax import config
from softprompt_jax.config import Settings, UserError
from softprompt_jax.data.tokenizer import Tokenizer
from softprompt_jax.inference.texts import until
from softprompt_jax.models.decode import Greedy, Sampling
from softprompt_jax.serve.engine import Engine
from softprompt_jax.serve.jobs import Answer, Job
from softprompt_jax.serve.limits import MOST_S, RequestError


class Request(Settings):
    """The body of /v1/generate."""

    inputs: str = Field(json_schema_extra={"pattern": r"\S"})
    prompt: str
    max_tokens: int | None = Field(None, ge=0, lt=2**31)  # longest answer in tokens; 0: only score the words
    decoding: Annotated[Greedy | Sampling, Field(discriminator="kind")] = Greedy()
    forced: str = ""  # beginning of the answer
    words: list[str] = Field([])  # answers to score
    stream: bool = False
    timeout_s: float | None = Field(None, gt=0, le=MOST_S)

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


Asked = TypeVar("Asked", bound=Settings)


def parse(
    values: dict[str, Any], kind: type[Asked] = Request, example: str = '{"inputs": "...", "prompt": "NAME"}'
) -> Asked:
    """Validate a JSON body. Errors: RequestError with the field that is missing, unknown or wrong."""
    fields = kind.model_fields
    for name in values:
        if name not in fields:
            hint = config.nearest(name, fields)
            raise RequestError(
                422, f"body: {name[:80]!r}: unknown field; expected {', '.join(fields)}{hint}", name[:80]
            )
    for name, field in fields.items():
        if field.is_required() and name not in values:
            raise RequestError(422, f"body: no field {name!r}; expected {example}", name)
    try:
        return config.parse(kind, values, "body", strict=True)
    except UserError as error:
        raise RequestError(422, str(error), str(error).removeprefix("body: ").partition(":")[0]) from None


def make_job(request: Request, engine: Engine, notify: Callable[[Any], object]) -> Job:
    """Turn a request into work for the engine. Errors: RequestError with the HTTP status."""
    engine.check_open()  # before anything is tokenized
    limits, bank = engine.limits, engine.bank
    try:
        bank.prompt(request.prompt)
    except UserError as error:
        raise RequestError(404, str(error), "prompt") from None
    reader = bank.reader(request.prompt)
    ids = input_ids(engine, reader, request.inputs, "inputs")
    most = most_tokens(engine, request.max_tokens)
    if not most and not request.words:
        raise RequestError(422, "max_tokens: found 0 and no words; expected an answer or words to score", "max_tokens")
    forced = _ids("forced", reader.target_ids, request.forced)[:-1] if request.forced else []
    if forced and len(forced) >= most:
        raise RequestError(422, f"forced: {len(forced)} tokens; expected fewer than max_tokens, {most}", "forced")
    sentinel = [bank.tokenizer.sentinel(0)] if bank.prompt(request.prompt).target_sentinel else []
    how, ends = request.decoding, engine.ends | {*reader.stop_ids}
    samples = 0 if not most else how.samples if isinstance(how, Sampling) else 1
    if (count := samples + len(request.words)) > limits.slots:
        expected = f"at most {limits.slots}, the server's slots; ask for fewer words or decoding.samples"
        raise RequestError(422, f"request: {count} samples and words; expected {expected}", "words")
    answers = [Answer(most, forced, how, number, ends=ends) for number in range(samples)]
    for word in request.words:
        forced = [*sentinel, *_ids("words", reader.target_ids, word)]
        if len(forced) > limits.max_tokens:
            found = f"words: {word[:80]!r} has {len(forced)} tokens"
            raise RequestError(422, f"{found}; expected at most {limits.max_tokens}", "words")
        answers.append(Answer(len(forced), forced, ends=engine.ends))
    time_s = min(limits.timeout_s, request.timeout_s or limits.timeout_s)
    return Job(request.prompt, ids, answers, time.monotonic() + time_s, notify, request.stream, reader=reader)


def input_ids(engine: Engine, reader: Tokenizer, text: str | list[int], field: str) -> list[int]:
    """Return what a model reads of a text, whose ids may be given. Errors: RequestError, which names the `field`."""
    rows, most = engine.bank.backbone.settings.vocabulary_rows, engine.limits.max_input_tokens
    if not (text.strip() if isinstance(text, str) else text):
        raise RequestError(422, f"{field}: found an empty text; expected some words", field)
    ids = _ids(field, reader.input_ids, text) if isinstance(text, str) else text
    if not 0 <= min(ids) <= max(ids) < rows:
        found = next(id_ for id_ in ids if not 0 <= id_ < rows)
        raise RequestError(422, f"{field}: found the id {found}; expected ids from 0 to {rows - 1}", field)
    if len(ids) > most:
        raise RequestError(
            422, f"{field}: {len(ids)} tokens; expected at most {most}, its end included; shorten it", field
        )
    return ids


def most_tokens(engine: Engine, wanted: int | None) -> int:
    """Return the longest that an answer may be, the server's limit where nothing is `wanted`. Errors: RequestError."""
    limit = engine.limits.max_tokens
    if wanted is not None and wanted > limit:
        expected = f"at most {limit}; ask for fewer, or start the server with --limit max_tokens={wanted}"
        raise RequestError(422, f"max_tokens: found {wanted}; expected {expected}", "max_tokens")
    return limit if wanted is None else wanted


def _ids(field: str, encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Return the ids of a text. Errors: RequestError, which does not say where the tokenizer lies."""
    try:
        return encode(text)
    except UserError as error:
        raise RequestError(422, f"{field}: {str(error).partition(': ')[2]}", field) from None


def reply(request: Request, done: Job) -> dict[str, Any]:
    """Return the JSON that answers a finished request."""
    assert done.reader is not None
    made = len(done.answers) - len(request.words)
    answers = [
        {
            "text": done.reader.decode(answer.tokens),
            "score": answer.score,
            "tokens": answer.tokens,
            "ended": answer.ended,
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

    def __init__(self, decode: Sequence[Callable[[list[int]], str]], stops: Sequence[str] = ()):
        """Keep what is sent of each answer; `decode` has a function for each, `stops` end all of them."""
        self._decode, self._stops = decode, stops
        self.sent, self._seen = [""] * len(decode), [(0, False)] * len(decode)

    def new_pieces(self, answers: list[Answer]) -> list[tuple[int, str]]:
        """Return (answer, new text) for each answer that has grown.

        An incomplete character waits for its rest, and what may be the beginning of a stop text for what follows.
        """
        found = []
        for index, answer in enumerate(answers[: len(self.sent)]):
            done, tokens, old = answer.done, list(answer.tokens), self.sent[index]  # done first: then all tokens are in
            if (len(tokens), done) == self._seen[index]:
                continue
            text = until(self._decode[index](tokens), self._stops)
            text = text if done else text[: len(text) - _begun(text, self._stops)]
            if len(text) > len(old) and text.startswith(old) and (done or not text.endswith("\ufffd")):
                found.append((index, text[len(old) :]))
                self.sent[index] = text
            self._seen[index] = len(tokens), done
        return found


def _begun(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop text."""
    longest = max(map(len, stops), default=1) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in stops)), 0)
