"""What leaves a run for others, and what comes in from others as a whole.

`export` writes a run as npy, PEFT, Hugging Face or StableHLO (`stablehlo`), `push` publishes it with a model card,
`import_source` converts a checkpoint to a Hugging Face folder, `show` says what a file holds.
Begin with `export.py`."""
