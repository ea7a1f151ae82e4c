"""The published T5 sizes: settings by name, without any weights."""

from __future__ import annotations

from softprompt_jax.backbone.t5 import RUNTIME_DEFAULTS, T5Settings
from softprompt_jax.config import UserError, nearest

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


def preset(name: str) -> T5Settings:
    """Return the settings of a published size, e.g. `t5-v1_1-small`."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r}: unknown; expected one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
    return PRESETS[name]


def published(settings: T5Settings) -> str | None:
    """Return the preset that has this model's shapes (whatever its dropout or remat), or None."""
    shapes = settings.model_copy(update=RUNTIME_DEFAULTS)
    return next((name for name, known in PRESETS.items() if known == shapes), None)
