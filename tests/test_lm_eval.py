"""EleutherAI's lm-evaluation-harness asks our models, on tasks of local jsonl: its numbers are ours."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_lm
import yaml

from softprompt_jax import UserError, load_backbone, load_predictor, logits, train
from softprompt_jax.inference.harness import register
from softprompt_jax.run import Run
from softprompt_jax.trust import remember

lm_eval = pytest.importorskip("lm_eval", reason="see make test-http")
pytestmark = pytest.mark.http
WORDS = ["good", "bad"]


@pytest.fixture(autouse=True)
def harness(monkeypatch):
    """Our model is there, and the harness's logger writes to what standard error is in this test."""
    register()
    logger = logging.getLogger("lm_eval")
    monkeypatch.setattr(lm_eval.utils, "_LOGGING_CONFIGURED", False)
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", logger.propagate)


def write_task(folder: Path, name: str, rows: list[dict[str, str]], text: str = "{{text}}", **settings) -> None:
    """Write a task of the harness over jsonl, as a user would."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {"task": name, "dataset_path": "json", "test_split": "test", "doc_to_text": text}
    about |= {"dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(about | settings, sort_keys=False))


def choice(words: list[str]) -> dict:
    means = {"aggregation": "mean", "higher_is_better": True}
    found = {"output_type": "multiple_choice", "doc_to_target": "{{label}}", "doc_to_choice": words}
    return found | {"metric_list": [{"metric": "acc", **means}]}


def written(most: int, **ways) -> dict:
    found = {"output_type": "generate_until", "doc_to_target": "{{label}}"}
    found["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": most, **ways}
    found["filter_list"] = [{"name": "bare", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}]
    return found | {
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def evaluated(folder: Path, tasks: list[str], model_args, **settings) -> dict:
    """Run the harness from Python."""
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate("softprompt", model_args, tasks=tasks, task_manager=manager, **settings)


@pytest.fixture(scope="module")
def t5(small, tmp_path_factory):
    """A trained run of a T5, and tasks of the harness on its validation rows."""
    folder = tmp_path_factory.mktemp("t5")
    train(Run(**small.full), folder / "run")
    rows = [json.loads(line) for line in (small.folder / "validation.jsonl").read_text().splitlines()]
    write_task(folder, "moods_choice", rows, **choice(["yes", "no"]))
    write_task(folder, "moods_text", rows, **written(4))
    return folder


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A run of a decoder-only model with random weights, its rows, and tasks of the harness on them."""
    folder = tmp_path_factory.mktemp("lm")
    backbone = tiny_lm.folder(folder / "llama", chat=True, tied=False)
    rows = [
        {"text": f"{text} {word} {number}", "label": WORDS[number % 2]}
        for number, text in enumerate(tiny_lm.TEXTS * 3)
        for word in ("warm", "flat")
    ]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"kind": "files", "train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl")}
    task = {"name": "toy", "source": source, "input": "review: {text}\nIt is", "label_words": WORDS}
    values = {"backbone": str(backbone), "task": task, "steps": 3, "batch_size": 4, "max_target_tokens": 6}
    run = Run(**values, methods=[{"kind": "prompt", "length": 3}], max_input_tokens=80)
    remember(run)
    train(run, folder / "bank" / "toy")
    text = "review: {{text}}\nIt is"
    write_task(folder, "toy_choice", rows, text, **choice(WORDS))
    write_task(folder, "toy_text", rows, text, **written(6))
    sampled = written(6, do_sample=True, temperature=2.0)
    write_task(folder, "toy_drawn", rows, text, **sampled | {"repeats": 2})
    means = {"aggregation": "weighted_perplexity", "higher_is_better": False}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}"}
    write_task(folder, "toy_rolling", rows, "", **rolling, metric_list=[{"metric": "word_perplexity", **means}])
    return folder


def printed(softprompt, *arguments) -> dict[str, float]:
    """Run the command and return the value of each task from the table that the harness prints."""
    code, out, err = softprompt("lm-eval", *arguments)
    assert code == 0, err
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    return {row[0]: float(row[6]) for row in rows if re.fullmatch(r"\d+\.\d+", row[6])}


