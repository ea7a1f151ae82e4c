"""The command line: one thin file for each group of commands, no logic of its own.

`main` holds the program and the commands around one run; `run_commands`, `task_commands`, `deploy_commands` and
`paper_command` hold the others. A command reads its options, calls the library and prints.
Begin with `main.py`."""
