"""Folders of shared/fixtures/peft: a backbone, and what transformers and PEFT made of it."""

from __future__ import annotations

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from softprompt_jax.checkpoints.backbone import load_backbone
from softprompt_jax.methods.prompt import attach_rows

PLAIN = ["T5V10_PLAIN", "T5V11_PLAIN", "T5V11_LONG", "MT5_PLAIN", "UMT5_PLAIN"]
PROMPTED = ["PROMPT_TUNING", "PROMPT_TUNING_SUB1", "PROMPT_TUNING_T5V10", "PROMPT_TUNING_UMT5"]
LENGTH = 5  # PEFT saves 2P rows; the first P are read
PROMPT_WEIGHT = "prompt_encoder.default.embedding.weight"  # in data.npz: its gradient; its values there are trained


@functools.cache
def golden(fixtures: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(fixtures / "peft" / name / "data.npz") as arrays:
        return dict(arrays)


def model(fixtures: Path, name: str):
    made = load_backbone(fixtures / "peft" / name / "backbone").model
    if name in PROMPTED:
        saved = load_file(fixtures / "peft" / name / "adapter" / "adapter_model.safetensors")
        attach_rows(made, saved["prompt_embeddings"][:LENGTH])
    return made


def batch(fixtures: Path, name: str) -> dict[str, jnp.ndarray]:
    arrays = golden(fixtures, name)
    encoder = arrays["input_ids"] * arrays["attention_mask"]
    if name in PROMPTED:
        ids = np.tile(np.arange(128, 128 + LENGTH), (len(encoder), 1))
        encoder = np.concatenate([ids, encoder], 1)
    arrays = {
        "encoder_tokens": encoder,
        "decoder_inputs": arrays["decoder_input_ids"],
        "decoder_targets": np.maximum(arrays["labels"], 0),
    }
    return {key: jnp.asarray(value, jnp.int32) for key, value in arrays.items()}
