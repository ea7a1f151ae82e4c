"""A teacher reads a context before every input; what trains learns to answer without it."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_lm
import yaml

from softprompt_jax import UserError, compress, load_backbone, load_predictor, load_run, logits, sweep, train
from softprompt_jax.assembly import assemble
from softprompt_jax.checkpoints.artifact import load_prompt
from softprompt_jax.config import parse
from softprompt_jax.data.examples import Example, known_target
from softprompt_jax.data.task import Distill, iterate
from softprompt_jax.data.tokenizer import TextFormat, Tokenizer
from softprompt_jax.inference.evaluate import DecodedAnswer
from softprompt_jax.methods import split
from softprompt_jax.optim.losses import cross_entropy, divergence
from softprompt_jax.progress import Reporter
from softprompt_jax.run import Run
from softprompt_jax.training import distill
from softprompt_jax.training.compress import ask_questions, describe, read_question
from softprompt_jax.training.run_data import RunData
from softprompt_jax.training.vmapped import _task_of, shape_of

pytestmark = pytest.mark.usefixtures("own_cache")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = "a warm film . good\nthe plot makes no sense . bad\n"


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    path = tiny_lm.folder(tmp_path_factory.mktemp("lm") / "llama")
    about = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": CHAT}))
    return path


@pytest.fixture
def settings(lm, tmp_path):
    """Return the settings of a short run with a teacher, of which some rows have targets."""
    (tmp_path / "context.txt").write_text(CONTEXT)
    words = " ".join(tiny_lm.TEXTS).split()
    rows = [{"inputs": " ".join(words[n : n + 4 + n % 3]), "targets": ("good", "bad")[n % 2]} for n in range(20)]
    (tmp_path / "inputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": {"kind": "distill", "context": str(tmp_path / "context.txt"), "inputs": str(tmp_path / "inputs.jsonl")},
        "backbone": str(lm),
        "methods": [{"kind": "prompt", "length": 3}],
        **{"steps": 30, "batch_size": 8, "shapes": 1, "max_input_tokens": 24, "max_target_tokens": 4},
        **{"evaluate_every": 15, "checkpoint_every": 15, "log_every": 5},
    }


def assembled(settings, **changes):
    run = parse(Run, settings | changes, "test")
    assembly = assemble(run)
    distill.attach_context(run, assembly)
    return run, assembly


# ------------------------------------------------------------------------------------------------------- the teacher


def test_a_context_is_read_as_it_stands_before_a_word(tmp_path):
    """A byte-level tokenizer takes two line breaks at the end of a text for one piece, before a word for two."""

    class Breaks(Tokenizer):
        form = TextFormat(start=None)

        def __init__(self) -> None: ...

        def encode(self, text: str) -> list[int]:
            return [0 if part == "\n\n" else ord(part) for part in re.findall(r"\n\n$|.", text, re.S)]

    path = tmp_path / "context.txt"
    path.write_text("b\n\n")
    assert distill.read_context(str(path), Breaks()) == [98, 10, 10]


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_teachers_logits_are_those_of_the_context_in_front_of_the_input(settings, lm, template):
    run, assembly = assembled(settings, text={"template": template})
    tokenizer = assembly.tokenizer
    batch = next(iter(RunData(run, assembly, split(assembly.model)).batches(0)))
    batch = {name: jnp.asarray(rows) for name, rows in batch.items()}
    found = np.asarray(distill.teacher_logits(assembly.model, batch))
    begin, context = list(tokenizer.begin), tokenizer.encode(CONTEXT)
    assert bool(begin) == (template == "chat")
    for row in range(3):
        text = [i for i in np.asarray(batch["encoder_tokens"][row]).tolist() if 0 <= i < 416][len(begin) :]
        target = [i for i in np.asarray(batch["decoder_targets"][row]).tolist() if i >= 0]
        whole = [*begin, *context, *text, *target[:-1]]
        expected = np.asarray(logits(load_backbone(lm), [whole]))[0, -len(target) :]
        np.testing.assert_allclose(found[row, : len(target)], expected, atol=1e-4)


def test_an_encoder_reads_the_context_together_with_the_input(small, settings):
    run, assembly = assembled(settings, backbone=str(small.backbone), dropout=0)
    batch = next(iter(RunData(run, assembly, split(assembly.model)).batches(0)))
    batch = {name: jnp.asarray(rows) for name, rows in batch.items()}
    found = np.asarray(distill.teacher_logits(assembly.model, batch))
    context = assembly.tokenizer.encode(CONTEXT)
    for row in range(3):
        text = [i for i in np.asarray(batch["encoder_tokens"][row]).tolist() if 0 < i < 160]
        inputs = batch["decoder_inputs"][row][None]
        expected = np.asarray(logits(load_backbone(small.backbone), [[*context, *text]], inputs))[0]
        real = np.asarray(batch["decoder_targets"][row]) > 0
        np.testing.assert_allclose(found[row][real], expected[real], atol=1e-4)


def test_a_prefix_of_the_contexts_own_keys_and_values_has_no_divergence(settings):
    length = len(assembled(settings)[1].tokenizer.encode(CONTEXT))
    prefix = {"kind": "prefix", "length": length, "network": None, "positions": "before"}
    run, assembly = assembled(settings, methods=[prefix])
    model = assembly.model
    batch = next(iter(RunData(run, assembly, split(model)).batches(0)))
    batch = {name: jnp.asarray(rows) for name, rows in batch.items()}
    teacher = distill.teacher_logits(model, batch)
    before, _ = divergence(model(batch), teacher, batch["decoder_targets"], -1)
    model.decoder.prefix.attention.keys[...], model.decoder.prefix.attention.values[...] = model.context()
    after, count = divergence(model(batch), teacher, batch["decoder_targets"], -1)
    assert float(before) > 0.01
    assert float(after) < 1e-4 * float(count)


def test_divergence_is_that_of_its_definition_and_its_gradient_leaves_the_teacher_alone():
    found, known = (jax.random.normal(jax.random.key(n), (2, 3, 5)) for n in (0, 1))
    targets = jnp.asarray([[4, 1, -1], [0, -1, -1]])
    p, q = jax.nn.softmax(known), jax.nn.softmax(found)
    expected = np.asarray(p * np.log(p / q)).sum(-1)[np.asarray(targets) >= 0].sum()
    loss, count = divergence(found, known, targets, -1)
    assert (float(loss), float(count)) == (pytest.approx(float(expected), rel=1e-5), 3.0)
    assert float(jnp.abs(jax.grad(lambda teacher: divergence(found, teacher, targets, -1)[0])(known)).max()) == 0
    sure = jnp.where(jax.nn.one_hot(jnp.maximum(targets, 0), 5) > 0, 50.0, -50.0)
    assert float(divergence(found, sure, targets, -1)[0]) == pytest.approx(
        float(cross_entropy(found, targets, padding=-1)[0]), rel=1e-5
    )


# ------------------------------------------------------------------------------------------------------ its answers


def data_of(settings, **changes):
    run, assembly = assembled(settings, **changes)
    return RunData(run, assembly, split(assembly.model)).tasks[0], assembly.tokenizer


def test_the_answers_of_the_train_split_are_the_rows_or_the_teachers(settings, tmp_path, monkeypatch):
    data, tokenizer = data_of(settings)
    assert [tokenizer.decode(data.tokens["train"].target(n).tolist()) for n in range(4)] == [
        "good",
        "bad",
        "good",
        "bad",
    ]
    rows = [json.loads(line) for line in (tmp_path / "inputs.jsonl").read_text().splitlines()]
    assert [one.input for one in data.examples["validation"]] == [row["inputs"] for row in rows[4::5]]
    asked, tokenizer = data_of(settings, task=settings["task"] | {"answers": "greedy"})
    for split_name in ("train", "validation"):
        for number, example in enumerate(asked.examples[split_name]):
            said = example.fields[distill.TEACHER]
            assert tokenizer.decode(asked.tokens[split_name].target(number).tolist()) == said
            assert example.target in ("good", "bad")  # by which it is scored
    monkeypatch.setattr(distill.Decoder, "answers", None)  # what was answered is not asked again
    again, _ = data_of(settings, task=settings["task"] | {"answers": "greedy"})
    assert again.examples == asked.examples


def test_rows_without_targets_are_answered_by_the_teacher(settings, tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "inputs.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        del row["targets"]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = settings["task"] | {"inputs": str(tmp_path / "some.jsonl")}
    data, _ = data_of(settings, task=task)
    train_split = data.examples["train"]
    assert [distill.TEACHER in one.fields for one in train_split[:4]] == [True, False, True, False]
    assert train_split[0].target == train_split[0].fields[distill.TEACHER]
    assert isinstance(data.task, Distill)
    scores = data.task.compare(["x"] * 4, data.examples["validation"])
    assert set(scores) == {"agreement"}  # labels of some are no accuracy


def test_label_words_are_chosen_by_the_teacher(settings):
    task = settings["task"] | {"label_words": ["good", "bad"], "predict_by": "likelihood", "answers": "greedy"}
    data, _ = data_of(settings, task=task)
    assert {one.fields[distill.TEACHER] for one in data.examples["train"]} <= {"good", "bad"}


def test_the_likelier_word_may_be_asked_of_a_run_with_a_teacher(settings, tmp_path, softprompt):
    task = settings["task"] | {"label_words": ["good", "bad"], "answers": "greedy"}
    changes = {"task": task, "steps": 1, "evaluate_every": 1, "result_examples": 4}
    train(parse(Run, settings | changes, "test"), tmp_path / "run")
    code, out, err = softprompt(
        "eval", tmp_path / "run", "--split", "validation", "--predict-by", "likelihood", "--trust"
    )
    assert code == 0, err
    assert json.loads(out)["accuracy"] >= 0
    assert json.loads(out)["illegal"] == 0


def test_agreement_and_accuracies_are_shares():
    task = parse(Run, {"task": {"kind": "distill", "context": "c", "inputs": "i"}}, "test").task
    assert isinstance(task, Distill)
    examples = [
        Example("a", "good", {distill.TEACHER: "good", distill.LABELLED: True}),
        Example("b", "bad", {distill.TEACHER: "good", distill.LABELLED: True}),
    ]
    assert task.compare(["good", "bad"], examples) == {"agreement": 0.5, "teacher_accuracy": 0.5}
    assert task.compare(["good"], [Example("a", "good")]) == {}


def test_a_file_of_inputs_keeps_every_fifth_row_for_validation(settings, tmp_path):
    (task,) = parse(Run, settings, "test").tasks
    texts = {name: [one.input for one in iterate(task, name, labelled=False)] for name in ("train", "validation")}
    assert [len(each) for each in texts.values()] == [16, 4]
    source = {"kind": "inputs", "path": str(tmp_path / "inputs.jsonl"), "test": str(tmp_path / "inputs.jsonl")}
    source |= {"validation": str(tmp_path / "inputs.jsonl")}
    (own,) = parse(Run, settings | {"task": {"kind": "distill", "context": "c", "source": source}}, "test").tasks
    assert [len(list(iterate(own, name, labelled=False))) for name in ("train", "validation", "test")] == [20, 20, 20]


def test_a_named_task_takes_a_teacher_and_settings_are_settings_again(settings):
    run = parse(Run, settings | {"task": {"kind": "distill", "context": "c.txt", "name": "sentiment_movie"}}, "test")
    assert isinstance(run.task, Distill)
    assert (run.task.words, run.task.source.kind) == (["negative", "positive"], "package")
    assert parse(Run, run.model_dump(mode="json"), "again") == run
    other = parse(Run, settings | {"task": {"kind": "distill", "context": "d.txt", "name": "sentiment_movie"}}, "test")
    assert shape_of(run) != shape_of(other)  # what a teacher has read is shared by those that train together


# ------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def compressed(settings, tmp_path):
    def run(out, *changes):
        task = settings["task"]
        kept = {key: value for key, value in settings.items() if key not in ("task", "methods", "backbone")}
        own = [f"{key}={json.dumps(value)}" for key, value in kept.items()]
        return compress(
            task["context"], tmp_path / out, task["inputs"], None, settings["backbone"], 3, [*own, *changes]
        )

    return run


@pytest.mark.slow
def test_rows_come_nearer_to_the_teacher_and_leave_what_a_prompt_leaves(settings, tmp_path, compressed, softprompt):
    result = compressed("out", "schedule.decay=constant", "steps=60", "task.answers=greedy")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert {"agreement", "teacher_accuracy", "accuracy"} <= set(result["validation"])
    assert result["context_tokens"] == len(assembled(settings)[1].tokenizer.encode(CONTEXT))
    assert load_prompt(tmp_path / "out").shape == (3, 32)
    answers = load_predictor(tmp_path / "out").texts(["a warm , funny"])
    assert len(answers) == 1
    own = [
        f"{key}={json.dumps(value)}" for key, value in settings.items() if key not in ("task", "methods", "backbone")
    ]
    command = ["compress", settings["task"]["context"], "--inputs", settings["task"]["inputs"], "--rows", 3, "--out"]
    command += [tmp_path / "out", "--backbone", settings["backbone"], *own]
    again = softprompt(*command, "schedule.decay=constant", "steps=60", "task.answers=greedy", "--json")
    assert (again[0], json.loads(again[1])) == (0, result.result)  # finished already
    said = "\n".join(describe(result))
    assert "agreement with the teacher" in said
    assert f"instead of {result['context_tokens']} tokens" in said


@pytest.mark.slow
def test_a_stopped_compression_goes_on_to_the_same_bits(tmp_path, compressed, monkeypatch):
    whole = compressed("whole", "task.answers=sampled")
    real, calls = RunData.validate, 0

    def dying(*arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunData, "validate", dying)
        with pytest.raises(KeyboardInterrupt):
            compressed("killed", "task.answers=sampled")
    again = compressed("killed", "task.answers=sampled")
    assert again["validation"] == whole["validation"]
    np.testing.assert_array_equal(load_prompt(tmp_path / "killed"), load_prompt(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [{"kind": "prefix", "length": 4, "network": None}, {"kind": "p_tuning", "length": 4}]
)
def test_a_prefix_and_a_network_learn_from_a_teacher_too(settings, tmp_path, method):
    run = parse(Run, settings | {"methods": [method], "steps": 4, "evaluate_every": 4}, "test")
    assert "agreement" in train(run, tmp_path / "out")["validation"]


@pytest.mark.slow
def test_prompts_with_one_context_train_together(settings, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    sweep(path, ["learning_rate=0.1,0.3"], tmp_path / "many")
    alone = tmp_path / "alone"
    train(load_run(path, ["optimizer.learning_rate=0.1"]), alone)
    np.testing.assert_allclose(
        load_prompt(tmp_path / "many" / "learning_rate=0.1"), load_prompt(alone), rtol=1e-3, atol=1e-4
    )


# ------------------------------------------------------------------------------------------------------- questions


def test_a_question_is_the_first_line_up_to_its_mark():
    assert read_question(" Who wrote the book? I think\nAnswer: x") == "Who wrote the book?"
    assert read_question("The book was written.") is None
    assert read_question("Why?") is None
    assert read_question("") is None


def test_questions_are_asked_once_and_kept(settings, tmp_path, monkeypatch):

    from softprompt_jax.training import compress as module_function  # noqa: F401

    module = importlib.import_module("softprompt_jax.training.compress")
    rounds = iter([["Who is it now?", "Who is it now?", "nothing"], ["Why is it so?", "What of the film?", "x y z?"]])
    monkeypatch.setattr(module, "ask_teacher", lambda *_: [DecodedAnswer(text, [], 0.0) for text in next(rounds)])
    run, path = parse(Run, settings, "test"), tmp_path / "out.inputs.jsonl"
    ask_questions(run, 3, path, Reporter(quiet=True))
    asked = [json.loads(line)["inputs"] for line in path.read_text().splitlines()]
    assert asked == ["Who is it now?", "Why is it so?", "What of the film?"]
    ask_questions(run, 3, path, Reporter(quiet=True))  # the model is not asked again
    with pytest.raises(UserError, match="holds 3 questions; expected 4; delete it to ask again"):
        ask_questions(run, 4, path, Reporter(quiet=True))
    monkeypatch.setattr(module, "ask_teacher", lambda *_: [DecodedAnswer("nothing", [], 0.0)])
    with pytest.raises(UserError, match="the model asked 0 different questions of 2; expected all"):
        ask_questions(run, 2, tmp_path / "other.jsonl", Reporter(quiet=True))


# ---------------------------------------------------------------------------------------------------- what is refused


def test_what_cannot_be_compressed_is_one_line(settings, tmp_path, refused):
    context, inputs, backbone = settings["task"]["context"], settings["task"]["inputs"], settings["backbone"]
    command = ["compress", context, "--out", tmp_path / "out", "--backbone", backbone]
    assert "expected inputs or a number of questions" in refused(*command)
    assert "expected inputs or a number of questions" in refused(*command, "--inputs", inputs, "--ask", "3")
    command += ["--inputs", inputs]
    assert "lora changes the teacher too; expected a prompt or a prefix" in refused(*command, "methods=[lora]")
    assert "stands not only before the input; expected place: before" in refused(*command, "methods.0.place=after")
    assert "found packing or target_sentinel" in refused(*command, "packing=true")
    assert "found the task sentiment_movie; expected one of kind distill" in refused(*command, "task=sentiment_movie")
    assert "a task with a teacher takes all rows" in refused(*command, "task.few_shot={count: 1}")
    (tmp_path / "empty.txt").write_text(" \n")
    command[1] = tmp_path / "empty.txt"
    assert "is empty, so that the teacher would read what the student reads" in refused(*command)
    command[1] = tmp_path / "nowhere.txt"
    assert "nowhere.txt: cannot be read (No such file or directory); expected a text file" in refused(*command)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    command[1] = tmp_path / "bytes.txt"
    assert "cannot be read (not UTF-8)" in refused(*command)
    command[1] = context
    (tmp_path / "other.jsonl").write_text('{"question": "why"}\n' * 5)
    command[-1] = tmp_path / "other.jsonl"
    assert "no field 'inputs'; found question" in refused(*command)
    (tmp_path / "other.jsonl").write_text('{"inputs": " "}\n' * 5)
    assert "the input of row 1 is empty" in refused(*command)
    (tmp_path / "other.jsonl").write_text('{"inputs": "a"}\n')
    assert "validation: is empty; expected at least one input" in refused(*command)
    assert not Path(tmp_path / "out" / "config.yaml").exists()


def test_a_context_longer_than_the_models_positions_is_refused(settings, tmp_path, lm):
    config = json.loads((lm / "config.json").read_text())
    path = tiny_lm.folder(tmp_path / "short")
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    with pytest.raises(
        UserError, match=r"tokens, with an input and its answer up to \d+; expected at most 40, the pos"
    ):
        assembled(settings, backbone=str(path))


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_answers_under_its_own_keys_and_values_as_behind_the_text(settings, tmp_path):
    (tmp_path / "context.txt").write_text(
        "Review: a joy\nSentiment: positive\n\nReview: a bore\nSentiment: negative\n\n"
    )
    run, assembly = assembled(settings, backbone="smollm2")
    parts = split(assembly.model)
    batch = next(iter(RunData(run, assembly, parts).batches(0)))
    found = np.asarray(
        distill.teacher_logits(assembly.model, {name: jnp.asarray(rows) for name, rows in batch.items()})
    )
    text = [i for i in batch["encoder_tokens"][0].tolist() if 0 <= i < 49152]
    target = [i for i in batch["decoder_targets"][0].tolist() if i >= 0]
    joined = assembly.tokenizer.input_ids((tmp_path / "context.txt").read_text() + assembly.tokenizer.decode(text))
    expected = np.asarray(logits(load_backbone("smollm2"), [[*joined, *target[:-1]]]))[0, -len(target) :]
    np.testing.assert_allclose(found[0, : len(target)], expected, atol=2e-3)


def test_answers_are_kept_by_the_whole_teacher_and_drawn_by_the_seed(settings):
    _, assembly = assembled(settings)
    marks, model = {assembly.model.context.mark}, assembly.model
    for weight in (model.decoder.norm.scale, model.decoder.layers.feed_forward.down.kernel):
        before = weight[...]
        weight[...] = 1.5 * before  # what the values of the last layer do not depend on
        marks.add(distill.Context(distill._bare(model), list(model.context.ids), model.context.begin).mark)
        weight[...] = before
    again = distill.Context(distill._bare(model), list(model.context.ids), model.context.begin).mark
    assert (len(marks), again in marks) == (3, True)
    runs = [parse(Run, settings | {"seed": seed}, "test") for seed in (0, 1)]
    assert len({_task_of(run) for run in runs}) == 2
    plain = [parse(Run, settings | {"seed": seed, "task": "sentiment_movie"}, "test") for seed in (0, 1)]
    assert len({_task_of(run) for run in plain}) == 1


def test_questions_lie_beside_the_run_and_belong_to_their_text(settings, tmp_path, monkeypatch):
    module = importlib.import_module("softprompt_jax.training.compress")
    assert module._questions_of("runs/x/") == module._questions_of("runs/x") == Path("runs/x.inputs.jsonl")
    answers = [DecodedAnswer(text, [], 0.0) for text in ("Who is it now?", "Why is it so?")]
    monkeypatch.setattr(module, "ask_teacher", lambda *_: answers)
    run, path = parse(Run, settings, "test"), tmp_path / "out.inputs.jsonl"
    ask_questions(run, 2, path, Reporter(quiet=True))
    ask_questions(run, 2, path, Reporter(quiet=True))
    (tmp_path / "context.txt").write_text("quite another text .\n")
    with pytest.raises(UserError, match=r"holds questions about another text; expected those about .*context\.txt"):
        ask_questions(run, 2, path, Reporter(quiet=True))
    path.write_text('{"inputs": "Who is it?", "context": []}\n' * 2)  # written by others
    with pytest.raises(UserError, match="holds questions about another text"):
        ask_questions(run, 2, path, Reporter(quiet=True))


def test_minus_one_is_an_answer_where_the_target_is_a_template():
    task = Distill(context="c", source={"kind": "inputs", "path": "x"})
    found = [known_target(task, {"inputs": "5-6=", "targets": value}, "row") for value in ("-1", -1, "", None, 0)]
    assert found == ["-1", "-1", None, None, "0"]
