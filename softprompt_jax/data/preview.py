"""A task as a model sees it: its examples as text and tokens, lengths, truncations and label counts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from softprompt_jax.config import UserError
from softprompt_jax.data.packages import Package
from softprompt_jax.data.sources import Hub
from softprompt_jax.data.task import Example, Task, iterate, splits, with_limits
from softprompt_jax.data.tokenizer import Tokenizer

_MOST_LABELS = 10


def describe(
    task: Task, split: str, tokenizer: Tokenizer, show: int, limits: tuple[int, int], most: int
) -> Iterator[str]:
    """Yield lines about the first `most` examples of a split; `limits` are the tokens of an input and a target.

    Examples of a split without public labels are shown without a target.
    """
    labelled, task = split not in task.hidden, with_limits(task, *limits)
    yield f"{task.name}: {_origin(task)}; splits {', '.join(splits(task)) or 'none'}" + (
        f", and without public labels {', '.join(task.hidden)}" if task.hidden else ""
    )
    yield f"  input  {task.prefix if task.with_prefix else ''}{task.input}"
    yield f"  labels {', '.join(task.words) if task.words else 'free text'}; metrics {', '.join(task.metrics)}"
    task.source.check(tokenizer, metrics=False)
    source = iterate(task, split, labelled)
    found = list(itertools.islice(source, most))
    if not found:
        raise UserError(f"task {task.name}: split {split!r} is empty; expected at least one example; check the source")
    whole = next(source, None) is None
    yield f"{split}: {len(found):,} examples" if whole else f"{split}: the first {most:,} examples"
    inputs, targets = (_ids(tokenizer, found, side) for side in (0, 1))
    yield _lengths("input", inputs, limits[0], "truncated")
    if labelled:
        yield _lengths("target", targets, limits[1], "too long: a run refuses them")
        counts = Counter(example.target for example in found).most_common()
        shown = ", ".join(f"{word!r} {count:,} ({count / len(found):.1%})" for word, count in counts[:_MOST_LABELS])
        yield f"  targets: {shown}" + (f" and {len(counts) - _MOST_LABELS:,} more" * (len(counts) > _MOST_LABELS))
    for number, (example, ids, target_ids) in enumerate(zip(found[:show], inputs, targets, strict=False), start=1):
        yield f"example {number}"
        yield f"  input   {example.input}"
        yield f"  tokens  {_pieces(tokenizer, ids, limits[0])}"
        if labelled:
            yield f"  target  {example.target}"
            yield f"  tokens  {_pieces(tokenizer, target_ids, limits[1])}"
            if example.answers:
                yield f"  scored against  {' | '.join(example.answers)}"


def _origin(task: Task) -> str:
    source = task.source
    if isinstance(source, Hub):
        at = f" at {source.revision}" if source.revision else ", the newest"
        return f"hub {source.name}" + (f" {source.config}" if source.config else "") + at
    if isinstance(source, Package):
        return f"package {source.package}=={source.version}"
    return f"{source.kind} {getattr(source, 'name', '')}".strip()


def _ids(tokenizer: Tokenizer, examples: Sequence[Example], side: int) -> list[list[int]]:
    """Return the ids of all inputs (0) or targets (1) without EOS: a seqio Task's own, else those of the texts."""
    encoded = tokenizer.encode_batch([(example.input, example.target)[side] for example in examples])
    own = [example.ids and example.ids[side] for example in examples]
    return [
        ids if mine is None else [*mine[:-1], *(id_ for id_ in mine[-1:] if id_ != tokenizer.eos_id)]
        for ids, mine in zip(encoded, own, strict=True)
    ]


def _lengths(side: str, ids: Sequence[Sequence[int]], limit: int, beyond: str) -> str:
    lengths = np.asarray([len(each) + 1 for each in ids])  # with EOS
    middle, most = np.percentile(lengths, [50, 95]).astype(int)
    over = int((lengths > limit).sum())
    return (
        f"  {side} tokens with EOS: median {middle}, 95% within {most}, longest {lengths.max()}; "
        f"{over:,} over {limit} ({beyond})"
    )


def _pieces(tokenizer: Tokenizer, ids: Sequence[int], limit: int) -> str:
    kept = [*ids[: limit - 1], tokenizer.eos_id]
    return " ".join(tokenizer.pieces[id_] for id_ in kept) + f"  ({len(kept)})"
