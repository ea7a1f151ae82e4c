"""Write a backbone in Hugging Face layout and the workload beside it: FOLDER SIZE.

SIZE is a T5 1.1's (small, base, ...) with random weights; llama: a Llama of 8 layers of width 1,024, random too;
smollm2: SmolLM2-135M-Instruct itself; tiny or tiny-llama, to try a benchmark.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
from workload import Workload

from softprompt_jax import load_backbone
from softprompt_jax.checkpoints.backbone import save_backbone
from softprompt_jax.methods.prompt import embedding_rms
from softprompt_jax.models.build import build
from softprompt_jax.models.presets import preset

SHRUNK = {"num_layers": 2, "num_decoder_layers": 2, "vocabulary_rows": 512, "d_model": 64, "d_ff": 128}
LLAMA = {
    "llama": {"num_layers": 8, "pattern": (0,) * 8, "vocabulary_rows": 32_000, "d_model": 1024, "d_ff": 4096}
    | {"num_heads": 16, "num_key_heads": 4, "d_kv": 64},
    "tiny-llama": {"num_layers": 2, "pattern": (0,) * 2, "vocabulary_rows": 512, "d_model": 64, "d_ff": 128}
    | {"num_heads": 4, "num_key_heads": 2, "d_kv": 16},
}


def make(folder: str | Path, size: str) -> None:
    """Write the backbone and its workload."""
    short = {"input_tokens": 32, "median": 10.0, "shortest": 4} if size.startswith("tiny") else {}
    if size == "smollm2":
        backbone = load_backbone("smollm2")
        model = backbone.model
        for path in backbone.folder.iterdir():
            (Path(folder) / path.name).symlink_to(path)
    else:
        if size in LLAMA:
            settings = preset("llama-3.2-1b").model_copy(update=LLAMA[size])
        else:
            settings = preset(f"t5-v1_1-{'small' if size == 'tiny' else size}")
            settings = settings.model_copy(update=SHRUNK if size == "tiny" else {})
        model = build(settings, jax.random.key(0))
        save_backbone(model, folder, "float32")
    causal = size == "smollm2" or size in LLAMA
    scale = {"causal": True, "prompt_scale": embedding_rms(model)} if causal else {}
    Workload(model.settings.vocabulary_rows, **short, **scale).write(folder)


if __name__ == "__main__":
    make(*sys.argv[1:])
