"""The frozen networks; they know no files, no data and no methods.

`t5` is T5; `causal` is one block for all decoder-only models, and `t5gemma` two stacks of it. `families/` maps
published models to these: ADD A BACKBONE there; `presets` knows published sizes. `attention` and `flash` mix, `cache`
keeps keys and values, `decode` writes answers, `continuous_batching` is the server's step, `quantized` has int8 and
NF4 layers, `per_example` what differs by row. Begin with `t5.py`, then `causal.py`."""
