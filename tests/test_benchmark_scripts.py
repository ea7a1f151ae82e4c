"""Scripts of benchmarks/ run as their README says, at sizes that try them and measure nothing; the others say how."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_lm
import yaml
from test_docs import build

import softprompt_jax as sp
from softprompt_jax import load_run

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PARTS = {"machine", "make_backbone", "side_ours", "side_peft", "worker", "workload"}  # of the scripts
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in PARTS)


def run(script, *arguments):
    """Run a script; return what it printed."""
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_in_the_readme_and_says_what_it_does(script):
    text = (BENCHMARKS / "README.md").read_text() + (BENCHMARKS / "methods.md").read_text()
    assert f"{script}.py" in text
    assert "usage:" in run(script, "--help")


@pytest.mark.slow
def test_variants_on_an_accelerator_are_timed_and_what_fails_is_told(tmp_path):
    tiny = ["--sizes", "tiny", "--batch", 2, "--lengths", "32,8", "--rounds", 2, "--sample", 0]
    run("accelerator", *tiny, "--variants", "ours:plain:full,ours:plain:no", "--results", tmp_path / "lines")
    plain, failed = lines(tmp_path / "lines")
    assert plain["share"] == pytest.approx(plain["step_flop"] / plain["s_per_step"] / plain["ceiling_flop_s"])
    assert len(plain["fixed"]["seconds"]) == 2
    assert "'none', 'dots'" in failed["failed"]


@pytest.mark.slow
def test_checkpoints_are_timed(tmp_path):
    run("checkpoint", "--rounds", 1, "--results", tmp_path / "lines")
    assert all(line["bytes"] > 0 and line["cpu_s"] > 0 for line in lines(tmp_path / "lines"))


@pytest.mark.torch
def test_a_step_is_timed_beside_peft(tmp_path):
    tiny = ["--size", "tiny", "--dtypes", "float32", "--cores", 1, "--rounds", 1, "--steps", 1, "--sample", 0]
    run("training_step", *tiny, "--variants", "ours:unroll,peft:sdpa", "--results", tmp_path / "lines")
    ours, peft = lines(tmp_path / "lines")
    assert (ours["side"], peft["side"]) == ("ours", "peft")
    assert ours["losses_apart"] < 1e-3
    assert ours["times_best_peft"] == pytest.approx(peft["cpu_s_per_step"] / ours["cpu_s_per_step"], rel=0.02)


@pytest.mark.torch
def test_decoding_is_timed_beside_peft(tmp_path):
    run("decoding", "--size", "tiny", "--rounds", 1, "--tokens", 8, "--results", tmp_path / "lines")
    ours, peft = lines(tmp_path / "lines")
    assert ours["rows_that_agree"] == 1
    assert ours["times_peft"] == pytest.approx(peft["cpu_s_per_batch"] / ours["cpu_s_per_batch"], rel=0.02)


@pytest.mark.torch
def test_mixed_prompts_are_timed_beside_peft(tmp_path):
    run("mixed_prompts", "--rounds", 1, "--batch", 4, "--answer", 2, "--results", tmp_path / "lines")
    (line,) = lines(tmp_path / "lines")
    assert line["answers_that_agree"] == 1
    assert line["times_peft"]["peft, a prompt each"] > 0


def test_every_cell_of_the_table_of_methods_is_a_run():
    stated = yaml.safe_load((BENCHMARKS / "methods_smollm2.yaml").read_text())
    for method, own in stated["methods"].items():
        for config in stated["tasks"].values():
            changes = stated["settings"] | {key: value for key, value in own.items() if key != "only"}
            given = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
            assert load_run(BENCHMARKS.parent / config, given).backbone == "smollm2", method


@pytest.mark.slow
def test_each_cell_of_the_table_of_methods_is_a_file_and_what_is_done_is_not_done_again(small, tmp_path):
    config, cells, results = (tmp_path / name for name in ("task.json", "cells.yaml", "results"))
    config.write_text(json.dumps(small.short))
    norms = {"methods": ["norms"], "optimizer": {"kind": "adamw"}, "only": {"seeds": [0]}}
    stated = {"tasks": {"moods": str(config)}, "settings": {"log_every": 5}, "methods": {"norms": norms}}
    stated["methods"]["prompt"] = {"methods": [{"kind": "prompt", "length": 3}]}

    def measured() -> list[str]:
        cells.write_text(yaml.safe_dump(stated, sort_keys=False))
        given = ["--backbone", "smollm2", "--seeds", 2, "--steps", 20, "--cells", cells, "--results", results]
        said = run("methods", *given, "--runs", tmp_path / "runs").splitlines()
        assert not any((tmp_path / "runs" / "smollm2").iterdir())  # nothing is left but the files
        return [line.partition(":")[0] for line in said]

    assert measured() == ["moods-norms-0", "moods-prompt-0", "moods-prompt-1"]
    assert measured() == []
    stated["methods"]["prefix"] = {"methods": [{"kind": "prefix", "length": 2}], "only": {"tasks": ["moods"]}}
    assert measured() == ["moods-prefix-0", "moods-prefix-1"]
    found = json.loads((results / "smollm2" / "moods-prefix-1.json").read_text())
    assert (found["steps"], found["rows"], found["settings"]["seed"]) == (20, 2, 1)
    assert found["run_cpu_s"] > 20 * found["step_cpu_s"] > 0
    stated["methods"]["lora"] = {"methods": ["lora"]}
    cells.write_text(yaml.safe_dump(stated, sort_keys=False))
    rows = {line.split("|")[1].strip(): line for line in build.smollm2_table(cells, results / "smollm2").splitlines()}
    assert rows["norms"].split("|")[2].endswith(" (one seed) ")
    assert rows["prompt"].split("|")[2].endswith(" (2) ")
    assert rows["prompt"].split("|")[3:5] == [" 48 ", " 3 "]
    assert set(rows["lora"].split("|")[2:]) == {"  ", ""}  # not done yet
    assert rows["*majority class*"].split("|")[2] == " 50.0 "


@pytest.mark.torch
def test_peft_trains_and_answers_beside_ours(small, tmp_path):
    backbone = tiny_lm.folder(tmp_path / "backbone")
    task = small.task | {"predict_by": "likelihood", "metrics": ["accuracy"]}
    config, cells, results = (tmp_path / name for name in ("task.json", "cells.yaml", "results"))
    config.write_text(json.dumps(small.short | {"backbone": str(backbone), "task": task, "max_input_tokens": 64}))
    prompt = {"methods": [{"kind": "prompt", "length": 3}]}
    stated = {"tasks": {"movies": str(config)}, "settings": {"log_every": 5}, "methods": {"prompt": prompt}}
    cells.write_text(yaml.safe_dump(stated))
    given = ["--only", "movies", "--seeds", 1, "--steps", 20, "--cells", cells, "--results", results]
    given += ["--sides", "prompt", "peft_default", "peft_vocabulary", "peft_guide", "--runs", tmp_path / "runs"]
    said = [line.partition(":")[0] for line in run("quality", *given).splitlines() if "CPU minutes" in line]
    assert said == ["movies-prompt-0"] * 2 + [f"movies-peft_{kind}-0" for kind in ("default", "vocabulary", "guide")]
    guide, default = (
        json.loads((results / "quality" / f"movies-peft_{kind}-0.json").read_text()) for kind in ("guide", "default")
    )
    assert guide["trainable"] == default["trainable"] == 3 * 32
    assert guide["losses"]["last 10"] < guide["losses"]["first"] - 0.1  # it learns which words are answers
    assert guide["losses"]["first"] != default["losses"]["first"]  # other rows at the start
    assert guide["run_cpu_s"] > 20 * guide["step_cpu_s"] > 0
    table = build.quality_table(results).splitlines()
    assert f"| {guide['accuracy']:.1f} (one seed) |" in next(line for line in table if "rows of a text" in line)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT about transformers
def test_peft_chooses_words_as_ours_does(tmp_path, monkeypatch):
    import peft
    import transformers

    monkeypatch.syspath_prepend(BENCHMARKS)
    import quality

    folder, draw = tiny_lm.folder(tmp_path / "backbone"), np.random.default_rng(0)
    inner = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = peft.get_peft_model(inner, peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3)).eval()
    rows = model.prompt_encoder["default"].embedding.weight.detach().numpy()
    texts = [draw.integers(3, 400, size) for size in (9, 4, 6, 9, 2, 7, 12, 3)]
    words = [np.array([5, 2]), np.array([19, 2]), np.array([7, 31, 2])]
    backbone, expected = sp.load_backbone(folder), []
    for text in texts:
        scores = []
        for word in words:
            whole = np.concatenate([text, word])
            log_p = jax.nn.log_softmax(sp.logits(backbone, [whole.tolist()], prompt=rows)[0])
            scores.append(float(sum(log_p[place - 1, whole[place]] for place in range(len(text), len(whole)))))
        expected.append(int(np.argmax(scores)))
    assert len(set(expected)) > 1
    assert quality.likeliest(model, texts, words, batch_size=3) == expected
