"""Training from scores, without gradients: CMA-ES, a greedy search over words, and no training at all.

In a run each is an optimizer: `propose` makes candidates, the step scores them all in one batch, `choose` changes the
trainable parameters. Two functions tune prompts for a model whose weights nobody sees: `tune_rows` if it takes
embeddings, `search_words` if it takes text only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int
from pydantic import Field

from softprompt_jax.config import Settings, UserError
from softprompt_jax.optim.leaf import Leaf
from softprompt_jax.trees import flatten, unflatten

LARGEST = 5000  # numbers whose covariance CMA-ES keeps: 100 MB in float32
TEXT = "{text}"  # where the text stands in a template


class Search:
    """Proposes candidates and chooses by their losses. Its state is a nested dictionary of arrays.

    This one proposes the parameters as they are and keeps them.
    """

    population: int = 1  # candidates that a step scores

    def init(self, trainable: Any) -> Any:
        """Return the state before the first step."""
        return {}

    def propose(self, state: Any, trainable: Any, frozen: Any, key: jax.Array) -> tuple[Any, Any]:
        """Return candidates, shaped as `trainable` with a leading axis N, and what `choose` needs to know of them."""
        return jax.tree.map(lambda x: x[None], trainable), ()

    def choose(self, state: Any, trainable: Any, drawn: Any, losses: Float[Array, "N"]) -> tuple[Any, Any]:
        """Return the trainable parameters after the step, and the state."""
        return trainable, state

    def report(self, model: Any, steps: int, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
        """Return the search's part of the result of a run: the number of calls, and the words that it has found."""
        words = getattr(model.prompt, "template", None)
        return {"calls": steps * self.population} | ({} if words is None else {"template": words(model, decode)})


class GradientFree(Settings):
    """Settings of an optimizer that needs no gradients."""

    learning_rate: ClassVar[float] = 0.0  # for the log, in which every step has a rate
    max_calls: int | None = Field(default=None, ge=1)  # limit of candidates scored in the whole run; null: none

    @property
    def calls_per_step(self) -> int:
        """How many candidates a step scores."""
        return getattr(self, "population", 1)

    def check(self, steps: int) -> None:
        """Raise a ValueError if `steps` steps need more calls than `max_calls`."""
        calls, most = steps * self.calls_per_step, self.max_calls
        if most is not None and calls > most:
            raise ValueError(
                f"optimizer {getattr(self, 'kind', '')} needs {calls:,} calls for {steps:,} steps; expected at most "
                f"max_calls {most:,}; set fewer steps, fewer candidates a step, or a larger max_calls"
            )

    def search(self, leaves: Mapping[str, Leaf]) -> Search:
        """Return the search over these arrays. Errors: UserError for arrays that it cannot search."""
        return Search()


# ---------------------------------------------------------------------------------------------- CMA-ES


