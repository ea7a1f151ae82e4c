"""A commented config for rows that somebody brings: guesses of columns, labels and lengths, to be corrected."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from softprompt_jax.config import UserError
from softprompt_jax.data.examples import template_fields, text_of
from softprompt_jax.data.preprocessors import Row
from softprompt_jax.data.sources import Folder, read_file, split_files
from softprompt_jax.data.tokenizer import Tokenizer

MOST_ROWS = 2000  # that are looked at
_MOST_LABELS = 50  # distinct targets that can be a list of label words
_INPUTS = ("text", "input", "sentence", "question", "prompt", "message", "review", "content", "query", "inputs")
_LABELS = ("label", "labels", "intent", "category", "class", "target", "output", "answer", "sentiment", "reply")


class Guess(NamedTuple):
    """What the columns of rows seem to be; `words` are the label words, none where targets are free text."""

    input: str
    label: str
    words: list[str]
    others: list[str]


def starter(
    place: str, to: str, backbone: str, tokenizer: Tokenizer, columns: tuple[str | None, str | None] = (None, None)
) -> str:
    """Return the text of the config `to` for a file of rows, or a folder with a file for each split.

    `columns`: those of input and label, None to guess. Lengths are counted in the tokens of `tokenizer`. Errors:
    UserError for rows with less than two columns, or without a column that is stated.
    """
    source, rows, validated = _read(place)
    found = guess(rows, *columns)
    tokens = [len(ids) for ids in tokenizer.encode_batch([text_of(row.get(found.input, "")) for row in rows])]
    answers = [len(ids) for ids in tokenizer.encode_batch([text_of(row.get(found.label, "")) for row in rows])]
    causal, words = tokenizer.form.causal, found.words
    template = f"{{{found.input}}}" + (f"\n{found.label.capitalize()}:" if causal else "")
    around = len(tokenizer.encode(template)) + 2  # more than what stands around a text, with its ends
    longest, usual = max(tokens), int(np.percentile(tokens, 95))
    limit, target_limit = min(512, _up(longest + around, 8)), _up(max(answers) + 2, 4)
    task: list[tuple[dict[str, Any], str]] = [
        ({"name": Path(place).stem.replace("/", "-") or "rows"}, "name in results"),
        ({"source": source}, "place of the rows, relative to where softprompt is called"),
    ]
    if not validated:
        task.append(
            ({"validation": 0.1}, "share of the rows that is kept to choose the best step, by a hash of the input")
        )
    task.append(({"input": template}, f"what the model reads; other columns: {', '.join(found.others) or 'none'}"))
    task.append(({"target": f"{{{found.label}}}"}, "what it should answer"))
    if words:
        numbers = all(word.lstrip("-").isdigit() for word in words)
        hint = "; words say more to a model: target: {0: negative, 1: positive}" if numbers else ""
        task.append(({"label_words": words}, f"the legal answers, {len(words)} in {len(rows):,} rows{hint}"))
        task.append(({"metrics": ["accuracy", "f1_macro"]}, "scores, whose mean chooses the best step"))
        task.append(
            ({"predict_by": "likelihood"}, "the likeliest label word; decoding: any text that the model writes")
        )
    else:
        task.append(({"metrics": ["exact_match"]}, "scores, whose mean chooses the best step; for long texts rougeL"))
    run: list[tuple[dict[str, Any], str]] = [
        ({"methods": [{"kind": "prompt", "length": 20}]}, "what trains; `softprompt methods` lists all"),
        ({"steps": 500}, "more steps learn more; runs can be made longer"),
        ({"batch_size": 16}, "examples a step"),
        ({"max_input_tokens": limit}, f"texts have up to {longest} tokens, 95% within {usual}; longer ones are cut"),
        ({"max_target_tokens": target_limit}, f"targets have up to {max(answers)} tokens"),
        ({"evaluate_every": 50}, "steps between validations"),
        ({"patience": 5}, "validations without a better score after which training stops"),
    ]
    head = [f"# Trains a soft prompt on {place}. Guessed by `softprompt new`: correct what is wrong, then", "#"]
    head += [f"#   softprompt train {to} --out runs/{Path(to).stem}", ""]
    lines = [*_lines([({"backbone": backbone}, "frozen model: a folder, a hub name, embedded or smollm2")]), "task:"]
    return "\n".join([*head, *lines, *(f"  {line}" for line in _lines(task)), *_lines(run)]) + "\n"


def guess(rows: Sequence[Row], input: str | None = None, label: str | None = None) -> Guess:
    """Guess the columns of input and label: by their names, or as those with the longest and the fewest values."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for stated in (input, label):
        if stated is not None and stated not in columns:
            raise UserError(f"column {stated!r}: not in the rows; expected one of {', '.join(columns)}")
    values = {name: [text_of(row[name]) for row in rows if row.get(name) not in (None, "")] for name in columns}
    usable = [name for name in columns if values[name] and _is_field(name)]
    if len(usable) < 2:
        raise UserError(
            f"rows: found the columns {', '.join(columns) or 'none'}; expected two, a text and its label; name them in "
            "the first line, or state them with --input and --label"
        )
    by_length = sorted(usable, key=lambda name: -sum(map(len, values[name])) / len(values[name]))
    if label is None:
        repeated = [name for name in usable if 2 <= len(set(values[name])) <= len(values[name]) / 2]
        few = sorted(repeated, key=lambda name: len(set(values[name])))
        read = input or next(iter(_named(_INPUTS, usable)), None)
        candidates = [*_named(_LABELS, usable), *few, *reversed(by_length)]
        label = next(name for name in candidates if name != read)
    if input is None:
        input = next(name for name in (*_named(_INPUTS, usable), *by_length) if name != label)
    counts = Counter(values[label])
    few = len(counts) <= _MOST_LABELS and len(values[label]) >= 2 * len(counts) and len(counts) > 1
    words = [word for word, _ in counts.most_common() if word == word.strip()] if few else []
    return Guess(input, label, words, [name for name in columns if name not in (input, label)])


def _read(place: str) -> tuple[dict[str, Any], list[Row], bool]:
    """Return the source's settings, its first train rows, and whether it has a validation split."""
    if Path(place).is_dir():
        files = split_files(Folder(path=place))
        if "train" not in files:
            raise UserError(f"{place}: found {', '.join(files)}; expected a train split; add train.jsonl")
        each: Iterable[Any] = itertools.chain.from_iterable(map(read_file, files["train"]))
        source, validated = {"kind": "folder", "path": place}, "validation" in files
    else:
        each, source, validated = read_file(place), {"kind": "files", "train": place}, False
    rows = [row for _, row in itertools.islice(each, MOST_ROWS)]
    if not rows:
        raise UserError(f"{place}: has no rows; expected some; one JSON object a line, or a table with a header")
    return source, rows, validated


def _named(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    return [column for name in names for column in columns if column.lower() == name]


def _is_field(column: str) -> bool:
    try:
        return template_fields(f"{{{column}}}") == [column]
    except ValueError:
        return False


def _up(number: int, step: int) -> int:
    return math.ceil(number / step) * step


def _lines(settings: Sequence[tuple[dict[str, Any], str]]) -> list[str]:
    """Return settings as lines of YAML with a comment above each."""
    lines = []
    for setting, comment in settings:
        ((name, value),) = setting.items()  # JSON is YAML, and stays on one line
        lines += [f"# {comment}", f"{name}: {json.dumps(value, ensure_ascii=False)}"]
    return lines
