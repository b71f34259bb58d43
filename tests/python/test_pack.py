"""`stoker pack`: the same model, as it is loaded."""

import os
import shutil

import gguf as gguf_reader
import numpy
import pytest
from conftest import DATA
from stoker_server import Server

FLAGS = ("--dram", "512MiB", "--kv", "256MiB")


def answers(path, prompt="The capital of France is"):
    with Server(f'[models.a]\npath = "{path}"\ncontext = 512\n', FLAGS) as server:
        status, body, _ = server.post(
            "/v1/completions", {"model": "a", "prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 2}
        )
        assert status == 200, body
        ran = server.command("run", "a", prompt, "--max-tokens", "16", "--temperature", "0").stdout
        return body["choices"][0], ran, server.json("show", "a")


def test_the_real_model_answers_the_same_from_a_packed_folder(gguf, tmp_path):
    server = Server(f'[models.a]\npath = "{gguf}"\n')
    packed = tmp_path / "packed"
    report = server.json("pack", "a", "--output", str(packed))
    assert report["in_execution_order"] and report["tensors"] == 272 and report["bytes"] % 4096 == 0
    assert sorted(p.name for p in packed.iterdir()) == ["model.gguf", "stoker.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["packed"], "nothing beside it"
    *was, shown = answers(gguf)
    *now, packed_shown = answers(packed)
    assert was == now
    assert packed_shown["trust"] == "chunk" and shown["config"] == packed_shown["config"]

    # For other readers, too: the same tensors, aligned.
    old, new = (gguf_reader.GGUFReader(p) for p in (gguf, packed / "model.gguf"))
    by_name = {t.name: t for t in old.tensors}
    assert len(by_name) == len(new.tensors) == 272
    for tensor in new.tensors:
        twin = by_name[tensor.name]
        assert tensor.data_offset % 256 == 0 and tensor.tensor_type == twin.tensor_type
        assert numpy.array_equal(tensor.data, twin.data), tensor.name
    plain = lambda reader: {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    metadata = plain(new)
    assert metadata.pop("general.alignment") == 256 and metadata == plain(old)

    bench = server.json("bench", "load", "--model", str(packed), "--device", "none", "--runs", "1")
    assert bench["bytes"] == report["bytes"] and bench["ssd_to_dram"]["rate_bytes_per_s"] > 0


def test_shards_become_one_file(tmp_path):
    server = Server()
    model = DATA / "tiny-llama-bf16-sharded"
    whole, split = tmp_path / "whole", tmp_path / "split"
    server.json("pack", str(model), "--output", str(whole))
    *was, _ = answers(model, "ab")
    *now, shown = answers(whole, "ab")
    assert was == now and shown["trust"] == "chunk" and len(shown["files"]) == 1

    # 259 words: nobody has half of them.
    done = server.command("pack", str(model), "--output", str(split), "--shards", "2", check=False)
    assert done.returncode != 0 and "259" in done.stderr and not split.exists()


def test_each_rank_of_the_real_model_is_a_folder(gguf, tmp_path):
    split = tmp_path / "split"
    report = Server().json("pack", str(gguf), "--output", str(split), "--shards", "3")
    assert sorted(p.name for p in split.iterdir()) == [f"rank-{rank}-of-3" for rank in range(3)]
    assert len(report["files"]) == 3
    ranks = [{t.name: t.data for t in gguf_reader.GGUFReader(file).tensors} for file in report["files"]]
    for tensor in gguf_reader.GGUFReader(gguf).tensors:
        parts = [rank[tensor.name] for rank in ranks]
        if "norm" in tensor.name:
            assert all(numpy.array_equal(part, tensor.data) for part in parts)
        else:
            columns = "attn_output" in tensor.name or "ffn_down" in tensor.name
            assert numpy.array_equal(numpy.concatenate(parts, axis=int(columns)), tensor.data), tensor.name
    with Server(f'[models.a]\npath = "{split}/rank-1-of-3"\n') as server:
        (listed,) = server.json("ls")["models"]
        assert "rank 1 of 3" in listed["refusal"]


def test_what_is_there_is_not_replaced_and_what_is_wrong_leaves_nothing(gguf, tmp_path):
    copy = tmp_path / "copy.gguf"
    shutil.copy(gguf, copy)
    server = Server(f'[models.a]\npath = "{copy}"\n')
    assert server.json("verify", "a")["ok"]
    there = tmp_path / "there"
    there.mkdir()
    done = server.command("pack", "a", "--output", str(there), check=False)
    assert done.returncode != 0 and "exists already" in done.stderr
    stat = copy.stat()
    with copy.open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)
        file.seek(50_000_000)
        file.write(bytes([byte[0] ^ 1]))


    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    done = server.command("pack", "a", "--output", str(tmp_path / "out"), check=False)
    assert done.returncode != 0 and "chunk 2" in done.stderr and "corrupt" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.gguf", "there"]


@pytest.mark.parametrize("shards", ["0", "100000"])
def test_absurd_splits_are_refused(shards, tmp_path):
    server = Server()
    done = server.command(
        "pack", str(DATA / "tiny-llama"), "--output", str(tmp_path / "out"), "--shards", shards, check=False
    )
    assert done.returncode != 0 and not list(tmp_path.iterdir())
