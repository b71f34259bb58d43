"""`stoker pull` from a hub and from plain addresses: the path of a cold start, in parts, from one version, to be gone on
with; against a hub whose storage is another server."""

import hashlib
import json
import pathlib
import subprocess
import threading

import pytest
from conftest import DATA
from hub import COMMIT, Hub, Storage
from stoker_server import Server
from test_remote import Indexed, until

CHUNK = 16 << 20
FLAGS = ("--dram", "256MiB", "--kv", "256MiB")


@pytest.fixture
def storage():
    with Storage() as storage:
        yield storage


@pytest.fixture
def hub(storage):
    with Hub(storage) as hub:
        yield hub


def client(hub, models=None, config: str = "", token: str | None = None, kind=Server) -> Server:
    server = kind(config, FLAGS, models)
    server.environment |= {"HF_ENDPOINT": hub.url} | ({"HF_TOKEN": token} if token else {})
    return server


def chunks(site) -> list[int]:
    """Numbers of the chunks that were asked for. Shorter ranges at the beginning are the header's."""
    return sorted(begin // CHUNK for begin, end in site.ranges() if begin or end == CHUNK - 1)


def test_a_repository_is_pulled_in_parts_with_what_belongs_to_it(storage):
    for file in (DATA / "tiny-llama-bf16-sharded").iterdir():
        storage.files[file.name] = file.read_bytes()
    storage.files["pytorch_model.bin"] = b"never"
    with Hub(storage, token="secret") as hub:
        server = client(hub, token="secret")
        pulled = server.json("pull", "mine", "--source", "hf:o/n")
        assert not pulled["was_here"] and pulled["refusal"] is None
        shown = server.json("show", "mine")
        assert shown["trust"] == "chunk" and shown["source"] == {"uri": "hf:o/n", "revision": COMMIT}
        for name, data in storage.files.items():
            path = server.models / "mine" / name
            wanted = name not in ("pytorch_model.bin", "reference.json")
            assert path.read_bytes() == data if wanted else not path.exists(), name
        assert server.json("verify", "mine")["ok"]
        # The token went to the hub, and nowhere else.
        assert {token for *_, token in hub.log} == {"Bearer secret"}
        assert {token for *_, token in storage.log} == {None}
        asked = len(hub.log)
        assert server.json("pull", "mine", "--source", "hf:o/n")["was_here"]
        assert len(hub.log) == asked, "what is here is not asked for"
        assert server.json("cache", "ls")["disks"][0]["models"][0]["evictable"] is False
        with server:
            body = {"model": "mine", "prompt": "a", "max_tokens": 3, "temperature": 0}
            assert server.post("/v1/completions", body)[0] == 200
        # Gated, and no token: what to do is said.
        failed = client(hub).command("pull", "mine", "--source", "hf:o/n", check=False)
        assert failed.returncode != 0 and "HF_TOKEN" in failed.stderr


def test_a_pull_that_was_killed_goes_on(storage, hub, gguf, tmp_path):
    storage.files["m.gguf"] = gguf.read_bytes()
    gate = threading.Event()
    # The last two of six chunks don't come.
    storage.gate = lambda begin: gate.wait(120) if begin >= 4 * CHUNK else None
    server = client(hub, tmp_path / "models")
    command = [server.binary, "pull", "mine", "--source", "hf:o/n"]
    pull = subprocess.Popen(command, env=server.environment, stderr=subprocess.DEVNULL)
    copies = lambda: server.json("cache", "ls")["disks"][0]["copies"]
    until("four chunks are durable", lambda: copies() and copies()[0]["present_bytes"] == 4 * CHUNK)
    pull.kill()
    pull.wait()
    assert not (tmp_path / "models/mine").exists(), "no partial file is taken for whole"
    gate.set()
    storage.log.clear()
    server.json("pull", "mine", "--source", "hf:o/n")
    assert chunks(storage) == [4, 5], "only what was missing"
    assert (tmp_path / "models/mine/m.gguf").read_bytes() == gguf.read_bytes()


def test_two_pulls_of_one_model_become_one(storage, hub, gguf, tmp_path):
    storage.files["m.gguf"] = gguf.read_bytes()
    both = threading.Barrier(3, timeout=60)
    results = []

    def pull():
        server = client(hub, tmp_path / "models")
        both.wait()
        results.append(server.json("pull", "mine", "--source", "hf:o/n"))

    threads = [threading.Thread(target=pull) for _ in range(2)]
    for thread in threads:
        thread.start()
    both.wait()
    for thread in threads:
        thread.join()
    assert sorted(result["was_here"] for result in results) == [False, True]
    assert chunks(storage) == [*range(6)], "every chunk once"


def test_a_file_that_changes_midway_comes_in_one_version(storage, hub, gguf):
    old = gguf.read_bytes()
    new = bytearray(old)
    new[-1] ^= 1
    storage.files["m.gguf"] = old

    def gate(begin):
        if begin >= 3 * CHUNK:
            storage.files["m.gguf"] = bytes(new)

    storage.gate = gate
    server = client(hub)
    server.json("pull", "mine", "--source", "hf:o/n")
    assert (server.models / "mine/m.gguf").read_bytes() == bytes(new)
    assert server.json("cache", "ls")["disks"][0]["copies"] == [], "of the old version nothing is left"


def test_wrong_bytes_do_not_land(storage, hub, gguf):
    storage.files["m.gguf"] = gguf.read_bytes()
    server = client(hub)
    wrong = bytearray(storage.files["m.gguf"])
    wrong[50_000_000] ^= 1
    original = storage.files["m.gguf"]

    class Lying(dict):
        """The hub lists the hash of other bytes than storage has."""

        def items(self):
            return [("m.gguf", original)]

    storage.files = Lying({"m.gguf": bytes(wrong)})
    failed = server.command("pull", "mine", "--source", "hf:o/n", check=False)
    assert failed.returncode != 0 and "wrong content" in failed.stderr
    assert hashlib.sha256(wrong).hexdigest() in failed.stderr
    assert not (server.models / "mine").exists()
    assert server.json("cache", "ls")["disks"][0]["copies"] == []


def test_a_server_without_ranges_sends_it_whole(storage, hub, gguf):
    storage.files["m.gguf"] = gguf.read_bytes()
    storage.gives_ranges = False
    server = client(hub)
    server.json("pull", "mine", "--source", "hf:o/n")
    assert (server.models / "mine/m.gguf").read_bytes() == gguf.read_bytes()
    assert server.json("show", "mine")["trust"] == "chunk"
    # What can't be read in parts can't be loaded from there: said, and how it is done instead.
    server = client(hub, config='[models.far]\nsource = "hf:o/n"\n')
    with server:
        model = lambda: json.loads(server.get("/v1/models")[1])["data"][0]
        until("said", lambda: "only as a whole" in json.dumps(model()))
        assert not model()["runnable"]


def test_an_address_is_pulled_in_parts(storage, gguf, hub):
    storage.files["m.gguf"], storage.signature = gguf.read_bytes(), ""
    server = client(hub)
    pulled = server.json("pull", "mine", "--source", f"{storage.url}/m.gguf")
    assert pulled["source"] == f"{storage.url}/m.gguf"
    assert chunks(storage) == [*range(6)]
    assert (0, 0) in storage.ranges(), "a byte where HEAD is refused"
    assert (server.models / "mine/m.gguf").read_bytes() == gguf.read_bytes()
    failed = server.command("pull", "none", "--source", f"{storage.url}/none.gguf", check=False)
    assert failed.returncode != 0 and "none.gguf" in failed.stderr


def test_a_signed_address_that_ran_out_is_asked_for_again(storage, hub, gguf):
    storage.files["m.gguf"] = gguf.read_bytes()

    def gate(begin):
        if begin >= 3 * CHUNK:
            storage.signature = "sig=2"

    storage.gate = gate
    server = client(hub)
    server.json("pull", "mine", "--source", "hf:o/n")
    assert (server.models / "mine/m.gguf").read_bytes() == gguf.read_bytes()


def test_a_cold_start_takes_the_same_path(storage, hub, gguf):
    storage.files["m.gguf"] = gguf.read_bytes()
    config = 'ssd = "1GiB"\n[models.far]\nsource = "hf:o/n@v1"\ncontext = 512\n'
    with client(hub, config=config, kind=Indexed) as server:
        body = {"model": "far", "prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}
        status, answer, _ = server.post("/v1/completions", body)
        assert status == 200, answer
        path: pathlib.Path = server.models / "far/m.gguf"
        until("landed", lambda: path.exists() and path.read_bytes() == gguf.read_bytes())
        assert chunks(storage) == [*range(6)]
        assert server.json("cache", "ls")["disks"][0]["models"][0]["evictable"]
        # Asking for it by name makes it stay.
        asked = len(storage.log)
        assert server.json("pull", "far")["was_here"]
        assert not server.json("cache", "ls")["disks"][0]["models"][0]["evictable"]
        assert len(storage.log) == asked
