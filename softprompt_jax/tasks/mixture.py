"""Several tasks in one run: how often each is drawn, and whether they share a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from jaxtyping import Float, Int

from softprompt_jax.config import Settings, UserError, by_kind, nearest, to_yaml
from softprompt_jax.data.batches import Draw
from softprompt_jax.data.examples import Source
from softprompt_jax.data.sources import Hub
from softprompt_jax.data.task import Task
from softprompt_jax.tasks import complete, get, names, short


class Equal(Settings):
    """All tasks are drawn equally often."""

    kind: Literal["equal"] = "equal"

    def rates(self, counts: Sequence[int]) -> Float[np.ndarray, " N"]:
        """Return each task's share of the examples, from the examples it has."""
        return np.full(len(counts), 1 / len(counts))


class Proportional(Settings):
    """Tasks are drawn in proportion to their numbers of examples (Raffel et al., 2020)."""

    kind: Literal["proportional"] = "proportional"
    limit: int | None = pydantic.Field(None, gt=0)  # number of a task's examples that count at most

    def rates(self, counts: Sequence[int]) -> Float[np.ndarray, " N"]:
        return Temperature(temperature=1.0, limit=self.limit).rates(counts)


class Temperature(Settings):
    """Proportional rates to the power of 1 / temperature, so that high ones are near equal (Raffel et al., 2020)."""

    kind: Literal["temperature"] = "temperature"
    temperature: float = pydantic.Field(2.0, ge=1)  # flatness: 1 is proportional, large is equal
    limit: int | None = pydantic.Field(None, gt=0)  # number of a task's examples that count at most

    def rates(self, counts: Sequence[int]) -> Float[np.ndarray, " N"]:
        counted = np.minimum(counts, self.limit or max(counts)).astype(np.float64)
        weights = (counted / counted.sum()) ** (1 / self.temperature)
        return weights / weights.sum()


class FixedRates(Settings):
    """Tasks are drawn in proportion to fixed shares."""

    kind: Literal["given"] = "given"
    shares: list[Annotated[float, pydantic.Field(gt=0)]] = pydantic.Field(min_length=1)  # one number for each task

    def rates(self, counts: Sequence[int]) -> Float[np.ndarray, " N"]:
        return np.asarray(self.shares) / sum(self.shares)


def _task(value: Any) -> Any:
    """Read a task's name where its settings may stand."""
    if not isinstance(value, str):
        return complete(value)
    if value not in names():
        raise ValueError(f"expected one of {', '.join(names())}, or a task's settings{nearest(value, names())}")
    return get(value)


Rates = Annotated[
    Annotated[Equal | Proportional | Temperature | FixedRates, pydantic.Field(discriminator="kind")],
    pydantic.BeforeValidator(by_kind),
]


class Mixture(Settings):
    """Several tasks that are trained together.

    With `prompts: own` each task has its own prompt, and a batch holds examples of all. With `shared` one prompt
    serves all; then the inputs must tell the tasks apart. A task without a validation split is trained on, but not
    scored.
    """

    kind: Literal["mixture"] = "mixture"
    name: str = "mixture"  # name in results and messages
    tasks: list[Annotated[Task, pydantic.BeforeValidator(_task)]] = pydantic.Field(min_length=1)  # names or settings
    rates: Rates = Equal()  # how often each task is drawn
    prompts: Literal["shared", "own"] = "shared"  # one prompt for all tasks, or one for each

    @pydantic.field_validator("tasks")
    @classmethod
    def _names_differ(cls, tasks: list[Task]) -> list[Task]:
        known = [task.name for task in tasks]
        if twice := sorted({name for name in known if known.count(name) > 1}):
            raise ValueError(f"the name {twice[0]!r} stands twice; expected a name for each task")
        if odd := [name for name in known if "/" in name or name.startswith(".")]:
            raise ValueError(f"the name {odd[0]!r} cannot be a file's; expected one without / for each task")
        return tasks

    @pydantic.model_validator(mode="after")
    def _shares_are_of_the_tasks(self) -> Mixture:
        if isinstance(self.rates, FixedRates) and len(self.rates.shares) != len(self.tasks):
            raise ValueError(f"found {len(self.rates.shares)} shares for {len(self.tasks)} tasks; expected one each")
        return self


