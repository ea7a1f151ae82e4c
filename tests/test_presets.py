"""The published sizes have the published numbers of parameters."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

from softprompt_jax.config import UserError
from softprompt_jax.models.build import abstract
from softprompt_jax.models.presets import PRESETS, SOURCES, hub_name, other_presets, preset, published, published_size

PARAMETERS = {
    "t5-v1_1-small": 76_961_152,  # Lester et al., 2021, table 4
    "t5-v1_1-base": 247_577_856,
    "t5-v1_1-large": 783_150_080,
    "t5-v1_1-xl": 2_849_757_184,
    "t5-v1_1-xxl": 11_135_332_352,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "mt5-small": 300_176_768,
    "mt5-base": 582_401_280,
    "byt5-small": 299_637_760,
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_a_published_size_has_its_number_of_parameters(name, count):
    assert preset(name).parameters() == count


@pytest.mark.parametrize("name", PRESETS)
def test_the_model_has_the_parameters_that_its_settings_count(name):
    model = abstract(preset(name))  # shapes only: 11 B parameters cost nothing
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == preset(name).parameters()


def test_a_model_is_recognised_as_published_whatever_its_dropout_and_remat():
    for name, settings in PRESETS.items():
        assert published(settings.model_copy(update={"dropout": 0.1, "remat": "full", "unroll": True})) == name
    assert published(preset("t5-small").model_copy(update={"d_ff": 1000})) is None


def test_a_misspelt_preset_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match=r"unknown; expected one of .*did you mean t5-v1_1-small"):
        preset("t5-v1.1-small")


def test_every_size_names_where_it_is_published_and_a_t5x_checkpoint_knows_its_tokenizer():
    named = {name for name, _ in SOURCES.values()}
    assert named == PRESETS.keys() - {"umt5-large"}  # which was never published
    checkpoints = [where for _, where in SOURCES.values() if where]
    assert len(set(checkpoints)) == len(checkpoints)
    lm_adapted = "gs://t5-data/pretrained_models/t5x/t5_1_1_lm100k_base/checkpoint_1100000"
    assert SOURCES["google/t5-base-lm-adapt"] == ("t5-v1_1-base", lm_adapted)
    assert SOURCES["google-t5/t5-3b"][1].endswith("/t5_3B/checkpoint_1000000")
    assert hub_name(f"{lm_adapted}/") == "google/t5-base-lm-adapt"
    assert hub_name("gs://some-bucket/checkpoint_1") is None


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen2.5-0.5b", 494_032_768),
        ("gemma-2-2b", 2_614_341_888),
        ("gemma-3-1b", 999_885_952),
        ("gpt2", 124_439_808),
        ("pythia-70m", 70_426_624),
    ],
)
def test_a_published_decoder_only_model_has_its_number_of_parameters(name, count):
    assert preset(name).parameters() == count


def test_presets_of_all_families_are_what_they_build_and_are_found_by_either_name():
    for name, (hub, settings) in other_presets().items():
        assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract(settings)))) == settings.parameters()
        assert published(settings) == name
        assert published_size(hub) == published_size(name) == settings
