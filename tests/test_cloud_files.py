"""Data, runs and exports on gs:// and s3://: by fsspec's memory here, and by stand-ins for both clouds (`cloud`)."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from small_runs import write_config

from softprompt_jax.checkpoints.artifact import load_prompt
from softprompt_jax.config import UserError
from softprompt_jax.data.sources import Files, Folder
from softprompt_jax.distributed import cloud_files, folder_lock
from softprompt_jax.inference.shares import Share, join, part_name

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def memory(monkeypatch, own_cache, tmp_path):
    """Let gs:// and s3:// be a file system in memory."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    made = fsspec.filesystem("memory")
    made.store.clear()
    monkeypatch.setattr(cloud_files, "_filesystem", lambda place: made)
    return made


def test_a_remote_file_is_copied_once_and_again_when_it_changes(memory):
    memory.pipe("bucket/a/train.jsonl", b'{"x": 1}\n')
    copy = cloud_files.local("s3://bucket/a/train.jsonl")
    assert copy.name == "train.jsonl"
    assert copy.read_bytes() == b'{"x": 1}\n'
    before = copy.stat().st_mtime_ns
    assert cloud_files.local("s3://bucket/a/train.jsonl").stat().st_mtime_ns == before
    memory.pipe("bucket/a/train.jsonl", b'{"x": 1, "y": 2}\n')
    assert cloud_files.local("s3://bucket/a/train.jsonl").read_bytes() == b'{"x": 1, "y": 2}\n'
    assert cloud_files.local("here/train.jsonl") == Path("here/train.jsonl")


def test_rows_are_read_from_remote_files_and_folders(memory):
    memory.pipe("bucket/data/train.jsonl", b'{"x": "one"}\n{"x": "two"}\n')
    memory.pipe("bucket/data/test/part.csv", b"x\nthree\n")
    rows = list(Files(train="gs://bucket/data/train.jsonl").rows("train", "task"))
    assert [row for _, row in rows] == [{"x": "one"}, {"x": "two"}]
    folder = Folder(path="s3://bucket/data")
    assert [row for _, row in folder.rows("test", "task")] == [{"x": "three"}]
    with pytest.raises(UserError, match=r"s3://bucket/none: nothing there; expected a file or a folder"):
        list(Folder(path="s3://bucket/none").rows("train", "task"))


def test_what_is_written_goes_to_the_remote_place_when_it_is_whole(memory):
    with cloud_files.writing("s3://bucket/out/prompt.npy") as path:
        path.write_bytes(b"rows")
        assert not memory.exists("bucket/out/prompt.npy")
    assert memory.cat("bucket/out/prompt.npy") == b"rows"
    with cloud_files.writing("gs://bucket/model") as folder:
        (folder / "inner").mkdir(parents=True)
        (folder / "config.json").write_bytes(b"{}")
        (folder / "inner" / "weights").write_bytes(b"w")
    assert sorted(memory.find("bucket/model")) == ["/bucket/model/config.json", "/bucket/model/inner/weights"]
    failing = cloud_files.writing("s3://bucket/never")
    failing.__enter__().write_bytes(b"half")
    assert not failing.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert not memory.exists("bucket/never")


def test_predictions_go_to_a_remote_file_and_parts_of_several_processes_are_joined_there(
    memory, prompt_run, softprompt, tmp_path
):
    asked = tmp_path / "in.jsonl"
    asked.write_text("".join(json.dumps({"text": f"the tea room is {word} today"}) + "\n" for word in "abcde"))
    command = ["predict", prompt_run, "--trust", "--input", asked, "--output"]
    assert softprompt(*command, "gs://bucket/out.jsonl")[0] == 0
    assert softprompt(*command, tmp_path / "out.jsonl")[0] == 0
    lines = (tmp_path / "out.jsonl").read_bytes()
    assert memory.cat("bucket/out.jsonl") == lines
    share, each = Share.of_lines(5, 0, 2), lines.splitlines(keepends=True)
    for index, own in enumerate((each[:3], each[3:])):
        with cloud_files.writing(part_name("gs://bucket/joined.jsonl", share._replace(index=index))) as part:
            part.write_bytes(b"".join(own))
    join("gs://bucket/joined.jsonl", share)
    assert memory.cat("bucket/joined.jsonl") == lines
    assert sorted(memory.find("bucket")) == ["/bucket/joined.jsonl", "/bucket/out.jsonl"]
    with pytest.raises(UserError, match=r"gs://bucket/joined.jsonl.part-001-of-002: not there; expected"):
        join("gs://bucket/joined.jsonl", share)


