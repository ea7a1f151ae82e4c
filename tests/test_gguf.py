"""GGUF: numbers equal to the `gguf` package's to the bit, models and tokenizers equal to Hugging Face's, no trust."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc

import gguf_file
import numpy as np
import pytest
from safetensors.numpy import load_file

from softprompt_jax import UserError, load_backbone
from softprompt_jax.checkpoints import gguf, gguf_model
from softprompt_jax.checkpoints.backbone import find_folder, open_source
from softprompt_jax.checkpoints.gguf import TENSOR_TYPES, open_gguf
from softprompt_jax.data.tokenizer import load_tokenizer
from softprompt_jax.export.import_source import import_source


def written(path, metadata, tensors, version=3):
    path.write_bytes(gguf_file.pack(metadata, tensors, version))
    return path


def error_of(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# --------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("number", TENSOR_TYPES)
def test_every_format_has_the_numbers_of_the_gguf_package(tmp_path, number):
    reference = pytest.importorskip("gguf", reason="the extra dev has it")
    kind = TENSOR_TYPES[number]
    block, size = reference.GGML_QUANT_SIZES[reference.GGMLQuantizationType[kind.name]]
    assert (kind.numbers, kind.size, kind.name) == (block, size, reference.GGMLQuantizationType(number).name)
    blocks = np.random.default_rng(number).integers(0, 256, (6, 512 // block, size), np.uint8)
    path = written(tmp_path / "m.gguf", {}, {"t": ((6, 512), number, blocks.tobytes())})
    with np.errstate(all="ignore"):
        expected = reference.dequantize(blocks.reshape(6, -1), reference.GGMLQuantizationType(number))
    tensor = open_gguf(path).tensor("t")
    found = tensor.part((slice(0, 6), slice(0, 512)))
    assert found.dtype == np.float32
    number_there = ~np.isnan(expected)  # one that is none may have any bits
    np.testing.assert_array_equal(found.view(np.uint32)[number_there], expected.view(np.uint32)[number_there])
    for rows, columns in ((slice(2, 5), slice(0, 512)), (slice(0, 6), slice(37, 300)), (slice(5, 6), slice(256, 257))):
        np.testing.assert_array_equal(tensor.part((rows, columns)), expected[rows, columns])


def test_rows_may_be_read_in_another_order(tmp_path):
    values = np.arange(12, dtype="<f4").reshape(4, 3)
    path = written(tmp_path / "m.gguf", {}, {"t": values, "v": values[:, 0].copy()})
    order = np.array([2, 0, 3, 1])
    tensor = open_gguf(path).tensor("t", order, shift=-1.0)
    np.testing.assert_array_equal(tensor.part((slice(1, 3), slice(1, 3))), values[order][1:3, 1:] - 1)
    np.testing.assert_array_equal(open_gguf(path).tensor("v", order).read(), values[order, 0])


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_kind_are_read(tmp_path, version):
    metadata = {"a": True, "b": 7, "c": -7, "d": 1e-5, "e": "text ü", "f": ["x", "", "ü"], "general.alignment": 64}
    arrays = {dtype: np.array([1, 0, 3], f"<{dtype}") for dtype in gguf_file.TYPES if dtype != "b1"}
    path = written(tmp_path / "m.gguf", metadata | arrays | {"g": np.array([True, False])}, {}, version)
    found = open_gguf(path).metadata
    assert {key: found[key] for key in metadata} == metadata
    assert found["g"].tolist() == [True, False]
    for dtype, array in arrays.items():
        np.testing.assert_array_equal(found[dtype], array)
        assert found[dtype].dtype == array.dtype


# --------------------------------------------------------------------------------------------- models

FIXTURES = {
    "LLAMA": "llama",
    "LLAMA3_ROPE": "llama",
    "MISTRAL": "llama",
    "QWEN2": "qwen2",
    "QWEN3": "qwen3",
    "GEMMA": "gemma",
    "GEMMA2": "gemma2",
    "GEMMA3": "gemma3",
}


def converted(folder, architecture, path):
    """Write a Hugging Face folder as llama.cpp's converter does; names by the `gguf` package's own table."""
    reference = pytest.importorskip("gguf", reason="the extra dev has it")
    config, found = json.loads((folder / "config.json").read_text()), {}
    number = next(key for key, name in reference.MODEL_ARCH_NAMES.items() if name == architecture)
    names = reference.get_tensor_name_map(number, config["num_hidden_layers"])
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    for name, values in load_file(folder / "model.safetensors").items():
        for part, count in (("q_proj", heads[0]), ("k_proj", heads[1])):
            if architecture == "llama" and part in name:
                values = values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        stem, suffix = name.rsplit(".", 1)
        found[f"{names.get_name(stem)}.{suffix}"] = np.ascontiguousarray(values, "<f4")
    ropes = config["rope_parameters"]
    metadata = {
        "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads[0],
        "attention.head_count_kv": heads[1],
        "attention.key_length": config["head_dim"] if "head_dim" in config else config["hidden_size"] // heads[0],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(ropes.get("full_attention", ropes)["rope_theta"]),
    }
    if config.get("sliding_window"):
        metadata["attention.sliding_window"] = config["sliding_window"]
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name):
            metadata[name] = float(config[name])
    if architecture == "gemma3":
        near = [kind == "sliding_attention" for kind in config["layer_types"]]
        metadata["attention.sliding_window_pattern"] = np.array(near)
    if ropes.get("rope_type") == "llama3":
        metadata["rope.scaling.original_context_length"] = ropes["original_max_position_embeddings"]
        found["rope_freqs.weight"] = divisors(ropes, config["head_dim"])
    whole = {"general.architecture": architecture, "tokenizer.ggml.eos_token_id": config["eos_token_id"]}
    return written(path, whole | {f"{architecture}.{key}": value for key, value in metadata.items()}, found)


def divisors(rope, width):
    """Compute the tensor as llama.cpp's converter does."""
    found = []
    for i in range(0, width, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / width)
        turns = rope["original_max_position_embeddings"] / length
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        smooth = min(max((turns - low) / (high - low), 0), 1)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, "<f4")


