"""What goes to the hub: a run's files and a card that says what, how well, with which settings, and how to load."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from small_runs import CONFIGS

from softprompt_jax import UserError, load_backbone, load_predictor, load_prompt
from softprompt_jax.config import parse, read, to_yaml
from softprompt_jax.export.push import card, push
from softprompt_jax.run import Run, load_run

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def run(prompt_run, tmp_path):
    return shutil.copytree(prompt_run, tmp_path / "run")


def test_a_dry_run_writes_a_folder_that_loads_here_and_in_peft(run):
    folder = push(run, "me/moods", dry_run=True)
    assert folder == run / "hub"
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.yaml", "result.json", "prompt.safetensors"),
        *("adapter_config.json", "adapter_model.safetensors"),
    }
    np.testing.assert_array_equal(load_prompt(folder), load_prompt(run))
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "peft"
    result = json.loads((run / "result.json").read_text())
    assert f"| test | accuracy | {result['test']['accuracy']:.4f} |" in text
    assert 'PeftModel.from_pretrained(model, "me/moods")' in text
    assert 'load_predictor("me/moods", backbone="backbone")' in text
    assert "kind: prompt" in text
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["methods"] == yaml.safe_load((run / "config.yaml").read_text())["methods"]
    for file in ("README.md", "config.yaml"):
        assert "/tmp" not in (folder / file).read_text()
    push(run, "me/moods", dry_run=True)  # and again


def test_a_tuned_model_is_published_whole(full_run, tmp_path):
    run = shutil.copytree(full_run, tmp_path / "run")
    folder = push(run, "me/model", dry_run=True)
    load_backbone(folder)
    assert 'load_backbone("me/model")' in (folder / "README.md").read_text()


def test_a_published_backbone_is_named_and_what_peft_lacks_is_said():
    run = parse(Run, {"task": "rte", "backbone": "google/t5-base-lm-adapt"}, "test")
    text = card(run, {"test": {"accuracy": 0.5}, "steps": 3, "best_step": 2}, "me/x", {"prompt.safetensors"}, "m: why")
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "google/t5-base-lm-adapt"
    assert "No form for PEFT: why" in text
    assert 'load_predictor("me/x").texts' in text
    assert "step 2 of 3" in text


def test_a_card_of_a_decoder_only_model_names_its_class_and_its_kind():
    run = parse(Run, {"task": "rte", "backbone": "HuggingFaceTB/SmolLM2-135M"}, "test")
    text = card(run, {}, "me/x", {"prompt.safetensors", "adapter_config.json"}, None)
    front = yaml.safe_load(text.split("---")[1])
    assert (front["pipeline_tag"], front["base_model"]) == ("text-generation", "HuggingFaceTB/SmolLM2-135M")
    assert "llama" in front["tags"]
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/x")' in text
    assert "T5" not in text
    assert "Seq2Seq" not in text


def test_the_hub_is_asked_for_the_repository_and_given_the_folder(run, monkeypatch):
    asked = []

    class Api:
        def create_repo(self, name, private, exist_ok):
            asked.append((name, private, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            asked.append((repo_id, sorted(path.name for path in folder_path.iterdir())[0]))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    push(run, "me/moods")
    assert asked == [("me/moods", True, True), ("me/moods", "README.md")]


@pytest.mark.parametrize(("options", "private"), [((), True), (("--public",), False)])
def test_a_new_repository_is_private_unless_public_is_said(softprompt, run, monkeypatch, options, private):
    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **settings: asked.append(settings["private"]))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda *_, **__: None)
    assert softprompt("push", run, "me/moods", *options)[0] == 0
    assert asked == [private]


def settings_of(text: str) -> dict:
    """Return the settings that a card shows."""
    return yaml.safe_load(text.rpartition("```yaml")[2].partition("```")[0])


def test_a_card_counts_nothing_as_a_score_and_shows_what_differs(run):
    text = (push(run, "me/moods", dry_run=True) / "README.md").read_text()
    assert "count" not in text.partition("## Use")[0]
    settings = settings_of(text)
    assert set(settings["task"]) <= {"name", "source", "input", "target", "label_words", "metrics"}
    assert settings["methods"] == [{"kind": "prompt", "length": 3}]


@pytest.mark.parametrize(
    "config", [path for path in CONFIGS if path.parent.name == "methods"], ids=lambda path: path.stem
)
def test_the_settings_of_a_card_are_those_of_the_run(config):
    run = load_run(config)
    assert parse(Run, settings_of(card(run, {}, "me/x", set(), None)), "card") == run


def test_a_card_of_the_embedded_backbone_says_where_to_get_it(small):
    run = parse(Run, small.short | {"backbone": "embedded"}, "test")
    text = card(run, {}, "me/x", {"prompt.safetensors", "adapter_config.json"}, None)
    assert text.index("softprompt import embedded --to embedded") < text.index('from_pretrained("embedded")')


def test_a_card_on_a_copy_names_the_original_and_says_so(small):
    run = parse(Run, small.short | {"backbone": "smollm2"}, "test")
    text = card(run, {}, "me/x", {"prompt.safetensors", "adapter_config.json"}, None)
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "was `smollm2` of softprompt_jax, the Q4_1 copy of HuggingFaceTB/SmolLM2-135M-Instruct." in text
    assert 'load_predictor("me/x").texts' in text  # the settings name the copy
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/x")' in text


def code_of(text: str) -> list[str]:
    """Return the blocks of Python in a card."""
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_the_cards_code_answers_as_printed_from_the_hub(small, run, tmp_path, monkeypatch):
    folder = push(run, "me/moods", dry_run=True)
    expected = load_predictor(run).texts(["..."])
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        return str(shutil.copytree(folder, tmp_path / "cached", dirs_exist_ok=True))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "backbone").symlink_to(small.backbone)  # a reader's copy
    monkeypatch.chdir(tmp_path / "here")
    ours, _ = code_of((folder / "README.md").read_text())
    *before, last = ours.strip().splitlines()
    known: dict = {}
    exec("\n".join(before), known)
    assert eval(last, known) == expected
    np.testing.assert_array_equal(load_prompt("me/moods"), load_prompt(run))
    assert set(asked) == {"me/moods"}
    (tmp_path / "here" / "me").mkdir()  # a path, of which the hub is not asked
    with pytest.raises(UserError, match="me/moods: no such file"):
        load_prompt("me/moods")


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
def test_the_cards_code_for_peft_loads_as_printed(small, run, tmp_path, monkeypatch):
    shutil.copytree(push(run, "me/moods", dry_run=True), tmp_path / "here" / "me" / "moods")
    (tmp_path / "here" / "backbone").symlink_to(small.backbone)
    monkeypatch.chdir(tmp_path / "here")
    known: dict = {}
    exec(code_of((tmp_path / "here/me/moods/README.md").read_text())[1], known)
    rows = known["model"].get_prompt_embedding_to_save("default").detach().numpy()
    np.testing.assert_array_equal(rows, load_prompt(run))


def test_what_cannot_be_pushed_is_refused_in_a_line(run, tmp_path, monkeypatch):
    def refused(*arguments, match):
        with pytest.raises(UserError, match=match) as caught:
            push(*arguments)
        assert "\n" not in str(caught.value)

    refused(run, "moods", match="moods: not a hub name; expected OWNER/NAME")
    refused(tmp_path, "me/moods", match="no finished run")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("off")))
    refused(run, "me/moods", match=r"the hub did not take it \(off\); expected a login")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: (_ for _ in ()).throw(LookupError("x")))
    refused(run, "me/moods", match=r"the hub did not take it \(x\)")  # whatever carries its requests raises


def test_no_file_tells_where_it_was_made(run):
    folder = push(run, "me/moods", dry_run=True)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "backbone"
    for path in folder.iterdir():
        assert b"/tmp" not in path.read_bytes(), path.name
        assert str(run.parent).encode() not in path.read_bytes(), path.name


def test_a_card_that_was_changed_by_hand_stays(run):
    card = push(run, "me/moods", dry_run=True) / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    push(run, "me/moods", dry_run=True)
    assert card.read_text().endswith("\nMine.\n")
    push(run, "me/other", dry_run=True)
    assert "Mine." not in card.read_text()


def test_a_card_of_a_name_that_only_begins_alike_is_written_anew(run):
    card = push(run, "me/moods-2", dry_run=True) / "README.md"
    assert "me/moods-2" in card.read_text()
    assert "me/moods-2" not in (push(run, "me/moods", dry_run=True) / "README.md").read_text()


def test_a_card_survives_a_push_that_fails(run, monkeypatch):
    card = push(run, "me/moods", dry_run=True) / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    monkeypatch.setattr("softprompt_jax.export.push.export", lambda *arguments, **settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        push(run, "me/moods", dry_run=True)
    assert card.read_text().endswith("\nMine.\n")


def test_a_published_folder_answers_as_its_run(small, run):
    texts = ["the garden is warm", "the old mill is dull"]
    found = load_predictor(push(run, "me/moods", dry_run=True), str(small.backbone)).texts(texts)
    assert found == load_predictor(run).texts(texts)


def test_settings_that_look_like_numbers_are_read_again(small, run):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["task"]["name"] = "1e5"
    (run / "config.yaml").write_text(to_yaml(parse(Run, settings, "test")))
    folder = push(run, "me/moods", dry_run=True)
    assert parse(Run, read(folder / "config.yaml"), "published").task.name == "1e5"
