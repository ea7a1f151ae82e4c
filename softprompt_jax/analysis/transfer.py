"""Prompts of other tasks and of other backbones: how similar they are, and how to convert them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from softprompt_jax.checkpoints.artifact import load_artifact, save_prompt
from softprompt_jax.checkpoints.backbone import Backbone, load_backbone
from softprompt_jax.checkpoints.tensors import finite_float32
from softprompt_jax.config import UserError
from softprompt_jax.data.tokenizer import load_tokenizer
from softprompt_jax.files import writable
from softprompt_jax.trust import named_backbone

Measure = Literal["mean", "rows"]
Map = Literal["linear", "network"]
FEWEST = 16  # pieces in common with which a map is fitted at all
HELD_OUT = 10  # every how manyth piece only measures the map

# --------------------------------------------------------------------------------------------- SPoT


def similarity(one: Float[np.ndarray, "P D"], other: Float[np.ndarray, "Q E"], measure: Measure = "mean") -> float:
    """Return how similar two prompts of one backbone are, from -1 to 1.

    "mean": the cosine of the prompts' mean rows; "rows": the mean cosine of all pairs of rows. Prompts of equal tasks
    need not have their rows in the same order. Source: Vu et al., 2022, section 5.
    """
    if one.shape[1] != other.shape[1]:
        raise UserError(f"prompts: found widths {one.shape[1]} and {other.shape[1]}; expected prompts of one backbone")
    if measure == "mean":
        one, other = one.mean(0, keepdims=True), other.mean(0, keepdims=True)
    return float(np.mean(unit_rows(one.astype(np.float64)) @ unit_rows(other.astype(np.float64)).T))


def rank_sources(
    target: str | Path, sources: Sequence[str | Path], measure: Measure = "mean"
) -> list[dict[str, str | float]]:
    """Rank prompts of other tasks by their similarity to a target's prompt, the most similar first.

    Each is a run folder or a prompt file. Train the target's own prompt for a few steps first. Start from the best with
    `methods: [{kind: prompt, init: {kind: file, path: SOURCE}}]`. Errors: UserError for prompts of unlike backbones.
    Source: SPoT (Vu et al., 2022).
    """
    wanted = load_artifact(target)
    ranked = []
    for source in sources:
        other = load_artifact(source)
        known = [one.metadata.get("fingerprint") for one in (wanted, other)]
        if None not in known and known[0] != known[1]:
            raise UserError(
                f"{source}: trained on backbone {other.backbone or '?'}, {target} on another; "
                "expected one backbone; carry the prompt over with `softprompt recycle` first"
            )
        try:
            alike = similarity(wanted.prompt, other.prompt, measure)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        ranked.append({"source": str(source), "task": other.metadata.get("task", ""), "similarity": alike})
    return sorted(ranked, key=lambda entry: -entry["similarity"])  # type: ignore[operator,return-value]


def unit_rows(rows: Float[np.ndarray, "*P D"]) -> Float[np.ndarray, "*P D"]:
    """Return rows divided by their lengths, whose products are cosines; a row of zeros stays."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(norms == 0, 1, norms)


# ---------------------------------------------------------------------------------------- recycling


@dataclasses.dataclass(frozen=True)
class Recycled:
    """A converted prompt. `error` is that of the map on pieces it was not fitted on; 1 means that it learnt nothing."""

    rows: Float[np.ndarray, "P E"]
    pieces: int
    error: float


def recycle(
    rows: Float[np.ndarray, "P D"], source: Backbone, target: Backbone, kind: Map = "linear", seed: int = 0
) -> Recycled:
    """Convert a prompt of one backbone for another, by a map fitted on the pieces that both vocabularies have.

    "linear" is the least-squares solution; "network" has a hidden layer of four times the width. An error near 1 means
    that the map knows no more than the mean. Errors: UserError for a prompt of another width, and for vocabularies with
    hardly a piece in common. Source: Lester et al., 2022.
    """
    if rows.shape[1] != source.settings.d_model:
        raise UserError(
            f"prompt: found width {rows.shape[1]}; expected {source.settings.d_model}, that of {source.identity}; "
            "give the backbone that it was trained on"
        )
    ids = shared_pieces(source, target)
    if len(ids) < FEWEST:
        raise UserError(
            f"{source.identity} and {target.identity}: have {len(ids)} pieces in common; expected {FEWEST} or more, "
            "from which the map is fitted"
        )
    x, y = (
        np.asarray(backbone.model.word_rows(jnp.asarray(ids[:, side])))
        for side, backbone in enumerate((source, target))
    )
    scales = [float(np.sqrt(np.mean(np.square(side)))) for side in (x, y)]
    x, y = x / scales[0], y / scales[1]
    seen = np.arange(len(ids)) % HELD_OUT != HELD_OUT - 1
    fitted = _fit_linear(x[seen], y[seen]) if kind == "linear" else _fit_network(x[seen], y[seen], seed)
    missed = np.mean(np.square(fitted(x[~seen]) - y[~seen])) / np.mean(np.square(y[~seen] - y.mean(0)))
    with np.errstate(over="ignore", invalid="ignore"):
        found = fitted(rows / scales[0]) * scales[1]
    return Recycled(finite_float32(found, f"prompt for {target.identity}"), len(ids), float(missed))


