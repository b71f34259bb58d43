"""A server that serves from a device's memory: a simulated one, computed with by the processor."""

import concurrent.futures
import os
import pathlib
import signal
import time

import openai
import pytest
from stoker_server import Server
from conftest import DATA

MIB = 1 << 20
KINDS = {"a": "tiny-llama", "b": "tiny-llama3", "c": "tiny-mistral"}
CONFIG = "".join(f'[models.{name}]\npath = "{DATA}/{kind}"\ncontext = 64\n' for name, kind in KINDS.items())
# A quarter is left to others: 6 MiB, of which each model takes 2 MiB of weights and a little KV cache. Two fit.
DEVICE = ("--devices", "simulated:8MiB", "--dram", "128MiB")


def ask(server, model: str, prompt: str = "abc", tokens: int = 12):
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "seed": 1}
    return server.post("/v1/completions", body)


def text(answer) -> str:
    code, body, _ = answer
    assert code == 200, body
    return body["choices"][0]["text"]


def copied(server) -> float:
    return server.metric("stoker_node_device_copied_bytes_total", device="simulated:0")


@pytest.fixture(scope="module")
def on_cpu():
    """What the models answer when they are served from memory."""
    with Server(CONFIG, ("--devices", "cpu", "--dram", "128MiB", "--kv", "64MiB")) as server:
        yield {(name, p): text(ask(server, name, p)) for name in KINDS for p in ("abc", "x y z")}


def test_three_models_share_a_device_that_holds_two(on_cpu):
    with Server(CONFIG, DEVICE) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)
        for _ in range(3):
            for (name, prompt), expected in on_cpu.items():
                answer = client.completions.create(
                    model=name, prompt=prompt, max_tokens=12, temperature=0, seed=1
                )
                assert answer.choices[0].text == expected, name
                status = server.json("ps")
                (device,) = status["devices"]
                assert device["memory"]["budget"] == 6 * MIB
                assert device["memory"]["used"] <= device["memory"]["budget"]
                assert device["weights"] <= 4 * MIB, "two at most"
                assert {i["device"] for i in status["instances"]} == {"simulated:0"}
        assert copied(server) > 0
        # All three stay in memory, from where they come back; two are on the device.
        assert {row["model"] for row in status["cached"]} == set(KINDS)
        assert len(status["instances"]) == len(device["resident"]) == 2
        assert server.metric("stoker_node_device_bytes", device="simulated:0", kind="weights") == 4 * MIB
        listing = server.command("ps").stdout
        assert "simulated:0" in listing and "DEVICE" in listing
        explained = server.command("explain", "a").stdout
        assert "on simulated:0: " in explained, explained

        # Many at once: each is answered as it is alone.
        def one(n):
            name, prompt = list(on_cpu)[n % len(on_cpu)]
            return text(ask(server, name, prompt)) == on_cpu[name, prompt]

        with concurrent.futures.ThreadPoolExecutor(12) as threads:
            assert all(threads.map(one, range(60)))


def test_a_killed_worker_costs_its_streams_and_no_byte(on_cpu):
    with Server(CONFIG, DEVICE) as server:
        assert text(ask(server, "a")) == on_cpu["a", "abc"]
        before = copied(server)
        for _ in range(2):
            (instance,) = server.json("ps")["instances"]
            os.kill(instance["pid"], signal.SIGKILL)
            # Until the server has noticed, a request may be sent to a socket that is closing.
            while any(i["pid"] == instance["pid"] for i in server.json("ps")["instances"]):
                time.sleep(0.01)
            assert text(ask(server, "a")) == on_cpu["a", "abc"]
        assert copied(server) == before > 0, "the next worker had them already"
        assert server.json("ps")["devices"][0]["cached"] == 0