@pytest.mark.parametrize("name", FIXTURES)
def test_a_model_is_the_one_that_was_converted(shared_fixtures, tmp_path, name):
    folder = shared_fixtures / "lm" / name / "backbone"
    path = converted(folder, FIXTURES[name], tmp_path / "m.gguf")
    (settings, tensors, _), (expected, theirs, _) = open_source(path), open_source(folder)
    if "GEMMA" in name:  # no file states it: these fixtures have another than the published models
        expected = expected.model_copy(update={"score_scale": settings.score_scale})
    assert settings == expected
    assert set(tensors) == set(theirs)
    for key, tensor in tensors.items():
        close = 1e-6 if "norm" in key and "GEMMA" in name else 0
        np.testing.assert_allclose(tensor.read(), theirs[key].read(), rtol=0, atol=close, err_msg=key)
        index = tuple(slice(1, length - 1) for length in tensor.shape)
        np.testing.assert_allclose(tensor.read(index), theirs[key].read(index), rtol=0, atol=close, err_msg=key)


@pytest.mark.parametrize(
    ("architecture", "layers", "width", "heads", "scale"),
    [("gemma2", 26, 256, 8, 256), ("gemma2", 46, 4608, 32, 144), ("gemma3", 62, 5376, 32, 168)],
)
def test_only_the_largest_gemmas_scale_scores_by_the_width_of_the_model(architecture, layers, width, heads, scale):
    config = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, "head_dim": 256}
    file = gguf.Gguf("m.gguf", {}, {}, np.zeros(0, np.uint8))
    assert gguf_model._specials(file, architecture, config, {})["query_pre_attn_scalar"] == scale


def test_gemma_3_scales_the_positions_of_its_far_layers_only():
    file = gguf.Gguf(
        "m.gguf", {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}, {}, np.zeros(0, np.uint8)
    )
    config = {"num_hidden_layers": 34, "hidden_size": 2560, "num_attention_heads": 8, "head_dim": 256}
    ropes = gguf_model._specials(file, "gemma3", config, gguf_model._rope(file, "gemma3", 256))["rope_parameters"]
    assert ropes["full_attention"] == {"rope_theta": 1_000_000.0, "rope_type": "linear", "factor": 8.0}
    assert ropes["sliding_attention"] == {"rope_theta": 10_000.0, "rope_type": "default"}


