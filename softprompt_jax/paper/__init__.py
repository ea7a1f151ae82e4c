"""The experiments of Lester et al. (2021): grids of runs from `configs/paper/`, and what is measured on them.

`experiments` expands a file into runs and collects their scores, `measures` computes what is not a score of one run.
Begin with `experiments.py`."""
