import json
import pathlib

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

DEVICE = "cuda:0"


def every_type():
    """A tensor of each type that PyTorch and safetensors have, a scalar, an empty one."""
    make = torch.Generator().manual_seed(1)
    bits = lambda n: torch.randint(0, 256, (n,), generator=make, dtype=torch.uint8)  # noqa: E731
    tensors = {}
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16",
                 "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "complex64"):  # fmt: skip
        dtype = getattr(torch, name)
        tensors[name] = bits(21 * dtype.itemsize).view(dtype).reshape(3, 7)
    tensors["bool"] = bits(9) > 127
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 4, dtype=torch.float16)
    return tensors


@pytest.fixture(scope="session")
def types_file(tmp_path_factory):
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("types") / "types.safetensors"
    save_file(every_type(), path, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """1.2 GB of random bf16 in two shards with an index."""
    from safetensors.torch import save_file

    folder = pathlib.Path(tmp_path_factory.mktemp("large"))
    make = torch.Generator(device=DEVICE).manual_seed(2)
    weights = {}
    for shard in range(2):
        name = f"model-{shard + 1:05}-of-00002.safetensors"
        tensors = {
            f"layer.{shard}.{i}": torch.randn(4096, 4096, generator=make, device=DEVICE).bfloat16().cpu()
            for i in range(18)
        }
        tensors[f"norm.{shard}"] = torch.randn(4096, generator=make, device=DEVICE).cpu()
        save_file(tensors, folder / name)
        weights.update(dict.fromkeys(tensors, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return folder
