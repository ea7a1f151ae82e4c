"""Weights on disk: every way a frozen model, an adapter or a prompt is read and written.

`backbone` loads any frozen model, from the layouts of `hugging_face`, `t5x`, `torch_file` and `quantized_folder`;
`artifact` reads and writes what a run trained; `peft` reads and writes PEFT's adapters. `tensors` opens files lazily.
Begin with `backbone.py`; a run's resumable state is in `training_state.py`."""
