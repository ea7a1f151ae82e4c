"""Weights on disk: every way a frozen model, an adapter or a prompt is read and written.

`backbone` loads any frozen model: `hugging_face`, `t5x`, `torch_file`, `gguf`, `quantized_folder` read one layout each,
`packaged` fetches a Python package. `artifact` reads and writes what a run trained; `peft` reads and writes PEFT's
adapters. `tensors` opens files lazily.
Begin with `backbone.py` for models, with `artifact.py` (`save_prompt`) for prompt files; a run's resumable state is in
`training_state.py`."""
