"""Run: every setting of a run on one screen. The defaults are those of Lester et al. (2021)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from softprompt_jax import config
from softprompt_jax.config import Settings, by_kind, nearest
from softprompt_jax.data.packing import Packing
from softprompt_jax.data.task import Distill, Task
from softprompt_jax.data.tokenizer import TextSettings
from softprompt_jax.distributed.mesh import Mesh
from softprompt_jax.methods import METHODS, Method, Prompt
from softprompt_jax.models.decode import Decoding, Greedy
from softprompt_jax.models.flash import Implementation
from softprompt_jax.models.quantized import Quantization
from softprompt_jax.models.settings import ModelSettings
from softprompt_jax.models.t5 import T5Settings
from softprompt_jax.optim.gradient_free import GradientFree
from softprompt_jax.optim.optimizers import Adafactor, Optimizer, Schedule
from softprompt_jax.pretraining.data import Pretraining
from softprompt_jax.tasks import complete, get, names
from softprompt_jax.tasks.mixture import Mixture, at_revisions_of, expand, pinned

DEFAULT_METHOD = Prompt()
T5_DROPOUT = 0.1  # with which T5s are fine-tuned and prompted
# settings that say where a run computes and is watched, not what it computes: it may go on with others
UNHASHED_SETTINGS = frozenset({"mesh", "wandb"})


class Scratch(Settings):
    """A new backbone with random weights, for pre-training."""

    settings: T5Settings
    tokenizer: str = "embedded"  # folder or hub name of the backbone whose tokenizer is used


def _task_kind(value: Any) -> str:
    if isinstance(value, str):
        return "name"
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if kind in ("pretraining", "mixture", "distill") else "task"


def _named(name: str) -> Any:
    """Put the settings of a named task in the place of its name."""
    if name not in names():
        raise ValueError(f"expected a name that `softprompt tasks` lists, or settings{nearest(name, names())}")
    return get(name)


AnyTask = Annotated[
    Annotated[Annotated[str, AfterValidator(_named)], Tag("name")]
    | Annotated[Annotated[Task, BeforeValidator(complete)], Tag("task")]
    | Annotated[Annotated[Distill, BeforeValidator(complete)], Tag("distill")]
    | Annotated[Mixture, Tag("mixture")]
    | Annotated[Pretraining, Tag("pretraining")],
    Discriminator(_task_kind),
]


def _packing(value: Any) -> Any:
    """Let `packing: true` stand for the default row, false for none."""
    return ({} if value else None) if isinstance(value, bool) else value


PackingSetting = Annotated[Packing | None, BeforeValidator(_packing)]


def _plain(value: Any) -> Any:
    """Return settings as a new dictionary, anything else as it is."""
    return value.model_dump() if isinstance(value, Settings) else dict(value) if isinstance(value, dict) else value


def _is_method(value: Any) -> bool:
    known = isinstance(value, dict) and str(value.get("kind")) in METHODS
    return isinstance(value, Settings) or (known and isinstance(value.get("optimizer"), dict | Settings | None))


def _optimizers_of(methods: list[dict[str, Any]], shared: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return all settings of each method's optimizer, given what stands beside the methods and the run's `optimizer`.

    The run's is the first method's; with a kind it is also that of every method that states none. Otherwise a method
    has its default, or, if it scales the run's learning rate, the first method's.
    """
    found: list[dict[str, Any]] = []
    for method in methods:
        stated = _plain(method.get("optimizer"))
        if stated is None and (not found or "kind" in (shared or {})):
            stated = shared
        elif stated is None and method.get("learning_rate_scale", 1) != 1:
            stated = found[0]
        found.append(METHODS[method["kind"]].complete_optimizer(stated or {}))
    return found


