"""What a user writes; tests/test_typed_from_outside.py reads the types that pyright finds here. It is never run."""

from pathlib import Path

import numpy as np

import softprompt_jax
from softprompt_jax import Beam, PromptBank, Sampling

run = softprompt_jax.load_run("configs/quickstart.yaml", ["steps=2"])
trained = softprompt_jax.train(run, "runs/mine", callbacks=[lambda step, numbers: numbers["loss"] < step, print])
reveal_type(trained, expected_text="TrainedRun")
reveal_type(trained.generate(["warm tea"], stop="."), expected_text="list[str]")
reveal_type(softprompt_jax.Prompt(length=20).length, expected_text="int")
reveal_type(softprompt_jax.Task.from_rows([{"text": "a", "label": "b"}], validation=0.1), expected_text="Task")
predictor = softprompt_jax.load_predictor("runs/mine", decoding=Beam(beams=2))
reveal_type(predictor.texts(["warm tea"]), expected_text="list[str]")
reveal_type(predictor.evaluate(run.tasks[0], "validation"), expected_text="dict[str, float]")
reveal_type(predictor, expected_text="Predictor")

backbone = softprompt_jax.load_backbone()
rows, ids = softprompt_jax.load_prompt(Path("runs/mine")), np.zeros((1, 4), np.int32)
reveal_type(backbone.settings, expected_text="ModelSettings")
reveal_type(rows.shape, expected_text="tuple[Any, ...]")  # NumPy's own words
several = softprompt_jax.generate(backbone, ["warm tea"], rows, 8, Sampling(samples=3), scores=True)
reveal_type(softprompt_jax.generate(backbone, ["warm tea"]), expected_text="list[str]")
reveal_type(several, expected_text="tuple[list[list[str]], list[list[float]]]")
reveal_type(softprompt_jax.generate(backbone, ids, rows).dtype, expected_text="dtype[signedinteger[_32Bit]]")
reveal_type(softprompt_jax.logits(backbone, ids, ids, rows), expected_text="Array")

bank = PromptBank.open("prompts", max_input_tokens=64)
bank.add("mine", rows)
reveal_type(bank.generate(["warm tea"], "mine"), expected_text="list[tuple[str, float]]")
joined = softprompt_jax.ensemble(["runs/one", "runs/two"])
reveal_type(joined["vote"]["accuracy"]["value"], expected_text="float")
reveal_type(softprompt_jax.rank_sources("runs/mine", ["runs/one"]), expected_text="list[dict[str, str | float]]")
reveal_type(softprompt_jax.report(["runs"], "page"), expected_text="list[Path]")
reveal_type(softprompt_jax.recycle(rows, backbone, backbone), expected_text="Recycled")
