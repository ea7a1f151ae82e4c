"""Rows in memory as the source of a task: a list of dictionaries, a data frame, a data set, any iterable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from pydantic import PrivateAttr

from softprompt_jax.config import UserError
from softprompt_jax.data.examples import Source
from softprompt_jax.data.preprocessors import Row
from softprompt_jax.data.readers import SPLITS
from softprompt_jax.in_memory import Held, find, hold


class Rows(Source):
    """Rows in memory, which `Task.from_rows` takes in Python.

    A config names them by a hash only: who goes on with the run passes the same rows again.
    """

    kind: Literal["rows"] = "rows"
    sizes: dict[str, int]  # number of rows of each split
    sha256: str  # hash of all rows
    _held: Held | None = PrivateAttr(None)

    def model_post_init(self, context: Any) -> None:
        self._held = find(self.sha256)

    def split_names(self) -> list[str]:
        return [split for split in SPLITS if split in self.sizes]

    def rows(self, split: str, where: str) -> Iterator[tuple[str, Row]]:
        if self._held is None:
            sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
            raise UserError(
                f"{where}: its rows ({sizes}) were in memory where the run was made, and are in no file; expected them "
                "again; pass Task.from_rows with the same rows from Python"
            )
        return ((f"{split} row {number}", row) for number, row in enumerate(self._held.value[split], start=1))


def source_of(splits: Mapping[str, Any]) -> Rows:
    """Return the source of rows in memory by split. Errors: UserError for what are no rows."""
    found = {split: _rows(value, split) for split, value in splits.items() if value is not None}
    if unknown := [split for split in found if split not in SPLITS]:
        raise UserError(f"rows: found the split {unknown[0]!r}; expected some of {', '.join(SPLITS)}; rename it")
    if "train" not in found:
        raise UserError(f"rows: found {', '.join(found) or 'nothing'}; expected rows to train on; add train")
    digest = hashlib.sha256()
    for split, rows in found.items():
        digest.update(f"{split} {len(rows)}\n".encode())
        for number, row in enumerate(rows, start=1):
            try:
                written = json.dumps(row, sort_keys=True, default=str)
            except (TypeError, ValueError) as error:  # keys of unlike types, a row that holds itself
                raise UserError(
                    f"rows: {split} row {number}: cannot be written as JSON ({error}); expected fields of texts, "
                    "numbers, lists and dictionaries of these"
                ) from None
            digest.update(written.encode() + b"\n")
    held = hold(digest.hexdigest(), found)  # kept until the source has found it
    return Rows(sizes={split: len(rows) for split, rows in held.value.items()}, sha256=digest.hexdigest())


def _plain(item: Any) -> Any:
    """Return a value of NumPy as Python's."""
    return item.tolist() if isinstance(item, np.generic | np.ndarray) else item


def _rows(value: Any, split: str) -> list[Row]:
    """Return rows as dictionaries: of pandas, polars, pyarrow and `datasets`, or of any iterable."""
    for name in ("to_dicts", "to_pylist"):  # of a polars frame, a pyarrow table
        if hasattr(value, name):
            value = getattr(value, name)()
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        hint = "; for a file state source={'kind': 'files', 'train': PATH}" if isinstance(value, str) else ""
        raise UserError(f"rows: {split}: found {type(value).__name__}; expected dictionaries, one for each row{hint}")
    rows: Iterable[Any] = value.to_dict("records") if hasattr(value, "iloc") else value
    found = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise UserError(f"rows: {split} row {number}: found {type(row).__name__}; expected a dictionary of fields")
        found.append({str(key): _plain(item) for key, item in row.items()})
    if not found:
        raise UserError(f"rows: {split}: found none; expected at least one row")
    return found
