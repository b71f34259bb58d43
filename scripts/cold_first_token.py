#!/usr/bin/env python3
"""Time to first token of the 135M model: warm, cold from DRAM, cold from disk. One JSON object, milliseconds.

    scripts/cold_first_token.py [RUNS=9]

Each run takes the model out of its worker (DRAM) or out of memory (disk), then asks once; the prompt is never in the
prefix cache, so a warm request computes its whole prefill too.
"""

import http.client
import json
import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/python"))
from stoker_server import Server  # noqa: E402

runs = int(sys.argv[1]) if len(sys.argv) > 1 else 9
gguf = os.environ.get("STOKER_TEST_GGUF", str(ROOT / "target/fixtures/SmolLM2-135M-Instruct.Q4_1.gguf"))


def first_token(server: Server, number: int) -> tuple[float, dict]:
    body = {
        "model": "m",
        # A new first word for every request: nothing of the prompt after the system message is cached.
        "messages": [
            {"role": "system", "content": f"Request {number} {time.time_ns()}."},
            {"role": "user", "content": "Describe, in a few sentences, what a lighthouse keeper does in winter. " * 5},
        ],
        "max_tokens": 2,
        "temperature": 0,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    began = time.perf_counter()
    headers = {"content-type": "application/json", "x-stoker-timeline": "1"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    taken, timeline = None, {}
    while line := response.readline():
        if line.startswith(b"data:") and b'"content":"' in line and taken is None and b'"content":""' not in line:
            taken = (time.perf_counter() - began) * 1e3
        if line.startswith(b": x-stoker-timeline"):
            timeline = json.loads(line.split(b" ", 2)[2])
    connection.close()
    return taken, timeline


with Server(f'[models.m]\npath = "{gguf}"\ncontext = 2048\n', ("--dram", "512MiB")) as server:
    server.json("verify", "m")
    first_token(server, 0)
    results = {}
    for name, unload in (("warm", None), ("dram", ["unload", "m"]), ("disk", ["unload", "m", "--dram"])):
        times, prefills = [], []
        for number in range(runs):
            if unload:
                server.json(*unload)
            if name == "disk":
                fd = os.open(gguf, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
            taken, timeline = first_token(server, number)
            times.append(taken)
            prefills.append(timeline["phases"]["prefill"]["ms"])
        results[name] = {
            "first_token_ms": {"p50": round(statistics.median(times), 1), "max": round(max(times), 1)},
            "prefill_ms": {"p50": round(statistics.median(prefills), 1)},
        }
print(json.dumps(results))
