"""As a client of a running node."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy
import pytest
import stoker
from conftest import ROOT, bytes_of, in_tensors, noise, save
from stoker_server import Server

TINY = ROOT / "tests/data/tiny-llama"
MIB = 1 << 20


@pytest.fixture(scope="module")
def server(large):
    config = f'[models.tiny]\npath = "{TINY}"\n[models.gone]\npath = "{TINY}/nonesuch"\n'
    with Server(config, ("--dram", "256MiB", "--kv", "256MiB")) as running:
        yield running


def runtime(server):
    return pathlib.Path(server.environment["XDG_RUNTIME_DIR"]) / "stoker"


def mapped(server):
    """Bytes of the node's memory that somebody holds."""
    server.json("ps")
    return server.metric("stoker_node_bytes", tier="dram_mapped")


def said_since(server, logged, words):
    # The log is written by a thread of its own: looked at until it says so.
    deadline = time.monotonic() + 20
    while words not in (log := server.log.read_bytes()[logged:].decode()):
        assert time.monotonic() < deadline, log
        time.sleep(0.02)
    return log


def until_nothing_is_held(server):
    # The end of a connection is noticed by the node in its own time: asked again until it has.
    while mapped(server) > 0:
        pass


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_tensors_come_out_of_the_nodes_memory(server, device):
    mine = stoker.load(TINY, "cpu")
    before = in_tensors()
    told = []
    theirs = stoker.load("tiny", device, node=runtime(server), progress=lambda *p: told.append(p))
    assert theirs.keys() == mine.keys()
    assert all(bytes_of(theirs[name]) == bytes_of(mine[name]) for name in mine)
    if device == "cpu":
        assert mapped(server) > 0
        # What is written is this process's own.
        name = next(iter(theirs))
        first = bytes_of(theirs[name])
        theirs[name].numpy()[:] = 0
        again = stoker.load("tiny", "cpu", node=runtime(server), names=[name])
        assert again.keys() == {name} and bytes_of(again[name]) == first
        del again
    else:
        assert told[-1][0] == told[-1][1] > 0
    theirs.clear()
    until_nothing_is_held(server)
    assert in_tensors() == before


def test_a_name_that_is_no_path_is_asked_for_from_the_node(server, monkeypatch):
    monkeypatch.setenv("STOKER_RUNTIME_DIR", str(runtime(server)))
    assert stoker.load("tiny", "cpu").keys() == stoker.load(TINY, "cpu").keys()
    assert {name for name, _ in stoker.iter_load("tiny", "cpu")} == stoker.load(TINY, "cpu").keys()
    with pytest.raises(stoker.NotFoundError, match="nonesuch"):
        stoker.load("nonesuch", "cpu")
    with pytest.raises(stoker.NodeError):
        stoker.load("gone", "cpu")
    with pytest.raises(stoker.NodeError, match="is `stoker serve` running"):
        stoker.load("tiny", "cpu", node="/nonexistent/clients.sock")
    until_nothing_is_held(server)


def test_a_rank_takes_its_part_out_of_the_nodes_memory(server):
    # An odd vocabulary: by name, what can be split.
    name = "model.layers.0.self_attn.o_proj.weight"
    ranks = [stoker.load("tiny", "simulated", node=runtime(server), names=[name], shard=(i, 2)) for i in range(2)]
    whole = stoker.load(TINY, "cpu", names=[name])[name].numpy()
    assert numpy.array_equal(numpy.concatenate([rank[name].numpy() for rank in ranks], axis=1), whole)
    until_nothing_is_held(server)


@pytest.fixture(scope="module")
def on_device():
    """A node that serves from a device that the package simulates, too: the same by name."""
    config = f'[models.tiny]\npath = "{TINY}"\ncontext = 64\n'
    with Server(config, ("--devices", "simulated:64MiB", "--dram", "128MiB")) as running:
        yield running


def ask(server):
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "temperature": 0, "seed": 1}
    code, answer, _ = server.post("/v1/completions", body)
    assert code == 200, answer
    return answer["choices"][0]["text"]


