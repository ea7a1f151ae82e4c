"""A prompt bank: one frozen model in memory, many prompts, any mix of them in a batch.

A prompt's rows are read like words, so that a batch whose texts name different prompts is a batch like any other. So
are prefixes and IA3's factors, called extras, which each row of a batch takes from tables (prompt_cache.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from softprompt_jax import methods
from softprompt_jax.assembly import attach_methods, run_of
from softprompt_jax.checkpoints.artifact import CONFIG_FILE, PROMPT_FILE, TRAINED_FILE, Artifact, load_artifact
from softprompt_jax.checkpoints.backbone import Backbone, load_backbone
from softprompt_jax.config import UserError, nearest
from softprompt_jax.data import prompt_layout
from softprompt_jax.data.prompt_layout import EOS, NO_PROMPT, PromptLayout
from softprompt_jax.data.tokenizer import load_tokenizer
from softprompt_jax.distributed.cloud_files import CHECKPOINTS
from softprompt_jax.inference.prompt_cache import DevicePromptCache, HostPrompt, Structure
from softprompt_jax.inference.texts import answer_lines, check_texts, one_for_each
from softprompt_jax.methods.base import MethodSettings
from softprompt_jax.models import decode, per_example
from softprompt_jax.models.decode import MAX_TOKENS, Decoding, Greedy
from softprompt_jax.models.quantized import Quantization
from softprompt_jax.run import Run
from softprompt_jax.tasks import resolve

_SUFFIXES = (".safetensors", ".npy")


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
        self.device = DevicePromptCache(self.backbone.model, device_rows, device_extras)
        self.tokenizer = load_tokenizer(self.backbone.folder)
        self._prompts: dict[str, HostPrompt] = {}
        self._layouts: dict[tuple[str, int], PromptLayout] = {}  # prompts of one length and place share it

    @classmethod
    def open(cls, folder: str | Path, backbone: str | None = None, **settings: Any) -> PromptBank:
        """Open a folder of prompt files and runs; a name is the file's or the run folder's.

        Of an unfinished run the best checkpoint is taken, or else the latest. The backbone is the one that the prompts
        name, if no other is given. Errors: UserError names all runs that cannot be in a bank.
        """
        found = {path: load_artifact(path) for path in sorted(Path(folder).iterdir()) if _may_be_prompt(path)}
        if not found:
            raise UserError(f"{folder}: no prompt; expected .safetensors, .npy or the folders of runs")
        unfit = {path.name: reason for path, artifact in found.items() if (reason := _unfit(artifact))}
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
            backbone = named.pop()
        bank = cls(str(backbone), **settings)
        for path, artifact in found.items():
            name = path.stem if path.suffix in _SUFFIXES else path.name
            if name in bank:
                raise UserError(f"{folder}: two prompts of the name {name!r}; expected one of each; rename {path.name}")
            bank.add(name, artifact)
        return bank

    def __repr__(self) -> str:
        return f"PromptBank({self.backbone.identity!r}, {len(self)} prompts)"

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, name: object) -> bool:
        return name in self._prompts

    @property
    def names(self) -> list[str]:
        """The names of all prompts."""
        return sorted(self._prompts)

    def prompt(self, name: str) -> HostPrompt:
        """Return a prompt; an unknown name is a UserError."""
        found = self._prompts.get(name)
        if found is None:
            known = ", ".join(self.names[:8]) or "none"
            raise UserError(f"prompt {name!r}: not in the bank; found {known}{nearest(name, self._prompts)}")
        return found

    def add(self, name: str, source: str | Path | Artifact | Float[np.ndarray, "P D"]) -> None:
        """Add a prompt: rows [P, D] (none: the bare backbone), a file or a run folder. One of that name is replaced."""
        self.put(name, self.read(name, source))

    def put(self, name: str, prompt: HostPrompt) -> None:
        """Add a prompt that has been read; one of that name is replaced."""
        self.remove(name, missing_ok=True)
        self._prompts[name] = prompt
        self.device.expect(prompt.extras)

    def read(self, name: str, source: str | Path | Artifact | Float[np.ndarray, "P D"]) -> HostPrompt:
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
            return self._host_prompt(name, artifact.rows, artifact.place, _about(artifact))
        run = run_of(artifact)
        assert run is not None  # by check_artifact
        run = run.finished() if artifact.step is None else run
        try:
            model = self._trained_model(artifact, run)
            extras = {key: part for method in run.methods for key, part in method.per_example_state(model).items()}
        except UserError as error:
            raise UserError(f"prompt {name}: {error}") from None
        table, place = np.zeros((0, self.backbone.settings.d_model), np.float32), "before"
        if model.prompt is not None:
            table, place = np.asarray(model.prompt.table()), model.prompt.place
        return self._host_prompt(name, table, place, _about(artifact) | {"extras": extras})

    def _trained_model(self, artifact: Artifact, run: Run) -> Any:
        """Return the backbone with what a run has trained; its settings may claim no more than its file holds."""

        def attached(state: Any) -> Any:
            model = nnx.merge(graphdef, state)
            attach_methods(run, model, self.tokenizer, self.backbone)
            return model

        numbers = sum(leaf.size for leaf in jax.tree.leaves(artifact.tree))
        for method in run.methods:
            if (length := getattr(method, "length", 0)) > numbers:
                raise UserError(
                    f"{artifact.source}: holds {numbers} numbers, and its settings say {method.kind} of length "
                    f"{length}; expected the run's own file"
                )
        graphdef, state = nnx.split(self.backbone.model)
        expected = jax.eval_shape(lambda state: nnx.state(attached(state), methods.Trainable), state)
        methods.check_trained(nnx.to_pure_dict(expected), artifact.tree, artifact.source)
        model = attached(state)
        methods.put_trained(model, artifact.tree, artifact.source)
        return methods.finish(model)

    def _host_prompt(self, name: str, rows: np.ndarray, place: str, about: dict[str, Any]) -> HostPrompt:
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

    def _layout(self, place: str, rows: int) -> PromptLayout:
        if (place, rows) not in self._layouts:
            length, first = rows // prompt_layout.rows(place, 1), self.device.first
            made = prompt_layout.place(place, length, first, self.tokenizer.encode) if length else NO_PROMPT
            self._layouts[place, rows] = made
        return self._layouts[place, rows]

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

        A text may also be its ids with an EOS. Samples follow from the seed and a text's number, from `first` on.
        """
        ids, names = self._asked(texts, names)
        beginnings = self.tokenizer.beginnings(
            one_for_each(forced, len(ids), "generate", "forced beginnings"), max_tokens
        )
        answers: list[list[tuple[str, float]]] = [[]] * len(ids)
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
        ids, names = self._asked(texts, names)
        word_ids = [
            [self.word_ids(name, word, max_tokens) for word in of_text]
            for name, of_text in zip(names, words, strict=True)
        ]
        longest = max((len(word) for of_text in word_ids for word in of_text), default=0)
        table = np.zeros((len(ids), max(map(len, word_ids), default=0), -(-longest // 4) * 4), np.int32)
        for row, of_text in zip(table, word_ids, strict=True):
            for place, word in zip(row, of_text, strict=False):
                place[: len(word)] = word
        scores = np.zeros(table.shape[:2], np.float32)
        decoder_lengths = np.asarray([self._prompts[name].layout.lengths[1] for name in names])
        for length in np.unique(decoder_lengths):  # padding on the decoder's side would be seen
            chosen = np.flatnonzero(decoder_lengths == length)
            for part in self._batches([ids[index] for index in chosen], [names[index] for index in chosen]):
                group = chosen[part]
                tokens, before = self._tokens(group, ids, names)
                padded = np.resize(group, len(tokens))
                tables, entries = self.device.entries([names[index] for index in padded])
                found = _score(
                    *self.device.parts, tokens, before[:, before.shape[1] - length :], tables, entries, table[padded]
                )
                scores[group] = np.asarray(found)[: len(group)]
        return [row[: len(of_text)] for row, of_text in zip(scores, word_ids, strict=True)]

    def word_ids(self, name: str, word: str, max_tokens: int = MAX_TOKENS) -> list[int]:
        """Return the ids of a word as an answer under a prompt: with <extra_id_0> before it where answers begin so."""
        begun = [self.tokenizer.sentinel(0)] if self.prompt(name).target_sentinel else []
        return [*[*begun, *self.tokenizer.encode(word)][: max_tokens - 1], self.tokenizer.eos_id]

    def lines(
        self,
        rows: Iterable[tuple[str, Any]],
        max_tokens: int = MAX_TOKENS,
        chunk: int = 1024,
        decoding: Decoding | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield each row of (where, {"inputs": ..., "prompt": name, ...}) with its `prediction`, in order.

        Of several samples or beams all are its `answers`. A row may have a `forced` beginning.
        """

        def answers(asked: list[tuple[str, str, str]], first: int) -> list[list[str]]:
            texts, names, forced = map(list, zip(*asked, strict=True))
            found = self.answers(texts, names, max_tokens, decoding, forced, first)
            return [[text for text, _ in each] for each in found]

        return answer_lines(rows, self._line, answers, chunk)

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
        self, texts: Sequence[str | Sequence[int]], names: str | Sequence[str]
    ) -> tuple[list[list[int]], list[str]]:
        """Return the ids of each text, with its EOS, and the name of its prompt; ids are taken as they are."""
        if isinstance(texts, str) or any(isinstance(text, str) for text in texts):
            texts = check_texts(texts, "generate")
        names = one_for_each(names, len(texts), "generate", "prompt names")
        for name in dict.fromkeys(names):
            self.prompt(name)
        return [self._ids(text) for text in texts], names

    def _ids(self, text: str | Sequence[int]) -> list[int]:
        ids = [*self.tokenizer.encode(text), EOS] if isinstance(text, str) else list(text)
        if len(ids) <= self.max_input_tokens:
            return ids
        self.truncated += 1
        return [*ids[: self.max_input_tokens - 1], EOS]

    def _batches(self, ids: list[list[int]], names: list[str]) -> Iterator[np.ndarray]:
        """Yield indices of texts that are answered together: of like lengths, and of prompts that fit on the device."""

        def length(index: int) -> int:
            return self._prompts[names[index]].layout.lengths[0] + len(ids[index])

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
        layouts = [self.device.layout(names[index]) for index in group]
        around = [layout.around(ids[index]) for layout, index in zip(layouts, group, strict=True)]
        sides = around, [layout.before_decoder() for layout in layouts]
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

    def sides(self, name: str, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return what encoder and decoder read for a text, without its EOS, under a prompt that `load` has brought."""
        layout = self.device.layout(name)
        return layout.around([*ids, EOS]), layout.before_decoder()


def check_artifact(name: str, artifact: Artifact) -> None:
    """Refuse what no bank can hold, by its settings alone: nothing is attached, and no device is used.

    Errors: UserError, which calls it by its name.
    """
    if reason := _unfit(artifact):
        raise UserError(
            f"prompt {name}: {reason}; expected a prompt, a prefix or ia3, of which each text of a batch can have its "
            "own; use the run by itself"
        )


def _unfit(artifact: Artifact) -> str | None:
    """Say why a bank cannot hold what a run has trained; None: it can."""
    if artifact.rows is not None:
        return None
    run = run_of(artifact)
    if run is None:
        return "holds neither a prompt nor a run's settings"
    if run.own_prompts:
        return "has a prompt for each task, whose files are in its folder prompts/"
    for method in run.methods:
        if type(method).per_example_state is MethodSettings.per_example_state:
            return f"{method.kind} changes the model for every text, so that it cannot be in a bank"
    return None


def _may_be_prompt(path: Path) -> bool:
    """Tell whether a file or folder of a bank's folder is a prompt's; a run counts from its first checkpoint on."""
    if path.suffix in _SUFFIXES or any((path / file).exists() for file in (PROMPT_FILE, TRAINED_FILE)):
        return True
    return (path / CONFIG_FILE).exists() and any(step.name.isdigit() for step in path.glob(f"{CHECKPOINTS}/*"))


def _about(artifact: Artifact) -> dict[str, Any]:
    """Return what a prompt says of its task: name, label words, and whether answers begin with <extra_id_0>."""
    about: dict[str, Any] = {"task": artifact.metadata.get("task"), "step": artifact.step}
    try:
        settings = artifact.settings or {}
        task = resolve(settings["task"])
    except (KeyError, ValueError, TypeError, UserError):  # such as a task that is known where it was trained only
        return about
    return about | {
        "task": task.name,
        "label_words": tuple(task.words or ()),
        "target_sentinel": bool(settings.get("target_sentinel")),
    }


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


@functools.partial(jax.jit, static_argnums=0)
def _score(
    structure: Structure,
    table: Any,
    frozen: Any,
    tokens: Array,
    before: Array,
    tables: per_example.BatchState,
    entries: Array,
    words: Array,
) -> Any:
    def of_text(tokens: Array, before: Array, entry: Array, words: Array) -> Array:
        model = structure.merge(table, frozen)
        per_example.install(model, per_example.gather(tables, entry[None]))
        return decode.score_words(model, tokens[None], words, before[None])[0]

    return jax.vmap(of_text)(tokens, before, entries, words)
