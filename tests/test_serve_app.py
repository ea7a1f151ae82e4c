"""HTTP around the engine: what is asked and told, what is refused with which status; the server stays up."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import served
from safetensors.numpy import save
from served import PATIENCE_S, ask, events, rows

from softprompt_jax import PromptBank, Run, UserError
from softprompt_jax.config import parse
from softprompt_jax.models.quantized import quantization_of
from softprompt_jax.serve import server
from softprompt_jax.serve.app import make_app
from softprompt_jax.serve.uploads import Store

TEXT = "the garden is warm"


@pytest.fixture(scope="module")
def port(engine):
    with served.serving(engine) as port:
        yield port


@pytest.fixture
def alive(port, engine):
    """After the test the server answers as before, and nothing is left of what the test asked."""
    yield
    status, answer, _ = ask(port, "POST", "/v1/generate", {"inputs": TEXT, "prompt": "p1"})
    assert (status, answer["prompt"]) == (200, "p1")
    assert ask(port, "GET", "/health")[1] == {"status": "ok", "waiting": 0, "working": 0}


@pytest.mark.slow
def test_an_answer_equals_the_banks(port, engine):
    status, answer, headers = ask(
        port, "POST", "/v1/generate", {"inputs": TEXT, "prompt": "p4", "words": ["yes", "no"]}
    )
    assert status == 200
    assert headers["x-content-type-options"] == "nosniff"
    ((expected, score),) = engine.call(lambda: engine.bank.generate([TEXT], "p4", served.TOKENS)).result(PATIENCE_S)
    assert answer["prediction"] == answer["answers"][0]["text"] == expected
    assert answer["answers"][0]["score"] == pytest.approx(score, abs=1e-4)
    assert [word["word"] for word in answer["words"]] == ["yes", "no"]


def test_a_stream_tells_the_same_in_pieces(port):
    body = {"inputs": TEXT, "prompt": "p5", "forced": "the old mill", "decoding": {"kind": "sampling", "samples": 2}}
    _, whole, _ = ask(port, "POST", "/v1/generate", body)
    status, text, headers = ask(port, "POST", "/v1/generate", body | {"stream": True})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    *pieces, (last, done) = events(text)
    assert (last, done) == ("done", whole)
    assert {kind for kind, _ in pieces} == {"text"}
    assert len(pieces) > 2
    for index, answer in enumerate(whole["answers"]):
        assert "".join(piece["text"] for _, piece in pieces if piece["answer"] == index) == answer["text"]


def test_prompts_are_listed_added_replaced_and_removed(port):
    found = ask(port, "GET", "/v1/prompts")[1]["prompts"]
    assert [one["name"] for one in found] == [f"p{number}" for number in range(8)]
    assert found[1] == {"name": "p1", "rows": 2, "place": "before", "extras": [], "task": None, "label_words": []}
    file = io.BytesIO()
    np.save(file, rows(2, 7))
    body = {"inputs": TEXT, "prompt": "new-1"}
    assert ask(port, "PUT", "/v1/prompts/new-1", file.getvalue())[0] == 201
    first = ask(port, "POST", "/v1/generate", body)[1]["answers"][0]["score"]
    settings = {
        "settings": json.dumps(
            {"task": {"name": "moods", "source": {"kind": "files", "train": "x"}, "label_words": ["yes", "no"]}}
        ),
        "place": "after",
    }
    told = ask(port, "PUT", "/v1/prompts/new-1", save({"prompt": rows(3, 8)}, settings))[1]
    assert told == {
        "name": "new-1",
        "rows": 3,
        "place": "after",
        "extras": [],
        "task": "moods",
        "label_words": ["yes", "no"],
    }
    assert ask(port, "POST", "/v1/generate", body)[1]["answers"][0]["score"] != first
    assert ask(port, "DELETE", "/v1/prompts/new-1")[0] == 204
    assert ask(port, "POST", "/v1/generate", body)[0] == 404
    assert ask(port, "DELETE", "/v1/prompts/new-1")[0] == 404


def test_the_number_of_uploaded_prompts_is_bounded(engine, monkeypatch):
    monkeypatch.setattr(engine, "limits", engine.limits.model_copy(update={"max_prompts": 1}))
    with served.serving(engine) as port:
        file = save({"prompt": rows(2, 7)})
        assert ask(port, "PUT", "/v1/prompts/one", file)[0] == 201
        status, answer, _ = ask(port, "PUT", "/v1/prompts/two", file)
        assert (status, answer["error"]["param"]) == (429, "name")
        assert "server: 1 prompts were added already; expected fewer" in answer["error"]["message"]
        assert ask(port, "PUT", "/v1/prompts/one", file)[0] == 201  # replaced
        assert ask(port, "PUT", "/v1/prompts/p1", save({"prompt": rows(2, 1)}))[0] == 201  # as it was
        assert ask(port, "DELETE", "/v1/prompts/one")[0] == 204
        assert ask(port, "PUT", "/v1/prompts/two", file)[0] == 201
        assert ask(port, "DELETE", "/v1/prompts/two")[0] == 204


@pytest.mark.usefixtures("alive")
def test_an_uploaded_run_of_full_tuning_is_refused_by_its_settings_alone(port, engine, small, monkeypatch):
    for place in ("checkpoints.artifact.read_tensors", "methods.attach", "methods.put_trained"):
        monkeypatch.setattr(f"softprompt_jax.{place}", lambda *_: pytest.fail("weights were read or attached"))
    run = parse(Run, small.short | {"methods": [{"kind": "full"}]}, "test").model_dump(mode="json")
    weights = {"encoder.norm.scale": np.ones(16, np.float32)}
    status, answer, _ = ask(port, "PUT", "/v1/prompts/whole", save(weights, {"settings": json.dumps(run)}))
    assert status == 422
    assert answer["error"]["message"].startswith(
        "prompt whole: full changes the model for every text, so that it cannot be in"
    )
    assert "expected a prompt, a prefix or ia3" in answer["error"]["message"]
    assert "whole" not in engine.bank


def test_measures_count_what_happened(port):
    def read() -> dict[str, float]:
        text = ask(port, "GET", "/metrics")[1]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}

    before = read()
    ask(port, "POST", "/v1/generate", {"inputs": TEXT, "prompt": "p1"})
    ask(port, "POST", "/v1/generate", {"inputs": TEXT, "prompt": "q1"})
    after = read()
    assert after["softprompt_request_seconds_count"] - before["softprompt_request_seconds_count"] == 1
    refused = 'softprompt_refused_total{status="404"}'
    assert after[refused] - before.get(refused, 0) == 1
    assert after["softprompt_tokens_total"] > before["softprompt_tokens_total"]
    assert (after["softprompt_prompts"], after["softprompt_slots"]) == (8, 8)


JSON = {"Content_Type": "application/json"}
GOOD = {"inputs": TEXT, "prompt": "p1"}


@pytest.mark.usefixtures("alive")
@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "message"),
    [
        (
            "POST",
            "/v1/generate",
            GOOD | {"prompt": "p11"},
            {},
            404,
            r"prompt 'p11': not in the bank; .*did you mean p1",
        ),
        ("POST", "/v1/generate", GOOD | {"inputs": ""}, {}, 422, "inputs: found an empty text"),
        ("POST", "/v1/generate", GOOD | {"inputs": "warm " * 16}, {}, 422, r"inputs: 17 tokens; expected at most 16"),
        ("POST", "/v1/generate", GOOD | {"inputs": "warm " * 1000}, {}, 413, "body: over 4000 bytes"),
        ("POST", "/v1/generate", {"inputs": TEXT}, {}, 422, "body: no field 'prompt'; expected {\"inputs\""),
        ("POST", "/v1/generate", GOOD | {"beams": 4}, {}, 422, "body: 'beams': unknown field; expected inputs, prompt"),
        ("POST", "/v1/generate", {"input": TEXT}, {}, 422, "'input': unknown field; .* did you mean inputs"),
        ("POST", "/v1/generate", GOOD | {"inputs": [TEXT]}, {}, 422, "body: inputs: .*expected one text; send a req"),
        (
            "POST",
            "/v1/generate",
            GOOD | {"decoding": {"kind": "beam"}},
            {},
            422,
            "body: decoding: .*beams trade hypothes",
        ),
        ("POST", "/v1/generate", GOOD | {"max_tokens": "many"}, {}, 422, "body: max_tokens: found 'many'"),
        ("POST", "/v1/generate", b'{"inputs": "a', JSON, 400, "body: not JSON"),
        ("POST", "/v1/generate", b"[" * 3000, JSON, 400, "body: not JSON"),
        ("POST", "/v1/generate", b"[]", JSON, 400, "body: found list; expected a JSON object"),
        ("POST", "/v1/generate", b'{"inputs": "\xff\xfe"}', JSON, 400, "body: not UTF-8 at byte 12"),
        ("POST", "/v1/generate", b"{}", {}, 415, "Content-Type: not application/json"),
        ("POST", "/v1/generate", GOOD, {"Host": "other.example"}, 403, "Host: not this machine"),
        ("GET", "/v1/generate", None, {}, 405, "GET /v1/generate: Method Not Allowed"),
        ("GET", "/v1/nothing", None, {}, 404, "GET /v1/nothing: Not Found"),
        ("PUT", "/v1/prompts/new", b"nonsense", {}, 422, "new.safetensors: not a complete safetensors file"),
        ("PUT", "/v1/prompts/new", save({"prompt": rows(13, 0)}), {}, 422, "13 ids around a text; expected at most 12"),
        ("PUT", "/v1/prompts/new", save({"prompt": rows(3, 0)[:, 1:].copy()}), {}, 422, "the width of backbone"),
        (
            *(
                "PUT",
                "/v1/prompts/new",
                save({"prompt": rows(3, 0)}, {"fingerprint": "0", "backbone": "other"}),
                {},
                422,
            ),
            "trained on backbone other .*expected the same backbone",
        ),
        ("PUT", "/v1/prompts/new", b"x" * 8001, {}, 413, "body: over 8000 bytes"),
        ("PUT", "/v1/prompts/a%20b", b"", {}, 422, "prompt 'a b': not a name"),
        ("PUT", "/v1/prompts/" + "%E4%BD%A0" * 90, b"", {}, 422, "not a name; expected letters"),
        ("POST", "/v1/generate", GOOD | {"decoding": {"kind": "sampling", "top_k": 2**31}}, {}, 422, "top_k"),
        ("POST", "/v1/generate", GOOD | {"decoding": {"kind": "sampling", "seed": 10**30}}, {}, 422, "seed"),
        ("DELETE", "/v1/prompts/p99", None, {}, 404, "prompt 'p99': not in the bank"),
    ],
)
def test_bad_requests_get_a_status_and_one_line(port, method, path, body, headers, status, message):
    found, told, _ = ask(port, method, path, body, **headers)
    assert (found, list(told), list(told["error"])) == (status, ["error"], ["message", "type", "param", "code"])
    assert re.search(message, told["error"]["message"]), told
    assert "\n" not in told["error"]["message"]


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.usefixtures("alive")
def test_others_are_answered_while_an_uploaded_file_is_read(port, engine, monkeypatch):
    """Were the file read in the event loop or by the engine, the answers would come after the upload's."""
    real, reading, held = engine.bank.read, threading.Event(), threading.Event()

    def slow(*arguments):
        reading.set()
        held.wait(20)
        return real(*arguments)

    monkeypatch.setattr(engine.bank, "read", slow)
    upload: list[int] = []
    thread = threading.Thread(target=lambda: upload.append(ask(port, "PUT", "/v1/prompts/slow", npy(rows(2, 7)))[0]))
    thread.start()
    assert reading.wait(PATIENCE_S)
    status, text, _ = ask(port, "POST", "/v1/generate", GOOD | {"stream": True})
    assert (status, events(text)[-1][0], upload) == (200, "done", [])
    held.set()
    thread.join()
    assert upload == [201]
    assert ask(port, "DELETE", "/v1/prompts/slow")[0] == 204


