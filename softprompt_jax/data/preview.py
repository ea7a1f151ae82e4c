"""A task as a model sees it: its examples as text and tokens, lengths, truncations and label counts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from softprompt_jax.config import UserError
from softprompt_jax.data.packages import Package
from softprompt_jax.data.prompt_layout import NO_PROMPT, PromptLayout
from softprompt_jax.data.sources import Hub
from softprompt_jax.data.task import Example, Task, iterate, splits, with_limits
from softprompt_jax.data.tokenized import token_ids
from softprompt_jax.data.tokenizer import Tokenizer

_MOST_LABELS = 10


def describe(
    task: Task,
    split: str,
    tokenizer: Tokenizer,
    show: int,
    limits: tuple[int, int],
    most: int,
    layout: PromptLayout = NO_PROMPT,
) -> Iterator[str]:
    """Yield lines about the first `most` examples of a split; `limits` are the tokens of an input and a target.

    `layout` says where prompt rows stand, whose ids start at the tokenizer's size. Examples of a split without public
    labels are shown without a target.
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
    yield _lengths("input", inputs, limits[0], "truncated", len(tokenizer.end))
    if labelled:
        yield _lengths("target", targets, limits[1], "too long: a run refuses them")
        counts = Counter(example.target for example in found).most_common()
        shown = ", ".join(f"{word!r} {count:,} ({count / len(found):.1%})" for word, count in counts[:_MOST_LABELS])
        yield f"  targets: {shown}" + (f" and {len(counts) - _MOST_LABELS:,} more" * (len(counts) > _MOST_LABELS))
    for number, (example, ids, target_ids) in enumerate(zip(found[:show], inputs, targets, strict=False), start=1):
        yield f"example {number}"
        yield f"  input   {example.input}"
        read = layout.around(tokenizer.cut_input([*ids, *tokenizer.end], limits[0])).tolist()
        yield f"  tokens  {_pieces(tokenizer, read)}"
        if labelled:
            yield f"  target  {example.target}"
            before = layout.before_decoder().tolist()
            yield f"  tokens  {_pieces(tokenizer, [*before, *target_ids[: limits[1] - 1], tokenizer.eos_id])}"
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
    found = zip(examples, token_ids(examples, side, tokenizer, []), strict=True)
    return [ids[:-1] if example.ids and ids[-1:] == [tokenizer.eos_id] else ids for example, ids in found]


def _lengths(side: str, ids: Sequence[Sequence[int]], limit: int, beyond: str, behind: int = 1) -> str:
    lengths = np.asarray([len(each) + behind for each in ids])
    middle, most = np.percentile(lengths, [50, 95]).astype(int)
    over = int((lengths > limit).sum())
    return (
        f"  {side} tokens{' with EOS' * (behind == 1)}: median {middle}, 95% within {most}, longest {lengths.max()}; "
        f"{over:,} over {limit} ({beyond})"
    )


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the pieces of ids, prompt rows as their number, and how many ids there are without these."""
    shown, words = [], 0
    for is_row, group in itertools.groupby(ids, lambda id_: id_ >= tokenizer.size):
        part = list(group)
        shown += [f"<{len(part)} prompt rows>"] if is_row else [tokenizer.pieces[id_] for id_ in part]
        words += 0 if is_row else len(part)
    return " ".join(shown) + f"  ({words})"
