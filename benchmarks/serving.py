"""Load on a server, open-loop: requests arrive when they arrive, each under a prompt of its own.

Two servers take turns on the same arrivals and the same compiled programs. `slots` is the one that ships: a request
joins the running batch as soon as a slot is free, whatever its prompt. `one prompt at a time` fills the slots with
waiting requests of one prompt, and takes the next prompt when all of them have ended. A client process sends Poisson
arrivals over HTTP; a request's latency counts from when it should have been sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import threading
import time


async def _one(port: int, body: bytes, due: float, found: list[tuple[float, int, str]]) -> None:
    await asyncio.sleep(max(0.0, due - time.monotonic()))
    head = "POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    status = int(answer.split(b" ", 2)[1])
    told = json.loads(answer.partition(b"\r\n\r\n")[2])
    found.append((time.monotonic() - due, status, told.get("prompt", "")))


async def _client(port: int, rate: float, count: int, prompts: int, tokens: int, seed: int) -> None:
    draw, found, due, waits = random.Random(seed), [], time.monotonic() + 1, []
    started = due
    words = ("warm", "funny", "slow", "moving", "long", "film", "the", "was", "but", "plot")
    for _ in range(count):
        text = " ".join(draw.choices(words, k=draw.randint(6, 24)))
        body = {"inputs": text, "prompt": f"p{draw.randrange(prompts)}", "max_tokens": draw.randint(1, tokens)}
        waits.append(_one(port, json.dumps(body).encode(), due, found))
        due += draw.expovariate(rate)
    await asyncio.gather(*waits)
    seconds = time.monotonic() - started
    latencies = sorted(latency for latency, status, _ in found if status == 200)
    at = {
        f"p{part}": round(latencies[min(len(latencies) - 1, len(latencies) * part // 100)], 4) for part in (50, 90, 99)
    }
    refused = sum(status != 200 for _, status, _ in found)
    print(json.dumps(at | {"per_second": round(len(latencies) / seconds, 1), "refused": refused, "sent": count}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-length", type=int, default=20)
    parser.add_argument("--answer", type=int, default=16, help="tokens at most; lengths are uniform from 1")
    parser.add_argument("--rates", type=float, nargs="+", default=[5, 20, 1000], help="requests a second")
    parser.add_argument("--requests", type=int, default=150, help="for each rate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--client", nargs=6, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.client:
        port, rate, count, prompts, tokens, seed = chosen.client
        asyncio.run(_client(int(port), float(rate), int(count), int(prompts), int(tokens), int(seed)))
        return
    import machine
    import numpy as np

    from softprompt_jax import PromptBank, load_backbone
    from softprompt_jax.serve.engine import Engine, Job
    from softprompt_jax.serve.limits import Limits
    from softprompt_jax.serve.server import make_server

    class OnePromptAtATime(Engine):
        def _next_group(self) -> list[Job]:
            if self._working:
                return []
            with self._wake:
                same = [job for job in self._waiting if job.prompt == self._waiting[0].prompt][: self.limits.slots]
                others = [job for job in self._waiting if job not in same]
                self._waiting.clear()
                self._waiting.extend(others)
            for start in range(0, len(same), 8):
                self._join(same[start : start + 8])
            return []

    backbone = load_backbone(chosen.backbone)
    deviation = float(np.asarray(backbone.model.embedding[...], np.float32).std())
    limits = Limits(
        max_input_tokens=96, max_prompt_rows=32, max_tokens=chosen.answer, max_waiting=10_000, timeout_s=3600
    )
    ports, engines = {}, {}
    for name, kind in (("slots", Engine), ("one prompt at a time", OnePromptAtATime)):
        bank = PromptBank(backbone)
        draw = np.random.default_rng(0)
        for number in range(chosen.prompts):
            rows = deviation * draw.normal(size=(chosen.prompt_length, backbone.settings.d_model))
            bank.add(f"p{number}", rows.astype(np.float32))
        engines[name] = kind(bank, limits)
        engines[name].start()
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        ports[name] = listener.getsockname()[1]
        server = make_server(engines[name], None, loopback=True)
        threading.Thread(target=server.run, args=([listener],), daemon=True).start()
    runs: dict[str, dict[str, list]] = {name: {} for name in engines}
    busy, started = machine.busy_seconds(), time.monotonic()
    for round_ in range(chosen.rounds):
        for rate in chosen.rates:
            for name, port in ports.items():
                arguments = [port, rate, chosen.requests, chosen.prompts, chosen.answer, round_]
                begun = machine.cpu_seconds()
                done = subprocess.run(
                    [sys.executable, __file__, "--client", *map(str, arguments)],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                found = json.loads(done.stdout) | {"server_cpu_seconds": round(machine.cpu_seconds() - begun, 2)}
                runs[name].setdefault(str(rate), []).append(found)
                print(name, rate, found, flush=True)
    medians = {
        name: {
            rate: {key: float(np.median([one[key] for one in each])) for key in each[0]} for rate, each in by.items()
        }
        for name, by in runs.items()
    }
    result = machine.describe() | {
        "settings": {key: value for key, value in vars(chosen).items() if key != "client"},
        "medians": medians,
        "machine_used_cores": round((machine.busy_seconds() - busy) / (time.monotonic() - started), 2),
    }
    with (machine.ROOT / "benchmarks" / "results" / "serving.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
