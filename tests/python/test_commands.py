"""The commands, with and without a running server."""

import hashlib
import json
import os
import pathlib
import signal
import time

import openai
import pytest
from conftest import DATA
from stoker_server import ROOT, Server


def test_ls_and_show_without_a_server(gguf):
    server = Server(f'[models.a]\npath = "{gguf}"\n[models.b]\npath = "{DATA}/tiny-llama3"\n')
    models = {m["name"]: m for m in server.json("ls")["models"]}
    assert models["a"]["refusal"] is None and models["b"]["refusal"] is None
    shown = server.json("show", "a")
    assert shown["config"]["architecture"] == "llama" and shown["trust"] in ("none", "chunk", "file")
    human = server.command("ls").stdout
    assert "a" in human and "MiB" in human
    missing = server.command("show", "c", check=False)
    assert missing.returncode != 0 and "c" in missing.stderr


def test_commands_that_need_a_server_say_so(gguf):
    server = Server(f'[models.a]\npath = "{gguf}"\n')
    done = server.command("ps", check=False)
    assert done.returncode != 0 and "stoker serve" in done.stderr


def test_verify_names_a_flipped_byte(gguf, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(gguf.read_bytes())
    server = Server(f'[models.a]\npath = "{copy}"\n')
    assert server.json("verify", "a")["ok"]
    stat = copy.stat()
    with copy.open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)
        file.seek(50_000_000)
        file.write(bytes([byte[0] ^ 1]))
    # The same length, time and inode: nobody replaced the file, a bit of it flipped.
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    done = server.command("--json", "verify", "a", check=False)
    assert done.returncode != 0
    words = done.stdout + done.stderr
    assert "copy.gguf" in words and "chunk" in words


