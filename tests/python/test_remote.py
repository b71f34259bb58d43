"""Models that are only in an object store: cold starts, copies on SSD, and bad days; against a real S3 server."""

import json
import os
import pathlib
import signal
import subprocess
import threading
import time

import pytest
from object_store import ObjectStore, Proxy
from stoker_server import Server

FLAGS = ("--dram", "256MiB", "--kv", "256MiB")
ASK = ("/v1/completions", {"model": "far", "prompt": "The capital of France is", "max_tokens": 6, "temperature": 0})
CONFIG = 'ssd = "1GiB"\n[models.far]\nsource = "s3://models/smol"\ncontext = 512\n'


@pytest.fixture(scope="module")
def store(gguf):
    with ObjectStore() as store:
        store.put("models/smol/model.gguf", gguf.read_bytes())
        yield store


def until(what: str, so, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)  # the interval of asking, not a hope


class Indexed(Server):
    """Has started once its models are indexed, which a busy machine may not have done when the server answers."""

    def start(self):
        super().start()
        models = lambda: json.loads(self.get("/v1/models")[1])["data"]
        until("indexed", lambda: all(model["runnable"] for model in models()))
        return self


def remote_server(store, config: str = CONFIG, port=None, models=None, kind=Indexed, **kwargs) -> Server:
    server = kind(config, FLAGS, models, **kwargs)
    server.environment |= store.environment(port)
    return server


def landed(server: Server, gguf: pathlib.Path) -> bool:
    path = server.models / "far" / "model.gguf"
    return path.exists() and path.read_bytes() == gguf.read_bytes()


def test_a_model_that_is_only_remote_is_listed_and_served(store, gguf):
    with remote_server(store) as server:
        listed = json.loads(server.get("/v1/models")[1])["data"]
        assert [(m["id"], m["runnable"], m["owned_by"]) for m in listed] == [("far", True, "s3://models/smol")]
        assert not (server.models / "far").exists()
        status, first, _ = server.post(*ASK)
        assert status == 200, first
        until("landed", lambda: landed(server, gguf))
        assert server.metric("stoker_store_read_bytes_total", tier="remote") == gguf.stat().st_size
        # From memory, then from SSD: the store isn't asked again.
        for dram in ((), ("--dram",)):
            server.json("unload", "far", *dram)
            status, again, _ = server.post(*ASK)
            assert status == 200 and again["choices"] == first["choices"], again
        assert server.metric("stoker_store_read_bytes_total", tier="remote") == gguf.stat().st_size
        assert server.metric("stoker_store_read_bytes_total", tier="ssd") == gguf.stat().st_size
        cache = server.json("cache", "ls")["disks"][0]
        assert [(m["name"], m["evictable"]) for m in cache["models"]] == [("far", True)]
        assert server.json("cache", "verify")["models"][0]["outcome"] == "sound"
        assert server.json("cache", "gc", "--to", "0")["freed_bytes"] >= gguf.stat().st_size
        assert server.json("cache", "ls")["disks"][0]["models"] == []


def test_every_byte_crosses_the_network_once(store, gguf):
    with Proxy(store.s3) as proxy:
        with remote_server(store, port=proxy.port) as server:
            indexed = len(proxy.gets)
            status, body, _ = server.post(*ASK)
            assert status == 200, body
            until("landed", lambda: landed(server, gguf))
        assert sorted(proxy.gets[indexed:]) == [i << 24 for i in range(6)], "every chunk once"


def test_pull_and_remove(store, gguf, tmp_path):
    server = remote_server(store, "", models=tmp_path / "models")
    pulled = server.json("pull", "mine", "--source", "s3://models/smol/model.gguf")
    assert pulled["bytes"] == gguf.stat().st_size and not pulled["was_here"]
    assert (tmp_path / "models/mine/model.gguf").read_bytes() == gguf.read_bytes()
    assert server.json("pull", "mine", "--source", "s3://models/smol/model.gguf")["was_here"]
    assert server.json("verify", "mine")["ok"]
    assert server.json("cache", "ls")["disks"][0]["models"][0]["evictable"] is False
    assert server.json("cache", "gc", "--to", "0")["freed_bytes"] == 0, "what was pulled stays"
    server.json("rm", "mine")
    assert not (tmp_path / "models/mine").exists()
    failed = server.command("pull", "none", "--source", "s3://models/nothing", check=False)
    assert failed.returncode != 0 and "nothing" in failed.stderr


def test_refused_credentials_say_what_to_do(store):
    server = remote_server(store, kind=Server)
    server.environment["AWS_SECRET_ACCESS_KEY"] = "wrong"
    failed = server.command("pull", "mine", "--source", "s3://models/smol", check=False)
    assert failed.returncode != 0
    assert "access refused" in failed.stderr and "AWS_ACCESS_KEY_ID" in failed.stderr
    with server:
        status, body, _ = server.post(*ASK)
        assert status != 200 and "access refused" in body["error"]["message"], body


@pytest.mark.parametrize("deed", [503, 500, 429, "reset", "loris"])
def test_a_store_on_a_bad_day_is_asked_again(store, gguf, deed):
    with Proxy(store.s3) as proxy:
        # Index and first chunk pass; the first request for each of the others fails.
        proxy.misdeed = lambda number, begin: deed if begin and len([b for b in proxy.gets if b == begin]) < 2 else None
        with remote_server(store, port=proxy.port) as server:
            status, body, _ = server.post(*ASK)
            assert status == 200, body
            until("landed", lambda: landed(server, gguf))
        assert len([begin for begin in proxy.gets if begin]) >= 2 * 5


