"""The published T5 sizes: settings by name, without any weights, and where the weights are published."""

from __future__ import annotations

import re

from softprompt_jax.config import UserError, nearest
from softprompt_jax.models.t5 import RUNTIME_DEFAULTS, T5Settings

# name: (d_model, d_kv, d_ff, heads, layers)
_T5_1_0 = {
    "small": (512, 64, 2048, 8, 6),
    "base": (768, 64, 3072, 12, 12),
    "large": (1024, 64, 4096, 16, 24),
    "3b": (1024, 128, 16384, 32, 24),
    "11b": (1024, 128, 65536, 128, 24),
}
_T5_1_1 = {
    "small": (512, 64, 1024, 6, 8),
    "base": (768, 64, 2048, 12, 12),
    "large": (1024, 64, 2816, 16, 24),
    "xl": (2048, 64, 5120, 32, 24),
    "xxl": (4096, 64, 10240, 64, 24),
}
_BYT5 = {  # encoder and decoder differ in depth: (..., encoder layers, decoder layers)
    "small": (1472, 64, 3584, 6, 12, 4),
    "base": (1536, 64, 3968, 12, 18, 6),
    "large": (1536, 64, 3840, 16, 36, 12),
    "xl": (2560, 64, 6720, 32, 36, 12),
    "xxl": (4672, 64, 12352, 64, 36, 12),
}


def _settings(sizes: tuple[int, ...], vocabulary_rows: int, **others) -> T5Settings:
    d_model, d_kv, d_ff, heads, layers = sizes[:5]
    decoder = sizes[5] if len(sizes) > 5 else layers
    return T5Settings(
        vocabulary_rows=vocabulary_rows,
        d_model=d_model,
        d_kv=d_kv,
        d_ff=d_ff,
        num_heads=heads,
        num_layers=layers,
        num_decoder_layers=decoder,
        **others,
    )


PRESETS: dict[str, T5Settings] = {
    **{
        f"t5-{size}": _settings(s, 32128, activation="relu", gated=False, tied=True, scale_output=True)
        for size, s in _T5_1_0.items()
    },
    **{f"t5-v1_1-{size}": _settings(s, 32128) for size, s in _T5_1_1.items()},
    **{f"mt5-{size}": _settings(s, 250112) for size, s in _T5_1_1.items()},
    **{f"umt5-{size}": _settings(s, 256384, bias_in_every_layer=True) for size, s in _T5_1_1.items()},
    **{f"byt5-{size}": _settings(s, 384) for size, s in _BYT5.items()},
    "ul2": _settings((4096, 256, 16384, 16, 32), 32128, activation="silu"),
}


_T5X = "gs://t5-data/pretrained_models/t5x"
_T5_1_0_STEPS = {"small": 1_000_000, "base": 999_900, "large": 1_000_700, "3b": 1_000_000, "11b": 1_000_000}
_FLAN_STEPS = {"small": 1_198_000, "base": 1_184_000, "large": 1_164_000, "xl": 1_138_000, "xxl": 1_114_000}

# Hub name: (preset, T5X checkpoint or None). A backbone loads by either name.
SOURCES: dict[str, tuple[str, str | None]] = {
    **{
        f"google-t5/t5-{size}": (
            f"t5-{size}",
            f"{_T5X}/t5_{size.replace('b', 'B') if size[0].isdigit() else size}/checkpoint_{step}",
        )
        for size, step in _T5_1_0_STEPS.items()
    },
    **{f"google/t5-v1_1-{size}": (f"t5-v1_1-{size}", f"{_T5X}/t5_1_1_{size}/checkpoint_1000000") for size in _T5_1_1},
    **{
        f"google/t5-{size}-lm-adapt": (f"t5-v1_1-{size}", f"{_T5X}/t5_1_1_lm100k_{size}/checkpoint_1100000")
        for size in _T5_1_1
    },
    **{
        f"google/flan-t5-{size}": (f"t5-v1_1-{size}", f"{_T5X}/flan_t5_{size}/checkpoint_{step}")
        for size, step in _FLAN_STEPS.items()
    },
    "bigscience/T0_3B": ("t5-v1_1-xl", None),
    **{f"bigscience/{name}": ("t5-v1_1-xxl", None) for name in ("T0", "T0p", "T0pp")},
    **{f"google/mt5-{size}": (f"mt5-{size}", f"{_T5X}/mt5_{size}/checkpoint_1000000") for size in _T5_1_1},
    **{
        f"google/umt5-{size}": (f"umt5-{size}", f"{_T5X}/umt5/{size}/checkpoint_1000000")
        for size in ("small", "base", "xl", "xxl")
    },
    **{f"google/byt5-{size}": (f"byt5-{size}", f"{_T5X}/byt5_{size}/checkpoint_1000000") for size in _BYT5},
    "google/ul2": ("ul2", "gs://scenic-bucket/ul2/ul220b/checkpoint_2650000"),
    "google/flan-ul2": ("ul2", "gs://scenic-bucket/ul2/flan-ul220b-v3/checkpoint_2283000"),
}
# Published as T5X checkpoints only; sizes and tokenizers are those of mT5 on the hub.
T5X_ONLY = {f"{_T5X}/mt5_lm_adapted/{size}/checkpoint_1100000": f"google/mt5-{size}" for size in _T5_1_1}


def hub_name(checkpoint: str) -> str | None:
    """Return the hub name of a published T5X checkpoint's weights, or at least of its size and tokenizer."""
    known = {where: name for name, (_, where) in SOURCES.items() if where} | T5X_ONLY
    return known.get(checkpoint.rstrip("/"))


def preset(name: str) -> T5Settings:
    """Return the settings of a published size, e.g. `t5-v1_1-small`."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r}: unknown; expected one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
    return PRESETS[name]


def published_size(source: str) -> T5Settings | None:
    """Return the settings of a published backbone by its hub name, its T5X checkpoint or the last part of its path."""
    source = hub_name(source) or source
    name = re.sub(r"^flan-t5-(\w+)$|^t5-(\w+)-lm-adapt$", r"t5-v1_1-\1\2", source.rpartition("/")[2])
    return PRESETS.get(SOURCES.get(source, (name,))[0])


def published(settings: T5Settings) -> str | None:
    """Return the preset that has this model's shapes, whatever its dropout or remat; None if none has."""
    shapes = settings.model_copy(update=RUNTIME_DEFAULTS)
    return next((name for name, known in PRESETS.items() if known == shapes), None)