def test_an_export_and_a_prediction_need_no_local_folder(memory, prompt_run, softprompt):
    memory.put(str(prompt_run), "bucket/runs/spam", recursive=True)
    code, _, err = softprompt("export", "gs://bucket/runs/spam", "--format", "npy", "--to", "s3://bucket/prompt.npy")
    assert code == 0, err
    assert "wrote s3://bucket/prompt.npy" in err
    np.testing.assert_array_equal(load_prompt("s3://bucket/prompt.npy"), load_prompt(prompt_run))
    np.testing.assert_array_equal(load_prompt("gs://bucket/runs/spam"), load_prompt(prompt_run))
    memory.pipe("bucket/questions.jsonl", b'{"inputs": "yes no"}\n')
    answers = [
        softprompt("predict", run, "--input", "s3://bucket/questions.jsonl")
        for run in ("gs://bucket/runs/spam", str(prompt_run))
    ]
    assert answers[0][0] == 0, answers[0][2]
    assert answers[0][1] == answers[1][1] != ""


def test_a_run_folder_follows_its_remote_place_without_checkpoints(memory, monkeypatch):
    memory.pipe("bucket/run/config.yaml", b"old")
    memory.pipe("bucket/run/checkpoints/3/state", b"large")
    home = cloud_files.RunFolder("gs://bucket/run")
    with home.opened():
        home.fetch()
        assert [path.name for path in home.path.rglob("*")] == ["config.yaml"]
        (home.path / "metrics.jsonl").write_text("1")
        (home.path / "half.partial").write_text("1")
        for name in ("result.json", "trained.safetensors"):
            (home.path / name).write_text("1")
        sent: list[str] = []
        upload = cloud_files._upload
        monkeypatch.setattr(cloud_files, "_upload", lambda file, to: (sent.append(file.name), upload(file, to)))
        home.send()
        assert sent == ["metrics.jsonl", "trained.safetensors", "result.json"]  # which says that all is there
        assert memory.cat("bucket/run/metrics.jsonl") == b"1"
        assert not memory.exists("bucket/run/half.partial")
        memory.pipe("bucket/run/config.yaml", b"changed by someone else")
        (home.path / "metrics.jsonl").write_text("1 2")
        home.send()
        assert memory.cat("bucket/run/metrics.jsonl") == b"1 2"
        assert memory.cat("bucket/run/config.yaml") == b"changed by someone else"  # what did not change here stays
        assert home.checkpoints == "gs://bucket/run/checkpoints"
    assert not home.path.exists()
    again = cloud_files.RunFolder("gs://bucket/run")
    with pytest.raises(UserError, match=r"^gs://bucket/run/config\.yaml: bad$"), again.opened():
        raise UserError(f"{again.path}/config.yaml: bad")


def test_a_run_on_s3_is_refused_before_anything_is_loaded(refused, small, tmp_path):
    config = write_config(tmp_path / "run.yaml", small.short)
    assert "cannot go to s3, which Orbax does not know; expected a folder or gs://" in refused(
        "train", config, "--out", "s3://bucket/run"
    )


def test_names_that_lead_out_of_the_folder_are_refused(memory):
    memory.store["/bucket/run/../../evil"] = memory.store.get("x") or fsspec.implementations.memory.MemoryFile(
        memory, "/bucket/run/../../evil", b"x"
    )
    with pytest.raises(UserError, match="expected names below it"):
        cloud_files.local("gs://bucket/run")


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_without_the_extra_a_remote_place_is_refused_with_its_name(scheme, monkeypatch):
    def missing(name):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(UserError, match="needs the extra `cloud`"):
        cloud_files.local(f"{scheme}://bucket/file")
    assert not cloud_files.exists(f"{scheme}://bucket/file")