def weights(server):
    """Bytes of weights on the device, and of them for nobody."""
    server.json("ps")
    return tuple(server.metric("stoker_node_device_bytes", device="simulated:0", kind=k) for k in ("weights", "cached"))


def test_a_nodes_copy_on_a_device_is_shared_and_can_not_be_written_to(on_device):
    mine = stoker.load(TINY, "cpu")
    before = in_tensors()
    for served in (False, True):
        if served:
            text = ask(on_device)
        theirs = stoker.load("tiny", "simulated", node=runtime(on_device), shared=True)
        assert theirs.keys() == mine.keys()
        assert all(bytes_of(theirs[name]) == bytes_of(mine[name]) for name in mine)
        assert in_tensors() == before, "no memory of its own"
        name, tensor = next(iter(theirs.items()))
        assert tensor.read_only
        with pytest.raises(ValueError, match="read-only"):
            tensor.numpy()[:] = 0
        one = stoker.load("tiny", "simulated", node=runtime(on_device), names=[name], shared=True)
        assert one.keys() == {name} and one[name].data_ptr != tensor.data_ptr
        again = {name for name, _ in stoker.iter_load("tiny", "simulated", node=runtime(on_device), shared=True)}
        assert again == mine.keys()
        # Whoever asks, it stays while a program has it.
        on_device.json("unload", "--all", "--dram")
        assert weights(on_device)[0] > 0 and weights(on_device)[1] == 0
        assert bytes_of(tensor) == bytes_of(mine[name])
        assert ask(on_device) == (text if served else ask(on_device))
        del tensor, one
        theirs.clear()
    on_device.json("unload", "--all", "--dram")
    while weights(on_device)[0] > 0:
        on_device.json("unload", "--all", "--dram")
    with pytest.raises(stoker.NotSupportedError, match="doesn't serve from"):
        stoker.load("tiny", "simulated:5", node=runtime(on_device), shared=True)
    with pytest.raises(stoker.NotSupportedError, match="whole model"):
        stoker.load("tiny", "simulated", node=runtime(on_device), shared=True, shard=(0, 2))
    with pytest.raises(stoker.NotSupportedError, match="running node"):
        stoker.load(TINY, "simulated", shared=True)
    assert stoker.load("tiny", "cpu", node=runtime(on_device), shared=True).keys() == mine.keys()


def test_a_killed_client_of_a_device_lets_go_and_a_killed_node_leaves_it_its_tensors():
    mine = stoker.load(TINY, "cpu")
    config = f'[models.tiny]\npath = "{TINY}"\ncontext = 64\n'
    with Server(config, ("--devices", "simulated:64MiB", "--dram", "128MiB")) as server:
        program = (
            "import stoker, sys\n"
            f"held = stoker.load('tiny', 'simulated', node={str(runtime(server))!r}, shared=True)\n"
            "print(len(held), flush=True)\n"
            "sys.stdin.read()\n"
        )
        run = [sys.executable, "-c", program]
        with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
            assert int(client.stdout.readline()) == len(mine)
            assert weights(server)[1] == 0
            client.kill()
        while weights(server)[1] == 0:
            pass
        server.json("unload", "--all", "--dram")
        assert weights(server) == (0, 0)
        theirs = stoker.load("tiny", "simulated", node=runtime(server), shared=True)
        server.kill()
        assert all(bytes_of(theirs[name]) == bytes_of(mine[name]) for name in mine)
        server.start()
        text = ask(server)
        assert text == ask(server)
        assert all(bytes_of(theirs[name]) == bytes_of(mine[name]) for name in mine)


def test_a_killed_client_lets_go(server):
    program = (
        "import stoker, sys\n"
        f"held = stoker.load('tiny', 'cpu', node={str(runtime(server))!r})\n"
        "print(len(held), flush=True)\n"
        "sys.stdin.read()\n"
    )
    client = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert int(client.stdout.readline()) > 0
    assert mapped(server) > 0
    # Held: not evicted, whoever asks.
    server.json("unload", "tiny", "--dram")
    assert mapped(server) > 0
    client.send_signal(signal.SIGKILL)
    client.wait()
    client.stdin.close()
    client.stdout.close()
    until_nothing_is_held(server)


