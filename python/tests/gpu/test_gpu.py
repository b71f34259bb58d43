"""On a GPU, beside safetensors and transformers. Run by hand on a machine that has one, with the wheel installed:

python -m pytest -p no:cacheprovider python/tests/gpu
"""

import multiprocessing
import pathlib
import sys
import threading
import warnings

import pytest
import stoker
import torch
from safetensors.torch import load_file
from stoker.safetensors import load_file as stoker_load_file

DEVICE = "cuda:0"
ROOT = pathlib.Path(__file__).resolve().parents[3]


def same_bits(one, other):
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*flat)


def reference(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file, device=DEVICE))
    return tensors


def in_tensors():
    return stoker.device_memory(DEVICE)[2]


@pytest.mark.parametrize("device", [DEVICE, "cpu"])
def test_every_type_equals_safetensors(types_file, device):
    theirs, mine = load_file(types_file, device=device), stoker.load(types_file, device)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert str(mine[name].device) == device and same_bits(mine[name], tensor), name
        assert mine[name].is_contiguous()


@pytest.mark.parametrize("device", [DEVICE, "cpu"])
def test_a_large_model_equals_safetensors(large, device):
    theirs, mine = reference(large), stoker.load(large, device)
    assert mine.keys() == theirs.keys()
    assert all(same_bits(mine[name].to(DEVICE), tensor) for name, tensor in theirs.items())
    drop_in = stoker_load_file(large / "model-00001-of-00002.safetensors", device)
    assert all(same_bits(tensor.to(DEVICE), theirs[name]) for name, tensor in drop_in.items())


def test_memory_goes_with_the_last_tensor_in_it(large):
    before, free = in_tensors(), torch.cuda.mem_get_info(0)[0]
    mine = stoker.load(large)
    whole = in_tensors() - before
    assert 1.2e9 < whole < 1.4e9 and torch.cuda.mem_get_info(0)[0] <= free - whole
    # Work that is queued goes on with what it was given.
    total = sum(tensor.float().sum() for tensor in mine.values())
    for shard in (0, 1):
        for i in range(18):
            del mine[f"layer.{shard}.{i}"]
        assert in_tensors() - before <= whole * (1 - shard) / 2 + 3 * (64 << 20)
    assert torch.isfinite(total)
    mine.clear()
    assert in_tensors() == before


def test_memory_goes_while_the_rest_is_on_its_way(large):
    before, held = in_tensors(), []
    for _, tensor in stoker.iter_load(large):
        assert torch.isfinite(tensor.float().sum())
        del tensor
        held.append(in_tensors() - before)
    # Two granules may be shared with a tensor that has been taken with it, or is still to come.
    assert held[0] > 1e9 and held[-2] <= 4 * (64 << 20), held
    assert in_tensors() == before


def test_a_nodes_copy_is_shared():
    """Needs `stoker` itself: target/debug/stoker, or STOKER_TEST_BINARY."""
    sys.path.insert(0, str(ROOT / "tests/python"))
    from stoker_server import Server

    tiny = ROOT / "tests/data/tiny-llama"
    mine = stoker.load(tiny, DEVICE)
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "temperature": 0, "seed": 1}
    config = f'[models.tiny]\npath = "{tiny}"\ncontext = 64\n'
    with Server(config, ("--devices", DEVICE, "--dram", "256MiB")) as server:
        node = pathlib.Path(server.environment["XDG_RUNTIME_DIR"]) / "stoker"
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            theirs = stoker.load("tiny", DEVICE, node=node, shared=True)
        read_only = not any(issubclass(warning.category, RuntimeWarning) for warning in told)
        print("mapped without write access" if read_only else "mapped with write access: the driver refused")
        assert theirs.keys() == mine.keys() and all(same_bits(theirs[name], mine[name]) for name in mine)
        code, first, _ = server.post("/v1/completions", body)
        assert code == 200, first
        if not read_only:
            # What a program writes changes nothing that the node computes.
            next(iter(theirs.values())).zero_()
        theirs.clear()
        server.json("unload", "--all")
        code, again, _ = server.post("/v1/completions", body)
        assert code == 200 and again["choices"][0]["text"] == first["choices"][0]["text"]
        # With write access it is only to be had while nobody computes from it.
        server.json("unload", "--all")
        theirs = stoker.load("tiny", DEVICE, node=node, shared=True)
        server.kill()
        assert all(same_bits(theirs[name], mine[name]) for name in mine)