def recycle_prompt(
    prompt: str | Path,
    onto: str,
    to: str | Path,
    kind: Map = "linear",
    backbone: str | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Convert a prompt file or a run's prompt for the backbone `onto`, and write it to the file `to`.

    `backbone`: the one that it was trained on, if the file does not say. Returns the number of common pieces and the
    error of the map.
    """
    to = Path(to)
    if to.suffix != ".safetensors":
        raise UserError(f"{to}: ends in {to.suffix!r}; expected a file name ending in .safetensors")
    artifact = load_artifact(prompt)
    known = named_backbone([artifact], backbone, trust)
    with writable(to):  # before the backbones are loaded
        pass
    source, target = load_backbone(known), load_backbone(onto)
    artifact.check_backbone(source.fingerprint(), known)
    recycled = recycle(artifact.prompt, source, target, kind)
    about = {"backbone": onto, "fingerprint": target.fingerprint(), "recycled_from": known}
    kept = {name: artifact.metadata[name] for name in ("task", "place") if name in artifact.metadata}
    save_prompt(recycled.rows, to, kept | about)
    return {"pieces": recycled.pieces, "error": recycled.error, "rows": list(recycled.rows.shape)}


def shared_pieces(source: Backbone, target: Backbone) -> Int[np.ndarray, "pieces 2"]:
    """Return the ids, in either vocabulary, of the pieces that both have; special ones and sentinels are left out.

    SentencePiece's "▁ferry" and a byte-level "Ġferry" are one piece.
    """
    known = []
    for backbone in (source, target):
        tokenizer = load_tokenizer(backbone.folder, backbone.text_format)
        limit = min(tokenizer.size, backbone.settings.vocabulary_rows)
        texts = tokenizer.piece_texts()
        known.append({texts[i]: i for i in range(limit) if i not in tokenizer.special_ids})
    pairs = [(i, known[1][piece]) for piece, i in known[0].items() if piece in known[1]]
    return np.asarray(pairs, np.int64).reshape(-1, 2)


def _fit_linear(x: np.ndarray, y: np.ndarray) -> Any:
    """Fit y = x W by least squares, held near 0 where there are fewer pieces than numbers."""
    penalty = 1e-3 * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve((x.T @ x + penalty).astype(np.float64), (x.T @ y).astype(np.float64))
    return lambda rows: np.asarray(rows @ weights, np.float32)


def _fit_network(x: np.ndarray, y: np.ndarray, seed: int) -> Any:
    """Fit a network with one hidden layer of four times the width (ReLU) by 3,000 steps of Adam on 256 rows each."""
    width, hidden = x.shape[1], 4 * x.shape[1]
    keys = jax.random.split(jax.random.key(seed), 3)
    weights = {
        "first": (2 / width) ** 0.5 * jax.random.normal(keys[0], (width, hidden)),
        "bias": jnp.zeros((hidden,)),
        "second": hidden**-0.5 * jax.random.normal(keys[1], (hidden, y.shape[1])),
    }
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-3, 3000), weight_decay=1e-4)

    def output(weights: dict[str, Array], rows: Array) -> Array:
        return jax.nn.relu(rows @ weights["first"] + weights["bias"]) @ weights["second"]

    def loss(weights: dict[str, Array], chosen: Array) -> Array:
        return jnp.mean(jnp.square(output(weights, jnp.asarray(x)[chosen]) - jnp.asarray(y)[chosen]))

    def step(carry: Any, key: Array) -> tuple[Any, None]:
        weights, state = carry
        chosen = jax.random.choice(key, len(x), (min(256, len(x)),))
        updates, state = optimizer.update(jax.grad(loss)(weights, chosen), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    (trained, _), _ = jax.lax.scan(step, (weights, optimizer.init(weights)), jax.random.split(keys[2], 3000))
    return lambda rows: np.asarray(output(trained, jnp.asarray(rows)), np.float32)