def test_a_client_does_not_wait_for_a_step_without_end(small, monkeypatch):
    stuck, held = served.engine_of(small.backbone, timeout_s=1), threading.Event()
    monkeypatch.setattr(stuck, "_advance", lambda: held.wait(20))
    stuck.start()
    try:
        with served.serving(stuck) as port:
            assert ask(port, "POST", "/v1/generate", GOOD)[0] == 504
            assert ask(port, "DELETE", "/v1/prompts/p1")[0] == 504
            assert not held.is_set()
    finally:
        held.set()
        stuck.stop()


def test_a_server_whose_engine_has_died_says_so(small, monkeypatch, capfd):
    dying = served.engine_of(small.backbone)
    dying.start()

    def no_room() -> None:
        raise MemoryError("no room")

    with served.serving(dying) as port:
        monkeypatch.setattr(dying, "_advance", no_room)
        monkeypatch.setattr(dying, "_reset", no_room)
        assert ask(port, "POST", "/v1/generate", GOOD)[0] in (500, 503)
        dying._thread.join(PATIENCE_S)
        status, about, _ = ask(port, "GET", "/health")
        assert (status, about) == (503, {"status": "failed", "waiting": 0, "working": 0})
        for request in (("POST", "/v1/generate", GOOD), ("PUT", "/v1/prompts/new", npy(rows(2, 7)))):
            status, told, _ = ask(port, *request)
            assert (status, "its engine has failed" in told["error"]["message"]) == (503, True)
    assert "MemoryError" in capfd.readouterr().err


