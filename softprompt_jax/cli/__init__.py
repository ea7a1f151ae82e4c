"""The command line: one thin file for each group of commands, no logic of its own.

`main` holds the program and the commands around one run; `train`, `data`, `share` and
`paper` hold the others. A command reads its options, calls the library and prints.
Begin with `main.py`."""