def expand(task: Any) -> Any:
    """Return a task whose source stands for several as a mixture of them at its rates, any other task as it is."""
    found = task.source.mixture() if isinstance(task, Task) else []
    if not found:
        return task
    tasks = [task.model_copy(update={"name": name, "source": source}) for name, source, _ in found]
    return Mixture(name=task.name, tasks=tasks, rates=FixedRates(shares=[rate for *_, rate in found]))


def pinned(task: Any) -> Any:
    """Return a task or mixture at the revisions that are read now, where it states none."""
    return _with_sources(task, lambda each: each.source.pinned(f"task {each.name}"))


def at_revisions_of(task: Any, saved: Any) -> Any:
    """Return a task or mixture at the revisions of one that was saved, where it states none itself."""
    known = {each.name: each.source for each in _tasks_of(saved)}

    def stated(each: Task) -> Source:
        source, other = each.source, known.get(each.name)
        if not isinstance(source, Hub) or not isinstance(other, Hub) or source.revision is not None:
            return source
        return other if other.model_copy(update={"revision": None}) == source else source

    return _with_sources(task, stated)


def newest_as_yaml(task: Any) -> str:
    """Ask the hub for the commits of a task's data sets, and return YAML of the task at these for a run's settings."""
    if not _tasks_of(task):
        raise UserError("task: found pre-training; expected a task of the hub, or no --pin")
    for each in _tasks_of(task):
        if not isinstance(each.source, Hub):
            raise UserError(f"task {each.name}: its rows are not the hub's; expected a task of the hub, or no --pin")
    found = _with_sources(task, lambda each: each.source.newest(f"task {each.name}"))
    tasks = [short(each) for each in _tasks_of(found)]
    settings = found.model_dump(mode="json") | {"tasks": tasks} if isinstance(found, Mixture) else tasks[0]
    return to_yaml({"task": settings})


def _tasks_of(task: Any) -> list[Task]:
    return task.tasks if isinstance(task, Mixture) else [task] if isinstance(task, Task) else []


def _with_sources(task: Any, change: Callable[[Any], Source]) -> Any:
    """Return a task, or a mixture of tasks, with other sources."""
    if isinstance(task, Mixture):
        return task.model_copy(update={"tasks": [_with_sources(each, change) for each in task.tasks]})
    return task.model_copy(update={"source": change(task)}) if isinstance(task, Task) else task


def draw_mixture(counts: Sequence[int], rates: Float[np.ndarray, " N"], seed: int, at_least: int = 1) -> Draw:
    """Return the function that gives the shuffled examples of an epoch, numbered through all tasks in order.

    An epoch has as many examples as all tasks together (or `at_least`), each task's share of them by its rate,
    but one at least. A task goes through its own examples in an order of its own before it starts again, over the
    bounds of epochs: what an epoch holds is a pure function of the arguments and the epoch's number.
    """
    size = max(sum(counts), at_least)
    exact = rates * size
    shares = np.maximum(np.floor(exact), 1).astype(int)
    for task in np.argsort(shares - exact, kind="stable")[: max(0, size - shares.sum())]:
        shares[task] += 1
    starts = np.cumsum([0, *counts[:-1]])

    def draw(epoch: int, random: np.random.Generator) -> Int[np.ndarray, " chosen"]:
        parts = [
            start + _stretch(count, epoch * share, share, [seed, task])
            for task, (count, share, start) in enumerate(zip(counts, shares.tolist(), starts, strict=True))
        ]
        return random.permutation(np.concatenate(parts))

    return draw


def _stretch(count: int, first: int, length: int, seed: list[int]) -> Int[np.ndarray, " length"]:
    """Numbers `first` to `first + length` of endless shuffled rounds through `count` examples."""
    rounds = range(first // count, (first + length - 1) // count + 1)
    generators = (np.random.Generator(np.random.PCG64(np.random.SeedSequence([*seed, number]))) for number in rounds)
    orders = [generator.permutation(count) for generator in generators]
    return np.concatenate(orders)[first % count :][:length]
