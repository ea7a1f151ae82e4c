"""Adapters of PEFT: theirs are read, ours can be read by them, and what cannot be is refused in a line."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft_fixture
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from softprompt_jax import UserError, load_backbone
from softprompt_jax.checkpoints.backbone import save_backbone
from softprompt_jax.checkpoints.peft import attach_adapter, save_adapter
from softprompt_jax.export.export import export
from softprompt_jax.methods import (
    IA3,
    METHODS,
    Context,
    Full,
    LoRA,
    Multitask,
    Norms,
    Prefix,
    Prompt,
    PTuning,
    attach,
    put_trained,
    split,
)

ADAPTERS = [*peft_fixture.PROMPTED, "LORA", "IA3", "LN_TUNING"]
CONTEXT = Context(list)


_SAVED_NAME = {"prompt_encoder.embedding.weight": "prompt_embeddings"}


@pytest.mark.parametrize(
    "name",
    [name if name in ("PROMPT_TUNING", "LORA") else pytest.param(name, marks=pytest.mark.slow) for name in ADAPTERS],
)
def test_their_adapter_gives_their_logits_loss_and_gradient(shared_fixtures, name, tmp_path):
    golden, folder = peft_fixture.golden(shared_fixtures, name), shared_fixtures / "peft" / name
    model, batch = load_backbone(folder / "backbone").model, peft_fixture.batch(shared_fixtures, name)
    method = attach_adapter(model, folder / "adapter")
    loss, logits, gradient = tiny.loss_logits_gradient(split(model), batch)
    real = np.asarray(batch["decoder_targets"]) != 0
    np.testing.assert_allclose(logits[real], golden["logits"][real], atol=1e-4)
    np.testing.assert_allclose(loss / real.sum(), golden["loss"], rtol=1e-5)
    put_trained(model, gradient, name)  # so that it gets PEFT's names and layout
    _, slopes = method.to_peft(model)
    theirs = {key.removeprefix("grad/").replace(".default", ""): golden[key] for key in golden if key[:5] == "grad/"}
    theirs = {_SAVED_NAME.get(key, key): value for key, value in theirs.items()}
    assert slopes.keys() == theirs.keys()
    for key, slope in slopes.items():
        expected = theirs[key][: len(slope)]  # of 2P rows of a prompt P are read
        tolerance = 2e-5 * max(1, np.abs(expected).max())
        np.testing.assert_allclose(slope / real.sum(), expected, atol=tolerance, err_msg=key)
        assert not theirs[key][len(slope) :].any()


@pytest.mark.parametrize("name", ADAPTERS)
def test_their_adapter_written_again_is_the_same_adapter(shared_fixtures, name, tmp_path):
    folder = shared_fixtures / "peft" / name
    model = load_backbone(folder / "backbone").model
    method = attach_adapter(model, folder / "adapter")
    save_adapter(model, [method], tmp_path / "again", "t5", {"task": "none"})
    again = load_backbone(folder / "backbone").model
    assert attach_adapter(again, tmp_path / "again") == method
    jax.tree.map(np.testing.assert_array_equal, split(again).trainable, split(model).trainable)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    theirs = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "t5"
    assert config["peft_type"] == theirs["peft_type"]
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert set(config) <= set(theirs)
    expected = load_file(folder / "adapter" / "adapter_model.safetensors")
    found = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert set(found) == set(expected)
    for key, value in found.items():
        np.testing.assert_array_equal(value, expected[key][: len(value)])  # of 2P rows of a prompt P are written
        assert value.dtype == np.float32


@pytest.mark.slow
def test_a_run_leaves_an_adapter(prompt_run, tmp_path):
    export(prompt_run, "peft", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["num_virtual_tokens"] == 3
    assert config["num_transformer_submodules"] == 1
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rows = load_file(prompt_run / "prompt.safetensors")["prompt"]
    np.testing.assert_array_equal(saved["prompt_embeddings"], rows)
    with pytest.raises(UserError, match=r"trained on backbone .* used on this one"):
        load_backbone("embedded", adapter=tmp_path / "adapter")


def edited(fixtures, tmp_path, **changes):
    folder = tmp_path / "adapter"
    shutil.copytree(fixtures / "peft" / "PROMPT_TUNING" / "adapter", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"peft_type": "PROMPT_TUNNING"},
            "peft_type is 'PROMPT_TUNNING'; expected one of .*; did you mean PROMPT_TUNING",
        ),
        ({"task_type": "CAUSAL_LM"}, "task_type is 'CAUSAL_LM'; expected SEQ_2_SEQ_LM"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]; expected none"),
        ({"num_virtual_tokens": 4}, r"prompt_embeddings: found shape \[10, 32\]; expected \[4 or 8, its width"),
    ],
)
def test_an_adapter_that_asks_for_more_is_refused_in_a_line(shared_fixtures, tmp_path, changes, expected):
    with pytest.raises(UserError, match=expected) as error:
        attach_adapter(tiny.model(), edited(shared_fixtures, tmp_path, **changes))
    assert "\n" not in str(error.value)
    assert "adapter" in str(error.value)


def test_an_adapter_of_another_width_or_without_its_files_is_refused_in_a_line(shared_fixtures, tmp_path):
    folder = edited(shared_fixtures, tmp_path)
    with pytest.raises(UserError, match=r"found \[5, 32\] for prompt.rows; expected \[5, 16\]; give"):
        attach_adapter(tiny.model(), folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin: not a complete file of torch"):
        attach_adapter(tiny.model(), folder)
    save_file({"other": np.zeros((5, 32), np.float32)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"no 'prompt_embeddings'; expected it in an adapter of kind PROMPT_TUNING"):
        attach_adapter(tiny.model(), folder)
    for text, expected in {"[]": "found list; expected .*, a JSON object", "{": "cannot be read as JSON"}.items():
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=expected):
            attach_adapter(tiny.model(), folder)
    with pytest.raises(UserError, match=r"no adapter_config.json; expected what PEFT has written"):
        attach_adapter(tiny.model(), tmp_path)


def test_what_peft_has_not_is_refused_in_a_line(tmp_path):
    model = tiny.model()
    methods = [Full()]
    attach(methods, model, tiny.key(0), CONTEXT)
    with pytest.raises(UserError, match="full has no counterpart in PEFT"):
        save_adapter(model, methods, tmp_path, None, {})
    with pytest.raises(UserError, match="found prompt and full; expected one, since a PEFT adapter holds one"):
        save_adapter(model, [Prompt(), Full()], tmp_path, None, {})
    assert not list(tmp_path.iterdir())


def test_every_kind_of_peft_belongs_to_one_method():
    kinds = [method.peft_type for method in METHODS.values() if method.peft_type]
    assert len(kinds) == len(set(kinds))


# ------------------------------------------------------------------------------ PEFT itself reads ours


OURS = {
    "prompt": Prompt(length=3),
    "lora": LoRA(rank=2),
    "rslora, some places": LoRA(rank=3, alpha=4.5, rslora=True, targets=["encoder.*.query", "up", "cross.output"]),
    "dora, all places": LoRA(rank=2, dora=True, targets=["*"]),
    "ia3": IA3(),
    "ia3, other sides": IA3(outputs=["up", "cross.query"], inputs=["attention.output"]),
    "norms": Norms(),
    "norms, some": Norms(targets=["decoder.*", "encoder.norm"]),
    "p-tuning": PTuning(length=3, network="mlp", hidden=8),
    "prefix": Prefix(length=3, attentions=["decoder"], positions="before", network=None, init="zero"),
    "multitask": Multitask(length=3, tasks=2, rank=2),
}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
@pytest.mark.parametrize("gated", [True, False], ids=["1.1", "1.0"])
@pytest.mark.parametrize("name", list(OURS))
def test_our_adapter_gives_our_logits_in_peft(name, gated, tmp_path):
    import torch
    from peft import AutoPeftModelForSeq2SeqLM

    method = OURS[name]
    if not gated and "up" in {*getattr(method, "targets", ()), *getattr(method, "outputs", ())}:
        pytest.skip("T5 1.0 has no such place")
    shape = {} if gated else {"activation": "relu", "gated": False, "tied": True, "scale_output": True}
    model = tiny.model(**shape)
    save_backbone(model, tmp_path / "backbone", "float32")
    method.attach(model, tiny.key(0), CONTEXT)
    draw = np.random.default_rng(0)
    change = jax.tree.map(lambda x: x + 0.2 * draw.normal(size=x.shape).astype(np.float32), split(model).trainable)
    if name == "prefix":  # which PEFT's layers share on a T5 of even depth
        change = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), change)
    put_trained(model, change, "test")
    save_adapter(model, [method], tmp_path / "adapter", str(tmp_path / "backbone"), {})

    theirs = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").eval()
    text, whole = tiny.batch(), tiny.batch(prompt=3 if model.prompt is not None else 0)
    of_task = {}
    if name == "multitask":  # the odd rows are the second task's
        whole["encoder_tokens"] = whole["encoder_tokens"].at[1::2, :3].add(3)
        of_task = {"task_ids": torch.tensor([0, 1, 0, 1])}
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(np.asarray(text["encoder_tokens"])),
            attention_mask=torch.tensor(np.asarray(text["encoder_tokens"]) != 0).long(),
            labels=torch.tensor(np.asarray(text["decoder_targets"])).long(),
            **of_task,
        ).logits.numpy()
    real = np.asarray(text["decoder_targets"]) != 0
    np.testing.assert_allclose(tiny.forward(model, whole)[real], expected[real], atol=1e-4)