@pytest.mark.usefixtures("alive")
def test_half_of_a_surrogate_pair_is_no_crash(port):
    status, _, _ = ask(port, "POST", "/v1/generate", {"inputs": "warm \ud83d tea", "prompt": "p1", "words": ["\ud83d"]})
    assert status == 200


@pytest.mark.usefixtures("alive")
def test_clients_that_leave_take_their_work_along(port, engine, monkeypatch):
    """Half of them in mid-stream, half before the first word; the engine is slow, so that they leave in time."""
    real = engine._advance
    monkeypatch.setattr(engine, "_advance", lambda: (time.sleep(0.05), real())[1])
    body = {"inputs": TEXT, "prompt": "p1", "words": ["yes", "no"], "stream": True}
    data = json.dumps(body).encode()
    head = "POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    for number in range(12):
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
            client.sendall(head.encode() + data)
            if number % 2:
                assert client.recv(64).startswith(b"HTTP/1.1 200")
    until = time.monotonic() + PATIENCE_S
    while (engine.waiting or engine.working) and time.monotonic() < until:
        time.sleep(0.01)


@pytest.mark.usefixtures("alive")
def test_requests_beyond_the_queue_are_told_to_come_again(port, engine, monkeypatch):
    monkeypatch.setattr(engine, "limits", engine.limits.model_copy(update={"max_waiting": 4}))
    found: Counter = Counter()
    refused, advance = threading.Event(), engine._advance

    def after_a_refusal() -> None:  # however slowly the clients come
        if not refused.wait(20):
            refused.set()  # the assertion below fails
        advance()

    monkeypatch.setattr(engine, "_advance", after_a_refusal)

    def client() -> None:
        for _ in range(10):
            status, answer, headers = ask(port, "POST", "/v1/generate", GOOD)
            found[status] += 1
            if status == 429:
                refused.set()
                assert "requests wait already; expected fewer; try again" in answer["error"]["message"]
                assert headers["retry-after"] == "1"

    clients = [threading.Thread(target=client) for _ in range(40)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert set(found) == {200, 429}
    assert sum(found.values()) == 400


async def _call(app, body: bytes, token: str | None = None) -> int:
    """Ask an ASGI application without a socket; return the status."""
    statuses, messages = [], [{"type": "http.request", "body": body}]
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    headers += [(b"authorization", f"Bearer {token}".encode())] if token else []
    scope = {"type": "http", "method": "POST", "path": "/v1/generate", "raw_path": b"/v1/generate", "headers": headers}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1)}
    scope |= {"server": ("127.0.0.1", 80), "root_path": "", "asgi": {"version": "3.0"}}

    async def receive():
        return messages.pop() if messages else await asyncio.Future()

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, send)
    return statuses[0]