def test_what_a_cloud_refuses_is_one_line(memory, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError("403\nno   permission")

    monkeypatch.setattr(memory, "find", forbidden)
    with pytest.raises(UserError, match=r"gs://bucket/x: cannot be read \(403 no permission\); expected a bucket"):
        cloud_files.local("gs://bucket/x")


def test_a_defect_is_no_refusal_of_the_cloud(memory, monkeypatch):
    monkeypatch.setattr(memory, "find", None)
    with pytest.raises(TypeError):
        cloud_files.local("gs://bucket/x")


# --------------------------------------------------------------------------------- one command in a folder


@pytest.fixture
def quick_lock(memory, monkeypatch):
    """Let a lock in a bucket be renewed every 20 ms."""
    monkeypatch.setattr(folder_lock, "RENEW_S", 0.02)
    return memory


def test_a_second_command_on_gs_is_refused_while_the_first_renews_its_lock(quick_lock):
    said: list[str] = []
    with folder_lock.lock_folder("gs://bucket/run") as check:
        with (
            pytest.raises(UserError, match=r"^gs://bucket/run: a command on .* trains in it; expected one at a time"),
            folder_lock.lock_folder("gs://bucket/run", wait_s=0.3, report=said.append),
        ):
            pass
        check()
    assert said == ["gs://bucket/run: another command trains in it, or was killed; waiting up to 0.3 s for its end"]
    assert quick_lock.find("bucket/run") == []  # given back
    with folder_lock.lock_folder("gs://bucket/run", wait_s=0.0):
        pass


def test_the_lock_of_a_killed_command_on_gs_is_taken_over_and_a_sleeper_notices(quick_lock):
    quick_lock.pipe("bucket/run/lock.json", b'{"id": "of a killed command", "host": "gone", "process": 7}')
    with folder_lock.lock_folder("gs://bucket/run", wait_s=0.1) as check:
        check()
        own = quick_lock.cat("bucket/run/lock.json")
        assert b"of a killed command" not in own
        quick_lock.pipe("bucket/run/lock.json", b'{"id": "of another command", "host": "there", "process": 8}')
        time.sleep(0.3)
        with pytest.raises(UserError, match="another command has taken the folder over"):
            check()
    assert b"of another command" in quick_lock.cat("bucket/run/lock.json")  # which is not ours to remove


def test_the_lock_of_a_run_is_no_part_of_its_files(memory):
    memory.pipe("bucket/run/config.yaml", b"steps: 1")
    memory.pipe("bucket/run/lock.json", b"{}")
    copy = cloud_files.local("gs://bucket/run")
    assert [path.name for path in copy.iterdir()] == ["config.yaml"]
    memory.pipe("bucket/run/lock.json", b'{"renewed": 1}')
    assert cloud_files.local("gs://bucket/run") == copy  # nothing is copied again


def test_a_run_on_gs_that_fails_before_its_first_step_leaves_nothing_there(memory, small, refused, tmp_path):
    config = write_config(tmp_path / "run.yaml", small.short | {"backbone": str(tmp_path / "nowhere")})
    assert "nowhere" in refused("train", config, "--out", "gs://bucket/run")
    assert memory.find("bucket/run") == []


# ------------------------------------------------------------------------------- stand-ins for the clouds


def with_generations(objects, monkeypatch):
    """Let reads tell an object's generation and let writes heed `ifGenerationMatch`, as the service does.

    Without it TensorStore, which changes a manifest only as it read it, fails once two of its writers meet.
    """
    download = objects.download

    def telling(request, response, storage, *args, **kwargs):
        download(request, response, storage, *args, **kwargs)
        if response.status < 300:
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]

    def heeding(upload, name_of):
        def call(request, response, storage):
            expected, bucket = request.query.get("ifGenerationMatch"), request.params["bucket_name"]
            present = storage.objects.get(bucket, {}).get(name_of(request), {"generation": "0"})["generation"]
            if expected and expected[0] != present:
                response.status = objects.HTTPStatus.PRECONDITION_FAILED
                response.json({"error": {"code": 412, "message": "conditionNotMet"}})
            else:
                upload(request, response, storage)

        return call

    monkeypatch.setattr(objects, "download", telling)
    media, multipart = objects._media_upload, objects._multipart_upload
    monkeypatch.setattr(objects, "_media_upload", heeding(media, lambda request: request.query["name"][0]))
    monkeypatch.setattr(objects, "_multipart_upload", heeding(multipart, lambda request: request.data["meta"]["name"]))


