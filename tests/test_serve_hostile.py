"""Hostile and slow clients: every answer is valid JSON without a path of the server, and no connection stays open."""

from __future__ import annotations

import json
import logging
import re
import socket
import time

import numpy as np
import pytest
import served
from safetensors.numpy import save
from served import PATIENCE_S, ask, rows
from test_serve_app import GOOD, JSON, TEXT, npy

from softprompt_jax.serve.app import is_this_machine


@pytest.fixture(scope="module")
def port(engine):
    with served.serving(engine) as port:
        yield port


def npy_header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def trained(settings: str) -> bytes:
    return save({"a": np.ones(1, np.float32)}, {"settings": settings})


DIGITS = f"<extra_id_{'9' * 3000}>"
LONG = json.dumps({"methods": [{"kind": "prefix", "length": 1_000_000}]})
UPLOADS = {
    "float64": npy(np.full((2, 16), 1e300)),
    "float64 in safetensors": save({"prompt": np.full((2, 16), 1e300)}),
    "huge": npy_header("(1000000000000, 160)"),
    "large": npy_header("(100000000, 160)"),
    "brackets": b"\x93NUMPY\x01\x00" + (5000).to_bytes(2, "little") + b"(" * 5000,
    "checksum of nothing": save({"prompt": rows(2, 0)}, {"crc32": '{"prompt": [0, 1]}'}),
    "checksum of text": save({"prompt": rows(2, 0)}, {"crc32": '{"prompt": ["a", 1]}'}),
    "checksum nested": save({"prompt": rows(2, 0)}, {"crc32": "[" * 5000}),
    "settings nested": save({"prompt": rows(2, 0)}, {"settings": "[" * 5000}),
    "trained, settings nested": trained("[" * 5000),
    "trained, names": save({"a": rows(1, 0), "a.b": rows(1, 0)}, {"settings": "{}"}),
    "trained, long prefix": trained(LONG),
    "nothing": b"",
    "other backbone": save({"prompt": rows(3, 0)}, {"fingerprint": "0", "backbone": "other"}),
    "other width": npy(np.ones((2, 7), np.float32)),
}
SAMPLING = {"kind": "sampling"}
REQUESTS = {
    "sentinel in inputs": GOOD | {"inputs": DIGITS},
    "sentinel in forced": GOOD | {"forced": DIGITS},
    "sentinel in words": GOOD | {"words": [DIGITS]},
    "unknown sentinel": GOOD | {"inputs": "<extra_id_99999>"},
    "temperature infinite": GOOD | {"decoding": SAMPLING | {"temperature": float("inf")}},
    "temperature 1e999": json.dumps(GOOD | {"decoding": SAMPLING | {"temperature": 7}}).replace("7", "1e999").encode(),
    "temperature 1e-300": GOOD | {"decoding": SAMPLING | {"temperature": 1e-300}},
    "timeout infinite": GOOD | {"timeout_s": float("inf")},
    "timeout nan": GOOD | {"timeout_s": float("nan")},
    "digits": b'{"inputs": "a", "prompt": "p1", "max_tokens": ' + b"1" * 3900 + b"}",
    "number as text": GOOD | {"max_tokens": "3"},
    "truth as text": GOOD | {"stream": "yes"},
    "no object": b"1e999",
    "nested": b"[" * 3900,
}
ASKED = {"model": "p1", "prompt": TEXT}
COMPLETIONS = {
    "sentinel": ASKED | {"prompt": DIGITS},
    "sentinel in a list": ASKED | {"prompt": [TEXT, DIGITS]},
    "ids that are none": ASKED | {"prompt": [3, 10**9]},
    "ids below none": ASKED | {"prompt": [[3], [-1]]},
    "ids that are true": ASKED | {"prompt": [True]},
    "ids in ids": ASKED | {"prompt": [[[3]]]},
    "an empty list among ids": ASKED | {"prompt": [[3], []]},
    "too many texts": ASKED | {"prompt": ["a"] * 300},
    "no stop": ASKED | {"stop": [""]},
    "seed without end": ASKED | {"seed": 10**30},
    "n without end": ASKED | {"n": 2**62},
    "temperature nan": ASKED | {"temperature": float("nan")},
    "message of nothing": {"model": "p1", "messages": []},
    "nested": b'{"model": "p1", "prompt": ' + b"[" * 3000,
}
PATHS = [
    *(("PUT", f"/v1/prompts/{name}", npy(rows(2, 7))) for name in (".", "..", "...", "%2e%2e", "a%2Fb", "a%00b")),
    *((method, "/v1/generate", None) for method in ("GET", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW")),
    *(
        ("GET", path, None)
        for path in ("/v1/generate/", "/v1/prompts/", "/%00", "/..%2f..%2fetc/passwd", "/a/b/c", "/v1")
    ),
]
BAD = [
    *((f"upload {name}", "PUT", "/v1/prompts/bad", body, {}) for name, body in UPLOADS.items()),
    *((f"request {name}", "POST", "/v1/generate", body, JSON) for name, body in REQUESTS.items()),
    *((f"completion {name}", "POST", "/v1/completions", body, JSON) for name, body in COMPLETIONS.items()),
    *((f"{method} {path}", method, path, body, {}) for method, path, body in PATHS),
]


@pytest.mark.parametrize(("method", "path", "body", "headers"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_every_client_error_is_4xx_in_one_shape_without_a_path(port, engine, small, method, path, body, headers):
    status, told, answered = ask(port, method, path, body, **({} if isinstance(body, dict) else headers))
    assert 400 <= status < 500, told
    assert answered["content-type"] == "application/json"
    assert (list(told), list(told["error"])) == (["error"], ["message", "type", "param", "code"])
    text = json.dumps(told)
    for folder in (str(small.backbone), str(small.folder), "/tmp", "spiece.model", "site-packages"):
        assert folder not in text
    assert "bad" not in engine.bank


def test_no_answer_is_not_json(port):
    """`top_p: 1e-300` was a distribution of nothing; the backbone's folder stood in the list of prompts."""
    body = GOOD | {"decoding": SAMPLING | {"top_p": 1e-300, "seed": 3}}
    status, found, _ = ask(port, "POST", "/v1/generate", body)
    greedy = ask(port, "POST", "/v1/generate", GOOD)[1]
    assert (status, found["answers"][0]["tokens"]) == (200, greedy["answers"][0]["tokens"])
    assert ask(port, "GET", "/v1/prompts")[1]["backbone"] == "backbone"


def test_a_long_text_of_few_tokens_leaves_the_event_loop_free(engine, monkeypatch):
    monkeypatch.setattr(engine, "limits", engine.limits.model_copy(update={"max_body_bytes": 1 << 20}))
    with served.serving(engine) as port:
        assert ask(port, "POST", "/v1/generate", GOOD | {"inputs": TEXT + " " * 500_000})[0] == 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "127.8.9.1", "[::1]", "[::1]:8000")),
        *((host, True) for host in ("localhost.", "localhost.:8000", "[::ffff:127.0.0.1]")),
        *((host, False) for host in ("", "127.0.0.1.evil.com", "localhost.evil.com", "evil.com", "127.0.0.999", "::1")),
        *((host, False) for host in ("[::2]", "localhost..", "a@localhost", "localhost/a", "localhost:1:2", "[::1")),
        *(
            (host, False)
            for host in ("0.0.0.0", "10.0.0.1", "localhost:99999", "local\thost", "127.0.0.1#a", "2130706433")
        ),
    ],
)
def test_a_host_is_parsed_as_an_address(host, expected):
    assert is_this_machine(host) is expected


