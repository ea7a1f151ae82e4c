"""The types that a user's type checker sees: of the installed package, without the settings of this repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import softprompt_jax

SCRIPT = Path(__file__).parent / "typed_from_outside.py"


@pytest.mark.slow
def test_a_users_script_sees_real_types(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    environment = os.environ | {"PYTHONPATH": str(Path(softprompt_jax.__file__).parent.parent)}  # as if installed there
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    messages = json.loads(found.stdout)["generalDiagnostics"]
    revealed = [each for each in messages if each["severity"] == "information"]
    wrong = [
        f"line {each['range']['start']['line'] + 1}: {each['message']}" for each in messages if each not in revealed
    ]
    assert wrong == []
    assert len(revealed) == SCRIPT.read_text().count("reveal_type(")
