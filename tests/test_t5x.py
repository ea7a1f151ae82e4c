"""T5X checkpoints of every layout give the weights, slots and prompts that t5x had, or are refused in a line."""

from __future__ import annotations

import http.server
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import msgpack
import numpy as np
import pytest
import t5x_fixture
from t5x_fixture import copied, weights, write

from softprompt_jax.checkpoints.artifact import load_artifact, load_prompt
from softprompt_jax.checkpoints.backbone import load_adafactor, load_backbone
from softprompt_jax.config import UserError

LAYOUTS = ["t5_1_1_tiny_f32", "t5_1_1_tiny_legacy_gfile", "t5_1_1_tiny_orbax", "prompted_run"]


@pytest.fixture(scope="module")
def expected(shared_fixtures) -> dict[str, np.ndarray]:
    return weights(t5x_fixture.model(shared_fixtures))


@pytest.fixture(scope="module")
def flat(shared_fixtures) -> dict[str, np.ndarray]:
    return t5x_fixture.parameters(shared_fixtures)


def same(model, expected: dict[str, np.ndarray]) -> None:
    found = weights(model)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def edit_specs(folder: Path, change) -> None:
    """Rewrite every tensorstore spec in a checkpoint's msgpack file."""
    path = folder / "checkpoint"
    extensions = {"ext_hook": msgpack.ExtType, "raw": False, "strict_map_key": False}

    def edited(tree):
        if not isinstance(tree, dict):
            return tree
        return change(tree) if "driver" in tree else {key: edited(value) for key, value in tree.items()}

    path.write_bytes(msgpack.packb(edited(msgpack.unpackb(path.read_bytes(), **extensions))))


# -------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_weights_that_t5x_had(shared_fixtures, expected, layout):
    backbone = load_backbone(shared_fixtures / "t5x" / layout)  # a run folder: its latest checkpoint
    assert backbone.settings == t5x_fixture.SETTINGS
    same(backbone.model, expected)


def test_bfloat16_arrays_are_read_and_kept(shared_fixtures, expected):
    (folder,) = (shared_fixtures / "t5x" / "t5_1_1_tiny_bf16").glob("checkpoint_*")
    model = load_backbone(folder, "bfloat16").model
    assert {str(leaf.dtype) for leaf in weights(model).values()} == {"bfloat16"}
    for path, leaf in weights(model).items():
        np.testing.assert_allclose(leaf.astype(np.float32), expected[path], rtol=2**-8, err_msg=path)


