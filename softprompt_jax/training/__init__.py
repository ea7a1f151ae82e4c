"""One training run, and many of them.

`loop` trains a run in a folder, `step` is what it repeats, `run_data` is its data and validation, `run_folder` the
files that it leaves, `meter` measures its speed, `callbacks` hear of its numbers, `given` is what Python passes beside
settings, `trained_run` what it returns, `remat` decides what is computed twice. `sweep` trains a grid of runs,
`vmapped` several in one program. Begin with `loop.py`."""
