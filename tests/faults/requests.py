"""Mixed requests to a server: good ones get what `predict` says, all others an error of their own or nothing."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import random
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

from faults.child import Child, call, command
from faults.place import QUESTIONS, Place, lines

CLIENTS = 4
WARM = 500  # requests after which memory is to stay as it is
LIMITS = ["slots=8", "max_input_tokens=16", "max_prompt_rows=12", "timeout_s=20", "header_timeout_s=1",
          "keep_alive_s=2", "max_body_bytes=4000", "max_prompt_bytes=8000"]  # fmt: skip
GROWTH_MIB = 64


class Expected(NamedTuple):
    answers: list[str]  # of each question
    uploads: dict[str, bytes]
    bodies: dict[str, Any]


def prepare(place: Place) -> Expected:
    import test_serve_hostile as hostile

    ended = call(["predict", "bank"], place.good, lines(QUESTIONS))
    assert not ended.problem(0), ended
    answers = [json.loads(line)["prediction"] for line in ended.out.splitlines()]
    return Expected(answers, hostile.UPLOADS, hostile.REQUESTS)


def run(numbers: list[int], seed: int, place: Place, expected: Expected) -> tuple[list[Any], dict[str, Any]]:
    """Send the requests from several clients at once; return (case, title, problem, seconds) of each, and facts."""
    limits = [part for limit in LIMITS for part in ("--limit", limit)]
    child = Child(command(["serve", "bank", "--port", "0", *limits]), place.good)
    while not (told := re.search(r"http://127\.0\.0\.1:(\d+)", child.said())):
        assert child.running(), child.said()
        time.sleep(0.05)
    port, others = int(told[1]), 0.05 if os.environ.get("LONG") else 0.25
    found, facts, warm = [], {}, 0.0
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
        for first in range(0, len(numbers), WARM):
            part = numbers[first : first + WARM]
            found += clients.map(lambda number: one(number, seed, port, others, expected), part)
            warm = warm or memory_mib(child.pid)
    grown = memory_mib(child.pid) - warm
    os.kill(child.pid, signal.SIGTERM)
    ended = child.end(10**9)
    facts["memory_mib"] = {"after_500": round(warm), "at_the_end": round(warm + grown)}
    if ended.code not in (0, -signal.SIGTERM) or "Traceback" in ended.error or ended.asked:
        problem = f"code {ended.code}, tried {ended.asked or 'nothing'}: {ended.error[-1500:]}"
    else:
        problem = f"grew by {grown:.0f} MiB" if grown > GROWTH_MIB else ""
    if problem:
        found.append(("request", "the server itself", problem, 0.0))
    return found, facts


def memory_mib(pid: int) -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def one(number: int, seed: int, port: int, others: float, expected: Expected) -> tuple[str, str, str, float]:
    draw, began = random.Random(f"request:{number}:{seed}"), time.monotonic()
    kind = draw.choice([bad, upload, disconnect, slow]) if draw.random() < others else good
    try:
        title, problem = kind(draw, port, expected)
    except (OSError, http.client.HTTPException, ValueError) as error:
        title, problem = kind.__name__, f"{type(error).__name__}: {error}"
    return f"request:{number}", title, problem, time.monotonic() - began


def ask(port: int, method: str, path: str, body: bytes) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"} if method == "POST" else {}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    told = json.loads(response.read(), parse_constant=lambda name: f"no JSON: {name}")
    connection.close()
    return response.status, told


def question(draw: random.Random) -> tuple[int, bytes]:
    number = draw.randrange(len(QUESTIONS))
    return number, json.dumps(QUESTIONS[number]).encode()


def good(draw: random.Random, port: int, expected: Expected) -> tuple[str, str]:
    number, body = question(draw)
    status, told = ask(port, "POST", "/v1/generate", body)
    right = status == 200 and told["prediction"] == expected.answers[number]
    return f"question {number}", "" if right else f"{status} {told}; expected {expected.answers[number]!r}"


def refused(status: int, told: Any) -> str:
    right = 400 <= status < 500 and list(told) == ["error"] and "softprompt_jax/" not in str(told)
    return "" if right else f"{status} {str(told)[:300]}; expected an error of the client in one shape"


def bad(draw: random.Random, port: int, expected: Expected) -> tuple[str, str]:
    name, body = draw.choice([*expected.bodies.items()])
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"bad request: {name}", refused(*ask(port, "POST", "/v1/generate", body))


def upload(draw: random.Random, port: int, expected: Expected) -> tuple[str, str]:
    name, body = draw.choice([*expected.uploads.items()])
    return f"upload: {name}", refused(*ask(port, "PUT", "/v1/prompts/hostile", body))


def head(body: bytes) -> bytes:
    return (
        b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(body)}\r\n\r\n".encode()
    )


def disconnect(draw: random.Random, port: int, expected: Expected) -> tuple[str, str]:
    """Leave at a random place of a request, or before its answer."""
    text = head(body := question(draw)[1]) + body
    sent = draw.randrange(1, len(text) + 1)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(text[:sent])
        time.sleep(draw.uniform(0, 0.05))
    return f"disconnects after {sent} of {len(text)} bytes", ""


def slow(draw: random.Random, port: int, expected: Expected) -> tuple[str, str]:
    """Send a request in small parts: an answer that is right; or a header that never ends: closed within seconds."""
    number, body = question(draw)
    endless, began = draw.random() < 0.3, time.monotonic()
    told = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        try:
            client.sendall(head(body)[:30] if endless else head(body))
            for place in range(0, 0 if endless else len(body), 16):
                client.sendall(body[place : place + 16])
                time.sleep(0.02)
            client.shutdown(socket.SHUT_WR) if endless and draw.random() < 0.5 else None
            while data := client.recv(65536):
                told += data
                if b'"best_word"' in told:
                    break
        except ConnectionError:
            pass
    seconds = time.monotonic() - began
    if endless:
        return "a header without end", "" if seconds < 15 else f"open for {seconds:.0f} s"
    right = json.dumps(expected.answers[number])[1:-1].encode() in told and told.startswith(b"HTTP/1.1 200")
    return f"slow question {number}", "" if right else f"{told[-300:]!r}; expected {expected.answers[number]!r}"