class CMAES(GradientFree):
    """CMA-ES (Hansen, 2016), as black-box tuning uses it (Sun et al., 2022).

    Candidates are drawn from a normal distribution. Its mean, which is the trained prompt, and its covariance follow
    the better half of the candidates.

    `alternate`: each layer's weights have a distribution of their own and move in turns (BBTv2, Sun et al., 2022).
    """

    kind: Literal["cma_es"] = "cma_es"
    population: int = Field(default=20, ge=4, le=100_000)  # candidates a step, scored in one batch of N times the rows
    deviation: float = Field(default=1.0, gt=0)  # standard deviation of the first candidates
    alternate: bool = False  # turns: each step moves one layer

    def search(self, leaves: Mapping[str, Leaf]) -> Search:
        sizes = {path: (leaf.shape[0] if leaf.stacked else 1, math.prod(leaf.shape)) for path, leaf in leaves.items()}
        each = {path: size // count for path, (count, size) in sizes.items()}
        if self.alternate and len(set(each.values())) > 1:
            raise UserError(
                "optimizer: cma_es alternates between blocks of equal size, and found "
                f"{', '.join(f'{path} {size}' for path, size in each.items())}; expected equal ones; "
                "set alternate to false, or use the method black_box"
            )
        blocks = sum(count for count, _ in sizes.values()) if self.alternate else 1
        dimensions = sum(size for _, size in sizes.values()) // blocks
        if dimensions > LARGEST:
            raise UserError(
                f"optimizer: cma_es over {dimensions:,} numbers keeps a matrix of their square; expected at most "
                f"{LARGEST:,}; use the method black_box, whose prompt moves in a small subspace, with fewer dimensions "
                "or, if it is deep, with alternate: true"
            )
        return Evolution(self.population, self.deviation, blocks, dimensions)


@dataclasses.dataclass(frozen=True)
class Constants:
    """The strategy parameters of CMA-ES; the defaults are those of Hansen (2016), without negative weights."""

    weights: tuple[float, ...]  # of the better half, from the best
    mass: float  # the effective number of them
    path_rate: float
    sigma_rate: float
    damping: float
    rank_one: float
    rank_mu: float

    @classmethod
    def default(cls, dimensions: int, population: int) -> Constants:
        """Return the constants for so many numbers and candidates."""
        raw = np.log((population + 1) / 2) - np.log(np.arange(1, population // 2 + 1))
        weights, n = raw / raw.sum(), dimensions
        mass = float(1 / np.sum(weights**2))
        sigma_rate = (mass + 2) / (n + mass + 5)
        rank_one = 2 / ((n + 1.3) ** 2 + mass)
        return cls(
            weights=tuple(weights.tolist()),
            mass=mass,
            path_rate=(4 + mass / n) / (n + 4 + 2 * mass / n),
            sigma_rate=sigma_rate,
            damping=1 + 2 * max(0.0, math.sqrt((mass - 1) / (n + 1)) - 1) + sigma_rate,
            rank_one=rank_one,
            rank_mu=min(1 - rank_one, 2 * (mass - 2 + 1 / mass) / ((n + 2) ** 2 + mass)),
        )


class Evolution(Search):
    """CMA-ES over K blocks of n numbers each; a step moves one block.

    It is not taken from the package `cma`, which draws and updates in NumPy on one host: here everything is arrays in
    the compiled step, which checkpoints hold and a mesh shares. A test follows `cma` generation by generation.
    """

    def __init__(
        self, population: int, deviation: float, blocks: int, dimensions: int, constants: Constants | None = None
    ):
        self.population, self.deviation, self.blocks, self.dimensions = population, deviation, blocks, dimensions
        self.constants = constants or Constants.default(dimensions, population)

    def init(self, trainable: Any) -> Any:
        k, n = self.blocks, self.dimensions
        return {
            "deviation": jnp.full((k,), self.deviation),
            "deviation_path": jnp.zeros((k, n)),
            "path": jnp.zeros((k, n)),
            "covariance": jnp.tile(jnp.eye(n), (k, 1, 1)),
            "axes": jnp.tile(jnp.eye(n), (k, 1, 1)),  # of the covariance, as columns
            "lengths": jnp.ones((k, n)),  # of the axes
            "steps": jnp.zeros((), jnp.int32),
        }

    def _moved(self, trainable: Any, block: Array, move: Float[Array, "n"]) -> Any:
        """Add a move to a block of n numbers of all, leaf after leaf; with several blocks, one is a layer of a leaf."""
        numbers, restored = ravel_pytree(trainable)
        return restored(numbers.reshape(self.blocks, -1).at[block].add(move).reshape(-1))

    def propose(self, state: Any, trainable: Any, frozen: Any, key: jax.Array) -> tuple[Any, Any]:
        block = state["steps"] % self.blocks
        normal = jax.random.normal(key, (self.population, self.dimensions))
        moves = (normal * state["lengths"][block]) @ state["axes"][block].T
        return jax.vmap(lambda move: self._moved(trainable, block, state["deviation"][block] * move))(moves), moves

    def choose(self, state: Any, trainable: Any, drawn: Any, losses: Float[Array, "N"]) -> tuple[Any, Any]:
        block, age = state["steps"] % self.blocks, state["steps"] // self.blocks
        one = {name: value[block] for name, value in state.items() if name != "steps"}
        best = drawn[jnp.argsort(jnp.nan_to_num(losses, nan=jnp.inf))[: len(self.constants.weights)]]
        move, one = self._updated(one, best, age)
        new = {name: state[name].at[block].set(value) for name, value in one.items()}
        return self._moved(trainable, block, state["deviation"][block] * move), new | {"steps": state["steps"] + 1}

    def _updated(self, state: Any, best: Float[Array, "M n"], age: Int[Array, ""]) -> tuple[Array, Any]:
        """Return the move of the mean, in deviations, and the distribution after a step with these better moves."""
        fixed, n = self.constants, self.dimensions
        usual = math.sqrt(2) * math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2))  # length of a normal vector
        weights = jnp.asarray(fixed.weights)
        move = weights @ best
        straight = (move @ state["axes"] / state["lengths"]) @ state["axes"].T  # covariance ** -1/2 times the move
        rate = fixed.sigma_rate
        deviation_path = (1 - rate) * state["deviation_path"] + math.sqrt(rate * (2 - rate) * fixed.mass) * straight
        length = jnp.linalg.norm(deviation_path) / usual
        steady = length / jnp.sqrt(1 - (1 - rate) ** (2.0 * (age + 1))) < 1.4 + 2 / (n + 1)
        rate = fixed.path_rate
        path = (1 - rate) * state["path"] + steady * math.sqrt(rate * (2 - rate) * fixed.mass) * move
        kept = 1 - fixed.rank_one - fixed.rank_mu + (1 - steady) * fixed.rank_one * rate * (2 - rate)
        covariance = kept * state["covariance"] + fixed.rank_one * jnp.outer(path, path)
        covariance = covariance + fixed.rank_mu * (best.T * weights) @ best

        def decompose(covariance: Array) -> tuple[Array, Array]:
            squares, axes = jnp.linalg.eigh(covariance)
            return axes, jnp.sqrt(jnp.maximum(squares, 1e-12))

        every = max(1, int(1 / (10 * n * (fixed.rank_one + fixed.rank_mu))))  # until when it has changed too little
        old = state["axes"], state["lengths"]
        axes, lengths = jax.lax.cond((age + 1) % every == 0, decompose, lambda _: old, covariance)
        return move, {
            "deviation": state["deviation"] * jnp.exp(fixed.sigma_rate / fixed.damping * (length - 1)),
            "deviation_path": deviation_path,
            "path": path,
            "covariance": covariance,
            "axes": axes,
            "lengths": lengths,
        }


# ---------------------------------------------------------------------------------------------- words


class GreedyWords(GradientFree):
    """A greedy search over the words of the method `hard`.

    Each step takes the next place, draws `candidates` words for it, and keeps the one with which the batch is most
    likely; the present word is among them. A call is a candidate scored on a batch.
    """

    kind: Literal["greedy_words"] = "greedy_words"
    candidates: int = Field(default=31, ge=1, le=100_000)  # words tried for one place in a step, beside the present one

    @property
    def calls_per_step(self) -> int:
        return self.candidates + 1

    def search(self, leaves: Mapping[str, Leaf]) -> Search:
        if len(leaves) != 1 or (leaf := next(iter(leaves.values()))).word_ids is None:
            raise UserError(
                f"optimizer: greedy_words searches words, and {', '.join(list(leaves)[:3])} train; expected the "
                "method hard alone; set methods to [{kind: hard}], or use another optimizer"
            )
        return WordSearch(self.calls_per_step, next(iter(leaves)), leaf.word_ids, leaf.word_factor)


class WordSearch(Search):
    """The embedded words [P, D] at `path` train; `ids` is the path of the ids of all words that a search may use.

    `factor`: of a row of the embedding table that is read as a prompt's.
    """

    def __init__(self, population: int, path: str, ids: str, factor: float = 1.0):
        self.population, self.path, self.ids, self.factor = population, path, ids, factor

    def init(self, trainable: Any) -> Any:
        return {"steps": jnp.zeros((), jnp.int32)}

    def propose(self, state: Any, trainable: Any, frozen: Any, key: jax.Array) -> tuple[Any, Any]:
        words, known = flatten(trainable)[self.path], flatten(frozen)[self.ids]
        drawn = jax.random.choice(key, known, (self.population - 1,), replace=self.population > len(known))
        rows = frozen["embedding"][drawn].astype(words.dtype) * self.factor
        proposed = jax.vmap(lambda row: words.at[state["steps"] % len(words)].set(row))(rows)
        proposed = unflatten({self.path: jnp.concatenate([words[None], proposed])})  # the first stays as it is
        return proposed, proposed

    def choose(self, state: Any, trainable: Any, drawn: Any, losses: Float[Array, "N"]) -> tuple[Any, Any]:
        best = jnp.argmin(jnp.nan_to_num(losses, nan=jnp.inf))
        return jax.tree.map(lambda x: x[best], drawn), {"steps": state["steps"] + 1}


class NoTraining(GradientFree):
    """No training: a method stays where it starts, such as a template written by hand.

    Beside other optimizers it holds one method of a list.
    """

    kind: Literal["none"] = "none"


# ---------------------------------------------------------------------------------------------- models of others


def projection(key: jax.Array, dimensions: int, rows: Float[Array, "*L P D"], scale: float) -> Float[Array, "*L d P D"]:
    """Return random directions: a normal vector times them has `scale` times the root mean square of `rows`."""
    size = jnp.sqrt(jnp.mean(jnp.square(rows), axis=(-1, -2), keepdims=True))[..., None, :, :]
    shape = (*rows.shape[:-2], dimensions, *rows.shape[-2:])
    return scale * size * dimensions**-0.5 * jax.random.normal(key, shape)


def words_of(template: str) -> list[str]:
    """Return the words of a template, `{text}` among them.

    Errors: UserError where it has no words, or `{text}` not once.
    """
    words = template.split()
    if words.count(TEXT) != 1 or len(words) < 2 or set("".join(words).replace(TEXT, "")) & set("{}"):
        raise UserError(f"template {template!r}; expected words and {{text}} once, such as '{{text}} it was'")
    return words


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The result of a search over a model whose weights nobody sees."""

    best: Any  # rows float32 [P, D], or a text
    score: float  # of the best candidate on the last batch
    calls: int


def tune_rows(
    score: Callable[[np.ndarray, Any], Any],
    start: Float[np.ndarray, "P D"],
    batches: Iterable[Any],
    settings: CMAES | None = None,
    dimensions: int = 500,
    scale: float = 1.0,
    seed: int = 0,
) -> SearchResult:
    """Tune a prompt for a model that takes embeddings, seen only through scores (Sun et al., 2022).

    `score(rows, batch)` gets all candidates, float32 [N, P, D], and returns N numbers, higher being better. One batch
    is one generation. The prompt is `start` plus a random projection of `dimensions` numbers, whose entries have a
    deviation of `scale` times the root mean square of `start`. A generation that `settings.max_calls` does not cover is
    not begun.
    Errors: UserError where `score` returns something else or not a number, or there is no batch.
    """
    settings = settings or CMAES()
    if settings.alternate:
        raise UserError("tune_rows: alternate is for the layers of a deep prompt; expected one prompt; leave it out")
    start = np.asarray(start, np.float32)
    directions = projection(jax.random.key(seed), dimensions, jnp.asarray(start), scale)
    search = Evolution(settings.population, settings.deviation, 1, dimensions)
    found: Any = jnp.zeros((dimensions,))
    state, calls, last = search.init(found), 0, float("nan")
    propose, choose = jax.jit(lambda s, z, key: search.propose(s, z, None, key)), jax.jit(search.choose)
    for step, batch in enumerate(batches):
        if settings.max_calls is not None and calls + settings.population > settings.max_calls:
            break
        candidates, drawn = propose(state, found, jax.random.fold_in(jax.random.key(seed + 1), step))
        rows = start + np.einsum("nd,dpw->npw", np.asarray(candidates), directions)
        scores = np.asarray(score(rows, batch), np.float32)
        if scores.shape != (settings.population,):
            raise UserError(
                f"score(rows, batch): returned shape {list(scores.shape)}; expected [{settings.population}], a number "
                "for each of the candidates rows[n]"
            )
        _check_numbers("score(rows, batch)", scores)
        calls, last = calls + len(scores), float(scores.max())
        found, state = choose(state, found, drawn, -jnp.asarray(scores))
    if not calls:
        raise UserError(
            f"tune_rows: max_calls {settings.max_calls} and the batches allow no generation of {settings.population} "
            "calls; expected a batch and at least as many calls"
        )
    return SearchResult(start + np.einsum("d,dpw->pw", np.asarray(found), directions), last, calls)


def search_words(
    score: Callable[[str, Any], float],
    template: str,
    words: Sequence[str],
    batches: Iterable[Any],
    candidates: int = 31,
    max_calls: int = 1000,
    seed: int = 0,
) -> SearchResult:
    """Search the words of a template for a model that takes text only, one word after another, keeping the best.

    `score(text, batch)` gets a template with its `{text}` left in, and returns a number, higher being better. Every
    call counts; none is made once `max_calls` are spent, and a round that they do not cover is not begun. A word may
    be a phrase.
    Errors: UserError for a template without words or without `{text}`, a score that is not a number, or no batch.
    """
    parts = words_of(template)
    places = [index for index, part in enumerate(parts) if part != TEXT]
    random, calls, best = np.random.default_rng(seed), 0, float("nan")
    for step, batch in enumerate(batches):
        place = places[step % len(places)]
        drawn = random.choice(len(words), min(candidates, len(words)), replace=False)
        tried = [parts[place], *(words[index] for index in drawn)]
        texts = [" ".join([*parts[:place], word, *parts[place + 1 :]]) for word in tried]
        if calls + len(texts) > max_calls:
            break
        scores = [float(score(text, batch)) for text in texts]
        calls += len(texts)
        _check_numbers("score(text, batch)", scores)
        chosen = int(np.argmax(scores))
        best, parts[place] = scores[chosen], tried[chosen]
    if not calls:
        raise UserError(
            f"search_words: max_calls {max_calls} and the batches allow no round of {candidates + 1} calls; expected "
            "a batch and at least as many calls"
        )
    return SearchResult(" ".join(parts), best, calls)


def _check_numbers(what: str, scores: Any) -> None:
    if np.isnan(scores).any():
        raise UserError(f"{what}: returned a number that is none (nan); expected the higher the better; mend the score")
