"""OpenAI's protocol: models, completions and chat completions, which become jobs of the one engine.

Each prompt of the bank is a model, and so is the bare backbone, under the name that a config has for it. A request is
read into a `Completion`, which makes its jobs and writes what they answer, whole or as a stream.
"""

from __future__ import annotations

import functools
import itertools
import json
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError, field_validator

from softprompt_jax.config import Settings, UserError, nearest
from softprompt_jax.inference.bank import PromptBank
from softprompt_jax.inference.texts import no_numbers, until
from softprompt_jax.models.continuous_batching import TOP
from softprompt_jax.models.decode import Greedy, Sampling
from softprompt_jax.serve.engine import Engine
from softprompt_jax.serve.jobs import Answer, Job
from softprompt_jax.serve.limits import RequestError, error_body
from softprompt_jax.serve.requests import TextStream, input_ids, most_tokens, parse

MOST_TOP = 5  # of a completion's `logprobs`, as in OpenAI's API
_FEW = 16  # tokens of a completion, where `max_tokens` is not given, as in OpenAI's API
_COLD = 1e-4  # temperature under which the most likely token is taken
_LEAST_P = 1e-6  # `top_p` may be 0
_NEAR = 9  # tokens that the text of one may depend on: the bytes of a character, a space before it
_LEAST_LOG_P = -9999.0  # JSON has no infinity

_Text = Annotated[str, Field(json_schema_extra={"pattern": r"\S"})]
_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
_Texts = Annotated[list[_Text], Field(min_length=1)]
_ListsOfIds = Annotated[list[_Ids], Field(min_length=1)]
_Stop = Annotated[str, Field(min_length=1)]


class StreamOptions(Settings):
    """What a stream has besides its texts."""

    include_usage: bool | None = None  # a last chunk with the numbers of tokens


class _Asked(Settings):
    """What completions and chat completions have in common. Null is what a field has where it is not given."""

    model: str  # name of a prompt, or of the bare backbone
    max_tokens: int | None = Field(None, ge=0, lt=2**31)  # longest answer in tokens
    temperature: float | None = Field(None, ge=0, le=2)  # divisor of log-probabilities; null: 1, 0: the most likely
    # token is taken
    top_p: float | None = Field(None, ge=0, le=1)  # share of probability to draw from
    top_k: int | None = Field(None, ge=1, lt=2**31)  # number of most likely tokens to draw from (not in OpenAI's API)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)  # as in our decoding (not in OpenAI's API)
    n: int | None = Field(None, ge=1, lt=2**31)  # answers to each text
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)  # null: another one each time
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None  # texts before which an answer ends
    stream: bool | None = None  # answer in pieces, as server-sent events
    stream_options: StreamOptions | None = None
    presence_penalty: Literal[0] | None = None  # not supported; repetition_penalty is
    frequency_penalty: Literal[0] | None = None  # not supported; repetition_penalty is
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None  # not supported
    user: str | None = None  # not used


class CompletionRequest(_Asked):
    """The body of /v1/completions."""

    prompt: _Text | _Ids | _Texts | _ListsOfIds  # texts, or their ids as they are
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)  # most likely tokens to tell beside each token
    echo: bool | None = None  # text before its answer, with its log-probabilities; for decoder-only models
    best_of: int | None = Field(None, ge=1, lt=2**31)  # not supported, unless it is n

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _one_kind(cls, prompt: Any, parsed: Callable[[Any], Any]) -> Any:
        try:
            return parsed(prompt)
        except ValidationError:  # of each kind by itself
            raise ValueError("expected a text, a list of texts, its ids, or a list of lists of ids") from None