def test_the_command_gives_the_accuracy_of_softprompt_eval_for_a_t5(softprompt, t5):
    arguments = ["--model", "softprompt", "--model_args", f"run={t5 / 'run'}", "--include_path", t5]
    found = printed(softprompt, *arguments, "--tasks", "moods_choice,moods_text")
    for task, ways in (("moods_choice", ["--predict-by", "likelihood"]), ("moods_text", ["--predict-by", "decoding"])):
        code, out, _ = softprompt("eval", t5 / "run", *ways)
        assert code == 0
        assert found[task] == pytest.approx(json.loads(out)["accuracy"], abs=1e-4)
    assert found["moods_choice"] > 0.5  # what it has learned


def test_the_command_gives_the_accuracy_of_softprompt_eval_for_a_decoder_only_model(softprompt, lm):
    for named in (f"run={lm / 'bank' / 'toy'}", f"bank={lm / 'bank'},prompt=toy"):
        arguments = ["run", "-M", "softprompt", "--model_args", f"{named},eos=true", "--include_path", lm]
        found = printed(softprompt, *arguments, "--tasks", "toy_choice", "toy_text")
        for task, way in (("toy_choice", "likelihood"), ("toy_text", "decoding")):
            out = softprompt("eval", lm / "bank" / "toy", "--predict-by", way)[1]
            assert found[task] == pytest.approx(json.loads(out)["accuracy"], abs=1e-4)
    assert 0 < found["toy_choice"] < 1


def test_log_probabilities_are_those_of_our_own_ranking_and_answers_ours_but_for_the_space(lm):
    found = evaluated(lm, ["toy_choice", "toy_text"], {"run": str(lm / "bank" / "toy"), "eos": True})["samples"]
    predictor = load_predictor(lm / "bank" / "toy")
    texts = [f"review: {sample['doc']['text']}\nIt is" for sample in found["toy_choice"]]
    likely = predictor.task.model_copy(update={"predict_by": "likelihood"})
    predictor.task = likely
    for sample, (answer,) in zip(found["toy_choice"], predictor.scored(texts), strict=True):
        values = [response[0][0] for response in sample["resps"]]
        assert (WORDS[int(np.argmax(values))], max(values)) == (answer.text, pytest.approx(answer.score, rel=1e-4))
    predictor.task = predictor.task.model_copy(update={"predict_by": "decoding"})
    answers = [answer.text for (answer,) in predictor.scored(texts)]
    assert [sample["filtered_resps"][0] for sample in found["toy_text"]] == answers
    assert len({*answers}) > 1


def test_pairs_are_tokenised_as_by_the_harness_itself(lm):
    model = lm_eval.api.registry.get_model("softprompt")(backbone=str(lm / "llama"))
    theirs = SimpleNamespace(backend="causal", tok_encode=lambda text, **_: model.scorer.encode(text))
    pairs = [(text[:cut], text[cut:]) for text in tiny_lm.TEXTS for cut in range(1, len(text) - 1)]
    compared = 0
    for context, continuation in [*pairs, ("a film \n ", " positive"), ("ends in two  ", "words")]:
        expected = lm_eval.api.model.TemplateLM._encode_pair(theirs, context, continuation)
        if expected[0] and expected[1]:
            assert model.scorer.pair(context, continuation) == expected
            compared += 1
    assert compared > 100


def test_rolling_likelihoods_are_those_of_every_window(lm):
    rows = np.asarray(load_predictor(lm / "bank" / "toy").model.prompt.table())
    backbone = load_backbone(lm / "llama")
    for name, under in (("backbone", None), ("run", rows)):
        arguments = {name: str(lm / ("llama" if under is None else "bank/toy")), "max_length": 8}
        found = evaluated(lm, ["toy_rolling"], arguments, limit=3)["samples"]["toy_rolling"]
        reader = load_predictor(lm / "bank" / "toy").tokenizer
        for sample in found:
            ids = [reader.prefix_id, *reader.encode(sample["doc"]["text"])]
            total = 0.0
            for first in range(0, len(ids) - 1, 8):  # each window reads up to 8 tokens and foretells what is new
                last = min(first + 8, len(ids) - 1)
                start = max(0, last - 8)
                values = np.asarray(jax.nn.log_softmax(logits(backbone, [ids[start : last + 1]], prompt=under)))[0]
                total += sum(values[place - start - 1, ids[place]] for place in range(first + 1, last + 1))
            assert len(ids) > 9
            assert sample["resps"][0][0] == pytest.approx(total, rel=1e-4)


