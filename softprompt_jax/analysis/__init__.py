"""What a run or a prompt can tell afterwards, and what a run would take before it begins.

`report` compares runs on one page, `inspect` looks at a prompt's rows, `transfer` compares and converts prompts
between tasks and backbones, `plan` says what a run takes on a topology. `page` writes their HTML.
Begin with `report.py`."""