class TextPart(Settings):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Settings):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None  # not used

    def as_text(self) -> dict[str, str]:
        """Return what a chat template reads."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": "system" if self.role == "developer" else self.role, "content": "".join(parts)}


class ChatRequest(_Asked):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)  # another name of max_tokens
    logprobs: bool | None = None  # whether to tell the log-probability of each token
    top_logprobs: int | None = Field(None, ge=0, le=TOP)  # most likely tokens to tell beside each token


class Token(NamedTuple):
    """A token of a text or answer, what is known of it, and where its text begins."""

    id: int
    log_p: float | None  # None: the first of a text
    others: dict[int, float] | None
    offset: int


class Completion:
    """A request: its texts as ids, how they are answered, and what is written of the answers.

    Errors: RequestError with a status of OpenAI's API, 404 for an unknown model and 400 for most others.
    """

    def __init__(self, engine: Engine, asked: CompletionRequest | ChatRequest):
        engine.check_open()  # before anything is tokenized
        bank = engine.bank
        check_model(bank, asked.model)
        self.engine, self.asked, self.model = engine, asked, asked.model
        self.reader, self._causal = bank.reader(asked.model), bank.tokenizer.form.causal
        self.n = asked.n or 1
        if self.n > engine.limits.slots:
            raise RequestError(
                400, f"n: found {self.n}; expected at most {engine.limits.slots}, the server's slots", "n"
            )
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        self.stops = [*stop, *([] if self.reader.text.stop is None else [self.reader.text.stop])]
        self._ends = engine.ends | {*self.reader.stop_ids}
        self._seed = secrets.randbits(31) if asked.seed is None else asked.seed
        self.echo: list[list[Token]] = []  # of each text, once `add_echo` has been called for it
        if isinstance(asked, ChatRequest):
            self._read_chat(asked)
        else:
            self._read_texts(asked)
        chat = "chat.completion.chunk" if asked.stream else "chat.completion"
        kind, prefix = (chat, "chatcmpl") if isinstance(asked, ChatRequest) else ("text_completion", "cmpl")
        name = f"{prefix}-{uuid.uuid4().hex}"
        self._about = {"id": name, "object": kind, "created": int(time.time()), "model": self.model}
        self._decode = [functools.partial(self.reader.text_behind, ids) for ids in self.texts]
        self._stream = TextStream([decode for decode in self._decode for _ in range(self.n)], self.stops)
        self._told: list[int] = [-1] * len(self.texts) * self.n  # tokens in chunks so far; -1: no chunk
        self._offsets = [[0] for _ in self._told]  # where the texts of an answer's tokens begin
        self._ended: set[int] = set()

    def _read_chat(self, asked: ChatRequest) -> None:
        reader = self.reader
        if not reader.has_chat_template:
            raise RequestError(404, "chat: this server's tokenizer has no chat template; expected /v1/completions")
        try:
            ids = reader.chat_ids([message.as_text() for message in asked.messages])
        except UserError as error:
            raise RequestError(400, f"messages: {str(error).partition(': ')[2]}", "messages") from None
        self.texts, self.echoes = [input_ids(self.engine, reader, ids, "messages")], False
        wanted = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        self.most = most_tokens(self.engine, wanted)
        if not self.most:
            raise RequestError(400, "max_tokens: found 0; expected an answer of 1 token or more", "max_tokens")
        if asked.top_logprobs and not asked.logprobs:
            raise RequestError(400, "top_logprobs: found without logprobs; expected logprobs true", "top_logprobs")
        self.top = (asked.top_logprobs or 0) if asked.logprobs else None

    def _read_texts(self, asked: CompletionRequest) -> None:
        given: Any = asked.prompt
        several = isinstance(given, list) and not isinstance(given[0], int)
        texts: list[str | list[int]] = given if several else [given]
        limits = self.engine.limits
        if len(texts) > limits.max_waiting:
            found = f"prompt: {len(texts)} texts"
            raise RequestError(400, f"{found}; expected at most {limits.max_waiting}, what the server queues", "prompt")
        self.texts = [input_ids(self.engine, self.reader, text, "prompt") for text in texts]
        self.most = (
            min(_FEW, limits.max_tokens) if asked.max_tokens is None else most_tokens(self.engine, asked.max_tokens)
        )
        self.echoes, self.top = bool(asked.echo), asked.logprobs
        if self.echoes and not self._causal:
            raise RequestError(
                400,
                "echo: this backbone's encoder reads texts, and foretells no token; expected a decoder-only one",
                "echo",
            )
        if not self.most and not self.echoes:
            raise RequestError(
                400, "max_tokens: found 0 without echo; expected an answer, or a text to score", "max_tokens"
            )
        if asked.best_of not in (None, self.n):
            raise RequestError(400, f"best_of: found {asked.best_of}; expected n, {self.n}, or nothing", "best_of")

    # ---------------------------------------------------------------------------------------------- to the engine

    def jobs(self, notify: Callable[[Any], object]) -> list[Job]:
        """Return the work for the engine, a job for each text; none where the texts are only scored."""
        asked, deadline = self.asked, time.monotonic() + self.engine.limits.timeout_s
        temperature = 1.0 if asked.temperature is None else asked.temperature
        penalty: dict[str, Any] = {
            "repetition_penalty": 1.0 if asked.repetition_penalty is None else asked.repetition_penalty
        }
        cuts: dict[str, Any] = {
            "top_k": asked.top_k,
            "top_p": None if asked.top_p is None else max(asked.top_p, _LEAST_P),
        }
        jobs = []
        for number, ids in enumerate(self.texts if self.most else ()):
            how: Greedy | Sampling = Greedy(**penalty)
            if temperature >= _COLD:
                seed = (self._seed + number + 2**63) % 2**64 - 2**63  # equal texts of a list get unlike answers
                how = Sampling(temperature=temperature, samples=self.n, seed=seed, **cuts, **penalty)
            stops = functools.partial(self._has_stop, number) if self.stops else None
            answers = [
                Answer(self.most, [], how, sample, ends=self._ends, stops=stops, top=self.top or 0)
                for sample in range(self.n)
            ]
            jobs.append(Job(self.model, ids, answers, deadline, notify, bool(asked.stream)))
        return jobs

    def _has_stop(self, number: int, tokens: list[int]) -> bool:
        text = self._decode[number](tokens)
        return any(stop in text for stop in self.stops)

    @property
    def scores_texts(self) -> bool:
        """Whether the log-probabilities of the texts are asked for: `add_echo` wants them."""
        return self.echoes and self.top is not None

    def add_echo(self, scores: list[np.ndarray] | None = None) -> None:
        """Take a text's own log-probabilities (`Engine.score_context`), the texts one after the other."""
        ids = self.texts[len(self.echo)]
        own: list[float | None] = [None] * len(ids)
        others: list[dict[int, float] | None] = [None] * len(ids)
        if scores is not None:
            if not np.isfinite(scores[0]).all():
                raise RequestError(422, no_numbers(self.model))
            pairs = zip(*(part[:, : self.top].tolist() for part in scores[1:]), strict=True)
            tops = (dict(zip(*pair, strict=True)) for pair in pairs)
            own, others = [None, *scores[0].tolist()[1:]], [None, *itertools.islice(tops, 1, None)]
        offsets = text_offsets(self._echo_text, ids, [0])
        self.echo.append(list(itertools.starmap(Token, zip(ids, own, others, offsets, strict=True))))

    def _echo_text(self, ids: list[int]) -> str:
        return self.reader.text_of(ids, past_eos=True)

    # ---------------------------------------------------------------------------------------------- to the client

    def whole(self, jobs: list[Job]) -> dict[str, Any]:
        """Return the body of an answer."""
        choices = []
        for index in range(len(self._told)):
            answer = self._answer(jobs, index)
            text = "" if answer is None else until(self._decode[index // self.n](answer.tokens), self.stops)
            before, tokens = self._before(index), self._tokens(index, answer, 0, len(text), True)
            echoed = self.echo[index // self.n] if self.echoes else []
            choices.append(self._choice(index, before + text, [*echoed, *tokens], self._reason(answer)))
        return self._about | {"choices": choices, "usage": self._usage(jobs)}

    def chunks(self, done: bool, jobs: list[Job]) -> Iterator[str]:
        """Yield what is new of unfinished answers as events, and at the end what closes the stream."""
        for index in [index for index, told in enumerate(self._told) if told < 0]:  # once
            self._told[index] = 0
            if isinstance(self.asked, ChatRequest):
                yield self._chunk(index, "", [], None, role="assistant")
            elif self.echoes:
                yield self._chunk(index, self._before(index), self.echo[index // self.n], None)
        answers = [answer for job in jobs for answer in job.answers]
        ended = {index for index, answer in enumerate(answers) if answer.done} if jobs else {*range(len(self._told))}
        for index, text in self._stream.new_pieces(answers):
            yield self._chunk(index, text, self._new_tokens(index, answers[index], False), None)
        for index in sorted(ended - self._ended):
            answer = self._answer(jobs, index)
            yield self._chunk(index, "", self._new_tokens(index, answer, True), self._reason(answer))
        self._ended |= ended
        if done:
            options = self.asked.stream_options
            if options is not None and options.include_usage:
                yield _event(self._about | {"choices": [], "usage": self._usage(jobs)})
            yield "data: [DONE]\n\n"

    def _answer(self, jobs: list[Job], index: int) -> Answer | None:
        return jobs[index // self.n].answers[index % self.n] if jobs else None

    def _before(self, index: int) -> str:
        return self._echo_text(self.texts[index // self.n]) if self.echoes else ""

    def _reason(self, answer: Answer | None) -> str:
        return "stop" if answer is not None and answer.ended else "length"

    def _usage(self, jobs: list[Job]) -> dict[str, int]:
        read, written = sum(map(len, self.texts)), sum(len(answer.tokens) for job in jobs for answer in job.answers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _new_tokens(self, index: int, answer: Answer | None, done: bool) -> list[Token]:
        found = self._tokens(index, answer, self._told[index], len(self._stream.sent[index]), done)
        self._told[index] += len(found)
        return found

    def _tokens(self, index: int, answer: Answer | None, first: int, length: int, done: bool) -> list[Token]:
        """Return the tokens of an answer, from a first one on, whose texts begin in its first `length` characters.

        Those that write nothing, as EOS, come when it is `done`; those behind a stop text never.
        """
        if answer is None or self.top is None:
            return []
        decode, before, found = self._decode[index // self.n], len(self._before(index)), []
        written = min(len(answer.tokens), len(answer.log_p), len(answer.others) if self.top else len(answer.tokens))
        offsets = text_offsets(decode, answer.tokens[:written], self._offsets[index])
        for place in range(first, written):
            offset = offsets[place]
            if offset >= length and (not done or answer.stopped):
                break
            others = answer.others[place] if self.top else {}
            found.append(Token(answer.tokens[place], answer.log_p[place], others, before + offset))
        return found

    def _choice(self, index: int, text: str, tokens: list[Token], reason: str | None) -> dict[str, Any]:
        told = None if self.top is None else self._log_probabilities(tokens)
        about = {"index": index, "logprobs": told, "finish_reason": reason}
        if isinstance(self.asked, ChatRequest):
            return about | {"message": {"role": "assistant", "content": text, "refusal": None}}
        return about | {"text": text}

    def _chunk(self, index: int, text: str, tokens: list[Token], reason: str | None, role: str | None = None) -> str:
        choice = self._choice(index, text, tokens, reason)
        if isinstance(self.asked, ChatRequest):
            del choice["message"]
            choice["delta"] = ({} if role is None else {"role": role}) | ({} if reason else {"content": text})
        return _event(self._about | {"choices": [choice]})

    def _log_probabilities(self, tokens: list[Token]) -> dict[str, Any]:
        name = self.reader.token_text
        if isinstance(self.asked, ChatRequest):
            return {
                "content": [
                    self._named(token.id, token.log_p)
                    | {"top_logprobs": [self._named(id_, log_p) for id_, log_p in (token.others or {}).items()]}
                    for token in tokens
                ],
                "refusal": None,
            }
        tops = [
            None
            if token.log_p is None
            else {name(id_): _finite(log_p) for id_, log_p in ({**(token.others or {}), token.id: token.log_p}).items()}
            for token in tokens
        ]
        return {
            "tokens": [name(token.id) for token in tokens],
            "token_logprobs": [token.log_p for token in tokens],
            "top_logprobs": tops,
            "text_offset": [token.offset for token in tokens],
        }

    def _named(self, id_: int, log_p: float | None) -> dict[str, Any]:
        text, reader = self.reader.token_text(id_), self.reader
        whole = text == reader.text_of([id_])  # neither a special token nor a part of a character
        return {"token": text, "logprob": _finite(log_p or 0.0), "bytes": list(text.encode()) if whole else None}


def read(engine: Engine, kind: type[CompletionRequest | ChatRequest], values: dict[str, Any]) -> Completion:
    """Read the body of a request. Errors: RequestError."""
    expected = '"messages": [{"role": "user", "content": "..."}]' if kind is ChatRequest else '"prompt": "..."'
    return Completion(engine, parse(values, kind, f'{{"model": "NAME", {expected}}}'))


def check_model(bank: PromptBank, name: str) -> None:
    """Refuse a model that is neither a prompt nor the backbone. Errors: RequestError."""
    if name != bank.bare and name not in bank:
        known = [bank.bare, *bank.names]
        message = f"model {name[:100]!r}: not here; found {', '.join(known[:8])}{nearest(name, known)}"
        raise RequestError(404, message, "model", "model_not_found")


def about_model(bank: PromptBank, name: str, created: int) -> dict[str, Any]:
    """Return what the API says of a model. Errors: RequestError for one that is not here."""
    check_model(bank, name)
    parent = bank.bare if name in bank else None
    return {"id": name, "object": "model", "created": created, "owned_by": "softprompt", "parent": parent}


def models(bank: PromptBank, created: int) -> dict[str, Any]:
    """Return the list of models: the bare backbone, then the prompts."""
    names: Iterable[str] = dict.fromkeys([bank.bare, *bank.names])
    return {"object": "list", "data": [about_model(bank, name, created) for name in names]}


def text_offsets(decode: Callable[[list[int]], str], tokens: list[int], known: list[int]) -> list[int]:
    """Add to where the texts of the first tokens begin, 0 for the first, what is not `known` yet, and return it.

    A token is read with a few before it, so that the time is linear: its text depends on these alone.
    """
    for end in range(len(known), len(tokens)):
        near = tokens[max(0, end - _NEAR) : end]
        known.append(known[-1] + len(decode(near)) - len(decode(near[:-1])))
    return known


def refusal(error: UserError) -> RequestError:
    """Return an error with the status that OpenAI's API has for it, 400 for what is 422 elsewhere."""
    told = error if isinstance(error, RequestError) else RequestError(422, str(error))
    return RequestError(400, str(told), told.param, told.code) if told.status == 422 else told


def failed_event(error: RequestError) -> str:
    """Return the last event of a stream that cannot go on."""
    return _event(error_body(error))


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, allow_nan=False)}\n\n"


def _finite(log_p: float) -> float:
    return max(log_p, _LEAST_LOG_P)
