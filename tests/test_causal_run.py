"""Runs on decoder-only models: a text's format, its limits, and what a run leaves."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_lm

from softprompt_jax import UserError, generate, load_backbone, load_predictor, load_run, logits, train
from softprompt_jax.assembly import assemble
from softprompt_jax.data.tokenizer import TextSettings, load_tokenizer
from softprompt_jax.models.causal_settings import LayerKind
from softprompt_jax.models.families import family_of

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lm.folder(tmp_path_factory.mktemp("lm") / "llama", tied=False)


def run_file(path, backbone, **changes):
    rows = [{"text": f"{text} {word}", "label": word} for text in tiny_lm.TEXTS[:3] for word in ("good", "bad")]
    for split in ("train", "validation"):
        (path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"kind": "files", "train": str(path / "train.jsonl"), "validation": str(path / "validation.jsonl")}
    task = {"name": "toy", "source": source, "input": "review: {text}", "label_words": ["good", "bad"]}
    values = {"backbone": str(backbone), "task": task, "steps": 4, "batch_size": 4, "evaluate_every": 4}
    values |= {"methods": [{"kind": "prompt", "length": 3}], "max_input_tokens": 40, "max_target_tokens": 4, **changes}
    (path / "run.yaml").write_text(json.dumps(values))
    return load_run(path / "run.yaml")


def test_a_context_has_no_eos_and_an_answer_has_its_space_and_one(folder):
    backbone = load_backbone(folder)
    tokenizer = load_tokenizer(backbone.folder, backbone.text_format)
    ids = tokenizer.input_ids("a warm film")
    assert tokenizer.decode(ids) == "a warm film"
    assert tokenizer.eos_id not in ids
    assert tokenizer.target_ids("good") == [*tokenizer.encode(" good"), tokenizer.eos_id]
    assert tokenizer.target_ids("good")[:-1] != tokenizer.encode("good")


def test_a_chat_template_stands_around_every_input_whatever_is_cut(folder, tmp_path):
    path = tiny_lm.folder(tmp_path / "chat")
    about = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": CHAT}))
    form = load_backbone(path).text_format
    tokenizer = load_tokenizer(path, form, TextSettings(template="chat"))
    whole = tokenizer.encode("<|im_start|>user\na warm film<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.input_ids("a warm film") == whole
    assert tokenizer.target_ids("good") == [*tokenizer.encode("good"), tokenizer.eos_id]
    first, last = len(tokenizer.begin), len(tokenizer.end)
    text = tokenizer.encode("a warm film and a funny one")
    long = tokenizer.input_ids("a warm film and a funny one")
    assert tokenizer.cut_input(long, first + last + 2) == [*tokenizer.begin, *text[:2], *tokenizer.end]
    left = load_tokenizer(path, form, TextSettings(template="chat", cut="left"))
    assert left.cut_input(long, first + last + 2) == [*tokenizer.begin, *text[-2:], *tokenizer.end]
    with pytest.raises(UserError, match="leave no room for text"):
        tokenizer.cut_input(long, first + last)
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(folder, form, TextSettings(template="chat"))


@pytest.mark.parametrize("keeps_bos", [True, False])
def test_a_prefix_that_begins_as_a_text_answers_as_with_the_text_in_front_bos_included(tmp_path, keeps_bos):
    path = tiny_lm.folder(tmp_path / "bos")
    stored = json.loads((path / "tokenizer.json").read_text())
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (path / "tokenizer.json").write_text(json.dumps(stored))
    text = "the jokes fall flat ."
    encode = load_tokenizer(path, load_backbone(path).text_format).encode
    length = 1 + len(encode(text))
    method = {"kind": "prefix", "length": length, "init": {"kind": "text", "text": text}}
    run = run_file(tmp_path, path, methods=[method], **({} if keeps_bos else {"text": {"bos": False}}))
    assembly = assemble(run)
    begin = [0] if keeps_bos else []
    assert list(assembly.tokenizer.begin) == begin
    asked = assembly.tokenizer.input_ids("a warm , funny film")
    front = [0, *encode(text)]
    assert asked == [*begin, *encode("a warm , funny film")]
    answer = np.asarray([[asked[-1], 7, 9]], np.int32)  # whose first input is the context's last token

    def logits_of(model, context):
        tokens = jnp.asarray([context + [-1] * 3], jnp.int32)
        return np.asarray(model({"encoder_tokens": tokens, "decoder_inputs": jnp.asarray(answer)}))

    expected = logits_of(load_backbone(path).model, [*front, *asked])
    np.testing.assert_allclose(logits_of(assembly.model, asked), expected, atol=1e-4)
    assert np.abs(logits_of(load_backbone(path).model, asked) - expected).max() > 1e-2
    train(run, tmp_path / "out")  # the run says of itself that its inputs have no BOS
    assert list(load_predictor(tmp_path / "out").tokenizer.begin) == begin


def test_an_answer_ends_at_a_stop_text(folder):
    backbone = load_backbone(folder)
    tokenizer = load_tokenizer(folder, backbone.text_format, TextSettings(stop=" film"))
    assert tokenizer.decode(tokenizer.encode("a warm film and more")) == "a warm"


def test_lists_of_ids_give_lists_of_ids_of_the_length_that_is_asked_for(folder):
    backbone = load_backbone(folder)
    texts = [[5, 6, 7], [9]]
    made = generate(backbone, texts, max_tokens=6, stop=False)
    assert [len(ids) for ids in made] == [6, 6]
    found = logits(backbone, texts)
    assert found.shape == (2, 3, backbone.settings.vocabulary_rows)
    assert [int(found[0, 2].argmax()), int(found[1, 0].argmax())] == [ids[0] for ids in made]
    padded = np.asarray([[5, 6, 7], [9, -1, -1]], np.int32)
    np.testing.assert_array_equal(logits(backbone, padded), found)
    rows = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    assert logits(backbone, texts, prompt=rows).shape == found.shape
    with pytest.raises(UserError, match="expected no decoder tokens"):
        logits(backbone, texts, texts)


@pytest.mark.slow
def test_a_run_leaves_what_answers_again(folder, tmp_path):
    run = run_file(tmp_path, folder)
    result = train(run, tmp_path / "out")
    assert result["validation"]["count"] == 6
    predictor = load_predictor(tmp_path / "out")
    assert predictor.texts([tiny_lm.TEXTS[0]]) == predictor.texts([tiny_lm.TEXTS[0]])


@pytest.mark.slow
def test_texts_beyond_the_learned_positions_are_refused_before_training(tmp_path):
    kinds = (LayerKind(),)
    path = tiny_lm.folder(tmp_path / "gpt", family="gpt_neo", kinds=kinds, learned_positions=40, **GPT)
    with pytest.raises(UserError, match="47 positions; expected at most 40, which this backbone has learned"):
        train(run_file(tmp_path, path), tmp_path / "out")
    assert not (tmp_path / "out" / "config.yaml").exists()


GPT = {
    **{"norm": "layer", "gated": False, "activation": "gelu_tanh", "output_bias": True, "feed_forward_bias": True},
    **{"score_scale": 1.0, "num_key_heads": 4},
}


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        ("llama", {"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; expected a whole number"),
        ("llama", {"num_hidden_layers": 10**6}, "at most 10,000 layers"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0; expected a whole number"),
        ("llama", {"hidden_size": "64"}, "hidden_size is '64'"),
        ("gpt_neo", {"attention_types": [[["global"], 10**12]]}, "names 1000000000000 layers; expected 2"),
        ("gpt_neo", {"attention_types": 3}, "expected \\[\\[\\[kinds\\], times\\], ...\\]"),
        ("gpt2", {"n_head": 0}, "n_head is 0"),
    ],
)
def test_sizes_of_a_foreign_config_are_judged_before_anything_is_made(model_type, changes, said):
    sizes = {
        "num_hidden_layers": 2,
        "num_layers": 2,
        "n_layer": 2,
        "num_attention_heads": 4,
        "num_heads": 4,
        "n_head": 4,
    }
    sizes |= {"hidden_size": 64, "n_embd": 64, "vocab_size": 100, "intermediate_size": 64}
    config = {"model_type": model_type, **sizes, **changes}
    with pytest.raises(UserError, match=said):
        family_of(model_type, "config.json").settings_of(config, "config.json")


def test_other_text_settings_read_no_file(folder, monkeypatch):
    tokenizer = load_tokenizer(folder, load_backbone(folder).text_format)
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: pytest.fail("reads a file"))
    other = tokenizer.reading(TextSettings(target_prefix=""))
    assert other.target_ids("good")[:-1] == tokenizer.encode("good")
    assert tokenizer.target_ids("good")[:-1] == tokenizer.encode(" good")