def test_the_frequencies_of_llama_3_are_recognised(tmp_path):
    rope = {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192, "factor": 32.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    metadata = {"llama.rope.freq_base": 500_000.0}
    path = written(tmp_path / "m.gguf", metadata, {"rope_freqs.weight": divisors(rope, 64)})
    assert gguf_model._rope(open_gguf(path), "llama", 64) == {"rope_type": "llama3", **rope}
    other = divisors(rope | {"high_freq_factor": 2.0}, 64)
    path = written(tmp_path / "m.gguf", metadata, {"rope_freqs.weight": other})
    assert "rope_freqs.weight is not what Llama 3" in error_of(gguf_model._rope, open_gguf(path), "llama", 64)


def test_a_file_becomes_a_folder(softprompt, tmp_path):
    path = gguf_file.llama(tmp_path / "m.gguf")
    code, output = softprompt("import", str(path), "--to", str(tmp_path / "m"))[:2]
    assert code == 0, output
    names = {"checksums.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (tmp_path / "m").iterdir()} == names
    backbone, direct = load_backbone(tmp_path / "m"), load_backbone(path)
    assert backbone.settings == direct.settings
    assert backbone.fingerprint() == direct.fingerprint()
    tokenizer = load_tokenizer(tmp_path / "m", backbone.text_format)
    assert tokenizer.size == backbone.settings.vocabulary_rows
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.begin) == (2, 2, ())
    text = "two hours , of 2025  ünicode"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    packed = import_source(str(path), tmp_path / "int8", quantize="int8")
    assert "llama model in int8" in packed[0]
    assert softprompt("show", str(path))[0] == 0
    assert "a GGUF file; expected a folder; softprompt import" in error_of(find_folder, path)


# --------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general__architecture": "mamba"}, "general.architecture is 'mamba'; expected one of llama, qwen2, qwen3"),
        ({"general__architecture": "gemma4"}, "did you mean gemma"),
        ({"split__count": 3}, "split.count is 3"),
        ({"llama__expert_count": 8}, "mixtures of experts"),
        ({"llama__block_count": 1 << 30}, "block_count is 1073741824, but there are 20 tensors"),
        ({"llama__block_count": 3}, "weights are missing, first model.layers.2"),
        ({"llama__embedding_length": 64}, r"token_embd.weight: found shape \[403, 32\]; expected \['any', 64\]"),
        ({"llama__feed_forward_length": 1 << 30}, "ffn_up.weight: found shape"),
        ({"llama__attention__head_count": 0}, "head_count is 0; expected 1"),
        ({"llama__attention__head_count": "4"}, "is of type str; expected an integer"),
        ({"llama__attention__key_length": 16}, "attn_q.weight: found shape"),
        ({"llama__attention__layer_norm_rms_epsilon": math.nan}, "is nan; expected a positive number"),
        ({"llama__rope__scaling__type": "yarn"}, "rope_type is 'yarn'"),
        ({"tokenizer__ggml__pre": "falcon"}, "tokenizer.ggml.pre is 'falcon'"),
    ],
)
def test_a_model_that_is_not_known_or_does_not_fit_is_named(tmp_path, change, message):
    path = gguf_file.llama(tmp_path / "m.gguf", **change)
    with pytest.raises(UserError, match=message.replace("403", r"\d+")):
        import_source(str(path), tmp_path / "new")
    assert not (tmp_path / "new").exists()


