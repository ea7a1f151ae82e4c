"""Every setting of a run: defaults, errors that name the key, a run's YAML is a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import tiny_lm
from small_runs import CONFIGS, write_config

from softprompt_jax import Run, load_run
from softprompt_jax.config import UserError, parse, read_text, to_yaml
from softprompt_jax.data.few_shot import FewShot
from softprompt_jax.methods import LoRA, Prompt
from softprompt_jax.tasks import get, names, resolve, short


def refused(small, tmp_path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_run(write_config(tmp_path / "a.yaml", small.short), overrides)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 700
    return text.replace(str(tmp_path / "a.yaml"), "A")


def test_defaults_are_the_papers():
    run = Run(task="sentiment_movie")
    assert (run.steps, run.batch_size, run.methods[0].length) == (30_000, 32, 100)
    assert (run.optimizer.kind, run.optimizer.learning_rate) == ("adafactor", 0.3)
    assert (run.loss, run.z_loss, run.dtype) == ("sum", 1e-4, "float32")


def test_a_t5_has_the_papers_dropout_and_a_decoder_only_model_none():
    models = [tiny.settings(), tiny_lm.settings()]
    for stated, expected in ((None, [0.1, 0.0]), (0.2, [0.2, 0.2])):
        run = Run(task="sentiment_movie", dropout=stated)
        assert [run.backbone_overrides(settings)["dropout"] for settings in models] == expected


def test_run_as_yaml_is_the_same_run(small, tmp_path):
    run = load_run(write_config(tmp_path / "a.yaml", small.full), ["steps=7", "schedule.decay=cosine"])
    (tmp_path / "b.yaml").write_text(to_yaml(run), encoding="utf-8")
    assert load_run(tmp_path / "b.yaml") == run


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_that_ships_is_a_run(path):
    run = load_run(path)
    assert Run.model_validate(run.model_dump(mode="json")) == run


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.learning_rate=0.1", ("adafactor", 0.1)),
        ("optimizer.kind=adamw", ("adamw", 0.3)),
        ("optimizer={kind: adamw, learning_rate: 2}", ("adamw", 2)),
    ],
)
def test_part_of_the_default_optimizer_can_be_set(small, tmp_path, override, expected):
    run = load_run(write_config(tmp_path / "a.yaml", small.short), [override])
    assert (run.optimizer.kind, run.optimizer.learning_rate) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("packing=true", (None, None)),
        ("packing={length: 64}", (64, None)),
        ("packing=false", None),
        ("packing=null", None),
    ],
)
def test_packing_has_a_short_form(small, tmp_path, override, expected):
    packing = load_run(write_config(tmp_path / "a.yaml", small.short), [override]).packing
    assert packing == expected or (packing.length, packing.target_length) == expected


def test_packing_is_refused_with_the_methods_reason(small, tmp_path):
    prefix = "methods=[{kind: prefix, positions: before}]"
    assert "packing with the method prefix: a prefix with positions" in refused(small, tmp_path, "packing=true", prefix)
    load_run(write_config(tmp_path / "a.yaml", small.short), [prefix])


@pytest.mark.parametrize("override", ["methods.0.length=20", "methods=[{kind: prompt, length: 20}]"])
def test_a_file_without_methods_has_one_that_can_be_changed(tmp_path, override):
    path = tmp_path / "mine.yaml"
    path.write_text("task: boolq\n")
    assert [(method.kind, method.length) for method in load_run(path, [override]).methods] == [("prompt", 20)]
    assert load_run(path, ["methods.0.kind=lora"]).methods[0].kind == "lora"
    with pytest.raises(UserError, match=r"methods\.0\.lenght: unknown setting; .*; did you mean length\?"):
        load_run(path, ["methods.0.lenght=20"])


@pytest.mark.parametrize("override", ["methods=lora", "methods=[lora]", "methods.0=lora", "methods=[{kind: lora}]"])
def test_a_methods_kind_may_stand_for_it_and_brings_its_optimizer(tmp_path, override):
    for text in ("task: boolq\n", "task: boolq\nmethods: [{kind: prompt, length: 3}]\n"):
        (tmp_path / "mine.yaml").write_text(text)
        run = load_run(tmp_path / "mine.yaml", [override])
        assert run == load_run(tmp_path / "mine.yaml", ["methods=[{kind: lora}]"])
        assert (run.methods[0].kind, run.optimizer.kind) == ("lora", "adamw")


def test_prompt_start_has_a_short_form(small, tmp_path):
    run = load_run(write_config(tmp_path / "a.yaml", small.short), ["methods.0.init=vocabulary"])
    assert run.methods[0].init.kind == "vocabulary"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stpes=3", "A: stpes: unknown setting; expected one of task, backbone, dtype, "),
        ("stpes=3", "; did you mean steps"),
        ("learning_rate=0.1", "A: learning_rate: unknown setting; expected one of task, backbone, "),
        ("learning_rate=0.1", "; did you mean optimizer.learning_rate?"),
        ("lr=0.1", "A: lr: unknown setting; "),
        ("lr=0.1", "; did you mean optimizer.learning_rate?"),
        ("optimizer.lr=0.1", "; did you mean optimizer.learning_rate?"),
        ("epochs=3", "; did you mean steps?"),
        ("num_virtual_tokens=3", "; did you mean methods.0.length"),
        (
            "methods=[loora]",
            "A: methods.0: found {'kind': 'loora'}; kind 'loora' is unknown; expected one of 'pro",
        ),
        ("methods=[loora]", "; did you mean lora?"),
        ("task={name: boolq, metrics: [f1_macro, acc]}", "A: task.metrics: found ['f1_macro', 'acc']; unknown metric"),
        ("task={name: squad, metrics: [f1]}", "A: task.metrics: found ['f1']; the metric f1 needs two label words or"),
        ("task={few_shot: {count: 3}}", "task: found few_shot; expected a source too, or the name of the task to"),
        ("steps=many", "A: steps: found 'many'; input should be a valid integer"),
        ("steps=0", "A: steps: found 0; input should be greater than 0"),
        ("steps=1.5", "A: steps: found 1.5; input should be a valid integer"),
        ("methods=[]", "A: methods: found []; list should have at least 1 item"),
        (
            "methods.0.lenght=3",
            "A: methods.0.lenght: unknown setting; "
            "expected one of optimizer, length, place, init, kind, reparameterization; did you mean",
        ),
        ("methods.0.kind=promt", "A: methods.0: found {'kind': 'promt', 'length': 3}; "),
        ("methods.0.init=words", "A: methods.0.init: found {'kind': 'words'}"),
        ("task=sentiment_moovie", "A: task: found 'sentiment_moovie'; expected a name that "),
        ("task=sentiment_moovie", "; did you mean sentiment_movie"),
        ("task=null", "A: task: "),
        ("task.label_word=[a]", "A: task.label_word: unknown setting; expected one of name, source, "),
        ("task.source.trian=x", "A: task.source.trian: unknown setting; expected one of kind, train, "),
        ("task.source.kind=file", "A: task.source: found {'kind': 'file', "),
        ("task.input='{text'", "A: task.input: found '{text'; not a template"),
        ("task.metrics=[acuracy]", "did you mean accuracy?"),
        ("accumulate=3", "accumulate 3 does not divide batch_size 8"),
        ("packing=64", "A: packing: found 64; "),
        ("packing={lenght: 64}", "A: packing.lenght: unknown setting; expected one of length, target_length; did you "),
        ("dtype=float16", "A: dtype: found 'float16'; input should be 'float32' or 'bfloat16'"),
        ("dropout=1", "A: dropout: found 1; input should be less than 1"),
        ("backbone=3", "A: backbone: found 3; input should be a valid string"),
        ("optimizer.kind=sgd", "'adafactor', 'adamw'"),
        ("seed=-1", "seed: found -1"),
        ("seed=${x}", "settings do not interpolate"),
    ],
)
def test_setting_that_does_not_fit_is_one_line(small, tmp_path, override, expected):
    assert expected in refused(small, tmp_path, override)


def test_a_named_task_stands_in_the_settings_whole():
    run = Run(task="cb")
    assert run.task == get("cb")
    assert run.model_dump(mode="json")["task"]["target"] == {"0": "entailment", "1": "contradiction", "2": "neutral"}
    changed = parse(Run, {"task": {"name": "cb", "source": {"revision": "abc"}, "with_prefix": True}}, "here")
    assert changed.tasks[0].source == get("cb").source.model_copy(update={"revision": "abc"})
    assert parse(Run, changed.model_dump(mode="json"), "here") == changed


@pytest.mark.parametrize("name", names())
def test_the_short_form_of_a_task_is_the_task(name):
    task = get(name)
    assert short(task) == name
    for changes in ({"with_prefix": True}, {"source": task.source.model_copy(update={"kind": task.source.kind})}):
        changed = task.model_copy(update=changes)
        assert resolve(short(changed)) == changed
    other = task.model_copy(update={"name": "mine", "few_shot": FewShot(count=2)})
    assert resolve(short(other)) == other


def test_revisions_of_a_saved_run_are_taken_where_none_is_stated():
    saved = parse(Run, {"task": {"name": "cb", "source": {"revision": "abc"}}}, "here")
    assert Run(task="cb").at_revisions_of(saved) == saved
    stated = parse(Run, {"task": {"name": "cb", "source": {"revision": "def"}}}, "here")
    assert stated.at_revisions_of(saved) == stated
    assert Run(task="rte").at_revisions_of(saved) == Run(task="rte")
    assert Run(task="spam_sms").at_revisions_of(saved) == Run(task="spam_sms") == Run(task="spam_sms").pinned()
    mixture = {"kind": "mixture", "tasks": ["rte", "cb"]}
    both = parse(Run, {"task": mixture}, "here").at_revisions_of(saved)
    assert [task.source.revision for task in both.tasks] == [None, "abc"]


def test_task_is_the_one_setting_without_a_default(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 3\n", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape("a.yaml: task: missing; expected a value; add it to the settings")):
        load_run(tmp_path / "a.yaml")
    assert [name for name, field in Run.model_fields.items() if field.is_required()] == ["task"]


def test_target_sentinel_needs_decoding():
    task = {"name": "boolq", "predict_by": "likelihood"}
    with pytest.raises(
        UserError, match="target_sentinel with predict_by likelihood or a seqio task: expected decoding and text"
    ):
        parse(Run, {"task": task, "target_sentinel": True}, "here")


def test_part_of_a_methods_own_optimizer_keeps_the_rest_of_it():
    quick = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    own = load_run(quick, ["methods=[{kind: lora}]"]).optimizer
    slower = load_run(quick, ["methods=[{kind: lora}]", "optimizer.learning_rate=0.1"]).optimizer
    assert slower == own.model_copy(update={"learning_rate": 0.1})
    assert load_run(quick, ["methods=[{kind: lora}]", "optimizer.kind=adamw"]).optimizer == own
    assert load_run(quick, ["methods=[{kind: lora}]", "optimizer.kind=adafactor"]).optimizer.kind == "adafactor"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": [{"kind": "multitask", "tasks": 3}]}, "several tasks: expected a mixture with prompts: own"),
        ({"task": "pretraining", "packing": True}, "packing with pre-training, whose batches have shapes of their own"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(settings, message):
    texts = {"kind": "pretraining", "texts": [{"path": "a"}], "stages": [{"until": 1, "objectives": {"copy": 1}}]}
    task = texts if settings.get("task") == "pretraining" else "sentiment_movie"
    with pytest.raises(UserError, match=message):
        parse(Run, settings | {"task": task}, "here")


PROMPT, LORA = {"kind": "prompt"}, {"kind": "lora"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"methods": [PROMPT, LORA]}, [("adafactor", 0.3), ("adamw", 2e-3)]),
        ({"methods": [LORA, PROMPT]}, [("adamw", 2e-3), ("adafactor", 0.3)]),
        ({"methods": [PROMPT, LORA | {"optimizer": {"learning_rate": 1e-4}}]}, [("adafactor", 0.3), ("adamw", 1e-4)]),
        ({"methods": [PROMPT | {"optimizer": {"kind": "adamw"}}, LORA]}, [("adamw", 0.3), ("adamw", 2e-3)]),
        # Without a kind it is the first method's, with one it is for all, a method's own rate included.
        ({"methods": [PROMPT, LORA], "optimizer": {"learning_rate": 0.1}}, [("adafactor", 0.1), ("adamw", 2e-3)]),
        ({"methods": [PROMPT, LORA], "optimizer": {"kind": "adamw"}}, [("adamw", 0.3), ("adamw", 2e-3)]),
        (
            {"methods": [PROMPT, LORA], "optimizer": {"kind": "adafactor", "learning_rate": 0.1}},
            [("adafactor", 0.1), ("adafactor", 0.1)],
        ),
        # A scale is of the run's rate, as it has always been.
        ({"methods": [PROMPT, LORA | {"learning_rate_scale": 0.01}]}, [("adafactor", 0.3), ("adafactor", 0.3)]),
    ],
)
def test_every_method_has_an_optimizer(settings, expected):
    run = parse(Run, {"task": "sentiment_movie"} | settings, "here")
    assert [(each.kind, each.learning_rate) for each in run.optimizers] == expected
    assert run.optimizers[0] == run.optimizer
    again = parse(Run, read_text(to_yaml(run), "saved"), "saved")
    assert again == run
    rates = [rate for _, rate in expected]
    found = run.learning_rate(0)
    assert found == (rates[0] if len(set(rates)) == 1 else dict(zip(run.method_names, rates, strict=True)))


def test_methods_in_python_have_their_optimizers_too():
    run = Run(task="sentiment_movie", methods=[LoRA(optimizer={"learning_rate": 1e-3}), Prompt()])
    assert run == parse(
        Run, {"task": "sentiment_movie", "methods": [LORA | {"optimizer": {"learning_rate": 1e-3}}, PROMPT]}, "here"
    )
    assert [each.kind for each in run.optimizers] == ["adamw", "adafactor"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": [PROMPT, LORA | {"optimizer": {"learning_rate": -1}}]}, "here: methods.1.optimizer.learning_rate"),
        ({"methods": [PROMPT | {"optimizer": {"rate": 1}}]}, "here: methods.0.optimizer.rate: unknown setting"),
        (
            {"methods": [PROMPT | {"optimizer": {"learning_rate": 1}}], "optimizer": {"learning_rate": 2}},
            "optimizer and methods.0.optimizer are one setting; expected one of them",
        ),
        ({"methods": [{"kind": "black_box"}, LORA]}, "optimizer cma_es beside another one: expected one optimizer for"),
        (
            {"methods": [{"kind": "full", "optimizer": {"kind": "adafactor", "restore": True}}, LORA]},
            "optimizer.restore for one method of several: expected one optimizer for all",
        ),
    ],
)
def test_optimizers_that_cannot_be_are_one_line(settings, message):
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        parse(Run, {"task": "sentiment_movie"} | settings, "here")
    assert "\n" not in str(refused.value)
