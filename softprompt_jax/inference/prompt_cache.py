"""What of a prompt bank lies on the device: the rows and extras of the prompts used last, in tables of fixed size.

Each prompt holds some of the rows, wherever they are free, and an entry of the tables of models/per_example.py.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from softprompt_jax.data.prompt_layout import PromptLayout
from softprompt_jax.data.tokenizer import PLAIN, TextSettings
from softprompt_jax.distributed.mesh import constrain, replicated, shard_model
from softprompt_jax.inference.programs import DeviceModel
from softprompt_jax.methods.prompt import PromptTable
from softprompt_jax.models import per_example
from softprompt_jax.models.causal import CausalLM
from softprompt_jax.models.language_model import LanguageModel

_WRITTEN = 128  # rows that are written at once
_KEYS = "positioned decoder"  # name of a prompt's own keys and values (models/per_example.py)


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


def with_table(model: LanguageModel, rows: int) -> tuple[LanguageModel, type[nnx.Param]]:
    """Return a model, which may be abstract, with a table of so many prompt rows, and the type of the table."""

    def attach(model: LanguageModel) -> LanguageModel:
        model.prompt = _Table(jnp.zeros((rows, model.settings.d_model), jnp.float32))
        return model

    abstract = isinstance(model.embedding.get_value(), jax.ShapeDtypeStruct)
    return nnx.eval_shape(attach, model) if abstract else attach(nnx.merge(*nnx.split(model))), _Rows


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
    text: TextSettings = PLAIN  # how its texts are put to the model
    extras: per_example.PerExampleState = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        what = ", ".join([f"{len(self.rows)} x {self.rows.shape[1]}", self.place, *self.kinds])
        return f"HostPrompt({what}{f', task {self.task!r}' if self.task else ''})"

    @property
    def kinds(self) -> list[str]:
        """What its extras are: a prefix, factors, an offset of the text, several of these, or nothing."""
        return sorted(set(map(per_example.kind_of, self.extras)))


class DevicePromptCache:
    """Tables for `rows` prompt rows and the extras of `extras` prompts, and a model that reads them."""

    def __init__(self, model: LanguageModel, rows: int, extras: int):
        self.rows, self.extras, self.first = rows, extras, model.settings.vocabulary_rows
        self.model = DeviceModel.of(shard_model(with_table(model, rows)[0]), _Rows)  # with the rows that are here
        self._places: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()  # by last use
        self._layouts: dict[str, PromptLayout] = {}  # with the ids of the rows as they lie here
        self._free = list(range(rows))
        self._shared = 0  # most ids before a text that are read once for all texts
        self._shapes: per_example.Shapes = {}  # of the extras that there may be
        self._tables: per_example.BatchState = {}
        self._entries: collections.OrderedDict[str, int] = collections.OrderedDict()  # by last use; from 1

    @property
    def nbytes(self) -> int:
        """How much memory the tables have, used or free."""
        return sum(table.nbytes for table in (*jax.tree.leaves(self.model.changing), *self._tables.values()))

    def expect(self, extras: per_example.PerExampleState) -> None:
        """Make room for such extras at the next load; the tables grow by what is longer or of another kind."""
        self._shapes = per_example.union_shapes(self._shapes, extras)

    def has_room(self, extras: per_example.PerExampleState) -> bool:
        """Tell whether the tables would not grow by such extras."""
        return per_example.union_shapes(self._shapes, extras) == self._shapes

    def share_keys(self, prompts: Iterable[HostPrompt]) -> None:
        """Read what stands before the texts of a decoder-only model once for each prompt, and keep its keys and values.

        The tables get room for the longest of `prompts`; the rows of longer ones are read with each text.
        """
        self._shared = max((one.layout.lengths[0] for one in prompts if _stands_before(one)), default=0)
        settings = self.model.merge().settings
        shape = 2, settings.num_layers, self._shared, settings.num_key_heads * settings.d_kv
        if self._shared:
            self.expect({_KEYS: np.broadcast_to(np.float32(0), shape)})

    def _shares(self, prompt: HostPrompt) -> bool:
        return _stands_before(prompt) and prompt.layout.lengths[0] <= self._shared

    def fit(self, prompts: Sequence[HostPrompt]) -> bool:
        """Tell whether different prompts have room together."""
        rows = sum(len(one.rows) for one in prompts if not self._shares(one))
        return rows <= self.rows and sum(map(self.takes_entry, prompts)) <= self.extras

    def takes_entry(self, prompt: HostPrompt) -> bool:
        """Tell whether a prompt has an entry of the tables."""
        return bool(prompt.extras) or self._shares(prompt)

    def forget(self, name: str) -> None:
        """Give free what a prompt has here."""
        self._free += list(self._places.pop(name, ()))
        self._layouts.pop(name, None)
        self._entries.pop(name, None)

    def load(self, wanted: Mapping[str, HostPrompt]) -> None:
        """Bring prompts here, in the place of those that were not used for longest."""
        shared = {name: one for name, one in wanted.items() if self._shares(one)}
        self._layouts |= {name: PromptLayout(end=one.layout.end) for name, one in shared.items()}
        missing = [name for name in sorted(wanted) if name not in self._places and name not in shared]
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
                new = jax.tree.map(lambda _, part=part: rows[part], self.model.changing)
                self.model = dataclasses.replace(self.model, changing=_write(self.model.changing, where[part], new))
            ends = np.cumsum([len(wanted[name].rows) for name in missing])[:-1]
            self._places |= dict(zip(missing, np.split(where, ends), strict=True))
            for name in missing:
                self._layouts[name] = wanted[name].layout.with_rows(self._places[name], self.first)
        for name in wanted.keys() - shared.keys():
            self._places.move_to_end(name)
        self._load_extras({name: one for name, one in wanted.items() if self.takes_entry(one)})

    def _load_extras(self, wanted: dict[str, HostPrompt]) -> None:
        shapes = {name: table.shape[1:] for name, table in self._tables.items() if name in self._shapes}
        if wanted and shapes != self._shapes:
            self._entries.clear()
            self._tables = replicated(per_example.empty_tables(self._shapes, self.extras + 1))
        for name in sorted(set(wanted) - set(self._entries)):
            if len(self._entries) == self.extras:
                place = self._entries.pop(next(other for other in self._entries if other not in wanted))
            else:
                place = min(set(range(1, self.extras + 1)) - set(self._entries.values()))
            extras = wanted[name].extras or self._read_keys(wanted[name])
            self._tables = _write(self._tables, place, per_example.table_entry(self._shapes, extras))
            self._entries[name] = place
        for name in wanted:
            self._entries.move_to_end(name)

    def _read_keys(self, prompt: HostPrompt) -> per_example.PerExampleState:
        """Return the keys and values that the model has for what stands before a text."""
        ids, length = prompt.layout.before[0], self._shared  # of one length, so that one program is compiled
        rows = np.zeros((length, prompt.rows.shape[1]), np.float32)
        rows[: len(prompt.rows)] = prompt.rows
        tokens = np.pad(ids, (0, length - len(ids)), constant_values=-1)[None]
        model = dataclasses.replace(self.model, changing=jax.tree.map(lambda _: rows, self.model.changing))
        return {_KEYS: np.asarray(_keys_values(model, tokens))[:, :, : len(ids)]}

    def layout(self, name: str) -> PromptLayout:
        """Return the layout of a prompt that is here, with the ids of its rows as they lie here."""
        return self._layouts[name]

    def batch(self, names: Sequence[str]) -> DeviceModel:
        """Return the model with the entries of a batch's prompts; 0, which is nothing, for one without extras."""
        entries = np.asarray([self._entries.get(name, 0) for name in names], np.int32)
        return dataclasses.replace(self.model, tables=self._tables, entries=entries)