def test_rolling_likelihoods_need_a_decoder_only_model(t5, lm):
    with pytest.raises(UserError, match="loglikelihood_rolling: found a model with an encoder"):
        evaluated(lm, ["toy_rolling"], f"run={t5 / 'run'}")


def test_samples_of_one_context_differ_and_are_the_same_each_time(lm):
    found = [evaluated(lm, ["toy_drawn"], {"backbone": str(lm / "llama")}, limit=4)["samples"] for _ in range(2)]
    drawn, again = ([sample["resps"][0] for sample in each["toy_drawn"]] for each in found)
    assert drawn == again
    assert any(first != second for first, second in drawn)


def test_arguments_of_the_harness_pass_through(softprompt, lm):
    arguments = ["--model", "softprompt", "--tasks", "toy_choice", "--include_path", lm, "--limit", 3]
    arguments += ["--output_path", lm / "out", "--log_samples", "--use_cache", lm / "cached", "--num_fewshot", 0]
    model = ["--model_args", f"backbone={lm / 'llama'}", "model=tiny", "dtype=float32", "max_length=12"]
    code, out, err = softprompt("lm-eval", *arguments, *model, "--batch_size", 2)
    assert code == 0
    assert "batch_size: 2" in out
    cut = re.search(r"loglikelihood: (\d) contexts cut on the left to 12 tokens", out + err)
    assert cut is not None
    assert int(cut[1]) > 0
    (samples,) = (lm / "out" / "tiny").glob("samples_toy_choice*.jsonl")
    first = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(first) == 3
    code, out, err = softprompt("lm-eval", *arguments, *model, "--batch_size", 2)
    assert code == 0
    assert "Cached requests: 6, Requests remaining: 0" in err
    code, out, _ = softprompt("lm-eval", "run", "--help")
    assert code == 0
    assert "--num_fewshot" in out
    code, out, _ = softprompt("lm-eval", "-h")
    assert code == 0
    assert "Language Model Evaluation Harness" in out


def test_few_shots_become_turns_of_the_chat_template(lm):
    settings = {"apply_chat_template": True, "system_instruction": "Be brief.", "num_fewshot": 0}
    found = evaluated(lm, ["toy_choice"], f"backbone={lm / 'llama'}", limit=1, **settings)
    context = found["samples"]["toy_choice"][0]["arguments"][0][0]
    assert context.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nreview: ")
    assert context.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert math.isfinite(found["samples"]["toy_choice"][0]["resps"][0][0][0])
    model = lm_eval.api.registry.get_model("softprompt")(backbone=str(lm / "llama"))
    assert model.chat_template(True)
    assert model.chat_template(False) is None
    with pytest.raises(UserError, match="--apply_chat_template tools: expected no name"):
        model.chat_template("tools")
    begun = model.apply_chat_template([{"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert begun == "<|im_start|>assistant\nIt is"


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ("run=/no/such", {}, "/no/such"),
        ("rum=a", {}, "--model_args: rum: unknown setting; .*did you mean run"),
        ({"backbone": "embedded", "batch_size": 0}, {}, "--model_args: batch_size"),
        (
            "backbone=embedded",
            {"apply_chat_template": True},
            "--apply_chat_template: .*the tokenizer has no chat template",
        ),
        ("backbone=embedded", {"gen_kwargs": "num_beam=2"}, "generation_kwargs num_beam: not known"),
    ],
)
def test_bad_arguments_are_errors_of_a_user(t5, arguments, settings, message):
    with pytest.raises(UserError, match=message):
        evaluated(t5, ["moods_text"], arguments, limit=2, **settings)


@pytest.mark.parametrize(
    ("task", "message"),
    [("nope", "lm-eval: Tasks not found: nope; expected tasks of"), ("moods_text", "--model_args: rum: unknown")],
)
def test_a_refused_command_ends_with_one_line_and_exit_code_2(softprompt, t5, task, message):
    base = ["lm-eval", "--model", "softprompt", "--model_args", "rum=a", "--include_path", t5]
    code, out, err = softprompt(*base, "--tasks", task)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"softprompt: {message}")
    assert "Traceback" not in out + err


def test_torch_is_not_needed():
    assert "torch" not in sys.modules