@pytest.fixture
def google(monkeypatch):
    """Start a stand-in for Google Cloud Storage with an empty bucket named `bucket`."""
    server = pytest.importorskip("gcp_storage_emulator.server")
    pytest.importorskip("gcsfs")
    logging.disable(logging.CRITICAL)
    # Orbax opens more connections at once than the five that wait by default; the sixth would be refused.
    monkeypatch.setattr(server.server.HTTPServer, "request_queue_size", 256)
    with_generations(server.objects, monkeypatch)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started = server.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    started.start()
    address = f"http://localhost:{port}"
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):  # gcsfs's, TensorStore's
        monkeypatch.setenv(name, address)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # would ask Google what kind of bucket it is
    fsspec.filesystem("gs").clear_instance_cache()
    yield fsspec.filesystem("gs")
    started.stop()
    logging.disable(logging.NOTSET)


@pytest.fixture
def amazon(monkeypatch):
    """Start a stand-in for S3 with an empty bucket named `bucket`."""
    server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    started = server.ThreadedMotoServer(port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    made = fsspec.filesystem("s3")
    made.clear_instance_cache()
    made = fsspec.filesystem("s3")
    made.mkdir("bucket")
    yield made
    started.stop()


def start(config: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "softprompt_jax", "train", str(config), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SOFTPROMPT_CACHE": str(config.parent / "cache")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.cloud
@pytest.mark.filterwarnings("default")
def test_a_run_on_gs_that_is_told_to_go_goes_on_from_there_to_the_same_bits(google, small, prompt_run, tmp_path):
    config = write_config(tmp_path / "run.yaml", small.short)
    told = start(config, "--out", "gs://bucket/runs/told")
    limit = time.monotonic() + 300
    while True:  # until a checkpoint is complete, then tell it to go
        google.invalidate_cache()
        if any(name.endswith("_CHECKPOINT_METADATA") for name in google.find("bucket/runs/told/checkpoints")):
            break
        assert told.poll() is None, told.communicate()[1][-3000:]
        assert time.monotonic() < limit
        time.sleep(0.05)
    told.send_signal(signal.SIGTERM)
    _, err = told.communicate(timeout=300)
    assert told.returncode in (75, 0), err[-3000:]  # 0: it was done before
    again = start(config, "--out", "gs://bucket/runs/told")
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err[-3000:]
    assert "resumed at step" in err or "finished already" in err
    google.invalidate_cache()
    for name in ("prompt.safetensors", "trained.safetensors"):
        assert google.cat(f"bucket/runs/told/{name}") == (prompt_run / name).read_bytes()
    steps = [json.loads(line)["step"] for line in google.cat("bucket/runs/told/metrics.jsonl").splitlines()]
    assert steps == sorted(steps)


@pytest.mark.cloud
@pytest.mark.filterwarnings("default")
def test_one_command_at_a_time_holds_a_folder_on_gs(google, monkeypatch):
    monkeypatch.setattr(folder_lock, "RENEW_S", 0.1)
    with (
        folder_lock.lock_folder("gs://bucket/runs/held") as check,
        pytest.raises(UserError, match=r"a command on .* trains in it"),
        folder_lock.lock_folder("gs://bucket/runs/held", wait_s=1.0),
    ):
        pass
    check()
    google.invalidate_cache()
    assert google.find("bucket/runs/held") == []
    assert cloud_files.create_object("gs://bucket/runs/held/lock.json", b'{"id": "killed", "host": "gone"}')
    assert not cloud_files.create_object("gs://bucket/runs/held/lock.json", b"{}")
    with folder_lock.lock_folder("gs://bucket/runs/held", wait_s=0.5) as check:
        check()


@pytest.mark.cloud
@pytest.mark.filterwarnings("default")
def test_data_and_exports_go_through_s3(amazon, prompt_run, softprompt, tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    amazon.pipe("bucket/data/train.jsonl", b'{"x": "one"}\n')
    assert [row for _, row in Folder(path="s3://bucket/data").rows("train", "task")] == [{"x": "one"}]
    amazon.pipe("bucket/data/train.jsonl", b'{"x": "two"}\n')
    assert [row for _, row in Folder(path="s3://bucket/data").rows("train", "task")] == [{"x": "two"}]
    amazon.put(str(prompt_run), "bucket/run", recursive=True)
    code, _, err = softprompt("export", "s3://bucket/run", "--format", "npy", "--to", "s3://bucket/prompt.npy")
    assert code == 0, err
    np.testing.assert_array_equal(load_prompt("s3://bucket/prompt.npy"), load_prompt(prompt_run))
    with pytest.raises(UserError, match="s3://elsewhere/x: "):
        cloud_files.local("s3://elsewhere/x")