@pytest.mark.slow
@pytest.mark.usefixtures("alive")
def test_of_ten_thousand_requests_at_once_each_is_answered_or_told(engine):
    app, body = make_app(engine, None, loopback=True), json.dumps(GOOD).encode()

    async def all_at_once() -> list[int]:
        return await asyncio.gather(*(_call(app, body) for _ in range(10_000)))

    found = Counter(asyncio.run(all_at_once()))
    assert set(found) == {200, 429}
    assert sum(found.values()) == 10_000
    assert found[200] >= engine.limits.max_waiting


@pytest.mark.parametrize(("given", "status"), [(None, 401), ("wrong", 401), ("s3cret", 200)])
def test_a_token_is_asked_for_where_there_is_one(engine, given, status):
    app = make_app(engine, "s3cret", loopback=False)
    assert asyncio.run(_call(app, json.dumps(GOOD).encode(), given)) == status


def test_without_a_token_only_this_machine_is_served(engine, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--host 0.0.0.0: others can reach it, and there is no token"):
        server.serve(engine.bank, engine.limits, "0.0.0.0", 0, None)
    assert [server.is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "10.0.0.1", "::")] == [True] * 3 + [
        False
    ] * 2
    monkeypatch.setenv(server.TOKEN, "one")
    (tmp_path / "token").write_text("two\n")
    assert [server.read_token(None), server.read_token(str(tmp_path / "token"))] == ["one", "two"]
    (tmp_path / "token").write_text("\n")
    with pytest.raises(UserError, match="is empty; expected the token"):
        server.read_token(str(tmp_path / "token"))


