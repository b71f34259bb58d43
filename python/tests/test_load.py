"""What a load returns, and when its memory goes. Host memory stands for a device's in `simulated`: everything but the
driver is as with a GPU."""

import json
import math
import os
import threading

import conftest
import numpy
import pytest
import stoker
from conftest import bytes_of, in_tensors, save

MIB = 1 << 20
PLACES = ["cpu", "simulated"]


@pytest.mark.parametrize("device", PLACES)
def test_every_type_arrives_as_it_is(every_type, device):
    path, tensors = every_type
    loaded = stoker.load(path, device)
    assert loaded.keys() == tensors.keys()
    for name, (_, shape, data) in tensors.items():
        tensor = loaded[name]
        assert (tensor.shape, tensor.device, tensor.nbytes) == (tuple(shape), "cpu", len(data)), name
        assert bytes_of(tensor) == data, name
        assert tensor.data_ptr % min(8, tensor.nbytes // max(1, int(numpy.prod(shape))) or 1) == 0, name
    assert loaded["of_BF16"].dtype == "bfloat16" and loaded["of_F8_E4M3"].dtype == "float8_e4m3fn"
    assert float(loaded["scalar"].numpy()) == 2.5
    assert loaded["flags"].numpy().tolist() == [True, False, False, True]
    assert loaded["of_C64"].numpy().dtype == numpy.complex64


def test_numpy_imports_without_a_copy_and_may_write(every_type):
    path, tensors = every_type
    one, other = stoker.load(path, "cpu"), stoker.load(path, "cpu")
    array = numpy.from_dlpack(one["of_F32"])
    assert array.ctypes.data == one["of_F32"].data_ptr
    one["of_F32"].numpy()[:] = 7
    assert numpy.all(one["of_F32"].numpy() == 7)
    assert bytes_of(other["of_F32"]) == tensors["of_F32"][2], "each load is its caller's own"
    assert bytes_of(stoker.load(path, "cpu")["of_F32"]) == tensors["of_F32"][2], "the file is as it was"
    del one
    assert numpy.all(array == 7), "an array keeps its memory"


def test_capsules_are_what_the_protocol_says(every_type):
    tensor = stoker.load(every_type[0], "cpu", names=["of_I16"])["of_I16"]
    assert tensor.__dlpack_device__() == (1, 0)
    assert '"dltensor"' in repr(tensor.__dlpack__())
    assert '"dltensor_versioned"' in repr(tensor.__dlpack__(max_version=(1, 0)))
    assert '"dltensor"' in repr(tensor.__dlpack__(max_version=(0, 8)))
    with pytest.raises(BufferError):
        tensor.__dlpack__(copy=True)
    with pytest.raises(BufferError):
        tensor.__dlpack__(dl_device=(2, 0))
    for _ in range(1000):
        numpy.from_dlpack(tensor)


def test_types_that_numpy_lacks_are_said_to_be_missing(every_type):
    tensor = stoker.load(every_type[0], "cpu", names=["of_BF16"])["of_BF16"]
    try:
        import ml_dtypes
    except ImportError:
        with pytest.raises(stoker.NotSupportedError, match='view\\("uint16"\\)'):
            tensor.numpy()
    else:
        assert tensor.numpy().dtype == ml_dtypes.bfloat16
    with pytest.raises(TypeError):
        tensor.view("float32")
    with pytest.raises(ValueError):
        tensor.view("int17")


def test_dtype_converts_floats_and_nothing_else(tmp_path):
    values = numpy.array([1.5, -2.25, 3e4], numpy.float32)
    bf16 = (values.view(numpy.uint32) >> 16).astype(numpy.uint16)
    tensors = {
        "a": ("F32", (3,), values.tobytes()),
        "b": ("BF16", (3,), bf16.tobytes()),
        "c": ("I32", (2,), numpy.array([1, 2], numpy.int32).tobytes()),
    }
    loaded = stoker.load(save(tmp_path / "x.safetensors", tensors), "cpu", dtype="float16")
    assert loaded["a"].dtype == numpy.float16 and loaded["a"].tolist() == [1.5, -2.25, 3e4]
    assert loaded["b"].dtype == numpy.float16 and loaded["b"].tolist() == [1.5, -2.25, 29952.0]
    assert loaded["c"].dtype == "int32"


@pytest.mark.parametrize("device", PLACES)
def test_folders_lists_and_parts(large, device):
    folder, tensors = large
    for source in (folder, str(folder), sorted(folder.glob("*.safetensors")), folder / "model.safetensors.index.json"):
        loaded = stoker.load(source, device, names=["layer.1.2", "norm.0"])
        assert loaded.keys() == {"layer.1.2", "norm.0"}
        assert all(bytes_of(loaded[name]) == tensors[name][2] for name in loaded)
    loaded = stoker.load(folder, device)
    assert all(bytes_of(loaded[name]) == tensors[name][2] for name in tensors)


@pytest.mark.parametrize("device", PLACES)
def test_names_read_only_what_they_need(large, device):
    told = []
    stoker.load(large[0], device, names=["norm.0"], progress=lambda arrived, total: told.append((arrived, total)))
    # One or two chunks of 16 MiB of 192 MiB.
    assert told[-1][0] == told[-1][1] <= 32 * MIB
    told.clear()
    stoker.load(large[0], device, progress=lambda arrived, total: told.append((arrived, total)))
    assert told == sorted(told) and told[-1][0] == told[-1][1] > 192 * MIB and len(told) > 1


@pytest.mark.parametrize("device", PLACES)
def test_tensors_land_one_by_one(large, device):
    folder, tensors = large
    seen = []
    for name, tensor in stoker.iter_load(folder, device):
        assert bytes_of(tensor) == tensors[name][2]
        seen.append(name)
    # In the order of the files.
    assert seen == list(tensors)


@pytest.fixture
def llama(tmp_path):
    """A Llama of one layer."""
    config = json.loads((conftest.ROOT / "tests/data/tiny-llama/config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
               "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "tie_word_embeddings": False}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (128, 64),
        layer + "input_layernorm.weight": (64,),
        layer + "self_attn.q_proj.weight": (64, 64),
        layer + "self_attn.k_proj.weight": (32, 64),
        layer + "self_attn.v_proj.weight": (32, 64),
        layer + "self_attn.o_proj.weight": (64, 64),
        layer + "post_attention_layernorm.weight": (64,),
        layer + "mlp.gate_proj.weight": (96, 64),
        layer + "mlp.up_proj.weight": (96, 64),
        layer + "mlp.down_proj.weight": (64, 96),
        "model.norm.weight": (64,),
        "lm_head.weight": (128, 64),
    }
    tensors = {n: ("F32", s, conftest.noise(i, 4 * math.prod(s))) for i, (n, s) in enumerate(shapes.items())}
    save(tmp_path / "model.safetensors", tensors)
    return tmp_path


def test_ranks_have_their_parts(llama):
    whole = stoker.load(llama, "cpu")
    ranks = [stoker.load(llama, "simulated", shard=(rank, 2)) for rank in range(2)]
    cut = {"embed": 0, "lm_head": 0, "q_proj": 0, "k_proj": 0, "v_proj": 0, "gate": 0, "up": 0, "o_proj": 1, "down": 1}
    for name, tensor in whole.items():
        parts = [rank[name].view("uint32").numpy() for rank in ranks]
        all_of_it = tensor.view("uint32").numpy()
        dims = [dim for part, dim in cut.items() if part in name.removeprefix("model.")]
        if dims:
            assert numpy.array_equal(numpy.concatenate(parts, axis=dims[0]), all_of_it), name
        else:
            assert "norm" in name and all(numpy.array_equal(part, all_of_it) for part in parts)
    name = "model.layers.0.self_attn.o_proj.weight"
    (only,) = stoker.load(llama, "simulated", shard=(1, 2), names=[name]).values()
    assert only.shape == (64, 32) and bytes_of(only.view("uint32")) == bytes_of(ranks[1][name].view("uint32"))
    with pytest.raises(stoker.NotSupportedError, match="share evenly"):
        stoker.load(llama, "simulated", shard=(0, 3))


def test_device_memory_goes_with_the_last_tensor_in_it(large):
    folder, tensors = large
    before = in_tensors()
    loaded = stoker.load(folder, "simulated")
    whole = in_tensors() - before
    assert 192 * MIB <= whole <= 200 * MIB
    # 24 MiB each, in granules of 64 MiB: the first three share the first two.
    for name in ("layer.0.0", "layer.0.1"):
        del loaded[name]
        assert in_tensors() - before == whole
    del loaded["layer.0.2"]
    assert in_tensors() - before == whole - 64 * MIB
    kept = loaded["norm.1"].numpy()
    loaded.clear()
    assert in_tensors() - before <= 64 * MIB
    del kept
    assert in_tensors() == before


def resident_shared():
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("RssShmem:")]
    return int(line.split()[1]) << 10


def test_host_memory_goes_with_the_last_tensor_in_it(large):
    before = resident_shared()
    loaded = stoker.load(large[0], "cpu")
    for tensor in loaded.values():
        tensor.view({"bfloat16": "uint16"}.get(tensor.dtype, tensor.dtype)).numpy().max()
    # Each page counts twice: where it was read to, and where the tensors have it.
    assert resident_shared() - before >= 2 * 192 * MIB
    for i in range(4):
        del loaded[f"layer.0.{i}"]
    # Half of it, and a chunk of 16 MiB on either side of a border.
    assert resident_shared() - before <= 2 * (96 + 32) * MIB
    loaded.clear()
    assert resident_shared() - before <= 2 * MIB


def test_device_memory_goes_while_the_rest_is_on_its_way(large):
    # A link of 40 MB/s: the last tensor is half a second behind.
    device = "simulated:7:40"
    used = lambda: stoker.device_memory(device)[2]  # noqa: E731
    held = {}
    for name, tensor in stoker.iter_load(large[0], device):
        assert bytes_of(tensor) == large[1][name][2]
        del tensor
        held[name] = used()
    # 24 MiB each, in granules of 64 MiB: what lies in front of the last three granules is gone when the second shard is half there.
    assert held["layer.0.0"] >= 192 * MIB
    assert held["layer.1.2"] <= held["layer.0.0"] - 128 * MIB
    assert used() == 0


def test_host_memory_goes_while_the_rest_is_on_its_way(tmp_path):
    # What is read but not taken yet counts as well: so many tensors that reading them takes longer than dropping them.
    tensors = {f"t{i}": ("U8", (16 * MIB,), bytes([i]) * (16 * MIB)) for i in range(40)}
    path = save(tmp_path / "model.safetensors", tensors)
    del tensors
    before, most = resident_shared(), 0
    for i, (name, tensor) in enumerate(stoker.iter_load(path, "cpu")):
        view = tensor.numpy()
        assert (name, view[0], view[-1]) == (f"t{i}", i, i)
        del view, tensor
        most = max(most, resident_shared() - before)
    assert most <= 500 * MIB, "all of it would be 640"
    assert resident_shared() - before <= 2 * MIB


def test_threads_load_at_the_same_time(large):
    folder, tensors = large
    before = in_tensors()
    failures = []

    def work(i):
        try:
            loaded = stoker.load(folder, PLACES[i % 2])
            assert all(bytes_of(loaded[name]) == data for name, (_, _, data) in tensors.items())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert in_tensors() == before


def test_a_gguf_file_keeps_its_types():
    path = os.environ.get("STOKER_TEST_GGUF", str(conftest.ROOT / "target/fixtures/SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert os.path.isfile(path), f"{path} is missing: run scripts/test, which fetches it"
    import gguf

    reader = gguf.GGUFReader(path)
    loaded = stoker.load(path, "cpu")
    assert loaded.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        mine = loaded[tensor.name]
        assert bytes_of(mine.view("uint8") if mine.dtype.startswith("Q") else mine) == tensor.data.tobytes()
        if mine.dtype.startswith("Q"):
            assert mine.dtype == tensor.tensor_type.name and mine.shape == tensor.data.shape


def test_closing_devices_gives_the_ring_back(large):
    kept = stoker.load(large[0], "simulated", names=["norm.0"])
    stoker.close_devices()
    again = stoker.load(large[0], "simulated", names=["norm.0"])
    assert bytes_of(kept["norm.0"]) == bytes_of(again["norm.0"]) == large[1]["norm.0"][2]
