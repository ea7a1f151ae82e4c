"""What others' programs find in the server: Schemathesis (its description and behaviour agree, nothing breaks it)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import served
import tiny_lm

CONFIG = """
[[operations]]
include-name = "PUT /v1/prompts/{name}"
# No schema says which bytes are a prompt file.
checks.positive_data_acceptance.expected-statuses = ["2xx", 422]
"""


@pytest.mark.http
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_schemathesis_finds_nothing(kind, small, tmp_path):
    """It draws requests that fit /openapi.json, and ones that do not, and follows what one answer says to others."""
    pytest.importorskip("schemathesis", reason="see make test-http")
    backbone, width = small.backbone, served.WIDTH
    if kind == "llama":  # which has /v1/chat/completions and echo besides
        backbone, width = tiny_lm.folder(tmp_path / "llama", chat=True), tiny_lm.settings().d_model
    engine = served.engine_of(backbone, width, timeout_s=20, max_body_bytes=1 << 20)
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    engine.start()
    try:
        with served.serving(engine, "s3cret") as port:
            command = [str(Path(sys.executable).with_name("schemathesis"))]
            command += ["--config-file", str(tmp_path / "schemathesis.toml"), "run", "--header"]
            command += ["Authorization: Bearer s3cret", "--seed", "1", "--max-examples", "60", "--max-time", "45"]
            command += ["--continue-on-failure", "--no-color", f"http://127.0.0.1:{port}/openapi.json"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    finally:
        engine.stop()
    assert done.returncode == 0, done.stdout + done.stderr