def test_an_address_in_use_is_one_line(engine, port):
    with pytest.raises(UserError, match=rf"--port {port}: .*expected an address that is free here"):
        server.serve(engine.bank, engine.limits, "127.0.0.1", port, None)


def test_serving_what_is_no_bank_is_one_line(refused, tmp_path):
    assert "no such folder" in refused("serve", tmp_path / "nowhere")
    assert "--limit: slot: unknown setting; expected one of slots" in refused("serve", tmp_path, "--limit", "slot=3")


def test_the_backbone_is_kept_as_the_command_says(small, softprompt, tmp_path, monkeypatch):
    np.save(tmp_path / "p.npy", rows(2, 0))
    served = []
    monkeypatch.setattr(server, "serve", lambda bank, *rest: served.append(bank.backbone.model))
    command = ["serve", tmp_path, "--backbone", small.backbone]
    softprompt(*command)
    softprompt(*command, "--quantize", "int8", "--dtype", "bfloat16")
    assert [quantization_of(model) for model in served] == [None, "int8"]
    assert served[1].embedding[...].dtype == "bfloat16"


@pytest.mark.slow
def test_sigterm_lets_requests_finish_and_takes_no_more(small, tmp_path):
    bank = tmp_path / "bank"
    bank.mkdir()
    for number in range(3):
        np.save(bank / f"p{number}.npy", rows(2, number))
    command = [sys.executable, "-m", "softprompt_jax", "serve", str(bank), "--backbone", str(small.backbone)]
    command += ["--port", "0", "--limit", "slots=2", "--limit", "max_input_tokens=16", "--limit", "max_prompt_rows=4"]
    command += ["--limit", "max_tokens=512", "--limit", f"timeout_s={PATIENCE_S}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        while not (
            found := re.search(r"serving 3 prompts over .* on http://127.0.0.1:(\d+)", process.stderr.readline())
        ):
            assert process.poll() is None
        port, statuses = int(found[1]), []
        forced = "warm " * 400  # a long answer
        body = {"inputs": TEXT, "prompt": "p1", "forced": forced, "max_tokens": 450}
        wanted = dict(enumerate([*[body | {"inputs": forced[:20]}] * 6]))

        def client(number: int) -> None:
            statuses.append(ask(port, "POST", "/v1/generate", wanted[number])[0])

        clients = [threading.Thread(target=client, args=(number,)) for number in wanted]
        for thread in clients:
            thread.start()
        here = {}
        while (here.get("waiting"), here.get("working")) != (4, 2):  # all six have come
            here = ask(port, "GET", "/health")[1]
            assert not statuses, "some were answered before all had come; expected longer answers"
        process.send_signal(signal.SIGTERM)
        for thread in clients:
            thread.join()
        assert statuses == [200] * 6
        assert process.wait(PATIENCE_S) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        with pytest.raises(ConnectionRefusedError):
            ask(port, "GET", "/health")
    finally:
        process.kill()
        process.communicate()


