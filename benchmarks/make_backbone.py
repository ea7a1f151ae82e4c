"""Write a T5 1.1 with random weights in Hugging Face layout, and the workload beside it: FOLDER SIZE."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
from workload import Workload

from softprompt_jax.checkpoints.backbone import save_backbone
from softprompt_jax.models.presets import preset
from softprompt_jax.models.t5 import T5


def make(folder: str | Path, size: str) -> None:
    """`size` is a published one, or tiny (to try a benchmark)."""
    if size == "tiny":
        shrunk = {"num_layers": 2, "num_decoder_layers": 2, "vocabulary_rows": 512, "d_model": 64, "d_ff": 128}
        settings = preset("t5-v1_1-small").model_copy(update=shrunk)
        workload = Workload(settings.vocabulary_rows, input_tokens=32, median=10.0, shortest=4)
    else:
        settings = preset(f"t5-v1_1-{size}")
        workload = Workload(settings.vocabulary_rows)
    save_backbone(T5(settings, jax.random.key(0)), folder, "float32")
    workload.write(folder)


if __name__ == "__main__":
    make(*sys.argv[1:])
