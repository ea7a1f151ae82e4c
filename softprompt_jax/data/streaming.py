"""Batches from a split that never ends: it is read one window of examples after the other, each put into buckets.

Only one window is in memory at a time. The order depends on nothing but the stream and the seed. A run that resumes at
step S first reads the S x B examples that it has seen, and drops them. A million take minutes; how many depends on the
preprocessors. Every process reads the whole stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from softprompt_jax.config import UserError
from softprompt_jax.data.batches import Batch, TrainBatches, collate, local_rows
from softprompt_jax.data.buckets import batch_plan, fitting_shape, rounded
from softprompt_jax.data.prompt_layout import NO_PROMPT, PromptLayout
from softprompt_jax.data.task import Example
from softprompt_jax.data.tokenized import TokenizedSet


class StreamBatches:
    """Training batches without end, from any step on.

    `read(number)` yields the examples of the stream from that number on, and `tokenized` turns examples into a set.
    `first` is the set of the first window: all windows have its size, and the shapes and the other attributes are
    computed from it. `largest` is the limit of tokens of an input and of a target. The rest is as in `TrainBatches`.
    """

    def __init__(
        self,
        read: Callable[[int], Iterable[Example]],
        tokenized: Callable[[Iterable[Example]], TokenizedSet],
        first: TokenizedSet,
        batch_size: int,
        seed: int,
        layout: PromptLayout = NO_PROMPT,
        max_shapes: int = 4,
        largest: tuple[int, int] = (512, 64),
        process_index: int = 0,
        process_count: int = 1,
    ):
        plan = TrainBatches(first, batch_size, seed, layout, max_shapes=max_shapes, process_count=process_count)
        self._read, self._tokenized, self.batch_size, self.seed = read, tokenized, batch_size, seed
        self._layout = layout
        self._local = local_rows(batch_size, process_index, process_count)
        self.batches_per_epoch, self.rows = len(first) // batch_size, batch_size
        self.examples_per_batch, self.padding_share = float(batch_size), plan.padding_share
        whole = rounded(np.asarray([largest]))[0] + np.array(self._layout.lengths)
        self.shapes = [*plan.shapes[: max_shapes - 1], (int(whole[0]), int(whole[1]))]

    def from_step(self, step: int = 0) -> Iterator[Batch]:
        """Iterate over the batches from a step on."""
        window, done = divmod(step, self.batches_per_epoch)
        size = self.batches_per_epoch * self.batch_size
        stream = iter(self._read(window * size))
        for number in itertools.count(window):
            examples = list(itertools.islice(stream, size))
            if len(examples) < size:
                raise UserError(
                    f"the stream ended after {number * size + len(examples)} examples; expected one without end; "
                    "leave out `endless`"
                )
            yield from itertools.islice(self._batches(self._tokenized(examples), number), done, None)
            done = 0

    def _batches(self, tokenized: TokenizedSet, number: int) -> Iterator[Batch]:
        """Yield the batches of window `number`, whose examples are shuffled and put into buckets."""
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, number])))
        lengths = tokenized.lengths + np.array(self._layout.lengths)
        order = random.permutation(len(tokenized))
        for ids in batch_plan(order, lengths, self.batch_size, random, self.batches_per_epoch):
            shape = fitting_shape(self.shapes, lengths[ids].max(0))
            yield collate(tokenized, ids[self._local][:, None], shape, self._layout)
