"""One training run, and many of them.

`loop` trains a run in a folder, `run_data` is its data and validation, `run_folder` the files that it leaves, `remat`
decides what is computed twice. `sweep` trains a grid of runs, `vmapped` several in one program.
Begin with `loop.py`."""
