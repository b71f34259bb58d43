"""A server on a GPU, on a machine that has one: the same answers as on the CPU, swaps, killed workers, memory that comes back;
then first tokens of LLaMA-2-7B shapes through the whole server. Run by scripts/gpu/engine.

    python3 serve.py STOKER DATA SCRATCH [OUT]
"""

import concurrent.futures
import http.client
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time

stoker, data, scratch = (pathlib.Path(p).resolve() for p in sys.argv[1:4])
out = pathlib.Path(sys.argv[4] if len(sys.argv) > 4 else ".")
os.environ["STOKER_TEST_BINARY"] = str(stoker)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from stoker_server import Server  # noqa: E402

KINDS = {"a": "tiny-llama", "b": "tiny-llama3", "c": "tiny-mistral"}
failures = []
report = {}


def check(right: bool, what: str):
    print("ok   " if right else "WRONG", what, flush=True)
    if not right:
        failures.append(what)


def post(server, body, first=False):
    """The answer, or with `first` the seconds until each piece of text, then how many tokens there were."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    begun = time.perf_counter()
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps({**body, **({"stream": True, "stream_options": {"include_usage": True}} if first else {})}),
        {"content-type": "application/json"},
    )
    response = connection.getresponse()
    if response.status != 200 or not first:
        answer = response.read()
        assert response.status == 200, answer[:600]
        return json.loads(answer)
    times, tokens = [], 0
    while line := response.readline():
        if line.startswith(b"data: {"):
            if b'"error"' in line:
                raise RuntimeError(line.decode())
            times.append(time.perf_counter() - begun)
            tokens = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", tokens)
    return [*times, tokens]


def milliseconds_a_token(times) -> float:
    # Random weights bring ids that the tokenizer has no text for: what there is to see is the first and the end.
    *times, tokens = times
    return (times[-1] - times[0]) / max(1, tokens - 1) * 1e3


def text(server, model, prompt, tokens=16):
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "seed": 1}
    return post(server, body)["choices"][0]["text"]


def free_memory() -> int:
    """MiB of the first GPU, as the driver counts."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


def until(what, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)  # the interval of asking
    return True


def small_models():
    config = "".join(f'[models.{name}]\npath = "{data}/{kind}"\ncontext = 64\n' for name, kind in KINDS.items())
    asked = [(name, prompt) for name in KINDS for prompt in ("abc", "x y z", "hello there")]
    with Server(config, ("--devices", "cpu", "--dram", "256MiB", "--kv", "256MiB")) as server:
        expected = {key: text(server, *key) for key in asked}
    used = free_memory()
    with Server(config, ("--devices", "cuda:0", "--dram", "256MiB")) as server:
        check(all(text(server, *key) == expected[key] for key in asked), "fp32 models answer on the GPU as on the CPU")
        with concurrent.futures.ThreadPoolExecutor(12) as threads:
            right = threads.map(lambda n: text(server, *asked[n % 9]) == expected[asked[n % 9]], range(120))
            check(all(right), "120 answers among others are those alone")
        before = server.metric("stoker_node_device_copied_bytes_total", device="cuda:0")
        pids = {i["pid"] for i in server.json("ps")["instances"]}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        until(lambda: not pids & {i["pid"] for i in server.json("ps")["instances"]})
        check(all(text(server, *key) == expected[key] for key in asked), "killed workers' models answer again")
        after = server.metric("stoker_node_device_copied_bytes_total", device="cuda:0")
        check(after == before > 0, f"nothing was copied for it ({after - before:.0f} bytes)")
        print(server.command("ps").stdout)
        pids = {i["pid"] for i in server.json("ps")["instances"]}
        time.sleep(1)  # for the keeper to have what is on the device: it says nothing when it does
        server.kill()
        server.start()
        check(all(text(server, *key) == expected[key] for key in asked), "after kill -9 of the server its models answer")
        after = server.metric("stoker_node_device_copied_bytes_total", device="cuda:0")
        check(not after, f"nothing was copied for it ({after or 0:.0f} bytes)")
        check({i["pid"] for i in server.json("ps")["instances"]} == pids, "by the workers that were there")
    check(until(lambda: abs(free_memory() - used) <= 1), f"GPU memory is back: {used} MiB before, {free_memory()} after")