HUGE = struct.pack("<Q", 1 << 62)
ONE, ALIGNED_TO_3 = struct.pack("<Q", 1), gguf_file.text("general.alignment") + gguf_file.value_of(3)
HEAD = b"GGUF" + struct.pack("<I", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"GGU", "begins with"),
        (b"GGML" + bytes(40), "begins with b'GGML'; expected b'GGUF'"),
        (HEAD, "the number of tensors takes 8 bytes at 8; expected at most the 0"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), "GGUF version 1; expected 2 or 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "GGUF version 50331648"),
        (HEAD + HUGE + bytes(8), "the number of tensors, 4611686018427387904, takes"),
        (HEAD + bytes(8) + HUGE, "the number of metadata, 4611686018427387904, takes"),
        (HEAD + struct.pack("<QQQ", 0, 1, (1 << 64) - 1) + bytes(9), "the length of a name in the metadata, 184467"),
        (HEAD + struct.pack("<QQ", 0, 1) + gguf_file.text("k") + struct.pack("<I", 13), "k has a value of kind 13"),
        (HEAD + struct.pack("<QQ", 0, 1) + gguf_file.text("k") + struct.pack("<IIQ", 9, 4, 1 << 60), "values in k"),
        (HEAD + struct.pack("<QQ", 0, 1) + gguf_file.text("k") + struct.pack("<IIQ", 9, 8, 1 << 60), "texts in k"),
        (HEAD + struct.pack("<QQ", 0, 1) + gguf_file.text("k") + struct.pack("<IIQ", 9, 9, 1), "array of kind 9"),
        (HEAD + struct.pack("<QQQ", 0, 1, 1) + b"\xff" + struct.pack("<IQ", 8, 0), "is not UTF-8"),
        (HEAD + struct.pack("<QQ", 0, 2) + 2 * (gguf_file.text("k") + gguf_file.value_of(1)), "'k' stands twice"),
        (HEAD + bytes(8) + ONE + ALIGNED_TO_3, "no power of two"),
        (HEAD + struct.pack("<QQ", 1, 0) + gguf_file.text("t") + struct.pack("<I", 9) + bytes(40), "has 9 axes"),
        (HEAD + struct.pack("<QQ", 1, 0) + gguf_file.text("t") + struct.pack("<IQIQ", 1, 0, 0, 0), "whole blocks"),
        (HEAD + struct.pack("<QQ", 1, 0) + gguf_file.text("t") + struct.pack("<IQIQ", 1, 33, 2, 0), "whole blocks"),
        (HEAD + struct.pack("<QQ", 1, 0) + gguf_file.text("t") + struct.pack("<IQIQ", 1, 32, 10, 0), "of type 10; ex"),
        (HEAD + struct.pack("<QQ", 1, 0) + gguf_file.text("t") + struct.pack("<IQIQ", 1, 8, 0, 1 << 63), "ends at 92"),
        (HEAD + struct.pack("<QQ", 1, 0) + gguf_file.text("t") + struct.pack("<IQIQ", 1, 8, 0, 4), "not aligned"),
        (
            HEAD + struct.pack("<QQ", 1, 0) + gguf_file.text("t") + struct.pack("<IQQIQ", 2, 1 << 63, 1 << 63, 0, 0),
            "ends",
        ),
        (gguf_file.pack({}, {"t": np.zeros(8, "<f4")})[:-8], "ends at"),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_allocated(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        found = error_of(open_gguf, tmp_path / "m.gguf")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert message in found
    assert found.startswith(str(tmp_path / "m.gguf"))


def test_no_flipped_byte_and_no_cut_brings_another_error(tmp_path):
    """Flips of the head, where the sizes are; those of the weights change numbers."""
    whole = gguf_file.llama(tmp_path / "m.gguf").read_bytes()
    rng, path, refused = np.random.default_rng(0), tmp_path / "damaged.gguf", 0
    head = whole.index(b"output_norm.weight") + 50
    for number in range(200):
        content = bytearray(whole)
        if number % 4 == 0:
            del content[int(rng.integers(len(content))) :]
        else:
            # The sizes of metadata and tensors lie at both ends of the head, the tokenizer between them.
            place = rng.integers(700) if number % 2 else rng.integers(head)
            content[int(place)] ^= int(rng.integers(1, 256))
        path.write_bytes(content)
        message = ""
        try:
            import_source(str(path), tmp_path / f"new{number}")
        except UserError as error:
            message = str(error)
        assert "\n" not in message
        refused += bool(message)
    assert refused > 75
