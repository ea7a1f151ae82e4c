"""`make test-faults`: kills, damaged and hostile files, bad inputs and mixed requests, each with its expected outcome.

`__main__` runs the cases and prints the table; `child` forks a command line that may neither connect nor start
programs; `kills`, `damage`, `hostile`, `inputs` and `requests` hold the cases of a kind each. A case is a number
and a seed: `--only damage:17 --seed 3` repeats one."""