def test_a_client_of_a_killed_node_keeps_what_it_has(tmp_path):
    """The next node has everything at once, works around what the client reads, and gets it back when that ends."""
    sizes = {"held": 96, "other": 48, "large": 160}
    config = ""
    for seed, (name, mib) in enumerate(sizes.items()):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((TINY / "config.json").read_text())
        tensors = {f"{name}.{i}": ("U8", (MIB,), noise(seed * 1000 + i, MIB)) for i in range(mib)}
        save(tmp_path / name / "model.safetensors", tensors)
        config += f'[models.{name}]\npath = "{tmp_path / name}"\n'
    program = (
        "import hashlib, stoker, sys\n"
        "held = stoker.load('held', 'cpu', node=sys.argv[1])\n"
        "def say():\n"
        "    sums = hashlib.sha256()\n"
        "    for name in sorted(held): sums.update(held[name].numpy())\n"
        "    print(sums.hexdigest(), flush=True)\n"
        "say()\n"
        "for line in sys.stdin: say()\n"
    )
    with Server(config, ("--dram", "256MiB", "--kv", "64MiB")) as server:
        run = [sys.executable, "-c", program, str(runtime(server))]
        with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
            try:
                first = client.stdout.readline()
                assert len(first) == 65

                def say():
                    client.stdin.write("again\n")
                    client.stdin.flush()
                    return client.stdout.readline()

                stoker.load("other", "cpu", node=runtime(server))
                before = {row["model"]: row["bytes"] for row in server.json("ps")["cached"]}
                assert before.keys() == {"held", "other"}
                for _ in range(2):
                    server.kill()
                    logged = server.log.stat().st_size
                    server.start()
                    log = said_since(server, logged, "took over what the node before had in memory")
                    assert {row["model"]: row["bytes"] for row in server.json("ps")["cached"]} == before
                    assert server.metric("stoker_store_read_bytes_total") == 0
                    # The start itself waits for workers; nobody waits for a client any more (that took 7 s).
                    assert "in use by others" not in log
                    assert mapped(server) > 0
                # Others are loaded and evicted beside it. What the client has is neither evicted nor written to.
                for _ in range(3):
                    assert stoker.load("other", "cpu", node=runtime(server)).keys()
                    server.json("unload", "--all", "--dram")
                with pytest.raises(stoker.OutOfMemoryError):
                    stoker.load("large", "cpu", node=runtime(server))
                again = stoker.load("held", "cpu", node=runtime(server))
                assert say() == first
                again.clear()
                assert say() == first
                client.stdin.close()
                assert client.wait(60) == 0
            finally:
                client.kill()
        until_nothing_is_held(server)
        assert stoker.load("large", "cpu", node=runtime(server)).keys()


def test_a_flipped_byte_is_never_handed_out(tmp_path):
    """Sums that a server has learned are checked by whoever loads the folder, too."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in TINY.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    server = Server(f'[models.a]\npath = "{copy}"\n')
    assert server.json("verify", "a")["ok"]
    (index,) = pathlib.Path(server.home.name).rglob("stoker.json")
    assert json.loads(index.read_text())["trust"] == "chunk"
    good = stoker.load(copy, "cpu")
    assert stoker.load(index.parent, "cpu").keys() == good.keys()
    weights = copy / "model.safetensors"
    stat = weights.stat()
    with weights.open("r+b") as file:
        file.seek(stat.st_size - 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    # The same length, time and inode: nobody replaced the file, a bit of it flipped.
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for device in ("cpu", "simulated"):
        with pytest.raises(stoker.CorruptError, match="model.safetensors") as caught:
            stoker.load(index.parent, device)
        assert caught.value.file == str(weights)