@pytest.mark.parametrize("form", ["gcs with a dummy bucket", "path at top level", "written elsewhere"])
def test_arrays_are_found_where_the_folder_lies_now(shared_fixtures, expected, tmp_path, form):
    folder = copied(shared_fixtures, "t5_1_1_tiny_f32", tmp_path)

    def change(spec):
        name = spec["kvstore"]["path"].rstrip("/")
        if form == "gcs with a dummy bucket":
            return spec | {"kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket", "path": name}}
        if form == "path at top level":
            return spec | {"kvstore": {"driver": "file"}, "path": f"/elsewhere/checkpoint_1/{name}"}
        return spec | {"kvstore": {"driver": "gfile", "path": f"/cns/elsewhere/checkpoint_1/{name}"}}

    edit_specs(folder, change)
    same(load_backbone(folder).model, expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scanned", ["layers", "STACK"], ids=["scalable t5", "flaxformer"])
def test_scanned_layers_are_taken_apart_also_with_heads_of_their_own_axis(flat, expected, tmp_path, scanned, axis):
    stacked = {name: value for name, value in flat.items() if "layers_" not in name}
    for name in (name for name in flat if "layers_0" in name):
        layers = [flat[name], flat[name.replace("layers_0", "layers_1")]]
        if scanned == "layers" and "attention/" in name:  # [D, heads, K] and [heads, K, D]
            shape = (4, 16, 64) if "/out/" in name else (64, 4, 16)
            layers = [layer.reshape(shape) for layer in layers]
        stacked[name.replace("layers_0", scanned.replace("STACK", name.split("/")[0]))] = np.stack(layers, axis)
    same(load_backbone(write(tmp_path, stacked)).model, expected)


def test_a_bias_in_every_layer_and_a_head_that_is_the_table_are_seen(flat, expected, tmp_path):
    own = {name: value for name, value in flat.items() if "relpos_bias" not in name and "logits_dense" not in name}
    for stack in ("encoder", "decoder"):
        for layer in range(2):
            bias = flat[f"{stack}/relpos_bias/rel_embedding"] + layer
            own[f"{stack}/layers_{layer}/relpos_bias/rel_embedding"] = bias
    backbone = load_backbone(write(tmp_path, own))
    assert backbone.settings.bias_in_every_layer
    assert backbone.settings.tied
    assert backbone.settings.scale_output
    found = weights(backbone.model)["decoder.layers.bias.table"]
    np.testing.assert_array_equal(found, np.stack([expected["decoder.bias.table"] + layer for layer in (0, 1)]))


def test_a_plain_feed_forward_block_is_that_of_t5_1_0(flat, tmp_path):
    plain = {name.replace("wi_0", "wi"): value for name, value in flat.items() if "wi_1" not in name}
    settings = load_backbone(write(tmp_path, plain)).settings
    assert (settings.gated, settings.activation) == (False, "relu")


def test_a_checkpoint_in_a_bucket_is_read(shared_fixtures, expected, tmp_path):
    """In a process of its own: tensorstore reads the address of the (here local) storage service once."""
    (root,) = (shared_fixtures / "t5x" / "t5_1_1_tiny_f32").glob("checkpoint_*")

    class Storage(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            name = urllib.parse.unquote(urllib.parse.urlparse(self.path).path.partition("/o/")[2])
            path = root / name.removeprefix("models/t5/")
            listing = urllib.parse.urlparse(self.path).path.endswith("/o")
            content = b"{}" if listing else path.read_bytes() if path.is_file() else b""
            self.send_response(200 if content else 404)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Storage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        script = (
            "import os, sys, numpy as np; from softprompt_jax import UserError, load_backbone\n"
            f"os.environ['TENSORSTORE_GCS_HTTP_URL'] = 'http://127.0.0.1:{server.server_port}'\n"
            "model = load_backbone('gs://some-bucket/models/t5').model\n"
            "np.savez(sys.argv[1], a=model.embedding[...], b=model.decoder.layers.cross.output.kernel[...])\n"
            "try: load_backbone('gs://some-bucket/models/nothing')\n"
            "except UserError as error: print(error)\n"
            "try: load_backbone('gs://No Bucket/models')\n"
            "except UserError as error: print(error)\n"
        )
        command = [sys.executable, "-c", script, str(tmp_path / "found.npz")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
        server.shutdown()
    assert done.returncode == 0, done.stderr
    missing, unnamed = done.stdout.splitlines()
    assert missing.startswith("gs://some-bucket/models/nothing: neither a file 'checkpoint' nor arrays in state/")
    assert unnamed.startswith("gs://No Bucket/models: cannot be read")
    with np.load(tmp_path / "found.npz") as found:
        np.testing.assert_array_equal(found["a"], expected["embedding"])
        np.testing.assert_array_equal(found["b"], expected["decoder.layers.cross.output.kernel"])


# -------------------------------------------------------------------------------------------- prompts


def test_the_prompt_of_a_prompted_run_is_read_with_its_step(shared_fixtures):
    run = shared_fixtures / "t5x" / "prompted_run"
    found = load_artifact(run)
    rows, metadata = found.prompt, found.metadata
    (saved,) = (run / "numpy_checkpoints").rglob("encoder.prompt.prompt.prompt")
    np.testing.assert_array_equal(rows, np.load(saved))
    np.testing.assert_array_equal(load_prompt(run / "checkpoint_1100010"), rows)
    assert metadata == {"step": "1100010"}
    _, slots = load_adafactor(run)
    assert {path: slot["v"].shape for path, slot in slots.items()} == {"prompt.rows": (5, 64)}


def test_the_latest_checkpoint_of_a_run_is_taken(flat, tmp_path):
    for step in (9, 10, 8):
        write(tmp_path / f"checkpoint_{step}", flat | {"encoder/prompt/prompt/prompt": np.full((1, 64), step, "f4")})
    write(tmp_path / "checkpoint_99.tmp-1700000000", {})
    assert load_prompt(tmp_path)[0, 0] == 10


# --------------------------------------------------------------------------------------------- errors


def refused(source: Path, problem: str, function=load_backbone) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        function(source)
    assert "\n" not in str(caught.value)


def test_checkpoints_that_are_none_are_refused(flat, tmp_path):
    folder = write(tmp_path / "checkpoint_1", flat)
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-1000"')  # TensorFlow's file of that name
    refused(folder, "checkpoint: not a T5X checkpoint")
    (folder / "checkpoint").write_bytes(write(folder, flat).joinpath("checkpoint").read_bytes()[:-100])
    refused(folder, "checkpoint: not a T5X checkpoint")
    refused(write(tmp_path / "checkpoint_2.tmp-123", flat), "never finished; expected checkpoint_STEP")
    (tmp_path / "orbax" / "state").mkdir(parents=True)
    refused(tmp_path / "orbax", "neither a file 'checkpoint' nor arrays in state/")
    refused(write(tmp_path / "none", flat), "prompts of the encoder: none; expected one", load_prompt)
    refused(tmp_path, "no T5X checkpoint; expected one", lambda _: load_adafactor("embedded"))


def test_weights_that_do_not_fit_are_refused_by_name(flat, tmp_path):
    query = "encoder/layers_1/attention/query/kernel"
    refused(write(tmp_path, flat | {query: flat[query][:, :-1]}), r"found shape \[64, 63\]; expected \[64, 64\]")
    refused(write(tmp_path, {k: v for k, v in flat.items() if k != query}), "1 weights are missing, first encoder.b")
    refused(write(tmp_path, flat | {"encoder/adapter/kernel": flat[query]}), "1 weights are unknown, first encoder.ad")
    refused(write(tmp_path, flat | {query: flat[query] * np.inf}), "query.kernel: holds numbers that are not finite")
    refused(write(tmp_path, {"a/b": flat[query]}), "no shared.weight")


def test_half_written_and_damaged_arrays_are_refused_by_name(shared_fixtures, tmp_path):
    folder = copied(shared_fixtures, "t5_1_1_tiny_f32", tmp_path)
    array = folder / "target.encoder.layers_0.mlp.wo.kernel"
    name = "tensor target.encoder.layers_0.mlp.wo.kernel: cannot be read"
    content = (array / "0.0").read_bytes()
    (array / "0.0").write_bytes(content[:3000] + bytes([content[3000] ^ 16]) + content[3001:])
    refused(folder, name)
    (array / "0.0").write_bytes(content[:-10])
    refused(folder, name)
    (array / "0.0").unlink()
    refused(folder, name)
    shutil.rmtree(array)
    refused(folder, name)