def large_model():
    made = scratch / "stoker" / "bench" / "synth-llama-2-7b"
    if not made.exists():
        subprocess.run(
            [stoker, "bench", "load", "--model", "synth:llama-2-7b", "--device", "none", "--tier", "ssd", "--warm",
             "--ring", "256MiB", "--runs", "1", "--keep-files"],
            env={**os.environ, "XDG_DATA_HOME": str(scratch)}, check=True, capture_output=True,
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data / "tiny-llama" / name, made / name)
    config = "".join(f'[models.{name}]\npath = "{made}"\ncontext = 1024\n' for name in "mnop")
    with Server(config, ("--devices", "cuda:0", "--dram", "56GiB", "--workers-per-gpu", "2")) as server:
        letters = "abcdefghijklmnopqrstuvwxyz"

        def ask(n, length, tokens=1, model="m"):
            # Another beginning each time, so that nothing comes from the prefix cache.
            prompt = "".join(letters[(i * 7 + i // 26 + n * 5) % 26] for i in range(length))
            return {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}

        length = 128
        usage = post(server, ask(0, length))["usage"]["prompt_tokens"]
        length = max(1, round(length * 128 / usage))
        usage = post(server, ask(1, length))["usage"]["prompt_tokens"]
        print("prompt tokens:", usage)
        warm, cold, killed = [], [], []
        for n in range(10):
            warm.append(post(server, ask(10 + n, length), True)[0])
        for n in range(6):
            server.command("unload", "m")
            until(lambda: not server.json("ps")["instances"])
            cold.append(post(server, ask(30 + n, length), True)[0])
        for n in range(4):
            (instance,) = server.json("ps")["instances"]
            os.kill(instance["pid"], signal.SIGKILL)
            until(lambda: instance["pid"] not in {i["pid"] for i in server.json("ps")["instances"]})
            # A worker that was ready takes over; the one that takes its place needs a GPU context first.
            check(until(lambda: server.json("ps")["workers_idle"] > 0), "a worker is ready")
            killed.append(post(server, ask(50 + n, length), True)[0])
        restarted = []
        for n in range(3):
            time.sleep(1)  # for the keeper to have what is on the device: it says nothing when it does
            (instance,) = server.json("ps")["instances"]
            server.kill()
            if n == 2:  # With the worker: another one takes the weights.
                os.kill(instance["pid"], signal.SIGKILL)
            begun = time.perf_counter()
            server.start()
            ready = time.perf_counter() - begun
            restarted.append(post(server, ask(60 + n, length), True)[0])
            copied = server.metric("stoker_node_device_copied_bytes_total", device="cuda:0") or 0
            check(copied == 0, f"restarted in {ready:.2f} s, {copied:.0f} bytes copied")
        times = post(server, ask(70, length, 128), True)
        per_token = milliseconds_a_token(times)
        busy = {}
        for models in ("mn", "mnop"):
            for model in models:
                post(server, ask(80, length, 1, model))
            with concurrent.futures.ThreadPoolExecutor(len(models)) as threads:
                all_times = list(threads.map(lambda m: post(server, ask(90, length, 128, m), True), models))
            busy[len(models)] = round(statistics.mean(milliseconds_a_token(times) for times in all_times), 2)
        ms = lambda seconds: [round(s * 1e3, 1) for s in seconds]
        report.update(
            prompt_tokens=usage, warm_ms=ms(warm), cold_ms=ms(cold), after_kill_ms=ms(killed), after_restart_ms=ms(restarted),
            token_ms=round(per_token, 2), token_ms_of_busy_models=busy,
        )
        explained = server.command("explain", "m").stdout
        print(explained)
        print(server.command("ps").stdout)
    for name in ("warm_ms", "cold_ms", "after_kill_ms", "after_restart_ms"):
        print(f"{name:14} median {statistics.median(report[name]):.1f}  all {report[name]}")
    print(f"token_ms       {report['token_ms']}; of several busy models {report['token_ms_of_busy_models']}")


small_models()
large_model()
(out / "serve.json").write_text(json.dumps(report, indent=1))
print("FAILED: " + "; ".join(failures) if failures else "all right")
sys.exit(bool(failures))
