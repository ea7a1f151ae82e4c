"""Log-probabilities of continuations, and answers, for contexts that are given as ids: what evaluation harnesses ask.

Texts are read as the run of a predictor has read them. Requests are batched by length; what is longer than the model's
positions is cut on the left and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from softprompt_jax.assembly import layout_of, positions_of
from softprompt_jax.config import UserError
from softprompt_jax.data.examples import Example
from softprompt_jax.data.tokenized import TokenizedSet, tokenize
from softprompt_jax.distributed.mesh import entered
from softprompt_jax.inference.evaluate import Batching, Decoder
from softprompt_jax.inference.predictor import Predictor
from softprompt_jax.inference.texts import is_number, no_numbers, until
from softprompt_jax.methods import split
from softprompt_jax.models.decode import Decoding
from softprompt_jax.models.language_model import LanguageModel

Pair = tuple[list[int], list[int]]  # ids of a context and of its continuation
Progress = Callable[[int], object]

DEFAULT_POSITIONS = 2048  # where a model does not say how many it knows, as in lm-evaluation-harness
_LEVELS = (64, 256, 1024)  # lengths up to which requests share batches
_TOKENS = 1 << 14  # most of a batch, unless a batch size is asked for


class Scorer:
    """Scores pairs of context and continuation, and answers contexts, with the model of a predictor.

    `max_length`: positions of a context with its continuation, without the prompt's rows; of an encoder-decoder, those
    of the context (default: what the model knows). `batch_size`: rows of a batch (default: as many as the predictor's,
    fewer where texts are long). `ends`: whether EOS behind a continuation counts, as `softprompt eval` counts it
    (default: for an encoder-decoder, whose continuation is a whole target).
    """

    def __init__(
        self,
        predictor: Predictor,
        max_length: int | None = None,
        batch_size: int | None = None,
        ends: bool | None = None,
    ):
        self.model, self.reader, self.mesh = predictor.model, predictor.tokenizer, predictor.mesh
        self.causal, self.layout = self.model.encoder is None, layout_of(self.model)
        # Whether something stands between a context and its continuation, so that they are no single text.
        self.apart = not self.causal or self.reader.text.template == "chat"
        self.ends = not self.causal if ends is None else ends
        self.truncated = 0  # contexts so far that were longer than the model's positions
        self._sentinel = [self.reader.sentinel(0)] if predictor.target_sentinel else []
        self._batch_size, self._most_rows = batch_size, predictor.batch_size
        self._left = self.reader.reading(self.reader.text.model_copy(update={"cut": "left"}))
        settings, prompt = self.model.settings, self.layout.lengths[0]
        if self.causal:
            prompt += self.layout.lengths[1] + int(np.max(np.asarray(self.model.decoder.shift())))
        source = Path(self.reader.source)
        known = positions_of(settings, source if source.is_dir() else source.parent) or DEFAULT_POSITIONS
        self.max_length = known - prompt if max_length is None else max_length
        learned = getattr(settings, "learned_positions", None) or max(known, self.max_length + prompt)
        if self.max_length < 1 or self.max_length + prompt > learned:
            raise UserError(
                f"max_length {self.max_length}: with {prompt} rows of a prompt more than the {learned} positions of "
                "this backbone; expected fewer, and at least 1; leave max_length out"
            )

    # ------------------------------------------------------------------------------------------------ texts to ids

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text by itself, behind BOS where the tokenizer puts one, once."""
        ids = self.reader.encode(text)
        begin = list(self.reader.bos) if self.reader.text.bos else []
        return ids if ids[: len(begin)] == begin else [*begin, *ids]

    def context(self, text: str) -> list[int]:
        """Return the ids of a context: an input, as a run has read it. An empty one becomes BOS, or EOS without one."""
        return self.reader.input_ids(text) if self.apart else self.encode(text) or [self.reader.prefix_id]

    def pair(self, context: str, continuation: str) -> Pair:
        """Return the ids of a context and its continuation.

        In a decoder-only model both are tokenised as one text, and the spaces at the end of the context belong to the
        continuation, as in lm-evaluation-harness. Behind an encoder or a chat template the continuation is a target,
        without spaces before it. Errors: UserError for a continuation without tokens.
        """
        end = [self.reader.eos_id] if self.ends else []
        if self.apart:
            before, own = self.context(context), self.reader.target_ids(continuation.lstrip())[:-1]
            own = [*self._sentinel, *own]
        elif not context:
            before, own = [self.reader.prefix_id], self.reader.encode(continuation)
            if own[:1] == before:
                own = own[1:]
        else:
            kept = context.rstrip()
            before = self.encode(kept)
            own = self.encode(context + continuation)[len(before) :]
            before = before or [self.reader.prefix_id]  # of spaces alone
        if not own and not end:
            raise UserError(f"continuation {continuation[:40]!r}: has no token of its own; expected one or more")
        return before, [*own, *end]

    def _cut(self, ids: list[int], limit: int) -> list[int]:
        if len(ids) <= limit:
            return ids
        self.truncated += 1
        return self._left.cut_input(ids, limit) if self.apart else ids[-limit:]

    # ------------------------------------------------------------------------------------------------ ids to numbers

    def scores(self, pairs: Sequence[Pair], progress: Progress | None = None) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation behind its context, and whether greedy decoding writes it.

        Errors: UserError for a continuation that is longer than `max_length`, and for numbers that are NaN.
        """
        fitting = [self._fitting(*pair) for pair in pairs]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        parts = split(self.model)
        decoder = Decoder(parts, self.reader)
        for group, rows in self._groups([len(context) + len(own) for context, own in fitting]):
            how = Batching(rows, 1, self.layout, progress=progress)
            with entered(self.mesh):
                tokenized = self._tokenized([fitting[index] for index in group])
                log_p, greedy = decoder.target_scores(parts.trainable, parts.frozen, tokenized, how)
            if np.isnan(log_p).any():
                raise UserError(no_numbers(None))
            for index, *one in zip(group, log_p.tolist(), greedy.tolist(), strict=True):
                found[index] = (one[0], one[1])
        return found

    def _fitting(self, context: list[int], own: list[int]) -> Pair:
        if not self.causal:
            return self._cut(context, self.max_length), own
        room = self.max_length + 1 - len(own)  # the last token is read by nobody
        if room < 1:
            raise UserError(
                f"continuation of {len(own)} tokens: expected at most {self.max_length}, the positions of the model"
            )
        return self._cut(context, room), own

    def answers(
        self,
        contexts: Sequence[list[int]],
        max_tokens: int,
        decoding: Decoding | None = None,
        stop: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> list[str]:
        """Return what the model writes behind each context: up to EOS, to the first of the texts `stop`, or the limit.

        The space that an answer begins with stays. Samples follow from the seed and a context's place among the
        requests of like length. Errors: UserError where `max_tokens` leave no room for a context, and for NaN.
        """
        room = self.max_length - max_tokens if self.causal else self.max_length
        if room < 1:
            raise UserError(
                f"max_gen_toks {max_tokens}: leaves no room for a context in the {self.max_length} positions of the "
                "model; expected fewer"
            )
        fitting = [self._cut(context, room) for context in contexts]
        stop = [*stop, *([] if self.reader.text.stop is None else [self.reader.text.stop])]
        parts, answers = split(self._ending_at(stop)), [""] * len(contexts)
        decoder, done = Decoder(parts, self.reader, decoding), 0
        for group, rows in self._groups([len(context) + max_tokens for context in fitting]):
            how = Batching(rows, max_tokens, self.layout, progress=progress)
            with entered(self.mesh):
                tokenized = self._tokenized([(fitting[index], [self.reader.eos_id]) for index in group])
                found = decoder.answers(parts.trainable, parts.frozen, tokenized, how, first_number=done)
            done += len(group)
            for index, (best, *_) in zip(group, found, strict=True):
                if not is_number(best.score):
                    raise UserError(no_numbers(None))
                answers[index] = until(self.reader.text_behind(fitting[index], best.ids), stop)
        return answers

    def _ending_at(self, stop: Sequence[str]) -> LanguageModel:
        """Return the model, whose answers end at pieces that hold a stop text whole; one in parts is cut afterwards."""
        model = nnx.merge(*nnx.split(self.model))
        ends = dict.fromkeys([*model.settings.ends, *self.reader.pieces_with([text for text in stop if text])])
        model.settings = model.settings.model_copy(update={"ends": tuple(ends)})
        return model

    def _tokenized(self, pairs: Sequence[Pair]) -> TokenizedSet:
        examples, longest = [Example("", "", ids=pair) for pair in pairs], max(max(map(len, pair)) for pair in pairs)
        return tokenize(examples, self.reader, self.model.settings.vocabulary_rows, longest, longest)

    def _groups(self, lengths: Sequence[int]) -> Iterator[tuple[list[int], int]]:
        """Yield the numbers of requests that share batches, and the rows of these, the longest first."""
        if self._batch_size is not None:
            if lengths:
                yield [*range(len(lengths))], self._batch_size
            return
        levels: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            levels.setdefault(sum(length > level for level in _LEVELS), []).append(index)
        for level in sorted(levels, reverse=True):
            longest = sum(self.layout.lengths) + max(lengths[index] for index in levels[level])
            yield levels[level], max(1, min(self._most_rows, _TOKENS // longest))
