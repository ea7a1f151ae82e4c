"""A prompt bank: one frozen model in memory, many prompts, any mix of them in a batch.

A prompt's rows are read like words, so that a batch whose texts name different prompts is a batch like any other. So
are prefixes and IA3's factors, called extras, which each row of a batch takes from tables (on_device.py).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from softprompt_jax import config, methods
from softprompt_jax.checkpoints import artifact
from softprompt_jax.checkpoints.backbone import Backbone, load_backbone
from softprompt_jax.checkpoints.tensors import open_safetensors
from softprompt_jax.config import UserError, nearest
from softprompt_jax.data import prompt_layout
from softprompt_jax.data.prompt_layout import Placement
from softprompt_jax.data.tokenizer import load_tokenizer
from softprompt_jax.inference.prompt_cache import OnDevice, Stored, Structure
from softprompt_jax.models import decode, per_example
from softprompt_jax.models.decode import Decoding, Greedy
from softprompt_jax.models.quantized import Quantization
from softprompt_jax.run import Run
from softprompt_jax.tasks import resolve

_SUFFIXES = (".safetensors", ".npy")
_FILES = (artifact.PROMPT_FILE, artifact.TRAINED_FILE)


class PromptBank:
    """Prompts for one backbone by name, and answers to texts that each name one of them.

    A prompt may also be a prefix, or IA3's factors, or several of these. Up to `device_rows` prompt rows and the extras
    of `device_extras` prompts are kept on the device, those used last; all others cost host memory only.
    """

    def __init__(
        self,
        backbone: Backbone | str = "embedded",
        device_rows: int = 8192,
        batch_size: int = 32,
        max_input_tokens: int = 512,
        dtype: str = "float32",
        device_extras: int = 32,
        quantize: Quantization | None = None,
        any_backbone: bool = False,
    ):
        if isinstance(backbone, str):
            backbone = load_backbone(backbone, dtype, quantize=quantize)
        self.backbone, self._any_backbone = backbone, any_backbone
        self.batch_size, self.max_input_tokens = batch_size, max_input_tokens
        self.truncated = 0  # texts so far that were longer than `max_input_tokens`
        self.device = OnDevice(self.backbone.model, device_rows, device_extras)
        self.tokenizer = load_tokenizer(self.backbone.folder)
        self._prompts: dict[str, Stored] = {}
        self._placements: dict[tuple[str, int], Placement] = {}  # prompts of one length and place share it

    @classmethod
    def open(cls, folder: str | Path, backbone: str | None = None, **settings: Any) -> PromptBank:
        """Open a folder of prompt files and finished runs; a name is the file's or the run folder's.

        The backbone is the one that the prompts name, if no other is given.
        """
        found = sorted(
            path
            for path in Path(folder).iterdir()
            if path.suffix in _SUFFIXES or any((path / file).exists() for file in _FILES)
        )
        if not found:
            raise UserError(f"{folder}: no prompt; expected .safetensors, .npy or the folders of finished runs")
        if backbone is None:
            named = {_metadata(path).get("backbone") for path in found} - {None}
            if len(named) != 1:
                said = ", ".join(sorted(map(str, named))) or "none"
                raise UserError(f"{folder}: its prompts name {said}; expected one backbone; add --backbone")
            backbone = named.pop()
        bank = cls(str(backbone), **settings)
        for path in found:
            name = path.stem if path.suffix in _SUFFIXES else path.name
            if name in bank._prompts:
                raise UserError(f"{folder}: two prompts of the name {name!r}; expected one of each; rename {path.name}")
            bank.add(name, path)
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
        """Add a prompt: rows [P, D] (none: the bare backbone), a file or a run folder. One of that name is replaced."""
        self.put(name, self.read(name, source))

    def put(self, name: str, stored: Stored) -> None:
        """Add a prompt that has been read; one of that name is replaced."""
        self.remove(name, missing_ok=True)
        self._prompts[name] = stored
        self.device.expect(stored.extras)

    def read(self, name: str, source: str | Path | Float[np.ndarray, "P D"]) -> Stored:
        """Return a prompt that would fit into the bank, for messages by its name; anything else is a UserError."""
        if isinstance(source, np.ndarray):
            return self._stored(name, source, "before", {})
        trained = _trained_file(Path(source))
        if trained is not None:
            return self._read_trained(name, trained)
        rows, metadata = artifact.read_prompt(source)
        self._check(name, metadata)
        return self._stored(name, rows, metadata.get("place", "before"), metadata)

    def _check(self, name: str, metadata: dict[str, str]) -> None:
        if not self._any_backbone:
            artifact.check_backbone(metadata, self.backbone.model, f"prompt {name}", self.backbone.identity)

    def _stored(self, name: str, rows: np.ndarray, place: str, metadata: dict[str, str], **extras: Any) -> Stored:
        rows, width = np.array(rows, np.float32), self.backbone.settings.d_model
        if rows.ndim != 2 or rows.shape[1] != width:
            raise UserError(
                f"prompt {name}: found shape {list(rows.shape)}; expected [P, {width}], the width of backbone "
                f"{self.backbone.identity}"
            )
        if len(rows) > self.device.rows:
            raise UserError(
                f"prompt {name}: {len(rows)} rows; expected at most the bank's {self.device.rows} device_rows"
            )
        if (place, len(rows)) not in self._placements:
            try:
                length = len(rows) // prompt_layout.rows(place, 1)
                placed = (
                    prompt_layout.place(place, length, self.device.first, self.tokenizer.encode)
                    if length
                    else Placement()
                )
            except ValueError as error:
                raise UserError(f"prompt {name}: {error}") from None
            self._placements[place, len(rows)] = placed
        return Stored(rows, self._placements[place, len(rows)], place, *_task(metadata), **extras)

    def _read_trained(self, name: str, path: Path) -> Stored:
        """Read what a run has trained that was not a prompt alone: its methods say what of it can differ by row."""
        trained, metadata = artifact.load_trained(path)
        self._check(name, metadata)
        try:
            settings = json.loads(metadata["settings"])
        except (KeyError, ValueError):
            raise UserError(
                f"prompt {name}: {path.name} holds neither a prompt nor a run's settings; expected either"
            ) from None
        run = config.parse(Run, settings, str(path)).finished()
        if run.own_prompts:
            raise UserError(
                f"prompt {name}: a prompt for each task; expected one; give the files in the run's prompts/"
            )
        model = nnx.merge(*nnx.split(self.backbone.model))
        try:  # what starts from a file or a label word has lost that with `finished`: nothing else is read
            methods.attach(run.methods, model, jax.random.key(0), methods.Context(self.tokenizer.encode))
            methods.put_trained(model, trained, path.name)
            extras = {key: part for method in run.methods for key, part in method.per_example_state(model).items()}
        except UserError as error:
            raise UserError(f"prompt {name}: {error}") from None
        rows = (
            np.zeros((0, self.backbone.settings.d_model), np.float32)
            if model.prompt is None
            else np.asarray(model.prompt.table())
        )
        place = "before" if model.prompt is None else model.prompt.place
        return self._stored(name, rows, place, metadata, extras=extras)

    def remove(self, name: str, missing_ok: bool = False) -> None:
        """Forget a prompt."""
        if not missing_ok:
            self.prompt(name)
        self._prompts.pop(name, None)
        self.device.forget(name)

    def generate(
        self,
        texts: Sequence[str],
        names: str | Sequence[str],
        max_tokens: int = 32,
        decoding: Decoding | None = None,
        forced: str | Sequence[str] = "",
    ) -> list[tuple[str, float]]:
        """Answer each text under the prompt that it names; return (answer, its score) in order.

        The score is a log-probability, of beams (`decoding`) a penalised one. `forced`: what all answers, or each,
        begin with. Answers do not depend on what else is in a batch. Errors: UserError for an unknown name.
        """
        return [answers[0] for answers in self.answers(texts, names, max_tokens, decoding, forced)]

    def answers(
        self,
        texts: Sequence[str],
        names: str | Sequence[str],
        max_tokens: int = 32,
        decoding: Decoding | None = None,
        forced: str | Sequence[str] = "",
        first: int = 0,
    ) -> list[list[tuple[str, float]]]:
        """Return all answers to each text: the samples, or the beams from the best; otherwise as `generate`.

        Samples follow from the seed and a text's number, from `first` on.
        """
        names = [names] * len(texts) if isinstance(names, str) else list(names)
        begun = [forced] * len(texts) if isinstance(forced, str) else list(forced)
        for given, what in ((names, "prompt names"), (begun, "forced beginnings")):
            if len(given) != len(texts):
                raise UserError(f"generate: {len(texts)} texts and {len(given)} {what}; expected one for each text")
        for name in dict.fromkeys(names):
            self.prompt(name)
        answers: list[list[tuple[str, float]]] = [[]] * len(texts)
        ids = [self._tokenize(text) for text in texts]
        beginnings = self.tokenizer.beginnings(begun, max_tokens)
        for group in self._batches(ids, names):
            tokens, before = self._tokens(group, ids, names)
            padded = np.resize(group, len(tokens))  # rows that only fill the batch have no token
            tables, entries = self.device.entries([names[index] for index in padded])
            rest = tables if entries.any() else {}, entries, padded + first, beginnings[padded]
            parts = *self.device.parts, decoding or Greedy(), max_tokens
            found, scores = map(np.asarray, _answer(*parts, tokens, before, *rest))
            for index, rows, values in zip(group, found, scores, strict=False):
                decoded = (self.tokenizer.decode([int(token) for token in row if token]) for row in rows)
                answers[index] = list(zip(decoded, map(float, values), strict=True))
        return answers

    def lines(
        self,
        rows: Iterable[tuple[str, Any]],
        max_tokens: int = 64,
        chunk: int = 1024,
        decoding: Decoding | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield each row of (where, {"inputs": ..., "prompt": name, ...}) with its `prediction`, in order.

        Of several samples or beams all are its `answers`. A row may have a `forced` beginning.
        """
        pending: list[dict[str, Any]] = []
        done = 0

        def answered() -> Iterator[dict[str, Any]]:
            texts, names = ([row[field] for row in pending] for field in ("inputs", "prompt"))
            forced = [row.get("forced", "") for row in pending]
            found = self.answers(texts, names, max_tokens, decoding, forced, done)
            for row, answers in zip(pending, found, strict=True):
                told = [text for text, _ in answers]
                yield {**row, "prediction": told[0], **({"answers": told} if len(told) > 1 else {})}

        for where, row in rows:
            for field in ("inputs", "prompt"):
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    raise UserError(f'{where}: no text {field!r}; expected {{"inputs": "...", "prompt": "NAME"}}')
            if not isinstance(row.get("forced", ""), str):
                raise UserError(f"{where}: forced is no text; expected what the answer begins with")
            try:
                self.prompt(row["prompt"])
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            pending.append(row)
            if len(pending) == chunk:
                yield from answered()
                done, pending = done + len(pending), []
        yield from answered()

    # ------------------------------------------------------------------------------- batches, rows on the device

    def _tokenize(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        self.truncated += len(ids) >= self.max_input_tokens
        return ids[: self.max_input_tokens - 1]

    def _batches(self, ids: list[list[int]], names: list[str]) -> Iterator[np.ndarray]:
        """Yield indices of texts that are answered together: of like lengths, and of prompts that fit on the device."""

        def length(index: int) -> int:
            return self._prompts[names[index]].encoder_length + len(ids[index])

        group: list[int] = []
        wanted: set[str] = set()
        for index in sorted(range(len(ids)), key=length):
            wanted.add(names[index])
            full = len(group) == self.batch_size or not self.device.fit([self._prompts[name] for name in wanted])
            if group and full:
                yield np.asarray(group)
                group, wanted = [], {names[index]}
            group.append(index)
        if group:
            yield np.asarray(group)

    def _tokens(self, group: np.ndarray, ids: list[list[int]], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return encoder tokens [B, T] and the decoder's prompt ids [B, n], both padded to few shapes."""
        self.load({names[index] for index in group})
        sides = list(zip(*(self.sides(names[index], ids[index]) for index in group), strict=True))
        longest = max(map(len, sides[0]))
        tokens = np.zeros((_few(len(group), 1), _few(longest, 16)), np.int32)
        before = max(map(len, sides[1]))
        prompts = np.zeros((len(tokens), before and _few(before, 1)), np.int32)
        for row, (on_encoder, on_decoder) in enumerate(zip(*sides, strict=True)):
            tokens[row, : len(on_encoder)] = on_encoder
            prompts[row, prompts.shape[1] - len(on_decoder) :] = on_decoder
        return tokens, prompts

    def load(self, wanted: set[str]) -> None:
        """Bring prompts onto the device, in the place of those that were not used for longest."""
        self.device.load({name: self._prompts[name] for name in wanted})

    def sides(self, name: str, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return what encoder and decoder read for a text under a prompt that `load` has brought onto the device."""
        placed = self._prompts[name].placed
        before, after, decoder = (self.device.ids(name, side) for side in (placed.before, placed.after, placed.decoder))
        return [*before, *ids, *after, decode.EOS], decoder


def _trained_file(path: Path) -> Path | None:
    """Return the file with all that a run has trained, where it is not a prompt alone."""
    if path.is_dir():
        found = path / artifact.TRAINED_FILE
        return found if found.exists() and not (path / artifact.PROMPT_FILE).exists() else None
    holds_other = path.suffix == ".safetensors" and path.exists() and artifact.ROWS not in open_safetensors(path)
    return path if holds_other else None


def _metadata(path: Path) -> dict[str, str]:
    """Return what a prompt's file or a run's says of itself."""
    trained = _trained_file(path)
    return artifact.read_prompt(path)[1] if trained is None else artifact.read_metadata(trained)


def _task(metadata: dict[str, str]) -> tuple[str | None, tuple[str, ...], bool]:
    """Return what a prompt's file says of its task: name, label words, and whether answers begin with <extra_id_0>."""
    try:
        settings = json.loads(metadata["settings"])
        task = resolve(settings["task"])
    except (KeyError, ValueError, TypeError, UserError):
        return metadata.get("task"), (), False
    return task.name, tuple(task.words or ()), bool(settings.get("target_sentinel"))


def _few(size: int, least: int) -> int:
    """Round up to a power of two, or to the one and a half between: at most half is padding, few are compiled."""
    power = max(least, 1 << max(0, size - 1).bit_length())
    between = power * 3 // 4
    return between if size <= between and between >= least and power > 2 else power


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _answer(
    structure: Structure,
    table: Any,
    frozen: Any,
    how: Decoding,
    max_tokens: int,
    tokens: Array,
    before: Array,
    tables: per_example.BatchState,
    entries: Array,
    numbers: Array,
    forced: Array,
) -> Any:
    model = structure.merge(table, frozen)
    per_example.install(model, per_example.gather(tables, entries))
    return decode.answers(model, tokens, max_tokens, how, numbers, before, forced)
