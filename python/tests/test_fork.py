"""Forked children: what they inherit, and what they can do."""

import os

import pytest
import stoker
from conftest import bytes_of, in_tensors


def in_child(work):
    """Runs `work` in a forked child; its words, "" if all is well."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        words = b""
        try:
            work()
        except BaseException as error:
            words = repr(error).encode() or b"?"
        os.write(write, words)
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        words = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert status == 0
    return words


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_child_reads_what_it_inherited_and_frees_nothing_of_its_parents(large, device):
    folder, tensors = large
    loaded = stoker.load(folder, device)

    def work():
        for name in tuple(loaded):
            tensor = loaded.pop(name)
            assert bytes_of(tensor) == tensors[name][2]
            tensor.view("uint16" if tensor.dtype == "bfloat16" else "uint32").numpy()[:] = 0

    assert in_child(work) == ""
    assert all(bytes_of(loaded[name]) == data for name, (_, _, data) in tensors.items())


def test_what_the_parent_frees_stays_the_childs(large):
    folder, tensors = large
    loaded = stoker.load(folder, "cpu")
    go_read, go_write = os.pipe()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(go_read, 1)
        same = all(bytes_of(loaded[name]) == data for name, (_, _, data) in tensors.items())
        os.write(write, b"same" if same else b"other")
        os._exit(0)
    loaded.clear()
    os.write(go_write, b"x")
    assert os.read(read, 10) == b"same"
    os.waitpid(child, 0)
    for fd in (go_read, go_write, read, write):
        os.close(fd)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_child_loads_by_itself(large, device):
    folder, tensors = large
    stoker.load(folder, device, names=["norm.0"])

    def work():
        loaded = stoker.load(folder, device)
        assert all(bytes_of(loaded[name]) == data for name, (_, _, data) in tensors.items())

    assert in_child(work) == ""


def test_a_load_is_not_its_childs(large):
    before = in_tensors()
    running = stoker.iter_load(large[0], "simulated")
    next(running)

    def work():
        with pytest.raises(stoker.ForkError, match="begin another"):
            next(running)

    assert in_child(work) == ""
    assert len(list(running)) == len(large[1]) - 1
    running.close()
    assert in_tensors() == before