def padded(
    sides: Sequence[tuple[np.ndarray, np.ndarray]], rows: int, length: int, before: int, padding: int = 0
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B P"]]:
    """Return what encoder and decoder read for texts, as `rows` rows; a shorter decoder prompt has 0 on its left."""
    tokens, prompts = np.full((rows, length), padding, np.int32), np.zeros((rows, before), np.int32)
    for row, (on_encoder, on_decoder) in enumerate(sides):
        tokens[row, : len(on_encoder)] = on_encoder
        prompts[row, before - len(on_decoder) :] = on_decoder
    return tokens, prompts


def _stands_before(prompt: HostPrompt) -> bool:
    """Tell whether a prompt is rows, and perhaps words, before a text, and nothing else."""
    (around, on_decoder), before = prompt.layout.lengths, prompt.layout.before.shape[1]
    return len(prompt.rows) > 0 and around == before and not on_decoder and not prompt.extras


@jax.jit
def _keys_values(model: DeviceModel, tokens: Int[Array, "1 P"]) -> Float[Array, "2 L P GK"]:
    merged = model.merge()
    assert isinstance(merged, CausalLM)
    _, (_, *pair) = merged.run(tokens, keep=True)
    return jnp.stack([part[:, 0].swapaxes(1, 2).reshape(len(part), tokens.shape[1], -1) for part in pair])


@functools.partial(jax.jit, donate_argnums=0)
def _write(tables: Any, where: Any, new: Any) -> Any:
    """Write numbers into tables, which stay whole on every device."""
    changed = jax.tree.map(lambda table, values: table.at[where].set(values), tables, new)
    return jax.tree.map(lambda table: constrain(table, *[None] * table.ndim), changed)
