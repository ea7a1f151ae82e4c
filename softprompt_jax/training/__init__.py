"""One training run, and many of them.

`loop` trains a run in a folder, `run_data` is its data and validation, `checkpoints` its resumable state, `remat`
decides what is computed twice. `sweep` trains a grid of runs, `vmapped` several in one program.
Begin with `loop.py`."""