def test_a_flipped_byte_is_never_served(gguf, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(gguf.read_bytes())
    config = f'[models.a]\npath = "{copy}"\ncontext = 512\n'
    with Server(config, ("--dram", "256MiB", "--kv", "256MiB")) as server:
        assert server.json("verify", "a")["ok"]
        stat = copy.stat()
        with copy.open("r+b") as file:
            file.seek(50_000_000)
            byte = file.read(1)
            file.seek(50_000_000)
            file.write(bytes([byte[0] ^ 1]))
        os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        status, body, _ = server.post(
            "/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 1}
        )
        assert status == 500, body
        assert "copy.gguf" in body["error"]["message"] and "chunk" in body["error"]["message"]


def test_a_replaced_file_is_indexed_anew(gguf, tmp_path):
    path = tmp_path / "copy.gguf"
    path.write_bytes(gguf.read_bytes())
    config = f'[models.a]\npath = "{path}"\ncontext = 512\n'
    ask = ("/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 1})
    with Server(config, ("--dram", "256MiB", "--kv", "256MiB")) as server:
        status, body, _ = server.post(*ask)
        assert status == 200, body
        server.json("unload", "a")
        beside = tmp_path / "beside.gguf"
        beside.write_bytes(gguf.read_bytes())
        beside.rename(path)
        # The prompt is made of the old file's tokens: not for the new one.
        status, body, headers = server.post(*ask)
        assert status == 503 and body["error"]["code"] == "model_changed", body
        assert "copy.gguf" in body["error"]["message"]
        assert "changed since it was added" in body["error"]["message"]
        assert headers["retry-after"] == "1" and "x-should-retry" not in headers
        status, body, _ = server.post(*ask)
        assert status == 200, body


def test_a_file_with_only_a_hash_is_checked_before_it_is_served(gguf, tmp_path):
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / f"sha256-{digest}"
    blob.write_bytes(gguf.read_bytes())
    (tmp_path / "m.gguf").symlink_to(blob)
    config = f'[models.a]\npath = "{tmp_path}/m.gguf"\ncontext = 512\n'
    ask = ("/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 1})
    flags = ("--dram", "256MiB", "--kv", "256MiB")

    def flip():
        stat = blob.stat()
        with blob.open("r+b") as file:
            file.seek(50_000_000)
            byte = file.read(1)
            file.seek(50_000_000)
            file.write(bytes([byte[0] ^ 1]))
        os.utime(blob, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    flip()
    with Server(config, flags) as server:
        assert server.json("show", "a")["trust"] == "file"
        status, body, _ = server.post(*ask)
        assert status == 500 and body["error"]["code"] == "checkpoint_corrupt", body
        wrong = hashlib.sha256(blob.read_bytes()).hexdigest()
        assert digest in body["error"]["message"] and wrong in body["error"]["message"]
        assert server.json("show", "a")["trust"] == "file"
        done = server.command("--json", "verify", "a", check=False)
        assert done.returncode != 0 and wrong in done.stdout
    flip()
    with Server(config, flags) as server:
        status, body, _ = server.post(*ask)
        assert status == 200, body
        # The sums are written after the answer.
        deadline = time.monotonic() + 20
        while server.json("show", "a")["trust"] != "chunk":
            assert time.monotonic() < deadline


def test_preload_pin_unload(gguf):
    with Server(f'[models.a]\npath = "{gguf}"\ncontext = 512\n', ("--dram", "256MiB")) as server:
        assert server.json("ps")["instances"] == []
        server.json("preload", "a")
        (instance,) = server.json("ps")["instances"]
        assert instance["model"] == "a" and instance["state"] == "ready"
        server.json("pin", "a")
        assert server.json("ps")["instances"][0]["pinned"]
        server.json("unpin", "a")
        server.json("unload", "a")
        assert server.json("ps")["instances"] == []


def test_explain_says_where_the_time_went(gguf):
    config = f'[models.a]\npath = "{gguf}"\ncontext = 512\n[models.tiny]\npath = "{DATA}/tiny-llama"\n'
    with Server(config, ("--dram", "256MiB")) as server:
        assert server.json("explain") == {"model": None, "requests": []}
        body = {"model": "a", "prompt": "x", "max_tokens": 2, "temperature": 0}
        _, answer, headers = server.post("/v1/completions", body)
        server.post("/v1/completions", body)
        server.post("/v1/completions", {**body, "model": "tiny"})
        told = json.loads(headers["x-stoker-timeline"])
        (request,) = server.json("explain", answer["id"])["requests"]
        assert request["model"] == "a" and request["status"] == 200 and request["output_tokens"] == 2
        for phase in request["phases"]:
            assert phase["ms"] == pytest.approx(told["phases"][phase["phase"]]["ms"], abs=0.001)
        predicted = {p["phase"]: p["predicted_ms"] for p in request["phases"]}
        assert predicted["ssd_read"] > 0 and predicted["prefill"] is not None
        assert [b["tier"] for b in request["bytes"]] == ["ssd"]
        # The newest first, of all models; the warm one had no start.
        assert [r["model"] for r in server.json("explain")["requests"]] == ["tiny", "a"]
        about = server.json("explain", "a")
        assert [r["request"] for r in about["requests"]] == [answer["id"]]
        assert [d["event"] for d in about["model"]["decisions"]] == ["start", "ready"]
        human = server.command("explain", "a").stdout
        assert answer["id"] in human and "ssd read" in human and "PREDICTED" in human
        missing = server.command("explain", "b", check=False)
        assert missing.returncode != 0 and "b" in missing.stderr


def test_convert_and_serve_the_result(gguf, tmp_path):
    folder = tmp_path / "converted"
    plain = Server()
    plain.command("convert", str(gguf), str(folder))
    assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()
    config = f'[models.a]\npath = "{folder}"\ncontext = 512\n'
    with Server(config, ("--dram", "512MiB")) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="a",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=16,
        )
        assert "Paris" in answer.choices[0].message.content


def test_keys(gguf):
    config = f'[api_keys]\nann = "secret"\n[models.a]\npath = "{gguf}"\ncontext = 512\n'
    with Server(config, ("--dram", "256MiB")) as server:
        assert server.get("/v1/models")[0] == 401
        assert server.get("/v1/models", {"Authorization": "Bearer wrong"})[0] == 401
        assert server.get("/v1/models", {"Authorization": "Bearer secret"})[0] == 200


def test_beyond_loopback_without_a_key_is_refused():
    server = Server()
    done = server.command("serve", "--listen", "0.0.0.0:0", check=False)
    assert done.returncode != 0 and "--insecure" in done.stderr


def test_a_killed_worker_costs_its_streams_only(gguf):
    config = f'[models.a]\npath = "{gguf}"\ncontext = 2048\n[models.tiny]\npath = "{DATA}/tiny-llama"\n'
    with Server(config, ("--dram", "256MiB")) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        server.json("preload", "tiny")
        stream = client.chat.completions.create(
            model="a",
            messages=[{"role": "user", "content": "Write a long story about a lighthouse."}],
            max_tokens=1000,
            stream=True,
        )
        next(iter(stream))
        serving = [i for i in server.json("ps")["instances"] if i["model"] == "a"]
        os.kill(serving[0]["pid"], signal.SIGKILL)
        with pytest.raises(openai.APIError) as caught:
            for _ in stream:
                pass
        assert "worker" in str(caught.value).lower()
        tiny = client.completions.create(model="tiny", prompt="abc", max_tokens=4, temperature=0)
        assert tiny.usage.completion_tokens == 4
        again = client.completions.create(model="a", prompt="The capital of France is", max_tokens=4, temperature=0)
        assert "Paris" in again.choices[0].text


def test_sigterm_leaves_nobody_behind(gguf):
    with Server(f'[models.a]\npath = "{gguf}"\ncontext = 512\n', ("--dram", "256MiB")) as server:
        server.json("preload", "a")
        workers = server.workers()
        assert workers
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(40) == 0
        deadline = time.monotonic() + 5
        while any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < deadline, "a worker outlived an orderly stop"


def test_config_check_shows_origins(gguf):
    server = Server('keep_alive = "3m"\n')
    settings = {s["key"]: s for s in server.json("config", "check")["settings"]}
    assert settings["keep_alive"]["origin"] == "file"
    assert settings["listen"]["origin"] == "STOKER_LISTEN"
    server.config.write_text('keep_alife = "3m"\n')
    done = server.command("config", "check", check=False)
    assert done.returncode != 0 and "did you mean `keep_alive`" in done.stderr


def test_a_thousand_models(tmp_path):
    tiny = DATA / "tiny-llama"
    config = "".join(f'[models.m{n:04}]\npath = "{tiny}"\n' for n in range(1000))
    server = Server(config)
    assert len(server.json("ls")["models"]) == 1000


def test_help_teaches():
    done = Server().command("--help")
    assert "stoker demo" in done.stdout and "/v1" in done.stdout
    assert json.loads(Server().command("--json", "ls").stdout) == {"models": []}
    assert ROOT.is_dir()


def test_devices_lists_them_or_says_why_there_are_none():
    report = Server("").json("devices")
    assert report["devices"] or report["none"], report
    for device in report["devices"]:
        assert device["uuid"].startswith("GPU-") and device["memory"] > 0, device


def test_a_bench_loads_to_a_device_and_compares_every_tensor(tmp_path):
    asked = ["--model", "synth:opt-125m", "--dir", str(tmp_path), "--device", "sim", "--runs", "1", "--verify"]
    for more in (["--tier", "dram"], ["--tier", "ssd", "--warm", "--ring", "64MiB"]):
        report = Server("").json("bench", "load", *asked, *more)
        assert report["verified_tensors"] == report["tensors"] == 196, report
        assert 0 < report["percent_of_limit"] and report["load_ms"]["p50"] > 0, report
    assert list(tmp_path.iterdir()) == [], "synthetic models go"
