"""The command line: one thin file for each group of commands of `softprompt --help`, no logic of its own.

`main` is the program with its errors, `options` what commands share, `process` and `signals` what is done to the
process; `data`, `train`, `use`, `analyse`, `share` and `benchmarks` hold the commands. A command reads its options,
calls the library and prints. Begin with `train.py`."""
