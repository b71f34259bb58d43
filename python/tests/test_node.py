"""As a client of a running node."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy
import pytest
import stoker
from conftest import ROOT, bytes_of, in_tensors
from stoker_server import Server

TINY = ROOT / "tests/data/tiny-llama"


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
