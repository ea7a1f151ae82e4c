"""From rows to batches of tokens; knows no model.

In the order in which data flow: `sources` and `packages` read rows, `task` makes them examples, `tokenizer` and
`tokenized` make tokens, `batches` (with `buckets`, `packing`, `streaming`, `mixture`) makes what a step takes.
`metrics` scores answers. Begin with `task.py`, then `batches.py`."""
