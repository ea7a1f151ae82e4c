"""A prompt bank: one frozen model in memory, many prompts, any mix of them in a batch.

A prompt's rows are read like words, so that a batch whose texts name different prompts is a batch like any other. So
are prefixes, IA3's factors and DePT's offsets, called extras, which each row of a batch takes from tables
(prompt_cache.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from softprompt_jax import methods
from softprompt_jax.assembly import ended_by, longest_input, own_mesh, run_of, with_trained
from softprompt_jax.checkpoints.artifact import Artifact, load_artifact
from softprompt_jax.checkpoints.backbone import Backbone, load_backbone
from softprompt_jax.config import UserError, nearest
from softprompt_jax.data import prompt_layout
from softprompt_jax.data.prompt_layout import NO_PROMPT, PromptLayout
from softprompt_jax.data.tokenizer import Tokenizer, load_tokenizer
from softprompt_jax.distributed.mesh import AnyMesh, entered, gather, make_mesh, round_rows, shard_batch
from softprompt_jax.inference import programs
from softprompt_jax.inference.bank_folder import SUFFIXES, about, artifacts_in, check_artifact, why_unfit
from softprompt_jax.inference.programs import DeviceModel
from softprompt_jax.inference.prompt_cache import DevicePromptCache, HostPrompt, padded
from softprompt_jax.inference.shares import CHUNK
from softprompt_jax.inference.texts import answer_lines, check_texts, is_number, one_for_each
from softprompt_jax.models.decode import MAX_TOKENS, Decoding, Greedy
from softprompt_jax.models.quantized import Quantization
from softprompt_jax.trust import named_backbone, reader


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
        mesh: AnyMesh | None = None,
    ):
        if isinstance(backbone, str):
            backbone = load_backbone(backbone, dtype, mesh=mesh, quantize=quantize)
        elif mesh is not None:
            raise UserError(
                "bank: found a loaded backbone and a mesh; expected one of them; give load_backbone the mesh"
            )
        self.tokenizer = load_tokenizer(backbone.folder, backbone.text_format)
        self.backbone = dataclasses.replace(backbone, model=ended_by(backbone.model, self.tokenizer))
        self._any_backbone, self._device_lock = any_backbone, threading.RLock()
        self.batch_size, self.max_input_tokens = batch_size, max_input_tokens
        self.truncated = 0  # texts so far that were longer than `max_input_tokens`
        with self.computing():
            self.device = DevicePromptCache(self.backbone.model, device_rows, device_extras)
        self._reading: Any = functools.lru_cache(maxsize=64)(self.tokenizer.reading)
        self._prompts: dict[str, HostPrompt] = {}
        self._none = HostPrompt(np.zeros((0, self.backbone.settings.d_model), np.float32), NO_PROMPT, "before")
        self._layout = functools.lru_cache(256)(self._new_layout)  # prompts of one length and place share it

    @classmethod
    def open(cls, folder: str | Path, backbone: str | None = None, trust: bool = False, **settings: Any) -> PromptBank:
        """Open a folder of prompt files and runs; a name is the file's or the run folder's.

        Of an unfinished run the best checkpoint is taken, or else the latest. The backbone is the one that the prompts
        name, if no other is given; one that is no hub name needs `trust` (trust.py). Errors: UserError names all runs
        that cannot be in a bank. Of several devices the first run's own `mesh` is made, if no other is given.
        """
        devices = make_mesh(given := settings.pop("mesh", None))  # before anything is read
        found = artifacts_in(folder)
        if not found:
            raise UserError(f"{folder}: no prompt; expected .safetensors, .npy or the folders of runs")
        unfit = {path.name: reason for path, artifact in found.items() if (reason := why_unfit(artifact))}
        if unfit:
            raise UserError(
                f"{folder}: {'; '.join(f'{name}: {reason}' for name, reason in unfit.items())}; expected prompts, "
                "prefixes or ia3, of which each text of a batch can have its own; leave these out of the folder"
            )
        if backbone is None:
            named = {artifact.backbone for artifact in found.values()} - {None}
            if len(named) != 1:
                said = ", ".join(sorted(map(str, named))) or "none"
                raise UserError(f"{folder}: its prompts name {said}; expected one backbone; add --backbone")
            backbone = named_backbone([*found.values()], trust=trust)
        devices = make_mesh(None, own_mesh(found.values())) if given is None else devices
        bank = cls(str(backbone), mesh=devices, **settings)
        for path, artifact in found.items():
            name = path.stem if path.suffix in SUFFIXES else path.name
            if name in bank:
                raise UserError(f"{folder}: two prompts of the name {name!r}; expected one of each; rename {path.name}")
            bank.add(name, artifact, trust)
        return bank

    def __repr__(self) -> str:
        return f"PromptBank({self.backbone.identity!r}, {len(self)} prompts)"

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, name: object) -> bool:
        return name in self._prompts

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def names(self) -> list[str]:
        """The names of all prompts."""
        return sorted(self._prompts)

    @property
    def bare(self) -> str:
        """The name of the backbone, as a config has it; of a folder its last part. It stands for no prompt at all."""
        name = self.backbone.identity
        return Path(name).name if "://" in name or Path(name).expanduser().is_dir() else name

    def prompt(self, name: str) -> HostPrompt:
        """Return a prompt, or what stands for the bare backbone; an unknown name is a UserError."""
        if name == self.bare and name not in self._prompts:
            return self._none
        self.check_name(name)
        return self._prompts[name]

    def check_name(self, name: str) -> None:
        """Refuse a name of no prompt. Errors: UserError."""
        if name not in self._prompts:
            known = ", ".join(self.names[:8]) or "none"
            raise UserError(f"prompt {name!r}: not in the bank; found {known}{nearest(name, self._prompts)}")

    def add(self, name: str, source: str | Path | Artifact | Float[np.ndarray, "P D"], trust: bool = False) -> None:
        """Add a prompt: rows [P, D] (none: the bare backbone), a file or a run folder. One of that name is replaced."""
        self.put(name, self.read(name, source, trust))

    def put(self, name: str, prompt: HostPrompt) -> None:
        """Add a prompt that has been read; one of that name is replaced."""
        self.remove(name, missing_ok=True)
        self._prompts[name] = prompt
        self.device.expect(prompt.extras)

    def read(
        self, name: str, source: str | Path | Artifact | Float[np.ndarray, "P D"], trust: bool = False
    ) -> HostPrompt:
        """Return a prompt that would fit into the bank, for messages by its name; anything else is a UserError.

        No prompt of the bank changes, and nothing is attached to a model before the settings and shapes are found to
        fit, so that a server can read what is uploaded in a thread of its own.
        """
        if isinstance(source, np.ndarray):
            return self._host_prompt(name, source, "before", {})
        artifact = source if isinstance(source, Artifact) else load_artifact(source)
        check_artifact(name, artifact)
        if not self._any_backbone:
            where = f"prompt {name}"
            artifact.check_backbone(self.backbone.fingerprint(), self.backbone.identity, where=where)
        if artifact.rows is not None:
            return self._host_prompt(name, artifact.rows, artifact.place, about(artifact))
        run = run_of(artifact)
        assert run is not None  # by check_artifact
        run = run.finished() if artifact.step is None else run
        try:
            with self.computing():
                read = reader(artifact.source, trust)
                model = methods.finish(with_trained(artifact, run, self.backbone, read, self.tokenizer).model)
                extras = {key: part for method in run.methods for key, part in method.per_example_state(model).items()}
                table, place = np.zeros((0, self.backbone.settings.d_model), np.float32), "before"
                if model.prompt is not None:
                    table, place = gather(model.prompt.table()), model.prompt.place
        except UserError as error:
            raise UserError(f"prompt {name}: {error}") from None
        return self._host_prompt(name, table, place, about(artifact) | {"extras": extras})

    def _host_prompt(self, name: str, rows: np.ndarray, place: str, about: dict[str, Any]) -> HostPrompt:
        with np.errstate(over="ignore"):  # infinity is refused below
            rows, width = np.array(rows, np.float32), self.backbone.settings.d_model
        if rows.ndim != 2 or rows.shape[1] != width:
            raise UserError(
                f"prompt {name}: found shape {list(rows.shape)}; expected [P, {width}], the width of backbone "
                f"{self.backbone.identity}"
            )
        if not all(np.isfinite(part).all() for part in (rows, *about.get("extras", {}).values())):
            raise UserError(f"prompt {name}: holds NaN or infinity; expected finite numbers; train it again")
        if len(rows) > self.device.rows:
            raise UserError(
                f"prompt {name}: {len(rows)} rows; expected at most the bank's {self.device.rows} device_rows"
            )
        try:
            layout = self._layout(place, len(rows))
        except ValueError as error:
            raise UserError(f"prompt {name}: {error}") from None
        return HostPrompt(rows, layout, place, **about)

    def _new_layout(self, place: str, rows: int) -> PromptLayout:
        length, first = rows // prompt_layout.rows(place, 1), self.device.first
        end = self.backbone.model.text_end
        return prompt_layout.place(place, length, first, self.tokenizer.encode, end) if length else NO_PROMPT

    def remove(self, name: str, missing_ok: bool = False) -> None:
        """Forget a prompt; an unknown name is a UserError, unless it may be `missing_ok`."""
        if not missing_ok:
            self.check_name(name)
        self._prompts.pop(name, None)
        self.device.forget(name)

    def generate(
        self,
        texts: Sequence[str],
        names: str | Sequence[str],
        max_tokens: int = MAX_TOKENS,
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
        texts: Sequence[str | Sequence[int]],
        names: str | Sequence[str],
        max_tokens: int = MAX_TOKENS,
        decoding: Decoding | None = None,
        forced: str | Sequence[str] = "",
        first: int = 0,
    ) -> list[list[tuple[str, float]]]:
        """Return all answers to each text: the samples, or the beams from the best; otherwise as `generate`.

        A text may also be its ids with an EOS. Samples follow from the seed and a text's number, from `first` on. Under
        a prompt whose numbers overflow, an answer is empty and its score NaN.
        """
        ids, names = self._asked(texts, names, max_tokens)
        begun = zip(names, one_for_each(forced, len(ids), "generate", "forced beginnings"), strict=True)
        begun_ids = [self.reader(name).target_ids(text)[:-1] if text else [] for name, text in begun]
        beginnings = self.tokenizer.beginnings(begun_ids, max_tokens)
        answers: list[list[tuple[str, float]]] = [[]] * len(ids)
        for group in self._batches(ids, names):
            with self.computing():
                rows, model, *sides = self._on_device(group, ids, names)
                given = shard_batch((*sides, rows + first, beginnings[rows]))
                found, scores = map(gather, programs.answers(model, decoding or Greedy(), max_tokens, *given))
            for index, answered, values in zip(group, found, scores, strict=False):
                decode = self.reader(names[index]).decode
                if not is_number(float(values[0])):
                    answered, values = answered[:, :0], np.full_like(values, np.nan)
                decoded = (decode([int(token) for token in row if token >= 0]) for row in answered)
                answers[index] = list(zip(decoded, map(float, values), strict=True))
        return answers

    def score_words(
        self,
        texts: Sequence[str | Sequence[int]],
        names: str | Sequence[str],
        words: Sequence[Sequence[str]],
        max_tokens: int = MAX_TOKENS,
    ) -> list[Float[np.ndarray, " W"]]:
        """Return the log-probability of each of a text's words as its answer, EOS included, under its prompt.

        `words`: those of each text, which may be unlike in number. One longer than `max_tokens` is cut.
        """
        ids, names = self._asked(texts, names, max_tokens)
        asked = zip(names, words, strict=True)
        word_ids = [[self.word_ids(name, word, max_tokens) for word in of_text] for name, of_text in asked]
        longest = max((len(word) for of_text in word_ids for word in of_text), default=0)
        shape = (len(ids), max(map(len, word_ids), default=0), -(-longest // 4) * 4)
        table = np.full(shape, self.tokenizer.form.padding, np.int32)
        for row, of_text in zip(table, word_ids, strict=True):
            for place, word in zip(row, of_text, strict=False):
                place[: len(word)] = word
        scores = np.zeros(table.shape[:2], np.float32)
        for group in self._batches(ids, names, alike=True):  # padding on the decoder's side would be seen
            with self.computing():
                rows, model, tokens, before = self._on_device(group, ids, names)
                padding = before.shape[1] - self.prompt(names[group[0]]).layout.lengths[1]
                given = shard_batch((tokens, before[:, padding:], table[rows]))
                scores[group] = gather(programs.score_words(model, *given))[: len(group)]
        return [row[: len(of_text)] for row, of_text in zip(scores, word_ids, strict=True)]

    def word_ids(self, name: str, word: str, max_tokens: int = MAX_TOKENS) -> list[int]:
        """Return the ids of a word as an answer under a prompt: with <extra_id_0> before it where answers begin so."""
        begun = [self.tokenizer.sentinel(0)] if self.prompt(name).target_sentinel else []
        return [*[*begun, *self.reader(name).target_ids(word)[:-1]][: max_tokens - 1], self.tokenizer.eos_id]

    def reader(self, name: str) -> Tokenizer:
        """Return the tokenizer as the run of a prompt has used it: with its chat template, for example."""
        return self._reading(self.prompt(name).text)

    def lines(
        self,
        rows: Iterable[tuple[str, Any]],
        max_tokens: int = MAX_TOKENS,
        chunk: int = CHUNK,
        decoding: Decoding | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[dict[str, Any]]:
        """Yield each row of (where, {"inputs": ..., "prompt": name, ...}) with its `prediction`, in order.

        Of several samples or beams all are its `answers`. A row may have a `forced` beginning. Under a prompt whose
        numbers overflow, it has an `error` instead. `share` as in `Predictor.lines`.
        """

        def answers(asked: list[tuple[str, str, str]], first: int) -> list[list[tuple[str, float]]]:
            texts, names, forced = map(list, zip(*asked, strict=True))
            return self.answers(texts, names, max_tokens, decoding, forced, first)

        return answer_lines(rows, self._line, answers, chunk, share)

    def _line(self, row: Any, where: str) -> tuple[str, str, str]:
        for field in ("inputs", "prompt"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise UserError(f'{where}: no text {field!r}; expected {{"inputs": "...", "prompt": "NAME"}}')
        if not isinstance(row.get("forced", ""), str):
            raise UserError(f"{where}: forced is no text; expected what the answer begins with")
        try:
            self.prompt(row["prompt"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return row["inputs"], row["prompt"], row.get("forced", "")

    # ------------------------------------------------------------------------------- batches, rows on the device

    def _asked(
        self, texts: Sequence[str | Sequence[int]], names: str | Sequence[str], max_tokens: int
    ) -> tuple[list[list[int]], list[str]]:
        """Return the ids of each text, with its EOS, and the name of its prompt; ids are taken as they are."""
        if isinstance(texts, str) or any(isinstance(text, str) for text in texts):
            texts = check_texts(texts, "generate")
        names = one_for_each(names, len(texts), "generate", "prompt names")
        for name in dict.fromkeys(names):
            self.prompt(name)
        return [self._ids(text, name, max_tokens) for text, name in zip(texts, names, strict=True)], names

    def _ids(self, text: str | Sequence[int], name: str, max_tokens: int) -> list[int]:
        reader, others = self.reader(name), max_tokens + sum(self.prompt(name).layout.lengths)
        ids = reader.input_ids(text) if isinstance(text, str) else list(text)
        most = longest_input(self.backbone.settings, self.max_input_tokens, others)
        self.truncated += len(ids) > most
        return reader.cut_input(ids, most)

    def _batches(self, ids: list[list[int]], names: list[str], alike: bool = False) -> Iterator[np.ndarray]:
        """Yield indices of texts that are answered together: of like lengths, and of prompts that fit on the device.

        `alike`: their prompts have equally many rows before the decoder's input.
        """

        def length(index: int) -> tuple[int, int]:
            on_encoder, on_decoder = self.prompt(names[index]).layout.lengths
            return on_decoder if alike else 0, on_encoder + len(ids[index])

        group: list[int] = []
        wanted: set[str] = set()
        for index in sorted(range(len(ids)), key=length):
            wanted.add(names[index])
            full = len(group) == self.batch_size or not self.device.fit([self.prompt(name) for name in wanted])
            if group and (full or length(group[0])[0] != length(index)[0]):
                yield np.asarray(group)
                group, wanted = [], {names[index]}
            group.append(index)
        if group:
            yield np.asarray(group)

    def _on_device(
        self, group: np.ndarray, ids: list[list[int]], names: list[str]
    ) -> tuple[np.ndarray, DeviceModel, np.ndarray, np.ndarray]:
        """Return which texts are the rows of a batch, the model, encoder tokens [B, T] and decoder prompts [B, n].

        They are padded to few shapes; rows that only fill the batch repeat a text but have no token.
        """
        self.load({names[index] for index in group})
        sides = [self.sides(names[index], ids[index]) for index in group]
        length, before = (max(len(side) for side in both) for both in zip(*sides, strict=True))
        padding = self.tokenizer.form.padding
        count = round_rows(_few(len(group), 1))
        tokens, prompts = padded(sides, count, _few(length, 16), before and _few(before, 1), padding)
        rows = np.resize(group, len(tokens))
        model = self.device.batch([names[index] for index in rows])
        tables, entries = model.tables if model.entries.any() else {}, shard_batch(model.entries)
        return rows, dataclasses.replace(model, tables=tables, entries=entries), tokens, prompts

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Compute on the backbone's mesh.

        On several devices one thread does at a time: programs that exchange data must begin in one order everywhere.
        """
        with contextlib.nullcontext() if self.backbone.mesh is None else self._device_lock, entered(self.backbone.mesh):
            yield

    def load(self, wanted: set[str]) -> None:
        """Bring prompts onto the device, in the place of those that were not used for longest."""
        with self.computing():
            self.device.load({name: self.prompt(name) for name in wanted})

    def sides(self, name: str, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return what encoder and decoder read for a text's ids under a prompt that `load` has brought."""
        layout = self.device.layout(name)
        return layout.around(ids), layout.before_decoder()


def _few(size: int, least: int) -> int:
    """Round up to a power of two, or to the one and a half between: at most half is padding, few are compiled."""
    power = max(least, 1 << max(0, size - 1).bit_length())
    between = power * 3 // 4
    return between if size <= between and between >= least and power > 2 else power
