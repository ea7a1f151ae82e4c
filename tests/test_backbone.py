"""Backbones on disk: what is saved is what is loaded, and what does not fit is refused in a line."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file, save_file

from softprompt_jax.checkpoints import tensors
from softprompt_jax.checkpoints.backbone import EMBEDDED, find_folder, load_backbone, save_backbone
from softprompt_jax.checkpoints.tensors import open_safetensors
from softprompt_jax.config import UserError
from softprompt_jax.data.tokenizer import load_tokenizer
from softprompt_jax.models import families
from softprompt_jax.models.families import names
from softprompt_jax.trees import flatten

SHAPES = {
    **tiny.SHAPES,
    "plain tanh gelu": {"gated": False},
    "plain silu": {"gated": False, "activation": "silu"},
    "tied, not scaled": {"tied": True},
    "untied, scaled": {"scale_output": True},
    "one layer with its own bias": {"num_layers": 1, "num_decoder_layers": 1, "bias_in_every_layer": True},
}


def weights(model) -> dict:
    return dict(flatten(nnx.to_pure_dict(nnx.state(model))))


def same(model, other) -> None:
    first, second = weights(model), weights(other)
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path], err_msg=path)
        assert leaf.dtype == second[path].dtype


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_backbone(tiny.model(), tmp_path, "float32")
    return tmp_path


def edit(folder: Path, **changes) -> None:
    """Change tensors of a folder's weights; None removes one."""
    values = load_file(folder / "model.safetensors") | {name.replace("__", "."): v for name, v in changes.items()}
    save_file({name: value for name, value in values.items() if value is not None}, folder / "model.safetensors")