def test_a_store_slower_than_the_deadline_costs_the_request_and_not_the_load(store, gguf):
    gate = threading.Event()
    with Proxy(store.s3) as proxy:
        proxy.misdeed = lambda number, begin: gate if begin >= 2 << 24 else None
        with remote_server(store, port=proxy.port) as server:
            status, body, headers = server.post(*ASK, {"x-stoker-deadline-ms": "1500"})
            assert status == 503 and "retry-after" in {name.lower() for name in headers}, body
            assert server.metric("stoker_controller_queue_waiting") == 0
            gate.set()
            status, body, _ = server.post(*ASK)
            assert status == 200, body
            until("landed", lambda: landed(server, gguf))
            begins = [begin for begin in proxy.gets if begin]
            assert sorted(begins) == sorted(set(begins)), "what was under way was not asked for again"


def test_a_store_that_is_down_is_an_error_and_then_forgotten(store):
    with Proxy(store.s3) as proxy:
        with remote_server(store, port=proxy.port) as server:
            proxy.misdeed = lambda number, begin: 500
            status, body, _ = server.post(*ASK)
            assert status >= 500 and "given up after" in body["error"]["message"], body
            until("free", lambda: server.metric("stoker_node_bytes", tier="dram") == 0)
            proxy.misdeed = lambda number, begin: None
            # A model that has just failed isn't tried for every request.
            until("served", lambda: server.post(*ASK)[0] == 200)


def test_another_version_is_indexed_anew(store, gguf):
    store.put("models/changing/model.gguf", gguf.read_bytes())
    config = CONFIG.replace("smol", "changing")
    with remote_server(store, config) as server:
        data = bytearray(gguf.read_bytes())
        data[-1] ^= 1
        store.put("models/changing/model.gguf", bytes(data))
        status, body, _ = server.post(*ASK)
        assert status == 503 and body["error"]["code"] == "model_changed", body
        until("indexed anew", lambda: server.post(*ASK)[0] == 200, 30)
        until("landed", lambda: (server.models / "far/model.gguf").exists())
        assert (server.models / "far/model.gguf").read_bytes() == bytes(data)


def test_a_killed_server_goes_on_with_its_copy(store, gguf, tmp_path):
    gate = threading.Event()
    with Proxy(store.s3) as proxy:
        # The last two chunks don't come.
        proxy.misdeed = lambda number, begin: gate if begin >= 4 << 24 else None
        server = remote_server(store, port=proxy.port, models=tmp_path / "models")
        with server:
            asked = threading.Thread(target=lambda: post_quietly(server))
            asked.start()
            copies = lambda: server.json("cache", "ls")["disks"][0]["copies"]
            until("four chunks are on SSD", lambda: copies() and copies()[0]["present_bytes"] == 4 << 24)
            workers = server.workers()
            server.process.kill()
            server.process.wait()
            for worker in workers:
                try:
                    os.kill(worker, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        asked.join()
        assert not (tmp_path / "models/far").exists(), "no partial file is taken for whole"
        gate.set()
        proxy.gets.clear()
        server = remote_server(store, port=proxy.port, models=tmp_path / "models")
        with server:
            assert server.post(*ASK)[0] == 200
            until("landed", lambda: landed(server, gguf))
            assert server.metric("stoker_store_read_bytes_total", tier="ssd") == 4 << 24
        assert sorted(proxy.gets) == [4 << 24, 5 << 24], "only what was missing"


def post_quietly(server: Server):
    try:
        server.post(*ASK)
    except OSError:
        pass  # it is killed meanwhile


def test_a_model_larger_than_the_budget_streams_past_it(store, gguf):
    with remote_server(store, CONFIG.replace("1GiB", "50MiB")) as server:
        assert server.post(*ASK)[0] == 200
        assert server.metric("stoker_store_tee_skipped_total", reason="too_large") == 1
        assert server.json("cache", "ls")["disks"][0]["copies"] == []
        assert not (server.models / "far").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_costs_the_copy_and_nothing_else(store, gguf, tmp_path):
    disk = tmp_path / "small"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "none", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this machine lets nobody mount")
    gate = threading.Event()
    try:
        with Proxy(store.s3) as proxy:
            proxy.misdeed = lambda number, begin: gate if begin >= 3 << 24 else None
            with remote_server(store, port=proxy.port, models=disk) as server:
                answers = []
                asked = threading.Thread(target=lambda: answers.append(server.post(*ASK)))
                asked.start()
                copies = lambda: server.json("cache", "ls")["disks"][0]["copies"]
                until("three chunks are on SSD", lambda: copies() and copies()[0]["present_bytes"] == 3 << 24)
                # Somebody else takes the rest.
                (disk / "other").write_bytes(bytes(60 << 20))
                gate.set()
                asked.join()
                assert answers[0][0] == 200, answers
                until("given up", lambda: server.metric("stoker_store_tee_failed_total") == 1)
                assert copies() == [] and (disk / "other").stat().st_size == 60 << 20
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_damaged_copy_is_fetched_again(store, gguf):
    with remote_server(store) as server:
        assert server.post(*ASK)[0] == 200
        until("landed", lambda: landed(server, gguf))
        server.json("unload", "far", "--dram")
        path = server.models / "far" / "model.gguf"
        stat = path.stat()
        with path.open("r+b") as file:
            file.seek(50_000_000)
            byte = file.read(1)
            file.seek(50_000_000)
            file.write(bytes([byte[0] ^ 1]))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        status, body, _ = server.post(*ASK)
        assert status == 200, body
        assert server.metric("stoker_store_refetches_total") == 1
        until("removed", lambda: not path.exists())
        server.json("unload", "far", "--dram")
        assert server.post(*ASK)[0] == 200
        until("landed again", lambda: landed(server, gguf))