def closed_after(port: int, *parts: bytes, pause_s: float = 0.05) -> tuple[float, bytes]:
    """Send parts with a pause between them; return the seconds until the server closes, and what it said."""
    found, began = b"", time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        try:
            for part in parts:
                client.sendall(part)
                time.sleep(pause_s)
            while data := client.recv(65536):
                found += data
        except ConnectionError:
            pass
        return time.monotonic() - began, found


HEAD = (
    b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 3000\r\n\r\n"
)


def test_half_open_and_slow_connections_end(engine, monkeypatch):
    short = {"timeout_s": 0.5, "header_timeout_s": 0.5, "keep_alive_s": 0.3}
    monkeypatch.setattr(engine, "limits", engine.limits.model_copy(update=short))
    with served.serving(engine) as port:
        health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert 0.3 < closed_after(port)[0] < 5  # says nothing
        assert 0.3 < closed_after(port, b"GET /health HT")[0] < 5  # half a header
        slow = closed_after(port, *([b"GET /health HTTP/1.1\r\n"] + [b"X-A: 1\r\n"] * 200))
        assert slow[0] < 15  # a byte now and then
        seconds, told = closed_after(port, HEAD + b'{"inputs": "')
        assert seconds < 5
        assert told.startswith(b"HTTP/1.1 408")
        seconds, told = closed_after(port, health)
        assert 0.2 < seconds < 5
        assert told.startswith(b"HTTP/1.1 200")
        assert closed_after(port, health, b"GET /hea")[0] < 5  # half a second header
        seconds, told = closed_after(port, b"\x16\x03\x01 nonsense\r\n\r\n")
        assert json.loads(told.partition(b"\r\n\r\n")[2])["error"]["code"] == "bad_request"
        assert ask(port, "GET", "/health")[0] == 200


def test_a_body_is_refused_while_it_is_read(port):
    """Chunks without end: the refusal comes after the limit, not at the end."""
    head = HEAD.replace(b"Content-Length: 3000", b"Transfer-Encoding: chunked")
    chunk = b"3e8\r\n" + b" " * 1000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        client.sendall(head + chunk * 6)
        assert re.match(rb"HTTP/1.1 413 ", client.recv(65536))


def test_a_client_that_leaves_in_its_body_leaves_no_traceback(port, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        client.sendall(HEAD + b'{"inputs": "')
    assert ask(port, "GET", "/health")[0] == 200
    time.sleep(0.2)
    assert not caplog.records


@pytest.mark.parametrize("token", [None, "s3cret"])
def test_the_description_is_complete_and_as_guarded_as_the_rest(engine, token):
    with served.serving(engine, token) as port:
        given = {} if token is None else {"Authorization": f"Bearer {token}"}
        host = {"Host": "evil.example"} if token is None else {}
        assert ask(port, "GET", "/openapi.json", **host)[0] == (403 if token is None else 401)
        status, found, _ = ask(port, "GET", "/openapi.json", **given)
        media = ask(port, "GET", "/metrics", **given)[2]["content-type"]
    assert status == 200
    references = set(re.findall(r'"\$ref": "(#/[^"]*)"', json.dumps(found)))
    assert len(references) >= 4
    for reference in references:
        place = found
        for part in reference.split("/")[1:]:
            place = place[part]
    assert list(found["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == [media.partition(";")[0]]
    assert ("securitySchemes" in found["components"]) == (token is not None)