class Run(Settings):
    """One training run: a task, a frozen backbone, a list of methods, and how to train them."""

    # ---- what is trained, and on what

    task: AnyTask  # name that `softprompt tasks` lists, or the settings of a task, a mixture, distill or pre-training
    backbone: str | Scratch = "embedded"  # model folder, hub name, "embedded" or "smollm2"; it stays frozen
    dtype: Literal["float32", "bfloat16"] = "float32"  # number format of frozen weights and activations
    quantize: Quantization | None = None  # storage of the frozen layers, in 8 or 4 bits
    methods: list[Method] = Field([DEFAULT_METHOD], min_length=1)  # methods whose weights train together

    # ---- how it is trained

    # optimizer of the first method, and with a `kind` of all methods that state none; else each has its own default
    optimizer: Optimizer = Adafactor()
    schedule: Schedule = Schedule()  # factor of all learning rates over the run; constant
    steps: int = Field(30_000, gt=0, lt=2**31)  # number of training steps
    batch_size: int = Field(32, gt=0)  # examples per step, over all devices and accumulated parts
    accumulate: int = Field(1, gt=0)  # parts of a batch that are computed one after the other, which saves memory
    clip_norm: float | None = Field(None, gt=0)  # largest norm of the gradient of all trainable weights together
    loss: Literal["sum", "mean"] = "sum"  # sum or mean over the real target tokens of a batch
    z_loss: float = Field(1e-4, ge=0)  # weight of the square of log Z, where Z is the sum in the softmax
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # probability of a target that goes to all tokens alike
    dropout: float | None = Field(None, ge=0, lt=1)  # dropout rate of the backbone in training; null: 0.1 in a T5, as
    # in the paper, 0 in models trained without
    seed: int = Field(0, ge=0)  # seed of the order of examples, of dropout and of what starts at random

    # ---- how text becomes batches

    text: TextSettings = TextSettings()  # text around inputs and targets: chat template, side that is cut, stop
    max_input_tokens: int = Field(512, gt=0)  # limit of an input's tokens, EOS included; prompt rows come on top
    max_target_tokens: int = Field(64, gt=0)  # limit of a target's tokens, EOS included
    truncate_targets: bool = False  # whether targets over the limit are cut; otherwise they are an error
    target_sentinel: bool = False  # whether <extra_id_0> precedes targets, for a backbone that only filled in spans
    shapes: int | None = Field(None, gt=0)  # limit of compiled (input, target) lengths; null: steps / 250, from 4 to 12
    packing: PackingSetting = None  # rows of one shape with several examples in each: true, or {length: 512}

    # ---- how it is computed

    # kernel of self-attention over texts: plain; flash: cuDNN's, which keeps no scores in memory, or an error that says
    # why not; auto: cuDNN's where it can be had (T5s and most decoder-only models on NVIDIA GPUs, bfloat16)
    attention: Implementation = "auto"
    # activations that are computed again for the gradient; auto: those that would not fit into a device's memory
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    unroll: bool = False  # whether the scan over layers is unrolled: compiles longer, 4 to 10% faster on a CPU
    mesh: Mesh = Mesh()  # division of the work among devices; a run may go on with another

    # ---- how it is evaluated and saved

    decoding: Decoding = Greedy()  # kind of decoding of predictions: greedy, beam or sampling
    evaluate_every: int = Field(1000, gt=0)  # steps between validations, among which the best checkpoint is chosen
    best_by: str | None = (
        None  # number that chooses the best: `loss`, or a metric; null: the mean of the task's metrics
    )
    patience: int | None = Field(
        None, gt=0
    )  # validations without a better score after which training stops; null: none
    evaluation_batch_size: int = Field(64, gt=0)  # examples that are evaluated at once
    evaluation_examples: int | None = Field(None, gt=0)  # first examples of the validation split that training looks at
    result_examples: int | None = Field(None, gt=0)  # first examples of each split that the result is measured on
    checkpoint_every: int = Field(1000, gt=0)  # steps between checkpoints
    log_every: int = Field(50, gt=0)  # steps between lines of the log
    wandb: str | None = None  # project of Weights & Biases that the numbers go to, where the package wandb is installed
    metric_functions: list[str] = Field(
        []
    )  # names of functions that `train` was given as `metrics`; no config holds them

    @model_validator(mode="before")
    @classmethod
    def _complete_methods(cls, values: Any) -> Any:
        """Give each method its optimizer, and let short forms stand for settings of methods.

        `methods: [lora]` and `methods.0=lora` are `[{kind: lora}]`; `methods.0.length=20` changes the default method.
        """
        if not isinstance(values, dict):
            return values
        methods, shared = values.get("methods", [DEFAULT_METHOD]), _plain(values.get("optimizer"))
        if isinstance(methods, dict) and list(methods) == ["0"]:
            first = by_kind(methods["0"])
            methods = [{"kind": DEFAULT_METHOD.kind} | first if isinstance(first, dict) else first]
        if isinstance(methods, str | list | tuple):
            methods = [*map(by_kind, [methods] if isinstance(methods, str) else methods)]
        if not isinstance(methods, list) or not all(map(_is_method, methods)) or not methods:
            return values | {"methods": methods}  # what is wrong with it is said when it is validated
        if not isinstance(shared, dict | None):
            return values
        methods = [_plain(method) for method in methods]
        if methods[0].get("optimizer") is not None and shared is not None:
            raise ValueError("optimizer and methods.0.optimizer are one setting; expected one of them")
        first, *others = _optimizers_of(methods, shared)
        for method, optimizer in zip(methods[1:], others, strict=True):
            method["optimizer"] = None if optimizer == first else optimizer
        return values | {"methods": methods, "optimizer": first}

    @field_validator("methods")
    @classmethod
    def _first_has_the_runs_optimizer(cls, methods: list[Method]) -> list[Method]:
        return [methods[0].model_copy(update={"optimizer": None}), *methods[1:]]

    @model_validator(mode="after")
    def _consistent(self) -> Run:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")
        if isinstance(self.backbone, Scratch) and getattr(self.optimizer, "restore", False):
            raise ValueError("optimizer.restore with random weights; expected a T5X checkpoint as the backbone")
        if self.target_sentinel and any(t.predict_by != "decoding" or t.source.makes_ids for t in self.tasks):
            raise ValueError("target_sentinel with predict_by likelihood or a seqio task: expected decoding and text")
        if self.packing is not None and self.pretraining is not None:
            raise ValueError("packing with pre-training, whose batches have shapes of their own: expected none")
        if len(self.methods) > 1 and any(getattr(method, "teachers", None) for method in self.methods):
            raise ValueError("teachers beside another method, which would change them too: expected multitask alone")
        for method in self.methods:
            if (getattr(method, "tasks", None) or 1) > 1 and not self.own_prompts:
                raise ValueError(f"method {method.kind} for several tasks: expected a mixture with prompts: own")
            if self.packing is not None and (reason := method.refuses_packing):
                raise ValueError(f"packing with the method {method.kind}: {reason}")
        if len(set(self.optimizers)) > 1:
            searches = [each.kind for each in self.optimizers if isinstance(each, GradientFree) and each.kind != "none"]
            if searches:
                raise ValueError(
                    f"optimizer {searches[0]} beside another one: expected one optimizer for all methods, or "
                    "`optimizer: {kind: none}` beside a method that does not train"
                )
            if any(getattr(optimizer, "restore", False) for optimizer in self.optimizers):
                raise ValueError("optimizer.restore for one method of several: expected one optimizer for all")
        elif isinstance(self.optimizer, GradientFree):
            if self.clip_norm is not None or self.schedule != Schedule():
                raise ValueError(f"optimizer {self.optimizer.kind} has no gradients; expected no clip_norm or schedule")
            self.optimizer.check(self.steps)
        return self

    def evaluates(self, step: int) -> bool:
        """Tell whether the run is validated after so many steps."""
        return step % self.evaluate_every == 0 or step == self.steps

    @property
    def max_compiled_shapes(self) -> int:
        """How many shapes may be compiled: each pads less and takes seconds, which a long run earns back."""
        return self.shapes or min(max(self.steps // 250, 4), 12)

    def backbone_overrides(self, settings: ModelSettings) -> dict[str, Any]:
        """Return the settings that a run has for a backbone with these; a step chooses `remat: auto` by its shapes."""
        remat = "none" if self.remat == "auto" else self.remat
        usual = T5_DROPOUT if isinstance(settings, T5Settings) else 0.0
        rate = usual if self.dropout is None else self.dropout
        return {"dropout": rate, "attention": self.attention, "remat": remat, "unroll": self.unroll}

    @property
    def draws_dropout(self) -> bool:
        """Whether a step needs a random key: for dropout of the backbone's or a method's own."""
        return self.dropout != 0 or any(getattr(method, "dropout", 0) > 0 for method in self.methods)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizer of each method."""
        return [method.optimizer or self.optimizer for method in self.methods]

    @property
    def method_names(self) -> list[str]:
        """A name for each method of the list: its kind, numbered from the second of a kind on."""
        kinds = [method.kind for method in self.methods]
        before = [kinds[:index].count(kind) for index, kind in enumerate(kinds)]
        return [f"{kind}_{count + 1}" if count else kind for kind, count in zip(kinds, before, strict=True)]

    def learning_rate(self, step: int) -> float | dict[str, float]:
        """Return the learning rate of the step after so many; by the methods' names where they differ."""
        rates = [optimizer.learning_rate for optimizer in self.optimizers]
        now = [float(np.asarray(self.schedule.build(rate, self.steps)(step))) for rate in rates]
        return now[0] if len(set(rates)) == 1 else dict(zip(self.method_names, now, strict=True))

    @property
    def pretraining(self) -> Pretraining | None:
        """The pre-training data, if this run has no task."""
        return self.task if isinstance(self.task, Pretraining) else None

    def expanded(self) -> Run:
        """Return the run with a seqio Mixture as the mixture that it is, which imports seqio."""
        return self.model_copy(update={"task": expand(self.task)})

    def pinned(self) -> Run:
        """Return the run with the revisions of hub data that are read now, where it states none."""
        return self.model_copy(update={"task": pinned(self.task)})

    def at_revisions_of(self, saved: Run) -> Run:
        """Return the run with the revisions of hub data that a saved one has, where it states none."""
        return self.model_copy(update={"task": at_revisions_of(self.task, saved.task)})

    def finished(self) -> Run:
        """Return the settings with which what was trained is read: without what only training needed."""
        methods = [method.finished() for method in self.methods]
        return self.model_copy(update={"methods": methods, "attention": "auto"})  # on whatever devices there are

    @property
    def tasks(self) -> list[Task]:
        """The settings of the run's task, of each task of a mixture; none in pre-training."""
        if isinstance(self.task, Task):
            return [self.task]
        return self.task.tasks if isinstance(self.task, Mixture) else []

    @property
    def task_name(self) -> str:
        """What the run's task, mixture or pre-training is called."""
        return self.task.name if isinstance(self.task, Task | Mixture) else "pretraining"

    @property
    def own_prompts(self) -> bool:
        """Whether each task of a mixture has a prompt of its own."""
        return isinstance(self.task, Mixture) and self.task.prompts == "own"


def load_run(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Run:
    """Read a YAML file with overrides as a Run; anything wrong is a UserError naming the key."""
    return config.parse(Run, config.read(path, overrides), str(path))


def read_decoding(text: str) -> Decoding:
    """Read a kind of decoding (`beam`), or its settings as YAML (`{kind: beam, beams: 8}`)."""

    class Holder(Settings):
        decoding: Decoding

    values = config.read_text(text, "--decoding")
    return config.parse(Holder, {"decoding": by_kind(values)}, "--decoding").decoding
