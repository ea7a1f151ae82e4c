"""The frozen networks; they know no files, no data and no methods.

`t5` is the encoder-decoder, `attention` and `flash` its attention, `decode` greedy, beam and sampled answers,
`continuous_batching` the server's step, `quantized` the int8 and NF4 layers, `per_example` what differs by row.
Begin with `t5.py`."""
