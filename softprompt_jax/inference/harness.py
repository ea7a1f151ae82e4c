"""Our models as one of EleutherAI's lm-evaluation-harness (package `lm_eval`), under the name `softprompt`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from softprompt_jax.assembly import ended_by
from softprompt_jax.checkpoints.backbone import load_backbone
from softprompt_jax.config import Settings, UserError, nearest, parse
from softprompt_jax.data.tokenizer import load_tokenizer
from softprompt_jax.inference.bank_folder import artifacts_in
from softprompt_jax.inference.predictor import Predictor, load_predictor
from softprompt_jax.inference.scorer import Scorer
from softprompt_jax.models.decode import Beam, Decoding, Greedy, Sampling

_WHERE = "--model_args"
_IGNORED = ("device", "max_batch_size", "trust_remote_code")  # the harness's own, which mean nothing here


class ModelArguments(Settings):
    """What `--model_args` may say: a run or prompt, one of a bank, or a backbone alone."""

    run: str | None = None  # folder of a run, or a prompt file
    bank: str | None = None  # folder of prompts and runs
    prompt: str | None = None  # name of one in the bank
    backbone: str | None = None  # frozen model: alone, or where the prompt names none or it has moved
    model: str | None = None  # name of the model in the harness's files, for --output_path; null: a random one
    task: str | None = None  # name of a task, of a run that has a prompt for each
    any_backbone: bool = False  # whether a prompt may be used with another backbone than its own
    trust: bool = False  # permission to read, fetch or import what the settings of the run name
    dtype: Literal["float32", "bfloat16"] | None = None  # type of weights and activations, of a backbone alone
    quantize: Literal["int8", "nf4"] | None = None  # layers in 8 or 4 bits, of a backbone alone
    mesh: str | dict[str, Any] | None = None  # division of the work among devices; null: the run's own
    batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] = (
        "auto"  # rows of a batch; auto: fewer where texts are long
    )
    max_length: int | None = Field(None, ge=1)  # positions of a text; null: those that the model knows
    max_tokens: int = Field(256, ge=1)  # longest answer in tokens, where the task does not say
    eos: bool | None = None  # whether EOS behind a continuation counts; null: for encoder-decoders


def load(arguments: ModelArguments) -> Scorer:
    """Load what the arguments name. Errors: UserError where they name nothing, or too much."""
    given = arguments
    named = [name for name in ("run", "bank") if getattr(given, name) is not None]
    if len(named) > 1 or not (named or given.backbone) or (given.bank is None) != (given.prompt is None):
        found = ", ".join(f"{name}={value}" for name, value in given.model_dump(exclude_defaults=True).items())
        raise UserError(
            f"{_WHERE}: found {found or 'nothing'}; expected run=RUN, bank=BANK,prompt=NAME, or backbone=NAME alone"
        )
    if named and (given.dtype or given.quantize):
        raise UserError(f"{_WHERE}: found dtype or quantize with a {named[0]}, which has its own; leave it out")
    if not named:
        assert given.backbone is not None
        loaded = load_backbone(given.backbone, given.dtype or "float32", mesh=given.mesh, quantize=given.quantize)
        tokenizer = load_tokenizer(loaded.folder, loaded.text_format)
        predictor = Predictor(ended_by(loaded.model, tokenizer), tokenizer, None, mesh=loaded.mesh)
    else:
        source = given.run if given.bank is None else _in_bank(given.bank, str(given.prompt))
        others = {"any_backbone": given.any_backbone, "trust": given.trust, "mesh": given.mesh}
        predictor = load_predictor(str(source), given.backbone, given.task, **others)
    rows = None if given.batch_size == "auto" else given.batch_size
    return Scorer(predictor, given.max_length, rows, given.eos)


def _in_bank(bank: str, name: str) -> Path:
    if not Path(bank).is_dir():
        raise UserError(f"{_WHERE}: bank {bank}: no such folder; expected one of prompts and runs")
    paths = {path.stem if path.is_file() else path.name: path for path in artifacts_in(bank)}
    if name not in paths:
        known = ", ".join([*paths][:8]) or "none"
        raise UserError(f"{_WHERE}: prompt {name!r}: not in {bank}; found {known}{nearest(name, paths)}")
    return paths[name]


def decoding_of(asked: dict[str, Any]) -> Decoding:
    """Return how answers are decoded, from `generation_kwargs` of a task as Hugging Face names them.

    Errors: UserError for what our decoding does not have.
    """
    known = ("do_sample", "temperature", "top_k", "top_p", "num_beams", "repetition_penalty")
    if unknown := [name for name in asked if name not in known]:
        raise UserError(
            f"generation_kwargs {unknown[0]}: not known here; expected until, max_gen_toks or one of {', '.join(known)}"
            f"{nearest(unknown[0], known)}"
        )
    penalty = {"repetition_penalty": asked.get("repetition_penalty") or 1.0}
    beams, temperature = asked.get("num_beams") or 1, asked.get("temperature")
    samples = asked.get("do_sample") if asked.get("do_sample") is not None else bool(temperature)
    if not samples or temperature == 0:
        if beams == 1:
            return parse(Greedy, penalty, "generation_kwargs")
        if penalty["repetition_penalty"] != 1:
            raise UserError("generation_kwargs: found num_beams and repetition_penalty; expected one of them")
        return parse(Beam, {"beams": beams}, "generation_kwargs")
    if beams != 1:
        raise UserError("generation_kwargs: found num_beams and sampling; expected one of them; set do_sample: false")
    cuts = {name: asked[name] for name in ("top_k", "top_p") if asked.get(name)}  # 0: none, as in Hugging Face
    return parse(Sampling, {"temperature": temperature or 1.0} | cuts | penalty, "generation_kwargs")


def register(note: Callable[[str], object] = print) -> None:
    """Add the model `softprompt` to the harness's own, once; `note` is told in a line of texts that were cut.

    Errors: UserError where lm_eval is not installed.
    """
    try:
        from lm_eval import utils  # pyright: ignore[reportMissingImports]
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
        from lm_eval.api.registry import model_registry, register_model  # pyright: ignore[reportMissingImports]
        from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
        from tqdm import tqdm
    except ImportError as error:
        raise UserError(f"lm-eval: {error.name} is not installed; expected it; pip install lm_eval") from None

    if "softprompt" in model_registry:
        return

    @register_model("softprompt")
    class SoftPrompt(LM):
        """A run, a prompt or a bare backbone, as the harness asks its models."""

        def __init__(self, **values: Any):
            super().__init__()
            values = {name: value for name, value in values.items() if name not in _IGNORED}
            if str(values.get("batch_size", "")).startswith("auto:"):  # how often the harness is to look for the size
                values["batch_size"] = "auto"
            self.arguments = parse(ModelArguments, values, _WHERE)
            self.scorer = load(self.arguments)

        @classmethod
        def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
            return cls(**{k: v for k, v in (additional_config or {}).items() if v is not None} | arg_dict)

        @classmethod
        def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
            return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = [self.scorer.pair(*request.args) for request in requests]
            with _Bar(len(pairs), "loglikelihood", disable_tqdm) as progress:
                found = self.scorer.scores(pairs, progress)
            return self._kept("loglikelihood", requests, found)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            if not self.scorer.causal:
                raise UserError(
                    "loglikelihood_rolling: found a model with an encoder, which foretells no token of its text; "
                    "expected a decoder-only one, or tasks without perplexity"
                )
            windows, prefix, length = [], self.scorer.reader.prefix_id, self.scorer.max_length
            for number, request in enumerate(requests):
                ids = self.scorer.encode(request.args[0])
                rolled = utils.get_rolling_token_windows(ids, prefix, length, context_len=1)
                windows += [(number, utils.make_disjoint_window(window)) for window in rolled]
            with _Bar(len(windows), "loglikelihood_rolling", disable_tqdm) as progress:
                found = self.scorer.scores([window for _, window in windows], progress)
            sums = [0.0] * len(requests)
            for (number, _), (log_p, _) in zip(windows, found, strict=True):
                sums[number] += log_p
            return self._kept("loglikelihood_rolling", requests, sums)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            ways: dict[str, list[int]] = {}
            for number, request in enumerate(requests):
                ways.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
            answers = [""] * len(requests)
            with _Bar(len(requests), "generate_until", disable_tqdm) as progress:
                for way, numbers in ways.items():
                    asked = dict(normalize_gen_kwargs(json.loads(way), self.arguments.max_tokens))
                    most, stop = int(asked.pop("max_gen_toks")), asked.pop("until", [])
                    contexts = [self.scorer.context(requests[number].args[0]) for number in numbers]
                    made = self.scorer.answers(contexts, most, decoding_of(asked), stop, progress)
                    for number, answer in zip(numbers, made, strict=True):
                        answers[number] = answer
            return self._kept("generate_until", requests, answers)

        def _kept(self, kind: str, requests: Sequence[Any], found: list[Any]) -> list[Any]:
            """Give the results to the harness's cache, and tell how many texts were cut for them."""
            for request, one in zip(requests, found, strict=True):
                self.cache_hook.add_partial(kind, request.args, one)
            if self.scorer.truncated:
                note(f"{kind}: {self.scorer.truncated} contexts cut on the left to {self.scorer.max_length} tokens")
                self.scorer.truncated = 0
            return found

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            reader = self.scorer.reader
            if reader.text.template == "chat":
                raise UserError("--apply_chat_template: the run puts its inputs into the template itself; leave it out")
            if not reader.has_chat_template:
                raise UserError(
                    f"--apply_chat_template: {reader.source}: the tokenizer has no chat template; leave it out"
                )
            return reader.chat_text(chat_history, add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            if isinstance(chat_template, str):
                raise UserError(f"--apply_chat_template {chat_template}: expected no name; the tokenizer has one")
            return self.apply_chat_template([{"role": "user", "content": "{{ content }}"}]) if chat_template else None

        @property
        def tokenizer_name(self) -> str:
            return self.scorer.reader.fingerprint

        def get_model_info(self) -> dict[str, Any]:
            model = self.scorer.model
            return {"model_num_parameters": model.settings.parameters(), "model_dtype": str(model.dtype)}

    class _Bar(tqdm):
        """A bar that is called with how many requests are done."""

        def __init__(self, total: int, kind: str, disable: bool):
            super().__init__(total=total, desc=f"Running {kind} requests", disable=disable)

        def __call__(self, done: int) -> None:
            self.update(done)
