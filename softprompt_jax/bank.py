"""A prompt bank: one frozen model in memory, many prompts, any mix of them in a batch.

A prompt's rows are read like words, so that a batch whose texts name different prompts is a batch like any other. The
rows in use lie on the device in a table of fixed size; each prompt holds some of its rows, wherever they are free.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from softprompt_jax import interop, placement
from softprompt_jax.backbone import decode
from softprompt_jax.backbone.pretrained import Backbone, load_backbone
from softprompt_jax.backbone.t5 import T5
from softprompt_jax.config import UserError, nearest
from softprompt_jax.methods.prompt import PromptTable
from softprompt_jax.placement import Placement
from softprompt_jax.tasks import resolve
from softprompt_jax.tasks.tokenizer import load_tokenizer

_SUFFIXES = (".safetensors", ".npy")
_WRITTEN = 128  # rows that are written onto the device at once


class _Rows(nnx.Param):
    """The device's table of prompt rows, which changes between batches."""


class _Table(PromptTable):
    """Looks rows up by gathering them, whose cost does not depend on how many there are."""

    def __init__(self, rows: Float[Array, "C D"]):
        self.rows = _Rows(rows, axes=("prompt", "embed"))
        self.place, self.placement = "before", Placement()

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
class Stored:
    """A prompt in host memory: its rows, where they stand, and what its file says of it."""

    rows: Float[np.ndarray, "P D"]
    placed: Placement
    place: str
    task: str | None = None
    label_words: tuple[str, ...] = ()

    @property
    def encoder_length(self) -> int:
        """How many ids it puts around a text."""
        return len(self.placed.before) + len(self.placed.after)