def configure(folder: Path, **changes) -> None:
    """Change settings in `config.json`; None removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


# ---------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_every_shape_returns_to_the_bit(changes, tmp_path):
    model = tiny.model(**changes)
    save_backbone(model, tmp_path, "float32")
    backbone = load_backbone(tmp_path)
    assert backbone.settings == model.settings
    assert backbone.identity == str(tmp_path)
    same(backbone.model, model)


def test_activations_without_a_name_in_a_t5_config_are_refused(tmp_path):
    with pytest.raises(UserError, match="gated exact gelu"):
        save_backbone(tiny.model(activation="gelu"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_become_the_wanted_dtype(tmp_path):
    model = tiny.model()
    save_backbone(model, tmp_path, "bfloat16")
    half = load_backbone(tmp_path, "bfloat16").model
    assert {str(leaf.dtype) for leaf in weights(half).values()} == {"bfloat16"}
    assert half.dtype == "bfloat16"
    wide = load_backbone(tmp_path).model
    for path, leaf in weights(model).items():
        rounded = leaf.astype(jnp.bfloat16)
        np.testing.assert_array_equal(weights(half)[path], rounded)
        np.testing.assert_array_equal(weights(wide)[path], rounded.astype(jnp.float32))


def test_sharded_weights_equal_one_file(folder):
    tensors = load_file(folder / "model.safetensors")
    whole = load_backbone(folder).model
    (folder / "model.safetensors").unlink()
    halves = {f"model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for file, members in halves.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in halves.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same(load_backbone(folder).model, whole)
    (folder / file).unlink()
    refused(folder, f"{file}: missing; expected every file that the index names")
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    refused(folder, "not an index of weights")


@pytest.mark.parametrize("alias", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_the_shared_table_may_have_its_other_names(folder, alias):
    expected = load_backbone(folder).model
    table = load_file(folder / "model.safetensors")["shared.weight"]
    edit(folder, **{"shared.weight": None, alias: table})
    same(load_backbone(folder).model, expected)
    edit(folder, **{"shared.weight": table})  # and all of them at once
    same(load_backbone(folder).model, expected)


def test_a_tensor_of_old_files_that_nobody_reads_is_no_surplus(folder):
    edit(folder, **{"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.zeros((32, 2))})
    load_backbone(folder)


def test_a_head_counts_only_if_it_differs_from_the_table(folder):
    assert not load_backbone(folder).settings.tied
    # transformers 5 writes this for T5 1.1 too
    configure(folder, tie_word_embeddings=True)
    assert not load_backbone(folder).settings.tied
    table = load_file(folder / "model.safetensors")["shared.weight"]
    edit(folder, **{"lm_head.weight": table})
    assert load_backbone(folder).settings.tied
    edit(folder, **{"lm_head.weight": None})
    assert load_backbone(folder).settings.tied


def test_the_output_is_scaled_as_the_config_says_and_otherwise_if_it_is_a_tied_t5(folder):
    def scaled(**changes) -> bool:
        configure(folder, **changes)
        return load_backbone(folder).settings.scale_output

    assert not scaled(scale_decoder_outputs=False)
    assert scaled(scale_decoder_outputs=True)
    assert not scaled(scale_decoder_outputs=None, tie_word_embeddings=False)  # T5 1.1 before transformers 5
    assert not scaled(tie_word_embeddings=None)  # untied by its weights
    edit(folder, **{"lm_head.weight": None})
    assert scaled()  # T5 1.0
    assert not scaled(model_type="mt5")


def test_configs_of_old_files_have_defaults(folder):
    configure(
        folder,
        **dict.fromkeys(["relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon"]),
        num_decoder_layers=None,
        feed_forward_proj="gated-gelu",
    )
    assert load_backbone(folder).settings == tiny.settings()


def test_every_tensor_name_is_used_once():
    for changes in SHAPES.values():
        used = [name for weight in names(tiny.settings(**changes)).values() for name in weight.tensors]
        assert len(used) == len(set(used))


# --------------------------------------------------------------------------------------------- errors


def refused(folder: Path, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        load_backbone(folder)
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_t5_are_refused(folder, tmp_path):
    refused(tmp_path / "nowhere", "no such folder")
    configure(folder, model_type="bert")
    refused(folder, "model_type is 'bert'; expected one of gemma")
    configure(folder, model_type="t5", feed_forward_proj="gated-tanh")
    refused(folder, "feed_forward_proj is 'gated-tanh'")
    configure(folder, feed_forward_proj="gated-gelu", d_model=None)
    refused(folder, "no 'd_model'")
    configure(folder, d_model="wide")
    refused(folder, "d_model")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json: cannot be read as JSON")
    (folder / "config.json").unlink()
    refused(folder, "no config.json")


def test_a_folder_without_weights_is_refused_with_what_it_holds(folder):
    (folder / "model.safetensors").rename(folder / "weights.bin")
    refused(folder, "found config.json, weights.bin; expected weights: model.safetensors, pytorch_model.bin")


def test_weights_that_do_not_fit_are_refused_by_name(folder):
    query = "encoder.block.1.layer.0.SelfAttention.q.weight"
    good = load_file(folder / "model.safetensors")[query]
    edit(folder, **{query: None})
    refused(folder, f"1 weights are missing, first {query}")
    edit(folder, **{query: good[:-1]})
    refused(folder, rf"tensor {query}: found shape \[16, 15\]; expected \[16, 16\]")
    edit(folder, **{query: good, "encoder.block.2.layer.0.layer_norm.weight": np.ones(16, np.float32)})
    refused(folder, "1 weights are unknown, first encoder.block.2")
    configure(folder, vocab_size=49)
    edit(folder, **{"encoder.block.2.layer.0.layer_norm.weight": None})
    refused(folder, r"shared.weight: found shape \[50, 16\]; expected \[49, 16\]")


@pytest.mark.parametrize("size", [0, 4, 300, -1], ids=["empty", "no header", "half a header", "one byte short"])
def test_a_truncated_file_is_refused(folder, size):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size])
    refused(folder, "model.safetensors: not a complete safetensors file")


def test_a_hub_name_that_cannot_be_reached_is_refused_and_the_embedded_one_is_a_folder():
    refused(Path("nobody/no-such-t5"), "nobody/no-such-t5: neither a file nor a folder nor reachable on the hub")
    assert find_folder("embedded") == EMBEDDED


def test_saving_leaves_no_half_file(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(tensors, "save_file", fail)
    with pytest.raises(UserError, match="no space"):
        save_backbone(tiny.model(seed=1), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert jax.tree.leaves(weights(load_backbone(folder).model))


# ------------------------------------------------------------------------------- numbers and bytes that were changed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("layer_norm_epsilon", value) for value in (math.nan, -1, 0, math.inf)),
        *(("relative_attention_max_distance", value) for value in (0, -5, 8, 16, 10**9)),
        *(("relative_attention_num_buckets", value) for value in (0, -1, 10**9)),
        *(("d_model", value) for value in (0, -4, 10**9)),
        *(("num_layers", value) for value in (-1, 10**9)),
        *(("num_heads", 0), ("d_ff", 0), ("d_kv", -1), ("vocab_size", 10**12)),
    ],
)
def test_senseless_numbers_of_a_config_are_refused_before_anything_is_built(tmp_path, key, value):
    save_backbone(tiny.model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"config.json: .*: found") as caught:
        load_backbone(tmp_path)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("of", "changes", "message"),
    [
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "found 3 layer_types; expected 2, one for each layer"),
        ("gemma2", {"layer_types": ["full_attention"]}, "found 1 layer_types; expected 2, one for each layer"),
        ("gemma2", {"layer_types": 5}, "is no config of a gemma2"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "is no config of a gemma2"),
        ("llama", {"eos_token_id": "</s>"}, "is no config of a llama"),
        ("llama", {"head_dim": "x"}, "head_dim|is no config of a llama"),
        ("gpt2", {"eos_token_id": [[1]]}, "is no config of a gpt2"),
        ("t5gemma", {"encoder": 3}, "is no config of a t5gemma|encoder"),
    ],
)
def test_values_of_another_type_in_a_config_are_refused_in_a_line(of, changes, message):
    config = families.config_of(tiny.settings(of), "float32") | changes
    with pytest.raises(UserError, match=f"^config: .*({message})") as error:
        families.settings_of(config, "config")
    assert "\n" not in str(error.value)


def test_a_model_type_that_is_no_text_is_refused_in_a_line(tmp_path):
    save_backbone(tiny.model(), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ["t5"]}')
    with pytest.raises(UserError, match=r"config.json: model_type is \['t5'\]; expected one of"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_nested_json_is_refused_in_a_line(tmp_path, name):
    save_backbone(tiny.model(), tmp_path)
    for text in ("[" * 100_000, '{"a": ' * 70 + "1" + "}" * 70):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name}: .*nested too deeply"):
            load_backbone(tmp_path)


def test_a_changed_byte_of_the_embedded_backbone_is_seen(tmp_path):
    folder = tmp_path / "embedded"
    shutil.copytree(EMBEDDED, folder)
    assert all(tensor.checked for tensor in open_safetensors(folder / "model.safetensors").values())
    for name, place in (("model.safetensors", -999), ("spiece.model", 5000), ("config.json", 30)):
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (folder / name).write_bytes(content)
        read = load_backbone if name == "model.safetensors" else load_tokenizer
        with pytest.raises(UserError, match=rf"{name}: (tensor .*its checksum does not fit|is not as it was written)"):
            read(folder)
        (folder / name).write_bytes((EMBEDDED / name).read_bytes())
    load_tokenizer(folder)
