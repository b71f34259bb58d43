#!/usr/bin/env python3
"""Twenty different models, thirty-two clients, memory for three.

    scripts/soak.py [--seconds 300] [--clients 32] [--no-kills]

Makes the models, asks each one alone for its answers (and asserts that the models' answers differ), then lets the
clients ask at random: first for the given time in peace, then for a quarter of it while workers are killed. Every
answer must equal the model's answer when it was served alone; in peace no request may fail; a killed worker may cost
its own streams only. At the end everything is unloaded and memory must be back where it was.
"""

import argparse
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/python"))

import openai  # noqa: E402
from stoker_server import Server  # noqa: E402

PROMPTS = [
    "Write one sentence about the sea.",
    "Tell me a short story about a fox.",
    "Describe your perfect day.",
    "Give me advice on learning to cook.",
]
TOKENS = 24
MODEL_BYTES = 98_362_432
CHUNK = 16 << 20


def ask(client: openai.OpenAI, model: str, prompt: str, stream: bool) -> str:
    request = dict(
        model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=TOKENS
    )
    if not stream:
        return client.chat.completions.create(**request).choices[0].message.content
    text, finished = "", False
    for event in client.chat.completions.create(stream=True, **request):
        for choice in event.choices:
            text += choice.delta.content or ""
            finished = finished or choice.finish_reason is not None
    if not finished:
        raise RuntimeError("the stream ended without a finish_reason")
    return text


class Load:
    """Clients that ask at random for a time."""

    def __init__(self, server: Server, alone: dict, clients: int):
        self.server, self.alone, self.clients = server, alone, clients
        self.answers = 0
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self.lock = threading.Lock()

    def client(self, number: int, end: float) -> None:
        rng = random.Random(number)
        client = openai.OpenAI(base_url=self.server.url + "/v1", api_key="none", max_retries=0, timeout=180)
        while time.monotonic() < end:
            model, prompt = rng.choice(list(self.alone))
            try:
                answer = ask(client, model, prompt, stream=rng.random() < 0.5)
            except Exception as error:  # counted and judged by the caller
                with self.lock:
                    self.failed.append(f"{model}: {type(error).__name__}: {error}")
                continue
            with self.lock:
                self.answers += 1
                if answer != self.alone[model, prompt]:
                    self.wrong.append(f"{model} {prompt!r}: {answer!r} instead of {self.alone[model, prompt]!r}")

    def run(self, seconds: float, meanwhile=None) -> None:
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self.client, args=(n, end)) for n in range(self.clients)]
        for thread in threads:
            thread.start()
        if meanwhile:
            meanwhile(end)
        for thread in threads:
            thread.join()


def evictions(server: Server) -> dict:
    reasons = {}
    for reason in ("room", "keep_alive", "unload", "max_wait"):
        count = server.metric("stoker_controller_stops_total", reason=reason)
        if count:
            reasons[reason] = int(count)
    return reasons


def check(condition: bool, words: str) -> None:
    print(("ok    " if condition else "FAIL  ") + words, flush=True)
    if not condition:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--no-kills", action="store_true")
    arguments = parser.parse_args()

    source = os.environ.get("STOKER_TEST_GGUF", str(ROOT / "target/fixtures/SmolLM2-135M-Instruct.Q4_1.gguf"))
    folder = ROOT / "target/fixtures/twenty"
    maker = ROOT / "scripts/fixtures/twenty_models.py"
    subprocess.run([sys.executable, str(maker), source, str(folder), str(arguments.models)], check=True)
    names = [f"m{n:02}" for n in range(arguments.models)]
    config = "".join(f'[models.{n}]\npath = "{folder / n}.gguf"\ncontext = 512\n' for n in names)
    pool = -(-MODEL_BYTES // CHUNK) * CHUNK

    with Server(config, ("--dram", str(3 * pool), "--kv", "512MiB")) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=180)
        began = time.monotonic()
        alone = {(n, p): ask(client, n, p, stream=False) for n in names for p in PROMPTS}
        for prompt in PROMPTS:
            answers = {alone[n, prompt] for n in names}
            check(len(answers) == len(names), f"{len(names)} models give {len(answers)} different answers to {prompt!r}")
        print(f"      alone: {len(alone)} answers in {time.monotonic() - began:.0f} s", flush=True)
        server.json("unload", "--all", "--dram")
        before_bytes, before_evictions = server.resident_bytes(), sum(evictions(server).values())

        load = Load(server, alone, arguments.clients)
        load.run(arguments.seconds)
        done = evictions(server)
        print(f"      {load.answers} answers, evictions by reason {done}", flush=True)
        check(not load.failed, f"{len(load.failed)} failed requests {load.failed[:3]}")
        check(not load.wrong, f"{len(load.wrong)} wrong answers {load.wrong[:3]}")
        enough = min(100, int(arguments.seconds / 3))
        check(sum(done.values()) - before_evictions > enough, f"more than {enough} evictions")
        # An instance that is evicted while it answers ends its streams with an error: none did (above).

        if not arguments.no_kills:
            kills = 0

            def kill(end: float) -> None:
                nonlocal kills
                rng = random.Random(7)
                while time.monotonic() < end - 3:
                    time.sleep(rng.uniform(1.5, 4))  # the distance between faults
                    workers = server.workers()
                    if workers:
                        os.kill(rng.choice(workers), signal.SIGKILL)
                        kills += 1

            load.run(max(15.0, arguments.seconds / 4), kill)
            print(f"      {load.answers} answers, {kills} workers killed, {len(load.failed)} streams failed", flush=True)
            check(not load.wrong, f"{len(load.wrong)} wrong answers {load.wrong[:3]}")
            # A worker serves at most `concurrency` (8) streams.
            check(len(load.failed) <= 8 * kills, f"at most {8 * kills} streams lost with {kills} workers")
            foreign = [f for f in load.failed if "worker" not in f.lower()]
            check(not foreign, f"every failure names the lost worker {foreign[:3]}")
            load.failed.clear()
            load.run(5)
            check(not load.failed, f"peace again: {len(load.failed)} failed requests {load.failed[:3]}")

        server.json("unload", "--all", "--dram")
        status = server.json("ps")
        check(not status["instances"], "nothing is resident after unloading all")
        after = server.resident_bytes()
        slack = 64 << 20
        check(
            after <= before_bytes + slack,
            f"memory is back: {before_bytes >> 20} MiB before, {after >> 20} MiB after (slack {slack >> 20} MiB)",
        )


main()
