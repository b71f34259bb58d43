import json
import pathlib
import struct
import sys

import numpy
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/python"))


def save(path, tensors, metadata=None):
    """A safetensors file of name -> (type, shape, bytes), in that order."""
    header, at = {}, 0
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            file.write(data)
    return path


def noise(seed, n):
    return numpy.random.default_rng(seed).integers(0, 256, n, numpy.uint8).tobytes()


SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
         "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}  # fmt: skip


@pytest.fixture(scope="session")
def every_type(tmp_path_factory):
    """One tensor of each type, a scalar, an empty one and one at an odd offset."""
    tensors = {f"of_{t}": (t, (3, 5), noise(i, 15 * size)) for i, (t, size) in enumerate(SIZES.items())}
    tensors["flags"] = ("BOOL", (4,), bytes([1, 0, 0, 1]))
    tensors["scalar"] = ("F32", (), struct.pack("<f", 2.5))
    tensors["empty"] = ("F16", (0, 7), b"")
    tensors["odd"] = ("U8", (3,), b"abc")
    tensors["crooked"] = ("F64", (2, 3), struct.pack("<6d", *range(6)))
    path = tmp_path_factory.mktemp("types") / "model.safetensors"
    return save(path, tensors, {"format": "pt"}), tensors


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """Two shards of 96 MiB with an index, in a folder: tensors of 24 MiB and small ones."""
    folder = tmp_path_factory.mktemp("large")
    weights, shards = {}, {}
    for shard in range(2):
        name = f"model-{shard + 1:05}-of-00002.safetensors"
        tensors = {f"layer.{shard}.{i}": ("BF16", (3072, 4096), noise(shard * 10 + i, 24 << 20)) for i in range(4)}
        tensors[f"norm.{shard}"] = ("F32", (64,), noise(99 + shard, 256))
        save(folder / name, tensors)
        weights.update(dict.fromkeys(tensors, name))
        shards.update(tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return folder, shards


def bytes_of(tensor):
    bits = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8", "float8_e8m0fnu": "uint8"}
    return tensor.view(bits.get(tensor.dtype, tensor.dtype)).numpy().tobytes()


def in_tensors():
    """Bytes of the simulated device that are in use."""
    import stoker

    return stoker.device_memory("simulated")[2]
