"""From rows to batches of tokens; knows no model.

In the order in which data flow: `sources` and `packages` (with `readers`) read rows, `task` (with `preprocessors`)
makes them examples, `tokenizer` and `tokenized` make tokens, `prompt_layout` says where prompt rows stand around
them, and `batches` (with `buckets`, `packing`, `streaming`) makes what a step takes. `metrics` scores answers. Begin
with `task.py`, then `batches.py`."""
