"""What of a prompt bank lies on the device: the rows and extras of the prompts used last, in tables of fixed size.

Each prompt holds some of the rows, wherever they are free, and an entry of the tables of models/per_example.py.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from softprompt_jax.data.prompt_layout import PromptLayout
from softprompt_jax.methods.prompt import PromptTable
from softprompt_jax.models import per_example
from softprompt_jax.models.t5 import T5

_WRITTEN = 128  # rows that are written at once


class _Rows(nnx.Param):
    """The device's table of prompt rows, which changes between batches."""


class _Table(PromptTable):
    """Looks rows up by gathering them, whose cost does not depend on how many there are."""

    def __init__(self, rows: Float[Array, "C D"]):
        self.rows = _Rows(rows, axes=("prompt", "embed"))
        self.place, self.layout = "before", PromptLayout()

    def table(self) -> Float[Array, "C D"]:
        return self.rows[...]

    def __call__(
        self, indices: Int[Array, "B T"], virtual: Bool[Array, "B T"], key: jax.Array | None = None
    ) -> Float[Array, "B T D"]:
        return self.rows[...][jnp.clip(indices, 0, len(self.rows[...]) - 1)]


class Structure:
    """A model's graphdef as a static argument; it is hashed once, not at every call."""

    def __init__(self, graphdef: Any):
        self.graphdef, self._hash = graphdef, hash(graphdef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self.graphdef == other.graphdef

    def merge(self, *states: Any) -> T5:
        """Return the model of these arrays."""
        return nnx.merge(self.graphdef, *states)


@dataclasses.dataclass(frozen=True)
class HostPrompt:
    """A prompt in host memory: its rows, where they stand, its extras, and what its file says of it."""

    rows: Float[np.ndarray, "P D"]
    layout: PromptLayout
    place: str
    task: str | None = None
    label_words: tuple[str, ...] = ()
    target_sentinel: bool = False  # answers begin with <extra_id_0>
    step: int | None = None  # of the checkpoint that was read, where the run has not finished
    extras: per_example.PerExampleState = dataclasses.field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """What its extras are: a prefix, factors, both, or nothing."""
        return sorted({"prefix" if per_example.is_prefix(name) else "factors" for name in self.extras})


class DevicePromptCache:
    """Tables for `rows` prompt rows and the extras of `extras` prompts, and a model that reads them."""

    def __init__(self, model: T5, rows: int, extras: int):
        model = nnx.merge(*nnx.split(model))
        self.rows, self.extras, self.first = rows, extras, model.settings.vocabulary_rows
        model.prompt = _Table(jnp.zeros((rows, model.settings.d_model), jnp.float32))
        graphdef, self._table, self._frozen = nnx.split(model, _Rows, ...)
        self._structure = Structure(graphdef)
        self._places: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()  # by last use
        self._layouts: dict[str, PromptLayout] = {}  # with the ids of the rows as they lie here
        self._free = list(range(rows))
        self._shapes: per_example.Shapes = {}  # of the extras that there may be
        self._tables: per_example.BatchState = {}
        self._entries: collections.OrderedDict[str, int] = collections.OrderedDict()  # by last use; from 1

    @property
    def parts(self) -> tuple[Structure, Any, Any]:
        """The model with the rows that are here: `structure.merge(table, frozen)`."""
        return self._structure, self._table, self._frozen

    @property
    def nbytes(self) -> int:
        """How much memory the tables have, used or free."""
        return sum(table.nbytes for table in (*jax.tree.leaves(self._table), *self._tables.values()))

    def expect(self, extras: per_example.PerExampleState) -> None:
        """Make room for such extras at the next load; the tables grow by what is longer or of another kind."""
        self._shapes = per_example.union_shapes(self._shapes, extras)

    def has_room(self, extras: per_example.PerExampleState) -> bool:
        """Tell whether the tables would not grow by such extras."""
        return per_example.union_shapes(self._shapes, extras) == self._shapes

    def fit(self, prompts: Sequence[HostPrompt]) -> bool:
        """Tell whether different prompts have room together."""
        rows, extras = sum(len(one.rows) for one in prompts), sum(bool(one.extras) for one in prompts)
        return rows <= self.rows and extras <= self.extras

    def forget(self, name: str) -> None:
        """Give free what a prompt has here."""
        self._free += list(self._places.pop(name, ()))
        self._layouts.pop(name, None)
        self._entries.pop(name, None)

    def load(self, wanted: Mapping[str, HostPrompt]) -> None:
        """Bring prompts here, in the place of those that were not used for longest."""
        missing = [name for name in sorted(wanted) if name not in self._places]
        needed = sum(len(wanted[name].rows) for name in missing)
        for name in [name for name in self._places if name not in wanted]:
            if len(self._free) >= needed:
                break
            self._free += list(self._places.pop(name))
            del self._layouts[name]
        if missing:
            rows = np.concatenate([wanted[name].rows for name in missing])
            where, self._free = np.asarray(self._free[:needed], np.int32), self._free[needed:]
            for start in range(0, needed, _WRITTEN):
                part = np.resize(np.arange(start, min(needed, start + _WRITTEN)), _WRITTEN)  # some again: one program
                self._table = _write(self._table, where[part], rows[part])
            ends = np.cumsum([len(wanted[name].rows) for name in missing])[:-1]
            self._places |= dict(zip(missing, np.split(where, ends), strict=True))
            for name in missing:
                self._layouts[name] = wanted[name].layout.with_rows(self._places[name], self.first)
        for name in wanted:
            self._places.move_to_end(name)
        self._load_extras({name: one.extras for name, one in wanted.items() if one.extras})

    def _load_extras(self, wanted: dict[str, per_example.PerExampleState]) -> None:
        if (
            wanted
            and {name: self._tables[name].shape[1:] for name in self._tables if name in self._shapes} != self._shapes
        ):
            self._entries.clear()
            self._tables = per_example.empty_tables(self._shapes, self.extras + 1)
        for name in sorted(set(wanted) - set(self._entries)):
            if len(self._entries) == self.extras:
                place = self._entries.pop(next(other for other in self._entries if other not in wanted))
            else:
                place = min(set(range(1, self.extras + 1)) - set(self._entries.values()))
            self._tables = _write_entry(self._tables, place, per_example.table_entry(self._shapes, wanted[name]))
            self._entries[name] = place
        for name in wanted:
            self._entries.move_to_end(name)

    def layout(self, name: str) -> PromptLayout:
        """Return the layout of a prompt that is here, with the ids of its rows as they lie here."""
        return self._layouts[name]

    def entries(self, names: Sequence[str]) -> tuple[per_example.BatchState, np.ndarray]:
        """Return the tables of extras and the entries of a batch's prompts; 0, which is nothing, for one without."""
        return self._tables, np.asarray([self._entries.get(name, 0) for name in names], np.int32)


@functools.partial(jax.jit, donate_argnums=0)
def _write(table: Any, where: Int[Array, " n"], rows: Float[Array, "n D"]) -> Any:
    return jax.tree.map(lambda old: old.at[where].set(rows), table)


@functools.partial(jax.jit, donate_argnums=0)
def _write_entry(tables: per_example.BatchState, where: Any, new: dict[str, Any]) -> per_example.BatchState:
    return {name: table.at[where].set(new[name]) for name, table in tables.items()}