def test_uploaded_prompts_are_kept_in_the_store(engine, small, tmp_path):
    store = Store(tmp_path / "store")
    bank = engine.bank
    with served.serving(engine, store=store) as port:
        whole = save({"prompt": rows(3, 8)}, {"place": "after"})
        assert ask(port, "PUT", "/v1/prompts/kept", whole)[0] == 201
        assert ask(port, "PUT", "/v1/prompts/array.1", npy(rows(2, 7).astype(np.float64)))[0] == 201
        assert ask(port, "PUT", "/v1/prompts/p1", save({"prompt": rows(2, 1)}))[0] == 201  # as it was
        assert ask(port, "PUT", "/v1/prompts/long", save({"prompt": rows(13, 0)}))[0] == 422
        assert ask(port, "PUT", "/v1/prompts/wrong", b"nonsense")[0] == 422
        assert ask(port, "DELETE", "/v1/prompts/wrong")[0] == 404
        assert ask(port, "DELETE", f"/v1/prompts/{bank.bare}")[0] == 404  # the backbone itself is no prompt
        assert {path.name for path in store.folder.iterdir()} == {f"{name}.safetensors" for name in store.names}
        assert store.names == {"kept", "array.1", "p1"}
        assert (store.folder / "kept.safetensors").read_bytes() == whole
        (store.folder / "left.upload").touch()  # of a killed server
        again = PromptBank(bank.backbone)
        again.add("p1", rows(1, 0))
        Store(store.folder).load(again)
        assert not (store.folder / "left.upload").exists()
        assert again.names == ["array.1", "kept", "p1"]
        for name in again.names:
            np.testing.assert_array_equal(again.prompt(name).rows, bank.prompt(name).rows)
        assert again.prompt("kept").place == "after"
        assert ask(port, "DELETE", "/v1/prompts/kept")[0] == 204
        assert ask(port, "DELETE", "/v1/prompts/array.1")[0] == 204
        assert store.names == {"p1"}
        (store.folder / "p1.safetensors").unlink()
        store.folder.rmdir()  # as a disk that is full
        status, told, _ = ask(port, "PUT", "/v1/prompts/late", whole)
        assert (status, told["error"]["code"]) == (507, "insufficient_storage")
        assert str(tmp_path) not in told["error"]["message"]
        assert "late" not in bank


def test_an_upload_that_takes_too_long_leaves_no_file(small, tmp_path, monkeypatch):
    slow, store, written = served.engine_of(small.backbone, timeout_s=1), Store(tmp_path / "store"), threading.Event()
    real = store.write

    def write(*given):
        file = real(*given)
        time.sleep(2)
        written.set()
        return file

    monkeypatch.setattr(store, "write", write)
    slow.start()
    try:
        with served.serving(slow, store=store) as port:
            assert ask(port, "PUT", "/v1/prompts/new", save({"prompt": rows(2, 7)}))[0] == 504
            assert written.wait(PATIENCE_S)
            until = time.monotonic() + PATIENCE_S
            while [*store.folder.iterdir()] and time.monotonic() < until:
                time.sleep(0.05)
            assert [*store.folder.iterdir()] == []
    finally:
        slow.stop()


def test_prompts_of_the_store_count_as_uploaded(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "limits", engine.limits.model_copy(update={"max_prompts": 1}))
    store, file = Store(tmp_path), save({"prompt": rows(2, 7)})
    (tmp_path / "old.safetensors").write_bytes(file)
    engine.call(lambda: store.load(engine.bank)).result(PATIENCE_S)
    try:
        with served.serving(engine, store=store) as port:
            assert ask(port, "PUT", "/v1/prompts/new", file)[0] == 429
            assert store.names == {"old"}
            assert not [*tmp_path.glob("*.upload")]
            assert ask(port, "DELETE", "/v1/prompts/old")[0] == 204
            assert ask(port, "PUT", "/v1/prompts/new", file)[0] == 201
            assert ask(port, "DELETE", "/v1/prompts/new")[0] == 204
    finally:
        engine.call(lambda: engine.bank.remove("old", missing_ok=True)).result(PATIENCE_S)


def test_a_store_with_a_file_that_is_no_prompt_is_one_line(small, refused, tmp_path):
    np.save(tmp_path / "p.npy", rows(2, 0))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "bad.safetensors").write_bytes(b"nonsense")
    told = refused("serve", tmp_path, "--backbone", small.backbone, "--store", tmp_path / "store")
    assert "bad.safetensors: " in told
    assert "move the file away to start without it" in told