class PromptBank:
    """Prompts for one backbone by name, and answers to texts that each name one of them.

    Up to `device_rows` prompt rows are kept on the device, those used last; all others cost host memory only.
    """

    def __init__(
        self,
        backbone: Backbone | str = "embedded",
        device_rows: int = 8192,
        batch_size: int = 32,
        max_input_tokens: int = 512,
        dtype: str = "float32",
    ):
        self.backbone = load_backbone(backbone, dtype) if isinstance(backbone, str) else backbone
        self.batch_size, self.max_input_tokens = batch_size, max_input_tokens
        self.truncated = 0  # texts so far that were longer than `max_input_tokens`
        model = nnx.merge(*nnx.split(self.backbone.model))
        width = model.settings.d_model
        model.prompt = _Table(jnp.zeros((device_rows, width), jnp.float32))
        graphdef, self._table, self._frozen = nnx.split(model, _Rows, ...)
        self._structure = Structure(graphdef)
        self._first, self._width = model.settings.vocabulary_rows, width
        self.tokenizer = load_tokenizer(self.backbone.folder)
        self._prompts: dict[str, Stored] = {}
        self._places: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()  # by last use
        self._free = list(range(device_rows))

    @classmethod
    def open(cls, folder: str | Path, backbone: str | None = None, **settings: Any) -> PromptBank:
        """Open a folder of prompt files and finished runs; a name is the file's or the run folder's.

        The backbone is the one that the prompts name, if no other is given.
        """
        found = sorted(
            path for path in Path(folder).iterdir() if path.suffix in _SUFFIXES or (path / interop.PROMPT_FILE).exists()
        )
        if not found:
            raise UserError(f"{folder}: no prompt; expected .safetensors, .npy or the folders of finished runs")
        if backbone is None:
            named = {interop.read_prompt(path)[1].get("backbone") for path in found} - {None}
            if len(named) != 1:
                said = ", ".join(sorted(map(str, named))) or "none"
                raise UserError(f"{folder}: its prompts name {said}; expected one backbone; add --backbone")
            backbone = named.pop()
        bank = cls(str(backbone), **settings)
        for path in found:
            bank.add(path.stem if path.suffix in _SUFFIXES else path.name, path)
        return bank

    @property
    def names(self) -> list[str]:
        """The names of all prompts."""
        return sorted(self._prompts)

    def prompt(self, name: str) -> Stored:
        """Return a prompt; an unknown name is a UserError."""
        found = self._prompts.get(name)
        if found is None:
            known = ", ".join(self.names[:8]) or "none"
            raise UserError(f"prompt {name!r}: not in the bank; found {known}{nearest(name, self._prompts)}")
        return found

    def add(self, name: str, source: str | Path | Float[np.ndarray, "P D"]) -> None:
        """Add a prompt: rows [P, D], or a file or run folder that holds some. One of that name is replaced."""
        self.put(name, self.read(name, source))

    def put(self, name: str, stored: Stored) -> None:
        """Add a prompt that has been read; one of that name is replaced."""
        self.remove(name, missing_ok=True)
        self._prompts[name] = stored

    def read(self, name: str, source: str | Path | Float[np.ndarray, "P D"]) -> Stored:
        """Return a prompt that would fit into the bank, for messages by its name; anything else is a UserError."""
        rows, metadata = (source, {}) if isinstance(source, np.ndarray) else interop.read_prompt(source)
        rows = np.array(rows, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self._width or not len(rows):
            raise UserError(
                f"prompt {name}: found shape {list(rows.shape)}; expected [P, {self._width}], the width of backbone "
                f"{self.backbone.identity}"
            )
        if len(rows) > self.device_rows:
            raise UserError(
                f"prompt {name}: {len(rows)} rows; expected at most the bank's {self.device_rows} device_rows"
            )
        interop.check_backbone(metadata, self.backbone.model, f"prompt {name}", self.backbone.identity)
        place = metadata.get("place", "before")
        try:
            length = len(rows) // placement.rows(place, 1)
            placed = placement.place(place, length, self._first, self.tokenizer.encode)
        except ValueError as error:
            raise UserError(f"prompt {name}: {error}") from None
        return Stored(rows, placed, place, *_task(metadata))

    def remove(self, name: str, missing_ok: bool = False) -> None:
        """Forget a prompt."""
        if not missing_ok:
            self.prompt(name)
        self._prompts.pop(name, None)
        self._free += list(self._places.pop(name, ()))

    def generate(
        self, texts: Sequence[str], names: str | Sequence[str], max_tokens: int = 32
    ) -> list[tuple[str, float]]:
        """Answer each text under the prompt that it names; return (answer, its log-probability) in order.

        Answers do not depend on what else is in a batch. Errors: UserError for an unknown name.
        """
        names = [names] * len(texts) if isinstance(names, str) else list(names)
        if len(names) != len(texts):
            raise UserError(f"generate: {len(texts)} texts and {len(names)} prompt names; expected one for each text")
        for name in dict.fromkeys(names):
            self.prompt(name)
        answers: list[tuple[str, float]] = [("", 0.0)] * len(texts)
        ids = [self._tokenize(text) for text in texts]
        for group in self._batches(ids, names):
            tokens, before = self._tokens(group, ids, names)
            table = self._table
            found, scores = _answer(self._structure, table, self._frozen, tokens, before, max_tokens)
            for index, row, score in zip(group, np.asarray(found), np.asarray(scores), strict=False):
                answers[index] = self.tokenizer.decode([int(token) for token in row if token]), float(score)
        return answers

    def lines(
        self, rows: Iterable[tuple[str, Any]], max_tokens: int = 64, chunk: int = 1024
    ) -> Iterator[dict[str, Any]]:
        """Yield each row of (where, {"inputs": ..., "prompt": name, ...}) with its `prediction`, in order."""
        pending: list[dict[str, Any]] = []

        def answered() -> Iterator[dict[str, Any]]:
            texts, names = ([row[field] for row in pending] for field in ("inputs", "prompt"))
            for row, (answer, _) in zip(pending, self.generate(texts, names, max_tokens), strict=True):
                yield {**row, "prediction": answer}

        for where, row in rows:
            for field in ("inputs", "prompt"):
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    raise UserError(f'{where}: no text {field!r}; expected {{"inputs": "...", "prompt": "NAME"}}')
            try:
                self.prompt(row["prompt"])
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            pending.append(row)
            if len(pending) == chunk:
                yield from answered()
                pending = []
        yield from answered()

    # ------------------------------------------------------------------------------- batches, rows on the device

    def _tokenize(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        self.truncated += len(ids) >= self.max_input_tokens
        return ids[: self.max_input_tokens - 1]

    def _batches(self, ids: list[list[int]], names: list[str]) -> Iterator[list[int]]:
        """Yield indices of texts that are answered together: like lengths, and prompts that fit on the device."""

        def size(index: int) -> tuple[int, int]:
            stored = self._prompts[names[index]]
            return len(stored.placed.decoder), stored.encoder_length + len(ids[index])

        group: list[int] = []
        for index in sorted(range(len(ids)), key=size):
            wanted = {names[i] for i in [*group, index]}
            rows = sum(len(self._prompts[name].rows) for name in wanted)
            unlike = group and size(group[0])[0] != size(index)[0]
            if len(group) == self.batch_size or unlike or rows > self.device_rows:
                yield group
                group = []
            group.append(index)
        if group:
            yield group

    def _tokens(self, group: list[int], ids: list[list[int]], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return encoder tokens [B, T] and the decoder's prompt ids [B, n], both padded to few shapes."""
        self.load({names[index] for index in group})
        sides = list(zip(*(self.sides(names[index], ids[index]) for index in group), strict=True))
        longest = max(map(len, sides[0]))
        tokens = np.zeros((_few(len(group), 1), _few(longest, 16)), np.int32)
        prompts = np.zeros((len(tokens), len(sides[1][0])), np.int32)
        for row, (on_encoder, on_decoder) in enumerate(zip(*sides, strict=True)):
            tokens[row, : len(on_encoder)] = on_encoder
            prompts[row] = on_decoder
        return tokens, prompts

    def sides(self, name: str, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return what encoder and decoder read for a text under a prompt that `load` has brought onto the device."""
        placed, rows = self._prompts[name].placed, self._places[name]
        before, after, decoder = (self._moved(side, rows) for side in (placed.before, placed.after, placed.decoder))
        return [*before, *ids, *after, decode.EOS], decoder

    def _moved(self, ids: Any, rows: np.ndarray) -> list[int]:
        """Return ids in which a prompt's row i is where it lies on the device; anchor words stay."""
        return [int(i) if i < self._first else self._first + int(rows[i - self._first]) for i in ids]

    def load(self, wanted: set[str]) -> None:
        """Bring prompts onto the device, in the place of those that were not used for longest."""
        missing = [name for name in sorted(wanted) if name not in self._places]
        needed = sum(len(self._prompts[name].rows) for name in missing)
        for name in [name for name in self._places if name not in wanted]:
            if len(self._free) >= needed:
                break
            self._free += list(self._places.pop(name))
        if missing:
            rows = np.concatenate([self._prompts[name].rows for name in missing])
            where, self._free = np.asarray(self._free[:needed], np.int32), self._free[needed:]
            for start in range(0, needed, _WRITTEN):
                part = np.resize(np.arange(start, min(needed, start + _WRITTEN)), _WRITTEN)  # some again: one program
                self._table = _write(self._table, where[part], rows[part])
            ends = np.cumsum([len(self._prompts[name].rows) for name in missing])[:-1]
            self._places |= dict(zip(missing, np.split(where, ends), strict=True))
        for name in wanted:
            self._places.move_to_end(name)

    def _table_rows(self) -> jax.Array:
        return jax.tree.leaves(self._table)[0]

    @property
    def device_rows(self) -> int:
        """How many prompt rows the device holds at most."""
        return len(self._table_rows())

    @property
    def parts(self) -> tuple[Structure, Any, Any]:
        """The model with the rows that `load` has brought: `structure.merge(table, frozen)`."""
        return self._structure, self._table, self._frozen


def _task(metadata: dict[str, str]) -> tuple[str | None, tuple[str, ...]]:
    """Return the name and label words of the task that a prompt was trained on, as far as its file says."""
    try:
        task = resolve(json.loads(metadata["settings"])["task"])
    except (KeyError, ValueError, TypeError, UserError):
        return metadata.get("task"), ()
    return task.name, tuple(task.words or ())


def _few(size: int, least: int) -> int:
    """Round up to a power of two, or to the one and a half between: at most half is padding, few are compiled."""
    power = max(least, 1 << max(0, size - 1).bit_length())
    between = power * 3 // 4
    return between if size <= between and between >= least and power > 2 else power


@functools.partial(jax.jit, donate_argnums=0)
def _write(table: Any, where: Int[Array, " n"], rows: Float[Array, "n D"]) -> Any:
    return jax.tree.map(lambda old: old.at[where].set(rows), table)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _answer(structure: Structure, table: Any, frozen: Any, tokens: Array, before: Array, max_tokens: int) -> Any:
    return decode.greedy(structure.merge(table, frozen), tokens, max_tokens, decoder_prompt=before)