def test_a_killed_server_costs_no_byte_and_no_worker(on_cpu):
    def kept() -> int:
        """Granules of the device's memory that the keeper has."""
        files = pathlib.Path(f"/proc/{keeper}/fd").iterdir()
        return sum(os.readlink(file).startswith("/memfd:stoker-device") for file in files)

    with Server(CONFIG, DEVICE) as server:
        keeper = server.keeper()
        assert text(ask(server, "a")) == on_cpu["a", "abc"]
        (instance,) = server.json("ps")["instances"]
        for _ in range(2):
            wait_until("the weights are kept", lambda: kept() > 0)
            server.kill()
            server.start()
            (device,) = server.json("ps")["devices"]
            assert (device["resident"], device["weights"]) == (["a"], 2 * MIB)
            assert text(ask(server, "a")) == on_cpu["a", "abc"]
            assert [i["pid"] for i in server.json("ps")["instances"]] == [instance["pid"]]
            assert copied(server) == server.metric("stoker_store_read_bytes_total") == 0

        # With the worker, too: another one has the weights at once.
        server.kill()
        os.kill(instance["pid"], signal.SIGKILL)
        server.start()
        assert server.json("ps")["devices"][0]["cached"] == 2 * MIB
        assert text(ask(server, "a", "x y z")) == on_cpu["a", "x y z"]
        assert [i["pid"] for i in server.json("ps")["instances"]] != [instance["pid"]]
        assert copied(server) == 0

        # What nobody asks for makes room for the two that are asked for.
        server.kill()
        server.start()
        for model in "bcb":
            assert text(ask(server, model)) == on_cpu[model, "abc"]
        assert copied(server) > 0
        wait_until("the keeper has no more than there is", lambda: kept() == 2)


def test_the_real_model_survives_on_a_device(gguf):
    config = f'[models.a]\npath = "{gguf}"\ncontext = 512\n'
    flags = ("--devices", "simulated:1GiB", "--dram", "512MiB")
    with Server(config, flags) as server:
        answer = text(ask(server, "a", "The capital of France is", 8))
        (instance,) = server.json("ps")["instances"]
        files = lambda: pathlib.Path(f"/proc/{server.keeper()}/fd").iterdir()
        wait_until("kept", lambda: any("stoker-slab" in os.readlink(file) for file in files()))
        server.kill()
        server.start()
        assert text(ask(server, "a", "The capital of France is", 8)) == answer
        assert [i["pid"] for i in server.json("ps")["instances"]] == [instance["pid"]]
        assert copied(server) == server.metric("stoker_store_read_bytes_total") == 0


def wait_until(what: str, is_so):
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.01)


def test_keep_alive_moves_a_model_from_the_device_to_memory():
    config = f'[models.a]\npath = "{DATA}/tiny-llama"\ncontext = 64\nkeep_alive = "100ms"\n'
    with Server(config, DEVICE) as server:
        text(ask(server, "a"))
        deadline = time.monotonic() + 30
        while server.json("ps")["instances"]:
            assert time.monotonic() < deadline, "it stays"
            time.sleep(0.02)
        (device,) = server.json("ps")["devices"]
        assert (device["weights"], device["free"]) == (0, 8 * MIB)
        assert [row["model"] for row in server.json("ps")["cached"]] == ["a"]
        read = server.metric("stoker_node_bytes_read_total")
        text(ask(server, "a"))
        assert server.metric("stoker_node_bytes_read_total") == read, "it came from memory"


def test_what_does_not_fit_says_what_it_needs(gguf):
    config = f'[models.large]\npath = "{gguf}"\n[models.long]\npath = "{DATA}/tiny-llama"\ncontext = 100000\n'
    with Server(config, ("--devices", "simulated:64MiB", "--gpu-memory", "32MiB", "--dram", "256MiB")) as server:
        assert server.json("ps")["devices"][0]["memory"]["configured"] == 32 * MIB
        code, body, _ = ask(server, "large")
        assert code == 507, body
        message = body["error"]["message"]
        assert "the budget is 32.0 MiB" in message and "weights" in message, message
        # Its trained length is what counts, and fits.
        assert ask(server, "long")[0] == 200


def test_devices_that_are_not_there_are_named():
    for devices in ("cuda:0", "cuda:7"):
        with pytest.raises(RuntimeError) as failure:
            Server(CONFIG, ("--devices", devices)).start()
        said = str(failure.value)
        assert devices in said and "devices" in said, said
    with pytest.raises(RuntimeError, match="`gpu` is no device: write `auto`, `cpu`"):
        Server(CONFIG, ("--devices", "gpu")).start()
