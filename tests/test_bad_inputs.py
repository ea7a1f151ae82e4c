"""Bad inputs of the command line: one line and exit code 2, within seconds and without memory.

Here are those of the table in bad_inputs.py that once hung, printed a traceback or were accepted, and some others. All
run, each in a process of its own, with `python tests/bad_inputs.py FOLDER`.
"""

from __future__ import annotations

import bad_inputs
import pytest
from small_runs import write_config

pytestmark = pytest.mark.usefixtures("own_cache")

CASES = {case.name: case for case in bad_inputs.cases()}
ONCE_BAD = [name for name in CASES if name.startswith(bad_inputs.ONCE_BAD)]
OTHERS = [
    name
    for name, case in CASES.items()
    if case.code == 2 and name not in ONCE_BAD and name.startswith(("yaml tag", "sweep", "task", "rows csv", "plan"))
][::3]


@pytest.fixture(scope="module")
def place(small, prompt_run, tmp_path_factory):
    """Return a folder with what the cases read: `small`, `run` and `base.yaml`."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "small").symlink_to(small.folder)
    (folder / "run").symlink_to(prompt_run)
    write_config(folder / "base.yaml", small.short | {"steps": 2})
    return folder


@pytest.mark.parametrize("name", [*ONCE_BAD, *OTHERS])
def test_a_bad_input_is_one_line(refused, place, monkeypatch, tmp_path_factory, name):
    folder = place / f"case{len(list(place.iterdir()))}"
    folder.mkdir()
    CASES[name].write(folder)
    monkeypatch.chdir(folder)
    assert len(refused(*CASES[name].arguments, stdin=CASES[name].stdin)) < 2000