def test_a_view_keeps_its_memory(large):
    before = in_tensors()
    view = stoker.load(large, names=["norm.0"])["norm.0"][10:20]
    assert in_tensors() > before
    assert torch.isfinite(view.sum())
    del view
    assert in_tensors() == before


def test_dtype_and_in_place_operations(large):
    (half,) = stoker.load(large, names=["norm.0"], dtype=torch.float16).values()
    (mine,) = stoker.load(large, names=["norm.0"]).values()
    assert half.dtype == torch.float16 and torch.equal(half, mine.half())
    mine.zero_()
    (again,) = stoker.load(large, names=["norm.0"]).values()
    assert again.abs().sum() > 0


def test_tensors_land_in_the_files_order(large):
    theirs = reference(large)
    seen = []
    for name, tensor in stoker.iter_load(large):
        assert same_bits(tensor, theirs[name]), name
        seen.append(name)
    arrival = [name for file in sorted(large.glob("*.safetensors")) for name, _ in stoker.iter_load(file)]
    assert sorted(seen) == sorted(theirs) and seen == arrival


def test_threads(large):
    theirs, failures = reference(large), []

    def work():
        try:
            mine = stoker.load(large)
            torch.cuda.synchronize()
            assert all(same_bits(mine[name], tensor) for name, tensor in theirs.items())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def forked(path, queue):
    try:
        stoker.load(path)
    except stoker.ForkError as error:
        host = stoker.load(path, "cpu", names=["norm.0"])
        queue.put((str(error), float(host["norm.0"].abs().sum())))
    else:
        queue.put(("loaded", 0.0))


def test_a_forked_child_is_told_and_loads_to_host_memory(large):
    held = stoker.load(large, names=["norm.0"])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=forked, args=(large, queue))
    child.start()
    words, total = queue.get(timeout=120)
    child.join(60)
    assert "spawn" in words and total > 0 and child.exitcode == 0
    assert held["norm.0"].abs().sum() > 0


def test_too_much_is_refused_with_numbers(tmp_path):
    total = stoker.device_memory(DEVICE)[0]
    path = tmp_path / "huge.safetensors"
    header = f'{{"a":{{"dtype":"U8","shape":[{total}],"data_offsets":[0,{total}]}}}}'.encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + total)
    before = in_tensors()
    with pytest.raises(stoker.OutOfMemoryError, match="needs .* free are"):
        stoker.load(path)
    assert in_tensors() == before


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-llama-bf16-sharded", "tiny-mistral"])
def test_a_transformers_model_is_transformers_own(model):
    transformers = pytest.importorskip("transformers")
    from stoker.transformers import from_pretrained

    path = ROOT / "tests/data" / model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, device_map={"": DEVICE}).eval()
    mine = from_pretrained(path, device=DEVICE).eval()
    assert type(mine) is type(theirs)
    mine_state, their_state = mine.state_dict(), theirs.state_dict()
    assert mine_state.keys() == their_state.keys()
    assert all(same_bits(mine_state[name], tensor) for name, tensor in their_state.items())
    mine_buffers, their_buffers = dict(mine.named_buffers()), dict(theirs.named_buffers())
    assert mine_buffers.keys() == their_buffers.keys()
    assert all(same_bits(mine_buffers[name], tensor) for name, tensor in their_buffers.items())
    assert not any(tensor.is_meta for tensor in (*mine.parameters(), *mine.buffers()))
    tied = lambda m: m.get_input_embeddings().weight is m.get_output_embeddings().weight  # noqa: E731
    assert tied(mine) == tied(theirs)
    assert mine.generation_config.to_dict() == theirs.generation_config.to_dict()
    ids = torch.arange(1, 33, device=DEVICE).reshape(1, -1)
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, theirs(ids).logits)


def test_tied_weights_and_own_buffers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from stoker.transformers import from_pretrained

    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=100, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": DEVICE}).eval()
    mine = from_pretrained(tmp_path, device=DEVICE).eval()
    assert mine.lm_head.weight.data_ptr() == mine.transformer.wte.weight.data_ptr()
    ids = torch.arange(1, 33, device=DEVICE).reshape(1, -1)
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, theirs(ids).logits)
